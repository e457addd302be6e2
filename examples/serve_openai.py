"""Serve with LongSpec and stream from it with the `openai` client.

python examples/serve_openai.py [--url http://localhost:8000 | --target TARGET --draft DRAFT]
"""

import os
import time
from typing import Annotated

import typer
from openai import OpenAI
from rich.console import Console
from served import DRAFT, TARGET, served

from vllm_longspec.commands import fail
from vllm_longspec.endpoint import server_errors
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.completions import check_server
from vllm_longspec.eval.server import counters_of, idle_counters, read_metrics

PROMPT = """import json


def read_config(path):
    with open(path) as f:
        return json.load(f)


def write_config(path, config):
    with"""


def main(
    url: Annotated[str | None, typer.Option(help="Running server; else one is started.")] = None,
    target: Annotated[str, typer.Option(help="Target to serve.")] = TARGET,
    draft: Annotated[str, typer.Option(help="Its LongSpec draft.")] = DRAFT,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
) -> None:
    """Serve with LongSpec and stream a completion with the openai client."""
    console = Console(highlight=False)
    try:
        with served(url, target, draft, console) as base, server_errors(base):
            check_server(base, speculating=True)
            stream_completion(base, prompt, max_tokens, temperature, console)
    except LongSpecError as error:
        fail(str(error))


def stream_completion(
    base: str, prompt: str, max_tokens: int, temperature: float, console: Console
) -> None:
    client = OpenAI(base_url=f"{base}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))
    before, start = counters_of(read_metrics(base)), time.perf_counter()
    stream = client.completions.create(
        model=client.models.list().data[0].id, prompt=prompt, max_tokens=max_tokens,
        temperature=temperature, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    console.print(prompt, end="", style="dim", markup=False)
    tokens = 0
    for event in stream:
        for choice in event.choices:
            console.print(choice.text, end="", markup=False, soft_wrap=True)
        tokens = event.usage.completion_tokens if event.usage else tokens
    seconds = time.perf_counter() - start
    after = idle_counters(base)
    verifications = after.drafts - before.drafts
    accepted = sum(after.depths) - sum(before.depths)
    console.print(
        f"\n\n{tokens} tokens in {seconds:.1f} s: {verifications} verifications, "
        f"mean acceptance length {1 + accepted / max(1, verifications):.2f}",
        style="bold",
    )


if __name__ == "__main__":
    typer.run(main)
