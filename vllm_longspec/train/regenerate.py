"""Prompts answered by the served target: text in its own words, which its draft learns best from.

The output is JSON lines that `train` reads, one a record of the data, in the order of arrival:

    {"key": ..., "messages": [...], "finish_reasons": ["stop", ...], "made_by": {...}}

or `prompt` and `completion` in place of `messages`. `key` follows from the record alone, so a run
that was cut off goes on wherever it stopped.
"""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_longspec.chat import Message
from vllm_longspec.endpoint import api_key, base_url, client, server_errors
from vllm_longspec.errors import LongSpecError, reason, short
from vllm_longspec.output import claim_file
from vllm_longspec.records import (
    BadRecordError,
    Skipped,
    check_source,
    check_unicode,
    content_of,
    usable,
)
from vllm_longspec.writing import alone

KEYS = ("key", "made_by")
RETRIES = 8  # of a request, on lost connections and overload, for about 40 s
CONNECT_TIMEOUT = 30.0  # an answer may take as long as it takes
SAY_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class Sampling:
    """None: as the server does by itself."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int = 4096
    seed: int | None = None
    thinking: bool | None = None
    chat: bool = True


@dataclass(frozen=True)
class Task:
    key: str
    content: str | list[Message]  # a prompt to continue, or a conversation to answer


@dataclass
class Counts:
    conversations: int = 0
    answers: int = 0
    cut: int = 0
    tokens: int = 0


def regenerate_answers(
    url: str, data: Path | str, output: Path, sampling: Sampling, concurrency: int
) -> bool:
    """Answer what `output` does not hold yet. False if Ctrl-C stopped it; what was written is kept.

    Raises LongSpecError for data, a server or an output that cannot be used.
    """
    if Path(data).exists() and output.exists() and output.samefile(data):
        raise LongSpecError(f"output: {output} is the data; name another file")
    claim_file(output, KEYS)
    if sampling.thinking is not None and not sampling.chat:
        raise LongSpecError("thinking: --no-chat has no chat template to tell; leave one out")
    url = base_url(url)
    check_source(data)
    model, context_length = served_model(url)
    made_by = {"model": model, **asdict(sampling)}
    done = keep_answers(output, made_by)
    console = Console(soft_wrap=True, stderr=True)
    if done:
        console.print(f"{output} holds {len(done):,} answered records, which are kept")
    counts, refused = Counts(), Skipped(str(data))
    started = said = time.monotonic()

    def write(record: dict[str, Any], num_tokens: int) -> None:
        nonlocal said
        try:
            lines.write(json.dumps(record | {"made_by": made_by}, ensure_ascii=False) + "\n")
            lines.flush()
        except OSError as error:
            raise LongSpecError(
                f"output: {output} cannot be written ({reason(error)}); make room, then the same "
                "command goes on"
            ) from error
        counts.conversations += 1
        counts.answers += len(record["finish_reasons"])
        counts.cut += record["finish_reasons"].count("length")
        counts.tokens += num_tokens
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            console.print(progress(counts, said - started))

    tasks = (task for task in read_tasks(data, sampling.chat) if task.key not in done)
    most = min(sampling.max_tokens, context_length or sampling.max_tokens)
    stopped = False
    with output.open("a", encoding="utf-8") as lines, alone(output), server_errors(url):
        try:
            asyncio.run(answer_all(url, model, tasks, sampling, most, concurrency, write, refused))
        except KeyboardInterrupt:
            stopped = True
        finally:
            if counts.conversations:
                console.print(progress(counts, time.monotonic() - started))
            refused.close()
    if stopped:
        console.print(f"stopped; the same command goes on with {output}")
    elif not done and not counts.answers:
        raise LongSpecError(f"data: no record of {data} was answered; give prompts")
    elif counts.cut:
        console.print(
            f"{counts.cut:,} answers were cut at --max-tokens {sampling.max_tokens:,} or the end "
            "of the context; a conversation ends there"
        )
    return not stopped


def progress(counts: Counts, seconds: float) -> str:
    return (
        f"{counts.conversations:,} records, {counts.answers:,} answers ({counts.cut:,} cut), "
        f"{counts.tokens:,} tokens in {seconds:.0f} s, {counts.tokens / max(seconds, 1e-9):,.0f} "
        "tokens/s"
    )


def served_model(url: str) -> tuple[str, int | None]:
    """The server's model and, of a vLLM server, its context length."""
    with server_errors(url):
        models = getattr(client(url, CONNECT_TIMEOUT).models.list(), "data", None)
    if not models:
        raise LongSpecError(f"url: {url} does not name a model; give a vLLM server")
    return models[0].id, getattr(models[0], "max_model_len", None)


def read_tasks(data: Path | str, chat: bool) -> Iterator[Task]:
    """Of equal records each has its own key."""
    seen: Counter[str] = Counter()
    for content in usable(data, lambda record: prompt_of(record, chat)):
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        seen[key] += 1
        yield Task(key if seen[key] == 1 else f"{key}-{seen[key]}", content)


def prompt_of(record: Any, chat: bool) -> str | list[Message]:
    """Raises BadRecordError for a record that nothing can be asked by."""
    asked = record.get("prompt") if isinstance(record, dict) else None
    content = asked if isinstance(asked, str) else content_of(record)
    assert not isinstance(content, tuple)  # it has a prompt
    try:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise BadRecordError("it has a number that is none") from error
    check_unicode(text)
    if isinstance(content, str):
        return [{"role": "user", "content": content}] if chat else content
    if not chat:
        raise BadRecordError("it holds messages; --no-chat continues texts and prompts")
    if all(message["role"] == "assistant" for message in content):
        raise BadRecordError("only the assistant speaks in its messages")
    return content


def keep_answers(output: Path, made_by: dict[str, Any]) -> set[str]:
    """The keys of what a run wrote before; a last line that was cut off is removed. Raises
    LongSpecError for answers that were made otherwise."""
    keys: set[str] = set()
    if not output.is_file():
        return keys
    whole = 0
    with output.open("rb+") as lines, alone(output):
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                key, before = record["key"], record["made_by"]
                different = [name for name in made_by if before.get(name) != made_by[name]]
                keys.add(key)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise LongSpecError(
                    f"output: line {number} of {output} is no answer of this command; name another "
                    "file"
                ) from error
            if different:
                raise LongSpecError(
                    f"output: {output} holds answers made otherwise (their {different[0]} is "
                    f"{before.get(different[0])}); name another file"
                )
            whole += len(line)
        lines.truncate(whole)
    return keys


async def answer_all(
    url: str,
    model: str,
    tasks: Iterator[Task],
    sampling: Sampling,
    max_tokens: int,
    concurrency: int,
    write: Callable[[dict[str, Any], int], None],
    refused: Skipped,
) -> None:
    """`concurrency` at a time. What the server refuses of a single request is reported and left
    out; at any other error those that are under way are finished first."""
    import openai

    errors: list[Exception] = []

    async def work() -> None:
        try:
            for task in tasks:  # which all workers take from
                await work_on(task)
                if errors:
                    return
        except Exception as error:
            errors.append(error)

    async def work_on(task: Task) -> None:
        try:
            record, num_tokens = await checked(answered(server, model, task, sampling, max_tokens))
            write(record, num_tokens)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            beginning = task.content if isinstance(task.content, str) else asked_first(task.content)
            where = f"record {task.key} of {refused.source} ({short(beginning, 40)!r})"
            refused.report(where, short(error.message))

    server = openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=api_key(), max_retries=RETRIES,
        timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT),
    )  # fmt: skip
    async with server:
        await asyncio.gather(*(work() for _ in range(concurrency)))
    if errors:
        raise errors[0]


async def checked(answer: Awaitable[tuple[dict[str, Any], int]]) -> tuple[dict[str, Any], int]:
    """Raises LongSpecError for an answer that is none of the API's."""
    try:
        record, num_tokens = await answer
        json.dumps(record, ensure_ascii=False).encode()
        if not all(isinstance(why, str) for why in record["finish_reasons"]):
            raise TypeError("no finish_reason")
        if "completion" in record and not isinstance(record["completion"], str):
            raise TypeError("no text")
        return record, num_tokens
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise LongSpecError(
            f"url: the server's answer is none of OpenAI's API ({reason(error)}); give a vLLM "
            "server"
        ) from error


async def answered(
    server: Any, model: str, task: Task, sampling: Sampling, max_tokens: int
) -> tuple[dict[str, Any], int]:
    """The record to write and how many tokens of it are new."""
    options: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    for name in ("temperature", "top_p"):
        if getattr(sampling, name) is not None:
            options[name] = getattr(sampling, name)
    if sampling.seed is not None:
        options["seed"] = (sampling.seed + int(task.key[:8], 16)) % 2**31
    if isinstance(task.content, str):
        done = await server.completions.create(prompt=task.content, **options)
        (choice,) = done.choices
        record = {
            "key": task.key, "prompt": task.content, "completion": choice.text,
            "finish_reasons": [choice.finish_reason],
        }  # fmt: skip
        return record, new_tokens(done)
    if sampling.thinking is not None:
        template = {"chat_template_kwargs": {"enable_thinking": sampling.thinking}}
        options["extra_body"] = template
    messages: list[Message] = []
    finish_reasons: list[str] = []
    tokens = 0
    for message in with_last_answer(task.content):
        # A tool's result belongs to the call that was made.
        if message["role"] != "assistant" or message.get("tool_calls"):
            messages.append(message)
            continue
        done = await server.chat.completions.create(messages=messages, **options)
        (choice,) = done.choices
        messages.append(answer_of(choice.message))
        finish_reasons.append(choice.finish_reason)
        tokens += new_tokens(done)
        if choice.finish_reason == "length":
            break
    record = {"key": task.key, "messages": messages, "finish_reasons": finish_reasons}
    return record, tokens


def asked_first(messages: list[Message]) -> str:
    return str(next(m["content"] for m in messages if m["role"] != "assistant"))


def with_last_answer(messages: list[Message]) -> list[Message]:
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls"):
        return messages
    return [*messages, {"role": "assistant"}]


def answer_of(message: Any) -> Message:
    """`reasoning_content` is what chat templates call what vLLM calls `reasoning`."""
    answer: Message = {"role": "assistant", "content": message.content or ""}
    for name in ("reasoning", "reasoning_content"):
        if getattr(message, name, None):
            answer["reasoning_content"] = getattr(message, name)
    return answer


def new_tokens(done: Any) -> int:
    return (done.usage.completion_tokens or 0) if done.usage else 0
