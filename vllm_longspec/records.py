"""Reading JSON lines, parquet and Hugging Face datasets.

Of texts to train on, what cannot be used is reported and counted (`read_documents`); of a
benchmark, the first bad record is an error that names line and field (`read_json_lines`).
"""

import json
import lzma
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_longspec.config import LongSpecError, reason

DOCUMENTS_PER_CALL = 512
HUB = "hf:"
SPLIT = "#"
MAX_REPORTS = 20
FORMATS = '"text", {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'


class BadRecordError(ValueError):
    """Why a record gives no text."""


@dataclass
class Skipped:
    """The records of one source that gave no text, reported on stderr as they come."""

    source: str
    count: int = 0

    def report(self, number: int, why: str) -> None:
        self.count += 1
        if self.count <= MAX_REPORTS:
            print(f"data: line {number} of {self.source} skipped: {why}", file=sys.stderr)

    def close(self) -> None:
        if self.count:
            lines = "1 line was" if self.count == 1 else f"{self.count:,} lines were"
            print(f"data: {lines} skipped in {self.source}", file=sys.stderr)


def read_documents(
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    skipped: Skipped | None = None,
) -> Iterator[str]:
    """The texts of JSON lines, `.xz` or plain, or of a dataset, "hf:NAME" or "hf:NAME#SPLIT".

    A record is a string or an object with `text`, with `prompt` and `completion`, or with
    `messages`, which `tokenizer`'s chat template makes a text of. Records that are none of these
    are reported on stderr with their number, skipped, and counted at the end. Raises LongSpecError
    for a source that cannot be read.
    """
    skipped = skipped or Skipped(str(source))
    hub = str(source).startswith(HUB)
    for number, record in _dataset(str(source)) if hub else decoded_lines(Path(source)):
        try:
            yield record_text(record, tokenizer)
        except BadRecordError as error:
            skipped.report(number, str(error))
    skipped.close()


def decoded_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and record of each line that is not empty, of a file that is plain or .xz; an
    undecodable line is an exception in the record's place. Raises LongSpecError for a file that is
    missing or cut short."""
    if not path.is_file():
        raise LongSpecError(f"data: {path} is not a file; give JSON lines, plain or .xz")
    opened = lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb")
    with opened as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        yield number, BadRecordError(f"it is not JSON ({error})")
        except (lzma.LZMAError, EOFError) as error:
            raise LongSpecError(
                f"data: {path} is not a whole .xz file ({error}); copy it again"
            ) from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line that is not empty; the file plain or .xz.

    Raises LongSpecError for a missing file and for a line that is no JSON object.
    """
    for number, record in decoded_lines(path):
        where = f"line {number} of {path}"
        if isinstance(record, BadRecordError):
            why = str(record).removeprefix("it ")
            raise LongSpecError(f"data: {where} {why}; fix or remove it")
        if not isinstance(record, dict):
            raise LongSpecError(f"data: {where} is no JSON object; fix or remove it")
        yield where, record


def load_dataset(source: str) -> Any:
    name, _, split = source.removeprefix(HUB).partition(SPLIT)
    try:
        import datasets
    except ImportError as error:
        raise LongSpecError(
            f"data: {source} needs the package datasets; pip install vllm-longspec[train]"
        ) from error
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # each backend of the library raises its own
        raise LongSpecError(
            f"data: {source} cannot be loaded ({reason(error)}); give hf:NAME or hf:NAME#SPLIT"
        ) from error


def _dataset(source: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(load_dataset(source), start=1)


def record_text(record: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Raises BadRecordError for a record without text."""
    if isinstance(record, BadRecordError):
        raise record
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise BadRecordError(f"it is none of {FORMATS}")
    if isinstance(record.get("text"), str):
        return record["text"]
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(f"it is none of {FORMATS}")
    if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise BadRecordError("one of its messages has no role or no content")
    if tokenizer is None or not tokenizer.chat_template:
        raise BadRecordError("the target has no chat template for its messages")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template may raise anything
        raise BadRecordError(f"the chat template refuses its messages ({error})") from error


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row. Raises LongSpecError where pyarrow is missing or cannot read it."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise LongSpecError(
            f"data: reading {path} needs pyarrow; pip install pyarrow, or give JSON lines"
        ) from None
    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise LongSpecError(f"data: {path} is not parquet ({error}); fetch it again") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {path}", row


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
