"""`vllm-longspec regenerate` against a server that is no vLLM: what is asked, written, kept."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import tokenizer
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.records import read_documents

MODEL = {"id": "target", "object": "model", "created": 0, "owned_by": "us", "max_model_len": 300}
Reply = tuple[int, dict[str, Any]]


class FakeServer(ThreadingHTTPServer):
    """Says how many messages it was sent; `reply` may say something else, or nothing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.delay = 0.0
        self.reply: Callable[[dict[str, Any]], Reply | None] = usual
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        self.send(200, {"object": "list", "data": [MODEL]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.at_once -= 1
            reply = self.server.reply(asked)
        if reply is not None:
            self.send(*reply)

    def send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def completion(text: str, finish: str = "stop", **more: Any) -> Reply:
    choice = {
        "index": 0, "finish_reason": finish, "text": text, "logprobs": None,
        "message": {"role": "assistant", "content": text, **more},
    }  # fmt: skip
    return 200, {
        "id": "x", "object": "x", "created": 0, "model": "target", "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
    }  # fmt: skip


def usual(asked: dict[str, Any]) -> Reply:
    return completion(f"answer to {len(asked.get('messages', []))}")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(url: str, data: Path, *more: object) -> Any:
    command = ["regenerate", "--url", url, "--data", data, *more]
    return CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_turn_is_answered_anew(server: FakeServer, tmp_path: Path) -> None:
    """On what was answered before, whatever form the prompt has; `train` reads the output."""
    system = {"role": "system", "content": "Be."}
    call = said("") | {"tool_calls": [{"id": "1"}]}
    data = write(tmp_path / "prompts.jsonl", [
        "a", {"text": "b"}, {"prompt": "c", "completion": "old"}, {"prompt": "d"},
        {"messages": [system, user("e"), said("old"), user("f")]},
        {"messages": [user("g"), call, {"role": "tool", "content": "3"}, said("old")]},
        {"messages": [said("old")]}, "a",
    ])  # fmt: skip
    output = tmp_path / "new/text.jsonl"
    done = run(server.url + "/v1/", data, "--output", output)
    assert done.exit_code == 0, done.output
    assert "7 records, 8 answers (0 cut), 56 tokens" in done.stderr
    assert "line 7" in done.stderr and "only the assistant speaks" in done.stderr
    records = written(output)
    assert len({record["key"] for record in records}) == 7
    by_prompt = {record["messages"][0]["content"]: record["messages"] for record in records}
    for prompt in "abcd":
        assert by_prompt[prompt] == [user(prompt), said("answer to 1")]
    assert by_prompt["Be."] == [
        system, user("e"), said("answer to 2"), user("f"), said("answer to 4")
    ]  # fmt: skip
    assert by_prompt["g"][1:] == [call, {"role": "tool", "content": "3"}, said("answer to 3")]
    assert all("temperature" not in asked and "seed" not in asked for asked in server.asked)
    assert {asked["max_tokens"] for asked in server.asked} == {300}  # all of its context
    texts = [document.text for document in read_documents(output, tokenizer())]
    assert tokenizer().apply_chat_template(by_prompt["a"], tokenize=False) in texts


def test_options_reach_the_server_and_thoughts_are_kept(server: FakeServer, tmp_path: Path) -> None:
    def reply(asked: dict[str, Any]) -> Reply:
        return completion("cut", "length", reasoning="well")

    server.reply, server.delay = reply, 0.2
    data = write(
        tmp_path / "a.jsonl", [*"abcdefgh", {"messages": [user("i"), said("."), user("")]}]
    )
    options = ["--temperature", 0.5, "--top-p", 0.9, "--max-tokens", 50, "--seed", 3, "--thinking",
               "--concurrency", 3]  # fmt: skip
    done = run(server.url, data, "--output", tmp_path / "x", *options)
    assert done.exit_code == 0 and "9 answers were cut at --max-tokens 50" in done.stderr
    assert len(server.asked) == 9 and server.most_at_once == 3
    for asked in server.asked:
        assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.5, 0.9, 50)
        assert asked["chat_template_kwargs"] == {"enable_thinking": True}
    seeds = {asked["messages"][0]["content"]: asked["seed"] for asked in server.asked}
    assert len(set(seeds.values())) == 9
    answer = said("cut") | {"reasoning_content": "well"}
    assert all(record["messages"][-1] == answer for record in written(tmp_path / "x"))
    server.asked.clear()
    write(data, ["h", "a"])  # another order, other neighbours
    assert run(server.url, data, "--output", tmp_path / "y", *options).exit_code == 0
    for asked in server.asked:
        assert asked["seed"] == seeds[asked["messages"][0]["content"]]


def test_prompts_are_continued_without_chat(server: FakeServer, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ["def f(", {"messages": [user("a")]}])
    done = run(server.url, data, "--output", tmp_path / "x", "--no-chat")
    assert done.exit_code == 0 and "--no-chat continues texts and prompts" in done.stderr
    (record,) = written(tmp_path / "x")
    assert (record["prompt"], record["completion"]) == ("def f(", "answer to 0")
    assert server.asked[0]["prompt"] == "def f("


def test_goes_on_where_it_stopped(server: FakeServer, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [*"abcde", "a"])
    output = tmp_path / "x"
    assert run(server.url, data, "--output", output).exit_code == 0
    whole = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(reversed(whole[2:])) + whole[0][:-9])
    server.asked.clear()
    write(data, ["a", "a", *"edcb"])
    done = run(server.url, data, "--output", output)
    assert done.exit_code == 0 and "holds 4 answered records" in done.stderr
    assert len(server.asked) == 2
    assert output.read_bytes().splitlines(keepends=True)[:4] == list(reversed(whole[2:]))
    keys = {record["key"] for record in written(output)}
    assert keys == {json.loads(line)["key"] for line in whole}
    assert run(server.url, data, "--output", output).exit_code == 0 and len(server.asked) == 2
    done = run(server.url, data, "--output", output, "--temperature", 1)
    assert done.exit_code == 2 and "made otherwise (their temperature is None)" in done.stderr
    output.write_bytes(whole[0] + b"{}\n")
    done = run(server.url, data, "--output", output)
    assert done.exit_code == 2 and "line 2 of" in done.stderr


def test_lost_connections_are_tried_again_and_refusals_left_out(
    server: FakeServer, tmp_path: Path
) -> None:
    lost: list[int] = []

    def reply(asked: dict[str, Any]) -> Reply | None:
        prompt = asked["messages"][0]["content"]
        if prompt == "long":
            return 400, {"error": {"message": "longer than the context", "code": 400}}
        if prompt == "b" and len(lost) < 2:
            lost.append(0)
            return (503, {}) if len(lost) == 1 else None
        return usual(asked)

    server.reply = reply
    data = write(tmp_path / "a.jsonl", ["a", "long", "b"])
    done = run(server.url, data, "--output", tmp_path / "x")
    assert done.exit_code == 0, done.output
    assert len(lost) == 2 and len(written(tmp_path / "x")) == 2
    assert (
        f"of {data} ('long') skipped: " in done.stderr and "longer than the context" in done.stderr
    )
    assert f"1 record was skipped in {data}" in done.stderr
    # It is asked for again; a server that fails stops the run, what is under way is written.
    server.reply = lambda asked: (401, {"error": {"message": "no key"}})
    done = run(server.url, data, "--output", tmp_path / "x")
    assert done.exit_code == 2 and f"url: {server.url} refused a request: " in done.stderr
    assert "no key" in done.stderr and len(written(tmp_path / "x")) == 2


def test_mistakes(server: FakeServer, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", ["a"])
    other = write(tmp_path / "other.jsonl", [{"some": "text"}])
    nobody = "http://127.0.0.1:9"
    for url, source, output, more, sentence in (
        (server.url, "/no/file", "x", (), "data: /no/file is not a file"),
        (server.url, data, data, (), f"output: {data} is the data"),
        (server.url, data, other, (), f"output: {other} is there, and this command did not"),
        (server.url, data, tmp_path, (), f"output: {tmp_path} is a folder"),
        (server.url, other, "x", (), f"data: line 1 of {other}, the first record"),
        (nobody, data, "x", (), f"url: no vLLM server answers at {nobody}"),
        ("localhost:8000", data, "x", (), "url: localhost:8000 is no address"),
        (server.url, data, "x", ("--no-chat", "--thinking"), "thinking: --no-chat has no"),
        (server.url, data, "x", ("--temperature", -1), "Usage"),
        (server.url, data, "x", ("--max-tokens", 0), "Usage"),
        (server.url, data, "x", ("--concurrency", 0), "Usage"),
    ):
        done = run(url, source, "--output", tmp_path / output, *more)
        assert done.exit_code == 2 and sentence in done.stderr, (sentence, done.stderr)
        assert "Traceback" not in done.output
    assert other.read_text() == '{"some": "text"}\n'


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": []}, {"choices": None},
        {"choices": [{"index": 0, "finish_reason": "stop", "message": None}]},
        {"choices": [{"index": 0, "finish_reason": None, "message": said("x")}]},
        {"choices": [{"index": 0, "finish_reason": "stop", "message": said("\ud800")}]},
    ],
    ids=str,
)  # fmt: skip
def test_answers_that_are_none(server: FakeServer, tmp_path: Path, changes: dict[str, Any]) -> None:
    data = write(tmp_path / "a.jsonl", ["a", "b"])
    status, body = completion("fine")
    server.reply = lambda asked: (status, body | changes)
    done = run(server.url, data, "--output", tmp_path / "x")
    assert done.exit_code == 2 and "is none of OpenAI's API" in done.stderr, done.output


def test_records_that_nothing_can_be_asked_by(server: FakeServer, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(
        '"a"\n{"messages": [{"role": null, "content": "x"}]}\n'
        '{"messages": [{"role": "user", "content": "x", "n": NaN}]}\n'
        '{"prompt": "\\ud800"}\n'
    )
    done = run(server.url, data, "--output", tmp_path / "x")
    assert done.exit_code == 0 and len(written(tmp_path / "x")) == 1, done.output
    for reason in ("no role", "a number that is none", "not Unicode"):
        assert reason in done.stderr, done.stderr
    (tmp_path / "x").write_text('{"key": ["x"], "made_by": {}}\n')
    done = run(server.url, data, "--output", tmp_path / "x")
    assert done.exit_code == 2 and "line 1 of" in done.stderr, done.output


def test_ctrl_c_keeps_what_was_answered(server: FakeServer, tmp_path: Path) -> None:
    server.delay = 0.3
    data = write(tmp_path / "a.jsonl", [str(i) for i in range(400)])
    output = tmp_path / "x"
    command = ["-m", "vllm_longspec.cli", "regenerate", "--url", server.url, "--data", str(data),
               "--output", str(output), "--concurrency", "4"]  # fmt: skip
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"COLUMNS": "200"})  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(server.asked) < 10:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopped; the same command goes on" in printed and "Traceback" not in printed
    assert 4 <= len(written(output)) <= len(server.asked)
