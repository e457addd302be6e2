"""The one reader of texts: JSON lines, plain or compressed, parquet and Hugging Face datasets.

One rule for what cannot be used. The first record of a source has to be usable: else the source is
not what it was taken for, and is refused. Later ones are reported with their line, skipped and
counted (`usable`). Of a benchmark, whose numbers would be of another one without them, every such
record is refused (`read_objects`). Binary files and files that are cut short are always refused.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from vllm_longspec.chat import ChatError, Message, Spans, chat_answers, chat_text
from vllm_longspec.errors import LongSpecError, reason

if TYPE_CHECKING:  # it takes seconds, and sources are checked before
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

DOCUMENTS_PER_CALL = 512
HUB = "hf:"
MAX_REPORTS = 20
FORMS = (
    '"text", {"text": ...}, {"prompt": ..., "completion": ...}, {"messages": [...]} or a record of '
    "sail/longspec-data"
)
# Records of sail/longspec-data: what is asked, what is answered, and the words around both.
ASKED: tuple[tuple[str, str, str, str], ...] = (
    ("article", "abstract", "Please summarize the following article: {}", "{}"),
    (
        "report", "summary",
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{}\n\nNow, write a one-page summary of the report.", "Summary:{}",
    ),
    (
        "document", "summary",
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{}"
        "\n\nNow, write a one-page summary of all the news.", "Summary:{}",
    ),
    (
        "transcript", "summary",
        "You are given a meeting transcript. Write a summary of the transcript. \n\nTranscript:\n"
        "{}\n\nNow, write a summary of the transcript.", "Summary:{}",
    ),
    (
        "prefix", "suffix",
        "Please complete the code given below. \n\nCode:\n{}\n\nNow, complete the code given.",
        "{}",
    ),
    ("problem", "qwq", "{}", "{}"),
)  # fmt: skip
SOURCES = "JSON lines (plain, .xz, .gz, .bz2 or .zst), .parquet or hf:NAME"
OPENED_BY: dict[str, Callable[..., Any]] = {
    ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open,
}  # fmt: skip


class BadRecordError(ValueError):
    """Why a record cannot be used, as the end of a sentence."""


@dataclass(frozen=True)
class Document:
    """A text to read, learn from or continue."""

    text: str
    answers: Spans | None = None  # the characters to learn; None: all
    kind: str | None = None


@dataclass
class Skipped:
    """The records of one source that could not be used, reported on stderr as they come."""

    source: str
    count: int = 0

    def report(self, where: str, why: str) -> None:
        self.count += 1
        if self.count <= MAX_REPORTS:
            print(f"data: {where} skipped: {why}", file=sys.stderr)

    def close(self) -> None:
        if self.count:
            records = "1 record was" if self.count == 1 else f"{self.count:,} records were"
            print(f"data: {records} skipped in {self.source}", file=sys.stderr)


def read_documents(
    source: Path | str,
    tokenizer: "PreTrainedTokenizerBase",
    skipped: Skipped | None = None,
    only_answers: bool = False,
) -> Iterator[Document]:
    """The texts of a source: strings, or objects with `text`, with `prompt` and `completion`, or
    with `messages`, which `tokenizer`'s chat template makes a text of; and the records of the
    paper's data (`messages_of`).

    `only_answers`: completions and the assistant's turns are to be learned, and a text that has
    none cannot be used. Raises LongSpecError for a source that cannot be read.
    """
    return usable(source, lambda record: document(record, tokenizer, only_answers), skipped)


def usable(
    source: Path | str, parse: Callable[[Any], T], skipped: Skipped | None = None
) -> Iterator[T]:
    """What `parse` makes of the records of which it raises no BadRecordError."""
    skipped = skipped or Skipped(str(source))
    first = True
    for where, record in read_records(source):
        try:
            if isinstance(record, BadRecordError):
                raise record
            parsed = parse(record)
        except BadRecordError as error:
            if first:
                raise LongSpecError(
                    f"data: {where}, the first record, cannot be used: {error}; fix it or give "
                    "other data"
                ) from error
            skipped.report(where, str(error))
        else:
            first = False
            yield parsed
    skipped.close()


def document(
    record: Any, tokenizer: "PreTrainedTokenizerBase", only_answers: bool = False
) -> Document:
    """Raises BadRecordError for a record without text."""
    content = content_of(record)
    answers: Spans | None = None
    if isinstance(content, str):
        text = content
        if only_answers:
            raise BadRecordError(
                "it is plain text, in which no answers are marked; train_on: answers needs "
                "messages, or prompt and completion"
            )
    elif isinstance(content, tuple):
        prompt, completion = content
        text = prompt + completion
        answers = ((len(prompt), len(text)),) if only_answers else None
    else:
        try:
            if only_answers:
                text, answers = chat_answers(content, tokenizer)
            else:
                text = chat_text(content, tokenizer)
        except ChatError as error:
            raise BadRecordError(str(error)) from error
    check_unicode(text)
    kind = record.get("kind") if isinstance(record, dict) else None
    return Document(text, answers, kind)


def content_of(record: Any) -> str | tuple[str, str] | list[Message]:
    """A text, a prompt with its completion, or messages. Raises BadRecordError."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise BadRecordError(f"it is none of {FORMS}")
    if isinstance(record.get("text"), str):
        return record["text"]
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    messages = messages_of(record)
    if messages is None and is_target(record):
        return record["target"]
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(f"it is none of {FORMS}")
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    ):
        raise BadRecordError("one of its messages has no role or no content")
    # Parquet has a value for every field that any message has.
    return [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]


def messages_of(record: dict[str, Any]) -> Any:
    """Of a record with `messages`, or of one of sail/longspec-data by its shape: `conversation`, or
    a pair of ASKED, of which an article may be a list. None: of neither."""
    for name in ("messages", "conversation"):
        if record.get(name) is not None:
            return record[name]
    for asked, answered, question, answer in ASKED:
        said = [
            [part] if isinstance(part, str) else part
            for part in (record.get(asked), record.get(answered))
        ]
        if all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in said):
            turns = [
                (("user", question.format(a)), ("assistant", answer.format(b)))
                for a, b in zip(*said, strict=False)
            ]
            return [{"role": role, "content": text} for turn in turns for role, text in turn]
    return None


def is_target(record: dict[str, Any]) -> bool:
    """Whether a text is under `target`, as the paper's trainer has it, and nothing but names of
    something beside it: where there is a `source` text, too, the target alone is half a record."""
    others = [value for name, value in record.items() if name != "target"]
    texts = [value for value in others if isinstance(value, str | list | dict)]
    named = all(isinstance(value, str) and len(value.split()) < 2 for value in texts)
    return isinstance(record.get("target"), str) and named


def check_unicode(text: str) -> None:
    """JSON can write half of a character, which no tokenizer and no server takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"its text is not Unicode ({error.reason})") from error


def check_source(source: Path | str) -> None:
    """Raises LongSpecError for a file that is not there; datasets are looked up when read."""
    if not str(source).startswith(HUB) and not Path(source).is_file():
        raise LongSpecError(f"data: {source} is not a file; give {SOURCES}")


def read_records(source: Path | str) -> Iterator[tuple[str, Any]]:
    """(where, record) of each record of a source, whatever it is; where a line is not JSON, a
    BadRecordError stands in the record's place. Raises LongSpecError."""
    if str(source).startswith(HUB):
        return dataset_rows(str(source))
    check_source(source)
    path = Path(source)
    return parquet_rows(path) if path.suffix.lower() == ".parquet" else json_lines(path)


def read_objects(source: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a benchmark's records. Raises LongSpecError for one that is no object."""
    for where, record in read_records(source):
        if isinstance(record, BadRecordError):
            why = str(record).removeprefix("it ")
            raise LongSpecError(f"data: {where} {why}; fix or remove it") from record
        if not isinstance(record, dict):
            raise LongSpecError(f"data: {where} is no JSON object; fix or remove it")
        yield where, record


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines are read here, not by `datasets`: it wants one schema for a whole file, and does not
    say which line is bad."""
    lines = opened(path)
    number = 0
    with lines:
        while True:
            where = f"line {number + 1} of {path}"
            try:
                line = lines.readline()
            except Exception as error:  # each compression raises its own
                raise LongSpecError(
                    f"data: {where} cannot be read ({reason(error)}); the file is cut short or "
                    "damaged, copy it again"
                ) from error
            if not line:
                return
            number += 1
            if b"\0" in line:
                raise LongSpecError(
                    f"data: {where} holds zero bytes; the file is binary or damaged, give {SOURCES}"
                )
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if number > 1 and not line.endswith(b"\n"):
                    raise LongSpecError(
                        f"data: {where}, its last, is cut short; copy the file again or remove it"
                    ) from error
                record = BadRecordError(f"it is not JSON ({reason(error)})")
            yield where, record


def opened(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    open_file = OPENED_BY.get(suffix, open)
    if suffix == ".zst":
        open_file = opened_zstandard
    try:
        return open_file(path, "rb")
    except ImportError:
        raise LongSpecError(
            f"data: reading {path} needs pyarrow; pip install pyarrow, or unpack it"
        ) from None
    except OSError as error:
        raise LongSpecError(
            f"data: {path} cannot be read ({error.strerror}); make it readable"
        ) from error


def opened_zstandard(path: Path, mode: str) -> IO[bytes]:
    """By pyarrow, which reads on behind the first frame and tells where a file is cut short; the
    package zstandard does neither."""
    from pyarrow import input_stream

    return io.BufferedReader(input_stream(path, compression="zstd"))


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise LongSpecError(
            f"data: reading {path} needs pyarrow; pip install pyarrow, or give JSON lines"
        ) from None
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(DOCUMENTS_PER_CALL):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {path}", row
    except (ArrowException, OSError) as error:
        where = f"behind row {number} " if number else ""
        raise LongSpecError(
            f"data: {path} is not parquet {where}({reason(error)}); fetch it again"
        ) from error


def load_tables(source: str) -> list[Any]:
    """hf:NAME, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT; the split is `train` if left out. `#` may
    stand in place of a colon, and a split may be a slice, train[:100]. hf:NAME/FILES takes these
    files only. A dataset whose files have different columns is a table for each file."""
    whole, *parts = re.split(r"[:#](?![^\[]*\])", source.removeprefix(HUB))
    name, files = named_files(whole)
    split = parts[-1] if parts else "train"
    try:
        import datasets
    except ImportError as error:
        raise LongSpecError(
            f"data: {source} needs the package datasets; pip install vllm-longspec[train]"
        ) from error
    chosen = {"data_files": {split.partition("[")[0]: files}} if files else {}
    try:
        try:
            return [datasets.load_dataset(name, *parts[:-1], split=split, **chosen)]
        except datasets.exceptions.DatasetGenerationError:
            builder = datasets.load_dataset_builder(name, *parts[:-1], **chosen)
            if split not in builder.config.data_files:
                raise ValueError(f"its files have different columns, and none is {split}") from None
            each = builder.config.data_files[split]
            if len(each) < 2:
                raise
            return [
                datasets.load_dataset(name, data_files={split: one}, split=split) for one in each
            ]
    except Exception as error:  # each backend of the library raises its own
        cause: Any = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            cause = error.__cause__ or error  # itself it says no more than that
        raise LongSpecError(
            f"data: {source} cannot be loaded ({reason(cause)}); give hf:NAME, hf:NAME/FILE, "
            "hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT"
        ) from error


def named_files(whole: str) -> tuple[str, str]:
    """A folder or OWNER/NAME, and what stands behind it: files in it, which may have wildcards."""
    path = Path(whole)
    if path.is_absolute() or whole.startswith(".") or path.exists():
        folder = next((place for place in (path, path.parent) if place.is_dir()), path)
    else:
        folder = Path(*path.parts[:2])
    files = path.relative_to(folder).as_posix()
    return str(folder), "" if files == "." else files


def dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    rows = (row for table in load_tables(source) for row in table)
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {source}", row


def string_field(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise LongSpecError(f'data: {where} has no text under "{field}"; fix or remove it')
    return value


def whole_number_field(record: Mapping[str, Any], field: str, where: str) -> int:
    value = record.get(field)
    if not isinstance(value, int):
        raise LongSpecError(f'data: {where} has no whole number under "{field}"; fix or remove it')
    return value
