"""Prompts, records, tables and mistakes of `vllm-longspec eval`; test_server.py runs it."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import DRAFT, TARGET, documents, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, generate_latest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.endpoint import base_url
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval import server
from vllm_longspec.eval.acceptance import Acceptance, held_out_prompts, proposer_configs
from vllm_longspec.eval.aime import PAPER_SYSTEM, aime_prompts, problem_file
from vllm_longspec.eval.benchmark import (
    LONGSPEC,
    PLAIN,
    Comparison,
    benchmark_report,
    compare,
    first_difference,
    room_for,
    write_results,
)
from vllm_longspec.eval.longbench import (
    RESERVED,
    TEMPLATES,
    longbench_prompts,
    paper_prompts,
    task_files,
)
from vllm_longspec.eval.paper import FRAMES, LENGTHS, LONGBENCH
from vllm_longspec.eval.report import comparison_plot, comparison_table

VICUNA = "/models/vicuna-7b-v1.5-16k"


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def longbench_records(count: int, characters: int) -> list[dict[str, Any]]:
    """Text cut to LongBench's format; braces in it are text, not fields of a template."""
    return [
        {
            "context": documents()[i][1000 : 1000 + characters * (i + 1)] + "{context} {nothing}",
            "input": f"def question_{i}(",
            "answers": [""],
            "length": characters,
            "dataset": "cut",
            "_id": str(i),
        }
        for i in range(count)
    ]


def chat_tokenizer() -> Any:
    marked = AutoTokenizer.from_pretrained(TARGET)
    marked.chat_template = "BEGIN{{ messages[0]['content'] }}END"
    return marked


def test_held_out_prompts_differ_and_leave_room_for_the_output(tmp_path: Path) -> None:
    text = max(documents(), key=len)[:40_000]
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    lines = [{"kind": "code", "text": text}, {"kind": "book", "text": text}]
    path = write_lines(tmp_path / "held-out.jsonl", lines)
    length = len(ids) - 20
    prompts = held_out_prompts(path, tokenizer(), 5, length, length, max_tokens=10)
    starts = [next(s for s in range(21) if ids[s : s + length] == p) for p in prompts]
    assert len(set(starts)) == 5 and max(starts) <= 10
    for count, longest, named in ((12, length, "12 different"), (1, len(ids), f"{len(ids) + 10}")):
        with pytest.raises(LongSpecError, match=named):
            held_out_prompts(path, tokenizer(), count, longest, longest, max_tokens=10)


def test_proposers_are_chosen_by_name() -> None:
    assert list(proposer_configs("d", ["ngram", "tree"], [68, 5], ["4 16 16 16 16"])) == [
        "vLLM n-gram, 4 tokens", "LongSpec, 68 nodes of 4 16 16 16 16",
        "LongSpec, 5 nodes of 4 16 16 16 16",
    ]  # fmt: skip
    with pytest.raises(LongSpecError, match="'beam' is none of tree, chain, ngram"):
        proposer_configs("d", ["beam"], [68], ["4 16 16 16 16"])


def test_longbench_prompts_are_the_templates_filled(tmp_path: Path) -> None:
    records = longbench_records(2, 500)
    for task in TEMPLATES:
        write_lines(tmp_path / f"{task}.jsonl", records)
    files = task_files(tmp_path, list(TEMPLATES))
    wide: dict[str, Any] = {"shortest": 1, "longest": 10**6}
    prompts = longbench_prompts(files, chat_tokenizer(), 2048, chat=True, **wide)
    for task, together in prompts.items():
        for record, ids in zip(records, together, strict=True):
            text = tokenizer().decode(ids, skip_special_tokens=True)
            assert record["context"] in text
            assert (record["input"] in text) == (task in ("qmsum", "repobench-p"))
            if task in ("lcc", "repobench-p"):
                assert text.startswith("Please complete the code given below. \n")
                assert text.endswith("Next line of code:\n")
            else:
                assert text.startswith("BEGINYou are given") and text.endswith(":END")
    plain = longbench_prompts(files, tokenizer(), 2048, chat=False, **wide)
    assert plain["lcc"] == prompts["lcc"]
    assert tokenizer().decode(plain["qmsum"][0]).startswith("You are given a meeting transcript")


def test_the_paper_s_prompts(tmp_path: Path) -> None:
    """Its authors' frame around LongBench's questions, whose last words begin the answer."""
    (record,) = longbench_records(1, 500)
    files = {task: write_lines(tmp_path / f"{task}.jsonl", [record]) for task in TEMPLATES}
    asked = longbench_prompts(files, tokenizer(), 10**6, chat=False, shortest=1)
    prompts = paper_prompts(files, chat_tokenizer(), 10**6, "any", shortest=1)
    begin, between = "<s>system\nYou are a helpful assistant</s>\n<s>user\n", "</s>\n<s>assistant\n"
    for task, (ids,) in prompts.items():
        text = tokenizer().decode(ids)
        user, answer = text.removeprefix(begin).split(between)
        assert text.startswith(begin), task
        if task in ("lcc", "repobench-p"):
            assert answer == "" and record["input"] not in text
            code = f"{record['context']}Now, complete the code given."
            assert user == f"Please complete the code given below. \n{code}"
        else:
            question = tokenizer().decode(asked[task][0]).removesuffix(answer).rstrip("\n")
            assert user == question and answer == ("Answer:" if task == "qmsum" else "Summary:")


def test_the_paper_s_filter_of_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2,000 below the target's length inclusive, whatever it is served with."""
    assert set(LENGTHS) == set(LONGBENCH)
    files = {"lcc": write_lines(tmp_path / "lcc.jsonl", longbench_records(4, 400))}

    def lengths(target: str, context_length: int = 10**6, **bounds: Any) -> list[int]:
        prompts = paper_prompts(files, tokenizer(), context_length, target, shortest=1, **bounds)
        return [len(ids) for ids in prompts["lcc"]]

    every = lengths("any")
    long = max(every)
    assert lengths("any", long + RESERVED) == every
    assert lengths("any", long + RESERVED - 1) == [n for n in every if n < long]
    for length, expected in ((long + RESERVED, every), (long + RESERVED - 1, every[:-1])):
        monkeypatch.setitem(LENGTHS, "lmsys/vicuna-7b-v1.5-16k", length)
        assert lengths(VICUNA, 3) == expected == sorted(expected)
    assert lengths(VICUNA, 3, longest=long + 1) == every
    assert lengths(VICUNA, 3, num_samples=2) == every[:2]


def test_commands_take_the_prompts_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def report(prompts_for: Any, frame: str, *_: Any, **__: Any) -> None:
        ((ids,),) = prompts_for(chatty, 10**6).values()
        asked.append((frame, tokenizer().decode(ids)))

    chatty = chat_tokenizer()
    chatty.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    monkeypatch.setattr("vllm_longspec.eval.benchmark.benchmark_report", report)
    write_lines(tmp_path / "gov_report.jsonl", longbench_records(1, 8000))
    write_lines(tmp_path / "aime.jsonl", [{"id": 60, "problem": "1 + 1?"}])
    pair = ["--target", str(TARGET), "--draft", str(DRAFT), "--output", str(tmp_path / "out")]

    def run(name: str, *more: str) -> Any:
        tasks = ["--task", "gov_report"] if name == "longbench" else []
        return CliRunner().invoke(
            app, ["eval", name, "--data", str(tmp_path), *pair, *tasks, *more]
        )

    for name, *more in (
        ("longbench",), ("longbench", "--chat-template"), ("longbench", "--prompts", "paper"),
        ("aime",), ("aime", "--prompts", "paper"),
    ):  # fmt: skip
        assert run(name, *more).exit_code == 0
    frames, texts = zip(*asked, strict=True)
    assert frames == ("longbench", "longbench-chat", "paper", "chat", "paper")
    begins = ("You are given a report", "[user]You are given", "<s>system\nYou are a helpful",
              "[user]1 + 1?", "[system]You are a helpful assistant[user]1 + 1?")  # fmt: skip
    assert all(text.startswith(begin) for text, begin in zip(texts, begins, strict=True)), texts
    done = run("longbench", "--prompts", "paper", "--chat-template")
    assert done.exit_code == 2 and "chat_template: the paper's prompts have a frame" in done.stderr
    assert run("aime", "--prompts", "longbench").exit_code == 2


def test_longbench_bounds_are_exclusive(tmp_path: Path) -> None:
    files = {"lcc": write_lines(tmp_path / "lcc.jsonl", longbench_records(4, 400))}

    def lengths(context_length: int = 10**6, **bounds: Any) -> list[int]:
        prompts = longbench_prompts(files, tokenizer(), context_length, chat=False, **bounds)
        return [len(ids) for ids in prompts["lcc"]]

    every = lengths(shortest=1)
    short, long = min(every), max(every)
    assert len(set(every)) == 4
    assert lengths(shortest=short) == [n for n in every if n > short]
    assert lengths(shortest=1, longest=long) == [n for n in every if n < long]
    assert lengths(shortest=1, context_length=long + RESERVED) == [n for n in every if n < long]
    assert lengths(shortest=1, context_length=long + RESERVED + 1) == every
    assert lengths(shortest=1, num_samples=3) == every[:3]
    # Those that do not fit do not count as samples.
    assert lengths(shortest=short, num_samples=3) == [n for n in every if n > short]
    with pytest.raises(LongSpecError, match=f"more than 1200 and less than {long}"):
        lengths(longest=long)


def test_missing_data_says_what_to_fetch(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "lcc.jsonl", [{}])
    assert task_files(tmp_path, ["lcc"]) == {"lcc": tmp_path / "data" / "lcc.jsonl"}
    options = ["--data", str(tmp_path), "--target", str(TARGET), "--output", str(tmp_path / "out")]
    tasks = ["--task", "lcc,qmsum,multi_news"]
    asked = CliRunner().invoke(app, ["eval", "longbench", *options, *tasks])
    assert asked.exit_code == 2
    for part in ("no qmsum.jsonl, multi_news.jsonl;", "THUDM/LongBench data.zip", f"-d {tmp_path}"):
        assert part in asked.stderr
    asked = CliRunner().invoke(app, ["eval", "longbench", *options, "--task", "lcc,trivia"])
    assert asked.exit_code == 2 and "task: 'trivia' is none of gov_report" in asked.stderr
    asked = CliRunner().invoke(app, ["eval", "aime", *options])
    assert asked.exit_code == 2 and "AI-MO/aimo-validation-aime --repo-type" in asked.stderr


BAD = {
    "{": "is not JSON",
    "[]": "is no JSON object",
    '{"input": ""}': 'no text under "context"',
    '{"context": "", "input": 3}': 'no text under "input"',
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_named(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "lcc.jsonl", longbench_records(1, 100))
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(LongSpecError) as raised:
        longbench_prompts({"lcc": path}, tokenizer(), 10**6, chat=False, shortest=1)
    assert f"line 3 of {path} " in str(raised.value) and BAD[line] in str(raised.value)


def test_aime_takes_2024_in_chat_format(tmp_path: Path) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    records = [{"id": i, "problem": f"What is {i}?", "answer": str(i)} for i in range(90)]
    lines = write_lines(tmp_path / "aime.jsonl", records)
    (tmp_path / "hub/data").mkdir(parents=True)
    write_table(Table.from_pylist(records), tmp_path / "hub/data/train-00000-of-00001.parquet")
    assert problem_file(tmp_path) == lines == problem_file(lines)
    prompts = aime_prompts(lines, chat_tokenizer())
    texts = [tokenizer().decode(ids, skip_special_tokens=True) for ids in prompts["aime24"]]
    assert texts == [f"BEGINWhat is {i}?END" for i in range(60, 90)]
    assert aime_prompts(problem_file(tmp_path / "hub"), chat_tokenizer()) == prompts
    assert aime_prompts(lines, chat_tokenizer(), 2)["aime24"] == prompts["aime24"][:2]

    chatty = chat_tokenizer()
    chatty.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    (framed,) = aime_prompts(lines, chatty, 1, PAPER_SYSTEM)["aime24"]
    assert tokenizer().decode(framed) == (
        "<s>system\nYou are a helpful assistant</s>\n<s>user\nWhat is 60?</s>\n<s>assistant\n"
    )
    chatty.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(LongSpecError, match=r"a system prompt \(System role .*\); leave --prompts"):
        aime_prompts(lines, chatty, 1, PAPER_SYSTEM)

    without = chat_tokenizer()
    without.chat_template = None
    with pytest.raises(LongSpecError, match="no chat template"):
        aime_prompts(lines, without)
    mistakes = (
        ([{"id": "60", "problem": ""}], 'line 1 .*"id"'),
        ([{"id": 60}], 'line 1 .*"problem"'),
    )
    for bad, named in (*mistakes, (records[:60], "from 60 to 89")):
        with pytest.raises(LongSpecError, match=named):
            aime_prompts(write_lines(tmp_path / "bad.jsonl", bad), chat_tokenizer())
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(LongSpecError, match=r"bad\.parquet is not parquet"):
        aime_prompts(tmp_path / "bad.parquet", chat_tokenizer())


@given(st.lists(st.integers(0, 1), max_size=5), st.lists(st.integers(0, 1), max_size=5))
def test_first_difference(a: list[int], b: list[int]) -> None:
    padded = itertools.zip_longest(a, b)
    expected = [i for i, (x, y) in enumerate(padded) if x != y]
    assert first_difference(a, b) == (expected[0] if expected else None)


def acceptance(proposer: str, speed: float, outputs: list[list[int]]) -> Acceptance:
    verifications = 0 if proposer == PLAIN else 4
    return Acceptance(proposer, 0.0, 6, verifications, 2.5, [1.0, 0.5], 0.1, speed, outputs)


PROMPTS = {"lcc": [[1] * 2000, [2] * 1000], "qmsum": [[3] * 1500]}
LONG = acceptance(LONGSPEC, 30.0, [[1, 2, 3], [4, 5, 6]])
SHORT = acceptance(PLAIN, 20.0, [[1, 2, 3], [4, 9, 6]])


def comparisons() -> list[Comparison]:
    """One compared with plain decoding, one not yet."""
    other = acceptance(LONGSPEC, 10.0, [[7]])
    return [compare("lcc", PROMPTS["lcc"], LONG, SHORT), compare("qmsum", [[3]], other, None)]


def test_comparison_table() -> None:
    def rows(target: str, frame: str = "longbench") -> list[dict[str, str]]:
        lines = comparison_table(comparisons(), target, frame).splitlines()[:4]
        header, _, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        return [dict(zip(header, row, strict=True)) for row in cells]

    compared, alone = rows(VICUNA)
    assert compared["speed-up"] == "1.50x" and compared["plain tokens/s"] == "20.0"
    assert compared["same tokens as plain"] == "1 of 2 (prompt 1 from token 1 on)"
    assert compared["prompt tokens"] == "1,500" and compared["acceptance length"] == "2.50"
    assert compared["paper, T=0, another frame"] == "3.73, 1.99x"  # Vicuna-7B on LCC
    assert alone["speed-up"] == alone["same tokens as plain"] == alone["plain tokens/s"] == ""
    assert rows("another")[0]["paper, T=0, another frame"] == "3.28 to 4.21"
    assert rows(VICUNA, "paper")[0]["paper, T=0, same frame"] == "3.73, 1.99x"
    for frame, name in FRAMES.items():
        assert f"\nPrompts: {name}. " in comparison_table(comparisons(), VICUNA, frame)


@pytest.mark.parametrize("target", [VICUNA, "another"])
def test_comparison_plot(tmp_path: Path, target: str) -> None:
    comparison_plot(comparisons(), target, "paper", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_run_cut_off_leaves_what_it_measured(tmp_path: Path) -> None:
    def measured() -> Iterator[tuple[str, float, Acceptance]]:
        yield "lcc", 0.0, LONG
        yield "qmsum", 0.0, acceptance(LONGSPEC, 10.0, [[7]])
        yield "lcc", 0.0, SHORT
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record = {"command": "eval", "frame": "paper"}
        write_results(measured(), PROMPTS, "another", record, tmp_path / "out")
    lcc, qmsum = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert lcc["speed_up"] == 1.5 and lcc["first_differences"] == [None, 1]
    assert qmsum["tokens_per_second"] == 10.0 and qmsum["speed_up"] is None
    assert (tmp_path / "out/results.md").read_text().startswith("eval\n")


def test_counters_come_in_the_order_of_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    accepted = Counter(server.ACCEPTED_BY_DEPTH, "", ["engine", "position"], registry=registry)
    for engine, position in itertools.product("01", range(12)):
        accepted.labels(engine, str(position)).inc(20 - position)
    Counter(server.DRAFTS, "", registry=registry).inc(50)
    page = generate_latest(registry)

    class Answer:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self) -> bytes:
            return page

    monkeypatch.setattr(server.urllib.request, "urlopen", lambda *_, **__: Answer())
    counters = server.counters_of(server.read_metrics("http://somewhere"))
    assert counters == server.Counters(50, [2 * (20 - position) for position in range(12)])
    assert server.counters_of({}) == server.Counters(0, [])


def test_mistakes_in_where_to_measure(tmp_path: Path) -> None:
    def report(target: str = str(TARGET), nodes: int | None = None, **places: str) -> None:
        engines = {"draft": None, "url": None, "plain_url": None, **places}
        benchmark_report(
            lambda *_: PROMPTS, "longbench", target, **engines, output=tmp_path / "out",
            temperatures=[0.0], max_tokens=8, nodes=nodes, max_model_len=None,
        )  # fmt: skip

    server_url = "http://127.0.0.1:9"
    with pytest.raises(LongSpecError, match="either --draft"):
        report()
    with pytest.raises(LongSpecError, match="go together"):
        report(url=server_url)
    with pytest.raises(LongSpecError, match="either --draft"):
        report(draft=str(DRAFT), url=server_url, plain_url=server_url)
    with pytest.raises(LongSpecError, match="where the server is started"):
        report(nodes=68, url=server_url, plain_url=server_url)
    with pytest.raises(LongSpecError, match=r"the config of .* cannot be read"):
        report(str(tmp_path), draft=str(DRAFT))
    assert base_url("http://host:8000/v1/") == base_url("http://host:8000") == "http://host:8000"
    assert room_for(PROMPTS, 2010, 8) == 8 and room_for(PROMPTS, 2003, 8) == 3
    with pytest.raises(LongSpecError, match="no room to answer a prompt of 2000"):
        room_for(PROMPTS, 2000, 8)
