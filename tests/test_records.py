"""The one reader: forms, files, what is skipped and what is refused."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import DRAFT, TARGET, documents, tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.draft.trim import count_tokens
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.acceptance import held_out_prompts
from vllm_longspec.records import (
    BadRecordError,
    Skipped,
    content_of,
    named_files,
    read_documents,
    read_objects,
)
from vllm_longspec.train.tokens import first_token, token_ids

MESSAGES = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]
FORMS: list[Any] = [
    "one", {"text": "two", "kind": "code"}, {"prompt": "a ", "completion": "b"},
    {"messages": MESSAGES},
]  # fmt: skip


def texts(path: Path | str) -> list[str]:
    return [document.text for document in read_documents(path, tokenizer())]


def as_lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_each_form_gives_its_text_and_a_bad_line_is_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {4: (b'{"txt": 1}', "none of"), 5: (b'{"text": "cut', "not JSON"),
           7: (b'{"prompt": "a"}', "none of"), 8: (b'{"messages": [1]}', "no role"),
           9: (b"\xff[", "not JSON"), 10: (b"[" * 9000, "not JSON"),
           11: (b'"half \\ud83d"', "not Unicode")}  # fmt: skip
    one, two, pair, chat = as_lines(FORMS).splitlines()
    lines = [one, two, b"", *(bad[i][0] for i in (4, 5)), pair, *(bad[i][0] for i in range(7, 12))]
    path = tmp_path / "mixed.jsonl.xz"
    path.write_bytes(lzma.compress(b"\n".join([*lines, chat, b""])))
    skipped = Skipped(str(path))
    found = list(read_documents(path, tokenizer(), skipped))
    rendered = tokenizer().apply_chat_template(MESSAGES, tokenize=False)
    assert [document.text for document in found] == ["one", "two", "a b", rendered]
    assert [document.kind for document in found] == [None, "code", None, None]
    said = capsys.readouterr().err.splitlines()
    assert skipped.count == 7 and said[-1] == f"data: 7 records were skipped in {path}"
    for (line, (_, why)), sentence in zip(bad.items(), said, strict=False):
        assert sentence.startswith(f"data: line {line} of {path} skipped: ") and why in sentence


def test_every_kind_of_file_is_read_alike(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    lines = as_lines(FORMS)
    packed = {"a.jsonl": lines, "a.XZ": lzma.compress(lines), "a.jsonl.gz": gzip.compress(lines),
              "a.bz2": bz2.compress(lines)}  # fmt: skip
    expected = ["one", "two", "a b", tokenizer().apply_chat_template(MESSAGES, tokenize=False)]
    for name, content in packed.items():
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name) == expected, name
    # Each row has a value for every column, and each message for every field.
    more = [*MESSAGES, {"role": "user", "content": "And?", "name": "me"}]
    columns = dict.fromkeys(("text", "kind", "prompt", "completion", "messages"))
    rows = [columns | record for record in (*FORMS[1:3], {"messages": more})]
    write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    found = texts(tmp_path / "a.parquet")
    assert found[:2] == expected[1:3] and found[2].startswith(expected[3].rstrip())
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard(lines))
    assert texts(tmp_path / "a.jsonl.zst") == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(LongSpecError, match=r"reading .*a\.jsonl\.zst needs pyarrow; pip"):
            texts(tmp_path / "a.jsonl.zst")


def zstandard(content: bytes) -> bytes:
    from pyarrow import BufferOutputStream, CompressedOutputStream

    sink = BufferOutputStream()
    with CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def test_zstandard(tmp_path: Path) -> None:
    """Of two frames, as large files have them."""
    lines = [zstandard(as_lines([text])) for text in ("one", "two")]
    (tmp_path / "a.zst").write_bytes(b"".join(lines))
    assert texts(tmp_path / "a.zst") == ["one", "two"]


def test_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_bytes(as_lines([{"text": split}, {"text": "two"}]))
    assert texts(f"hf:{folder}") == ["train", "two"]
    for source in (f"hf:{folder}:test", f"hf:{folder}#test", f"hf:{folder}:default:test"):
        assert texts(source) == ["test", "two"]
    assert texts(f"hf:{folder}:train[:1]") == ["train"]
    with pytest.raises(LongSpecError, match=r"hf:.*:nosplit cannot be loaded"):
        texts(f"hf:{folder}:nosplit")


# Of sail/longspec-data, each form: a record, and its text or what is asked and answered.
GOV = "You are given a report by a government agency. Write a one-page summary of the report."
NEWS = "You are given several news passages. Write a one-page summary of all news. "
MEETING = "You are given a meeting transcript. Write a summary of the transcript. "
LONGSPEC_DATA: dict[str, tuple[dict[str, Any], str | list[str]]] = {
    "book": ({"source": "book", "text": "It was."}, "It was."),
    "arxiv": (
        {"source": "arxiv", "article": "We show.", "abstract": "Shown."},
        ["Please summarize the following article: We show.", "Shown."],
    ),
    "arxivs": (
        {"source": "arxiv", "article": ["A.", "B."], "abstract": ["a", "b"]},
        ["Please summarize the following article: A.", "a",
         "Please summarize the following article: B.", "b"],
    ),
    "tulu-v2": (
        {"source": "tulu-v2", "conversation": [*MESSAGES, {"role": "user", "content": "And?"}]},
        ["Say hi.", "hi", "And?"],
    ),
    "gov-report": (
        {"source": "gov-report", "report": "Of {braces}.", "summary": "Few."},
        [f"{GOV}\n\nReport:\nOf {{braces}}.\n\nNow, write a one-page summary of the report.",
         "Summary:Few."],
    ),
    "multi-news": (
        {"source": "multi-news", "document": "Today.", "summary": "Now."},
        [f"{NEWS}\n\nNews:\nToday.\n\nNow, write a one-page summary of all the news.",
         "Summary:Now."],
    ),
    "meetingbank": (
        {"source": "meetingbank", "transcript": "Aye.", "summary": "Agreed."},
        [f"{MEETING}\n\nTranscript:\nAye.\n\nNow, write a summary of the transcript.",
         "Summary:Agreed."],
    ),
    "code": (
        {"source": "code", "prefix": "def f(", "suffix": "x): ..."},
        ["Please complete the code given below. \n\nCode:\ndef f(\n\nNow, complete the code given.",
         "x): ..."],
    ),
    "thought": ({"problem": "1 + 1?", "qwq": "So, 2."}, ["1 + 1?", "So, 2."]),
    "target": ({"index": 3, "source": "slimpajama", "target": "Once."}, "Once."),
}  # fmt: skip


@pytest.mark.parametrize("form", LONGSPEC_DATA)
def test_each_form_of_the_paper_s_data(form: str) -> None:
    record, expected = LONGSPEC_DATA[form]
    content = content_of(record | {"index": 7})
    if isinstance(content, str):
        assert content == expected
    else:
        assert [message["content"] for message in content] == expected
        roles = [message["role"] for message in content]
        assert roles == (["user", "assistant"] * 2)[: len(roles)]
    # As a table has it, with a column for every field of any record.
    every = dict.fromkeys(name for other, _ in LONGSPEC_DATA.values() for name in other)
    assert content_of(every | record) == content


@pytest.mark.parametrize(
    "record",
    [
        {"source": "Guten Tag!", "target": "Good day!"}, {"target": 3}, {"summary": "s"},
        {"target": "t", "parts": ["a"]}, {"article": ["a"]},
        {"article": [1], "abstract": ["x"]}, {"conversation": []}, {"prefix": "a", "summary": "b"},
    ],
    ids=str,
)  # fmt: skip
def test_what_resembles_a_form_is_refused(record: dict[str, Any]) -> None:
    """Half of a pair is not read for the whole."""
    with pytest.raises(BadRecordError, match="none of"):
        content_of(record)


def test_a_dataset_of_files_with_different_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the paper's: all of its files, or those that are named."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name in ("book", "arxivs", "code"):
        (folder / f"{name}.jsonl").write_bytes(as_lines([LONGSPEC_DATA[name][0]]))
    found = dict(enumerate(texts(f"hf:{folder}")))
    assert len(found) == 3 and "It was." in found.values()
    assert texts(f"hf:{folder}/book.jsonl") == texts(f"hf:{folder}/b*k.jsonl") == ["It was."]
    tokens, lengths = token_ids((f"hf:{folder}",), tokenizer())
    assert len(lengths) == 3 and tokens.shape == (lengths.sum(),)
    with pytest.raises(LongSpecError, match=r"have different columns, and none is test\); give hf"):
        texts(f"hf:{folder}:test")
    assert named_files("sail/longspec-data") == ("sail/longspec-data", "")
    assert named_files("sail/longspec-data/a/b.jsonl") == ("sail/longspec-data", "a/b.jsonl")


WHOLE = as_lines(["word " * 50] * 40)
REFUSED: dict[str, tuple[bytes, str]] = {
    "cut.jsonl.xz": (lzma.compress(WHOLE)[:-20], "line 41 of .* cut short or damaged"),
    "cut.jsonl.zst": (zstandard(WHOLE)[:-20], "line .* cut short or damaged"),
    "wrong.jsonl.zst": (WHOLE, "line 1 of .* cannot be read"),
    "cut.jsonl.gz": (gzip.compress(WHOLE)[:-20], "line .* cut short or damaged"),
    "wrong.jsonl.gz": (WHOLE, "line 1 of .* cannot be read"),
    "packed.jsonl": (gzip.compress(WHOLE), "line 1 of .* binary|line 1 of .* not JSON"),
    "binary.jsonl": (b'"one"\n\x80\x00\x05\n', "line 2 of .* holds zero bytes"),
    "utf16.jsonl": ('"one"\n'.encode("utf-16"), "line 1 of .* binary or damaged"),
    "cut.jsonl": (WHOLE[:-20], "line 40 of .*, its last, is cut short"),
    "source.py": (b"import os\nimport sys\n", "line 1 of .*, the first record, .* not JSON"),
    "array.json": (b"[\n  1\n]\n", "line 1 of .*, the first record, .* not JSON"),
    "form.jsonl": (b'{"txt": "a"}\n{"text": "b"}\n', "the first record, .* none of"),
    "text.parquet": (b"no parquet", "is not parquet"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    content, sentence = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LongSpecError, match=sentence) as raised:
        texts(tmp_path / name)
    assert str(raised.value).startswith("data: ") and "\n" not in str(raised.value)


def test_a_benchmark_is_refused_for_any_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, sentence in (("{", "not JSON"), ("[]", "no JSON object")):
        path.write_text('{"a": 1}\n\n' + line + "\n{}\n")
        with pytest.raises(LongSpecError, match=f"line 3 of .* is {sentence}.*; fix or remove it"):
            list(read_objects(path))


def test_all_that_read_text_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation begins with one <s>, wherever it is written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chat = AutoTokenizer.from_pretrained(TARGET)
    chat.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    marked = [tokens for tokens in (chat("a")["input_ids"],) if tokens[0] == chat.bos_token_id]
    assert (first_token(chat) is None) == (not marked)
    text = max(documents(), key=len)[:9000]
    path = tmp_path / "a.jsonl.gz"
    messages = [MESSAGES[0], {"role": "assistant", "content": text}]
    path.write_bytes(gzip.compress(as_lines([{"messages": messages, "kind": "code"}])))
    tokens, _ = token_ids((str(path),), chat)
    assert tokens.tolist().count(chat.bos_token_id) == 1 and tokens[0] == chat.bos_token_id
    counts = count_tokens((d.text for d in read_documents(path, chat)), chat, 4096)
    assert counts.sum() == len(tokens) and counts[chat.bos_token_id] == 1
    (prompt,) = held_out_prompts(path, chat, 1, 500, 500, max_tokens=8)
    assert prompt == tokens[:500].tolist()


def test_commands_say_what_is_wrong_with_the_data(tmp_path: Path) -> None:
    data = tmp_path / "binary.jsonl"
    data.write_bytes(b"\0\0\0")
    for command in (["train"], ["trim-head", "--draft", str(DRAFT), "--draft-vocab-size", "8"]):
        done = CliRunner().invoke(
            app, [*command, "--target", str(TARGET), "--data", str(data), "--output",
                  str(tmp_path / "out")], catch_exceptions=False,
        )  # fmt: skip
        assert done.exit_code == 2 and f"line 1 of {data} holds zero bytes" in done.stderr
        assert not (tmp_path / "out").exists()
