"""`vllm serve` with LongSpec, driven by the official `openai` client, beside a plain server; and
from a plain server to a draft of one's own."""

import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import DRAFT, ROOT, TARGET, text_prompt, tokenizer
from openai import BadRequestError, OpenAI
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.eval.server import Server, running_servers
from vllm_longspec.tree.lookup import COPY_DEPTH

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

MODEL = str(TARGET)
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs",
           "8", "--kv-cache-memory-bytes", str(1 << 27)]  # fmt: skip
COUNTERS = "vllm:spec_decode_num_"


@dataclass
class Pair:
    plain: Server
    speculating: Server

    def both(self) -> tuple[OpenAI, OpenAI]:
        return client(self.plain), client(self.speculating)


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    commands = (MODEL, OPTIONS), (MODEL, [*OPTIONS, "--speculative-model", str(DRAFT)])
    with running_servers(*commands) as servers:
        yield Pair(*servers)


def text(index: int, length: int) -> str:
    return tokenizer().decode(text_prompt(index, length))


def choices(answer: Any) -> list[tuple[Any, Any]]:
    return [
        (c.text if hasattr(c, "text") else c.message.content, c.finish_reason)
        for c in answer.choices
    ]


COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "seed": 11},
    "n=2": {"temperature": 0.9, "seed": 5, "n": 2},
    "stop": {"temperature": 0, "stop": ["\n\n", "def "]},
    "penalty": {"temperature": 0, "frequency_penalty": 0.8},
    "choice": {"temperature": 0,
               "extra_body": {"structured_outputs": {"choice": ["first", "second"]}}},
}  # fmt: skip


def test_completions(pair: Pair) -> None:
    for name, options in COMPLETIONS.items():
        request = {"model": MODEL, "prompt": text(3, 200), "max_tokens": 40, **options}
        plain, got = (one.completions.create(**request) for one in pair.both())
        assert choices(got) == choices(plain), name
        assert got.usage == plain.usage, name
        assert len(got.choices) == options.get("n", 1)


def test_streamed_completions_are_the_whole(pair: Pair) -> None:
    request = {"model": MODEL, "prompt": text(5, 120), "max_tokens": 48, "temperature": 0}
    plain, speculating = pair.both()
    expected = plain.completions.create(**request).choices[0].text
    events = list(speculating.completions.create(**request, stream=True))
    pieces = [c.text for event in events for c in event.choices]
    assert "".join(pieces) == expected
    # Several tokens of one verification arrive together.
    assert len(pieces) < 48 / 1.5


def test_chat(pair: Pair) -> None:
    request: dict[str, Any] = {
        "model": MODEL, "max_tokens": 40, "temperature": 0,
        "messages": [{"role": "user", "content": text(2, 90)}],
    }  # fmt: skip
    plain, speculating = pair.both()
    expected = plain.chat.completions.create(**request)
    got = speculating.chat.completions.create(**request)
    assert choices(got) == choices(expected) and got.usage == expected.usage
    stream = speculating.chat.completions.create(**request, stream=True)
    pieces = [c.delta.content or "" for event in stream for c in event.choices]
    assert "".join(pieces) == expected.choices[0].message.content


def test_logprobs(pair: Pair) -> None:
    request = {"model": MODEL, "prompt": text(4, 150), "max_tokens": 24, "temperature": 0}
    expected, got = (
        one.completions.create(**request, logprobs=5).choices[0].logprobs for one in pair.both()
    )
    assert got.tokens == expected.tokens and len(got.tokens) == 24
    assert got.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)
    for ours, theirs in zip(got.top_logprobs, expected.top_logprobs, strict=True):
        assert len(ours) >= 5
        assert ours == pytest.approx(theirs, abs=1e-4)
    chat: dict[str, Any] = {
        "model": MODEL, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 5,
        "messages": [{"role": "user", "content": "import os\n"}],
    }  # fmt: skip
    expected, got = (
        one.chat.completions.create(**chat).choices[0].logprobs.content for one in pair.both()
    )
    assert [t.token for t in got] == [t.token for t in expected]
    assert all(len(t.top_logprobs) == 5 for t in got)


def test_eight_clients_and_one_that_leaves(pair: Pair) -> None:
    """Each client's answer is plain vLLM's, while another hangs up in the middle of its stream;
    afterwards nothing of it is left running."""
    plain, speculating = pair.both()

    def request(i: int) -> dict[str, Any]:
        return {"model": MODEL, "prompt": text(i, 40 + 60 * i), "max_tokens": 32 + i,
                "temperature": 0.7 * (i % 2), "seed": i}  # fmt: skip

    def ask(one: OpenAI) -> Any:
        return lambda i: choices(one.completions.create(**request(i)))

    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(ask(plain), range(8)))
        stream = speculating.completions.create(
            model=MODEL, prompt=text(9, 300), max_tokens=1500, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        running = pool.map(ask(speculating), range(8))
        for _ in range(3):
            next(iter(stream))
        stream.close()
        assert list(running) == expected
    deadline = time.monotonic() + 30
    while pair.speculating.metrics()["vllm:num_requests_running"] > 0:
        assert time.monotonic() < deadline, "the aborted request still runs"
        time.sleep(0.2)


def test_metrics_tell_the_acceptance_length_of_the_outputs(pair: Pair) -> None:
    """vLLM's counters against what the client sees: each event of a stream is one verification, or
    several where the front end lagged and vLLM merged them (`RequestOutputCollector`)."""
    server = pair.speculating

    def counters() -> dict[str, float]:
        metrics = server.metrics()
        return {k.removeprefix(COUNTERS): v for k, v in metrics.items() if k.startswith(COUNTERS)}

    before = counters()
    lengths: list[int] = []
    for i in range(3):
        stream = client(server).completions.create(
            model=MODEL, prompt=text(6 + i, 100), max_tokens=61, temperature=0, stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
        events = [len(c.token_ids) for event in stream for c in event.choices if c.token_ids]
        assert sum(events) == 61
        lengths += events[1:]  # the first comes from the prompt's own forward
    time.sleep(1)
    after = counters()
    spent = {name: after[name] - before.get(name, 0) for name in after}
    drafts, tokens = spent["drafts_total"], 3 * 60  # a first token comes from the prompt's forward
    most = COPY_DEPTH + 1  # tokens of one verification
    fewest_merged = sum(-(-length // most) - 1 for length in lengths)
    assert len(lengths) + fewest_merged <= drafts <= tokens
    assert spent["draft_tokens_total"] <= 31 * drafts
    by_depth = [v for k, v in sorted(spent.items()) if re.search(r"per_pos_total/\d+$", k)]
    assert sum(by_depth) == spent["accepted_tokens_total"]
    # max_tokens cuts the last verification of each request short of what it accepted.
    length = 1 + spent["accepted_tokens_total"] / drafts
    assert tokens / drafts <= length <= (tokens + 3 * COPY_DEPTH) / drafts
    assert length > 1.5


def test_eval_longbench_over_servers(pair: Pair, tmp_path: Path) -> None:
    """The whole command on text in LongBench's format, without starting another engine."""
    for task, length in (("lcc", 150), ("repobench-p", 250)):
        records = [{"context": text(i, length), "input": f"import {task[:3]}\n"} for i in range(2)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{task}.jsonl").write_text(lines)
    arguments = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--target", MODEL]
    arguments += ["--min-prompt-tokens", "100", "--max-prompt-tokens", "400", "--max-tokens", "16"]
    arguments += ["--task", "lcc,repobench-p", "--temperature", "0", "--num-samples", "1"]

    def run(url: str, plain_url: str) -> Any:
        urls = ["--url", url, "--plain-url", plain_url]
        return CliRunner().invoke(app, ["eval", "longbench", *arguments, *urls])

    swapped = run(pair.plain.url, pair.speculating.url)
    assert swapped.exit_code == 2 and "does not speculate" in swapped.stderr
    nowhere = run("http://127.0.0.1:9", pair.plain.url)
    assert nowhere.exit_code == 2 and "no vLLM server answers" in nowhere.stderr

    before = pair.speculating.metrics()[COUNTERS + "accepted_tokens_total"]
    done = run(f"{pair.speculating.url}/v1/", pair.plain.url)
    assert done.exit_code == 0, done.output
    after = pair.speculating.metrics()[COUNTERS + "accepted_tokens_total"]
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["context_length"] == 2048 and record["max_tokens"] == 16
    assert [result["task"] for result in record["results"]] == ["lcc", "repobench-p"]
    accepted = 0.0
    for result in record["results"]:
        assert result["prompts"] == 1 and 100 < result["mean_prompt_tokens"] < 400
        assert result["first_differences"] == [None]
        assert result["mean_acceptance_length"] == pytest.approx(1 + sum(result["per_depth"]))
        # A verification yields what it accepts and one token, of which max_tokens cuts the last.
        decoded = result["new_tokens"] - result["prompts"]
        yielded = result["verifications"] * result["mean_acceptance_length"]
        assert decoded <= yielded <= decoded + 5 * result["prompts"]
        speeds = result["tokens_per_second"], result["plain_tokens_per_second"]
        assert result["speed_up"] == pytest.approx(speeds[0] / speeds[1])
        accepted += result["verifications"] * sum(result["per_depth"])
    assert 0 < accepted < after - before  # the rest is the warm-up's
    assert "1 of 1" in (tmp_path / "out/results.md").read_text()
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_tell_of_each_plan_and_context(pair: Pair) -> None:
    """Beside vLLM's own, with its labels; none in a server without LongSpec."""
    texts = [
        urllib.request.urlopen(f"{one.url}/metrics", timeout=30).read().decode()
        for one in (pair.plain, pair.speculating)
    ]
    assert "longspec" not in texts[0]
    samples = [s for f in text_string_to_metric_families(texts[1]) for s in f.samples]
    theirs = next(s.labels for s in samples if s.name == "vllm:num_requests_running")
    found: dict[str, dict[str | None, float]] = {}
    for sample in samples:
        if (name := sample.name.removeprefix("vllm:longspec_")) != sample.name:
            labels = {k: v for k, v in sample.labels.items() if k not in theirs}
            assert sample.labels == theirs | labels
            found.setdefault(name, {})[next(iter(labels.values()), None)] = sample.value
    plans = {"none", "4 16 16 16 16, 31 nodes"}
    by_context = "accepted_tokens_total", "verifications_total"
    by_plan = "steps_total", "nodes_verified_total", "nodes_accepted_total"
    assert set(found) == {*by_plan, *by_context, "copied_tokens_total"}
    assert all(set(found[name]) == plans for name in by_plan)
    assert all(len(found[name]) == 5 for name in by_context)
    assert found["steps_total"]["4 16 16 16 16, 31 nodes"] > 0


def test_a_request_switches_longspec_off(pair: Pair) -> None:
    def ask(one: OpenAI, value: Any) -> Any:
        return choices(
            one.completions.create(
                model=MODEL, prompt=text(3, 200), max_tokens=40, temperature=0,
                extra_body={"vllm_xargs": {"longspec": value}},
            )
        )  # fmt: skip

    plain, speculating = pair.both()
    expected = ask(plain, "unknown")  # nobody there whom it concerns
    assert ask(speculating, "on") == ask(speculating, "off") == expected
    for value in ("of", 0, ["off"]):
        with pytest.raises(BadRequestError, match='longspec has to be "on" or "off", not'):
            ask(speculating, value)
    with pytest.raises(BadRequestError, match='"on" or "off"'):
        speculating.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "import os"}],
            extra_body={"vllm_xargs": {"longspec": "never"}},
        )  # fmt: skip


def test_examples_over_a_server(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import chat
    import serve_openai

    url, console = pair.speculating.url, Console(file=io.StringIO(), width=160)
    serve_openai.stream_completion(url, text(3, 100), 24, 0.0, console)
    document = text(2, 3000)
    chat.chat(url, document, ["import", "/clear", "def main("], 24, 0.0, console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert re.search(r"\n24 tokens in .* verifications, mean acceptance length [1-6]\.", shown)
    kept, tokens = re.search(r"([\d,]+) of [\d,]+ characters, ([\d,]+) of 2,048", shown).groups()  # type: ignore[union-attr]
    assert 0 < int(kept.replace(",", "")) < len(document)
    assert 0.9 * (2048 - 4 * 24) < int(tokens.replace(",", "")) <= 2048 - 4 * 24
    answered = re.findall(r"\+\d ▮* +(\d+) accepted of (\d+) +([\d,]+) tokens of context", shown)
    assert len(answered) == 2
    counted = re.search(r"(\d+) verifications accepted (\d+) tokens", shown)
    # max_tokens cuts the last verification of an answer short of what it accepted.
    assert counted is not None
    seen = sum(int(tokens) - 1 for _, tokens, _ in answered)
    assert seen <= sum(map(int, counted.groups())) <= seen + 2 * 5


NUM_PROMPTS, STEPS, MAX_TOKENS = 30, 20, 12


def test_from_prompts_to_a_draft_of_their_answers(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder, the four commands as a user types them, on chat data: with the draft that
    learned of them the target answers as it did without."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = [json.dumps({"messages": conversation(i)}) for i in range(NUM_PROMPTS)]
    Path("prompts.jsonl").write_text("\n".join(asked))
    vllm_longspec(
        "regenerate", "--url", pair.plain.url, "--data", "prompts.jsonl", "--output", "text.jsonl",
        "--temperature", 0, "--max-tokens", MAX_TOKENS,
    )  # fmt: skip
    conversations = [json.loads(line)["messages"] for line in Path("text.jsonl").open()]
    assert len(conversations) == NUM_PROMPTS

    stage = {
        "name": "chat", "steps": STEPS, "learning_rate": 2e-3, "sequence_length": 64,
        "sequences_per_step": 4, "sequences_per_batch": 4, "train_on": "answers",
    }  # fmt: skip
    recipe = {"target": MODEL, "output": "draft", "data": "text.jsonl", "stages": [stage]}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert f"{STEPS} steps in " in vllm_longspec("train", "--config", "recipe.yaml")
    rows = [json.loads(line) for line in Path("draft/training_log.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5

    vllm_longspec(
        "eval", "replay", "--target", MODEL, "--draft", "draft", "--data", "text.jsonl",
        "--context", 48, "--max-tokens", 16, "--num-prompts", 8, "--temperature", 0,
        "--output", "replay.json",
    )  # fmt: skip
    (result,) = json.loads(Path("replay.json").read_text())
    assert result["prompts"] == 8 and result["tokens"] == 8 * 16
    assert 1 < result["mean_acceptance_length"] < 6

    with running_servers((MODEL, [*OPTIONS, "--speculative-model", "draft"])) as (server,):
        for messages in conversations[::15]:  # a token takes Triton's interpreter half a second
            assert answered_again(server, messages) == messages
        assert server.metrics()[COUNTERS + "drafts_total"] > 2


def conversation(number: int) -> list[dict[str, str]]:
    """A question; in each third conversation it was answered before, and is asked again."""
    question = {"role": "user", "content": text(number, 100)}
    if number % 3:
        return [question]
    return [question, {"role": "assistant", "content": "Yes."}, question]


def vllm_longspec(*arguments: object) -> str:
    """What the command printed."""
    command = [sys.executable, "-m", "vllm_longspec.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def answered_again(server: Server, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A conversation with the assistant's turns as the server has them."""
    result: list[dict[str, str]] = []
    for message in messages:
        if message["role"] == "assistant":
            done = client(server).chat.completions.create(
                model=MODEL, messages=result, temperature=0, max_tokens=MAX_TOKENS
            )
            message = {"role": "assistant", "content": done.choices[0].message.content}
        result.append(message)
    return result
