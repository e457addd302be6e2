"""A chat about a long document, in the terminal, with tokens/s and accepted tokens live.

python examples/chat.py DOCUMENT [--url http://localhost:8000 | --target TARGET --draft DRAFT]
"""

import json
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from served import DRAFT, TARGET, served

from vllm_longspec.commands import fail
from vllm_longspec.endpoint import server_errors
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.completions import check_server, client
from vllm_longspec.eval.server import Counters, idle_counters

COLOURS = ("green", "yellow", "cyan", "magenta", "blue")
HELP = "/clear forgets the conversation, /quit or an empty line ends it"


@dataclass
class Answer:
    """What has come of one answer. An event of the stream holds the tokens of one verification
    (of more where the server lags); the first comes from the prompt's own forward."""

    prompt_tokens: int
    asked: float  # time.perf_counter()
    events: list[tuple[float, int, str]] = field(default_factory=list)  # time, tokens, text

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens, _ in self.events)

    @property
    def text(self) -> str:
        return "".join(text for *_, text in self.events)

    @property
    def verified(self) -> list[int]:
        """Tokens of each verification."""
        return [tokens for _, tokens, _ in self.events[1:]]

    def tokens_per_second(self) -> float:
        """Decoding only: from the first event to the last."""
        seconds = self.events[-1][0] - self.events[0][0] if self.events else 0
        return sum(self.verified) / seconds if seconds > 0 else 0.0

    def status(self) -> Table:
        row = Table.grid(padding=(0, 2))
        waited = self.events[0][0] - self.asked if self.events else 0
        mean = sum(self.verified) / len(self.verified) if self.verified else 0
        newest = self.verified[-1] if self.verified else 0
        row.add_row(
            f"[bold]{self.tokens_per_second():.1f}[/] tokens/s",
            f"[bold]{mean:.2f}[/] tokens a verification",
            f"[bold green]+{newest}[/] " + "▮" * newest,
            f"[bold]{sum(self.verified) - len(self.verified)}[/] accepted of {self.tokens}",
            f"[dim]{self.prompt_tokens} tokens of context, first after {waited:.1f} s[/]",
        )
        return row

    def coloured(self) -> Text:
        """The tokens of each verification in one colour."""
        parts = [(text, COLOURS[i % len(COLOURS)]) for i, (_, _, text) in enumerate(self.events)]
        return Text.assemble(*parts)

    def live(self, console: Console) -> Group:
        """The lines that fit the terminal, over the status."""
        lines = self.coloured().wrap(console, console.width)
        return Group(*lines[-(console.height - 4) :], Text(), self.status())


def count_tokens(url: str, model: str, messages: list[dict[str, str]]) -> int:
    """What vLLM makes of a chat so far."""
    body = json.dumps({"model": model, "messages": messages}).encode()
    request = urllib.request.Request(
        f"{url}/tokenize", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["count"]


def fit(text: str, budget: int, count: Callable[[str], int]) -> str:
    """The beginning of `text` that has at most `budget` tokens, or nearly all of that."""
    while text and (tokens := count(text)) > budget:
        text = text[: int(len(text) * 0.99 * budget / tokens)]
    return text


def document_message(text: str) -> dict[str, str]:
    return {"role": "system", "content": f"Answer questions about this document.\n\n{text}"}


def stream_answer(
    url: str, model: str, messages: list[dict[str, str]], max_tokens: int, temperature: float,
    console: Console,
) -> Answer:  # fmt: skip
    answer = Answer(count_tokens(url, model, messages), time.perf_counter())
    stream: Iterable[Any] = client(url).chat.completions.create(
        model=model, messages=messages, max_tokens=max_tokens, temperature=temperature,
        stream=True, extra_body={"return_token_ids": True},
    )  # type: ignore[call-overload] # fmt: skip
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for event in stream:
            for choice in event.choices:
                tokens = len(getattr(choice, "token_ids", None) or [])  # none with the role
                if tokens:
                    text = choice.delta.content or ""
                    answer.events.append((time.perf_counter(), tokens, text))
                    live.update(answer.live(console), refresh=True)
    return answer


def totals(before: Counters, after: Counters) -> str:
    verifications = after.drafts - before.drafts
    accepted = sum(after.depths) - sum(before.depths)
    if not verifications:
        return "nothing was verified"
    return (
        f"{verifications} verifications accepted {accepted} tokens: "
        f"mean acceptance length {1 + accepted / verifications:.2f}"
    )


def chat(
    url: str, document: str, asked: list[str], max_tokens: int, temperature: float, console: Console
) -> None:
    context = check_server(url, speculating=True)
    model = client(url).models.list().data[0].id

    def count(text: str) -> int:
        return count_tokens(url, model, [document_message(text)])

    # Room for a few questions and answers behind the document.
    kept = fit(document, context - 4 * max_tokens, count)
    if not kept:
        raise LongSpecError(
            f"max_tokens: four answers of {max_tokens} leave nothing of a context of {context} "
            "tokens to the document; lower it"
        )
    system = document_message(kept)
    console.print(
        f"{len(kept):,} of {len(document):,} characters, {count(kept):,} of {context:,} tokens. "
        f"{HELP}.",
        style="dim",
    )
    messages, start = [system], idle_counters(url)
    questions = iter(asked)
    while question := next(questions, "") if asked else console.input("\n[bold]> [/]").strip():
        if question == "/quit":
            break
        if question == "/clear":
            messages = [system]
            continue
        if asked:
            console.print(f"\n> {question}", style="bold", markup=False)
        messages.append({"role": "user", "content": question})
        try:
            answer = stream_answer(url, model, messages, max_tokens, temperature, console)
        except openai.BadRequestError as error:
            console.print(f"{error.message}\n{HELP}.", style="red", markup=False)
            messages.pop()
            continue
        console.print(Group(answer.coloured(), Text(), answer.status()))
        messages.append({"role": "assistant", "content": answer.text})
    console.print(f"\n{totals(start, idle_counters(url))}", style="bold")


def main(
    document: Annotated[
        Path, typer.Argument(help="Text file.", exists=True, dir_okay=False)
    ] = Path(json.decoder.__file__),
    url: Annotated[str | None, typer.Option(help="Running server; else one is started.")] = None,
    target: Annotated[str, typer.Option(help="Target to serve.")] = TARGET,
    draft: Annotated[str, typer.Option(help="Its LongSpec draft.")] = DRAFT,
    ask: Annotated[
        list[str], typer.Option(help="Ask this instead of reading the keyboard; repeatable.")
    ] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(help="New tokens an answer at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0: greedy.", min=0)] = 0.0,
) -> None:
    """Chat about a long document; the tokens that one verification committed have one colour."""
    console = Console(highlight=False)
    try:
        text = document.read_text(errors="replace")
        with served(url, target, draft, console) as base, server_errors(base):
            chat(base, text, ask, max_tokens, temperature, console)
    except (EOFError, KeyboardInterrupt):
        console.print()
    except LongSpecError as error:
        fail(str(error))


if __name__ == "__main__":
    typer.run(main)
