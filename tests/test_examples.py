"""The examples: their help, and their parts that need no engine; test_server.py has one."""

import importlib
import io
import json
import sys
import time
from pathlib import Path

import pytest
import typer
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import chat  # noqa: E402
import offline_batch  # noqa: E402
import served  # noqa: E402
import train_your_own  # noqa: E402

from vllm_longspec.config import LongSpecError  # noqa: E402
from vllm_longspec.eval.server import Counters  # noqa: E402

PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "served")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module(program).main
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        main() if program == "demo" else typer.run(main)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "sage: " in shown and "--target" in shown


@given(st.text(max_size=400), st.integers(1, 60), st.integers(1, 7))
def test_fit_keeps_a_beginning_within_the_budget(text: str, budget: int, per_token: int) -> None:
    def count(part: str) -> int:
        return -(-len(part) // per_token)

    kept = chat.fit(text, budget, count)
    assert text.startswith(kept) and count(kept) <= budget
    if count(text) <= budget:
        assert kept == text
    else:
        assert len(kept) >= 0.8 * budget * per_token - 2 * per_token - 2


def test_an_answer_counts_verifications_not_the_prompt_s_token() -> None:
    start = time.perf_counter()
    answer = chat.Answer(prompt_tokens=900, asked=start)
    console = Console(file=io.StringIO(), width=160, height=10)
    console.print(answer.live(console))  # before anything has come
    answer.events = [(start + 1, 1, "def"), (start + 2, 4, " main():\n"), (start + 3, 2, "  x")]
    assert answer.tokens == 7 and answer.text == "def main():\n  x"
    assert answer.tokens_per_second() == pytest.approx(3.0)  # six in two seconds
    console.file = io.StringIO()
    console.print(answer.live(console))
    shown = console.file.getvalue()
    assert "3.0 tokens/s" in shown and "3.00 tokens a verification" in shown
    assert "4 accepted of 7" in shown and "+2" in shown and "first after 1.0 s" in shown


def test_a_long_answer_shows_its_last_lines() -> None:
    answer = chat.Answer(1, 0.0, [(float(i), 1, f"line {i}\n") for i in range(40)])
    console = Console(file=io.StringIO(), width=80, height=12)
    console.print(answer.live(console))
    shown = console.file.getvalue()
    assert "line 39" in shown and "line 20" not in shown and len(shown.splitlines()) <= 12


def test_totals() -> None:
    assert "mean acceptance length 3.50" in chat.totals(Counters(2, [1, 0]), Counters(6, [7, 4]))
    assert chat.totals(Counters(2, [1]), Counters(2, [1])) == "nothing was verified"


def test_flags_are_what_vllm_serve_takes() -> None:
    assert served.flags({"max_num_seqs": 4, "enforce_eager": True, "dtype": "float32"}) == [
        "--max-num-seqs", "4", "--enforce-eager", "--dtype", "float32"
    ]  # fmt: skip


def test_batch_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "text": "b"}\n{"text": "c"}\n')
    assert offline_batch.read_prompts(file) == ["a", "c"]
    file.write_text('{"prompt": "a"}\n{"words": "c"}\n')
    with pytest.raises(LongSpecError, match="2"):
        offline_batch.read_prompts(file)
    prompts = offline_batch.python_prompts()
    assert len(prompts) == len(set(prompts)) == 12


def test_texts_are_split_whole(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 50)
    (tmp_path / "copy.txt").write_text("text 3 " * 50)
    (tmp_path / "blank.md").write_text("\n")
    (tmp_path / "latin.md").write_bytes("gr\xfcn".encode("latin-1"))
    (tmp_path / "other.bin").write_text("not read")
    texts = train_your_own.read_texts(tmp_path, [".txt", ".md"])
    assert len(texts) == 21 and "grn" in texts
    train, held_out = train_your_own.split(texts, 0.1)
    assert sorted(train + held_out) == sorted(texts) and 2 <= len(held_out) <= 4
    assert train_your_own.split(texts, 0.1) == (train, held_out)
    assert [len(part) for part in train_your_own.split(["a", "b" * 99], 0.9)] == [1, 1]
    written = tmp_path / "train.jsonl"
    train_your_own.write_lines(train, written)
    assert [json.loads(line)["text"] for line in written.read_text().splitlines()] == train


def test_a_folder_without_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("import os\n")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train_your_own.main)
    done = CliRunner().invoke(app, [str(tmp_path), "--output", str(tmp_path / "draft")])
    assert done.exit_code == 2 and "holds 1 texts" in done.stderr and "--suffix" in done.stderr
    assert not (tmp_path / "draft").exists()
