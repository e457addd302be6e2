"""`vllm-longspec regenerate`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_longspec.commands import DATA, INTERRUPTED, mistakes_in_a_sentence
from vllm_longspec.commands.values import not_negative, positive


def regenerate(
    url: Annotated[str, typer.Option(help="Running server of the target, http://HOST:PORT.")],
    data: Annotated[str, typer.Option(help=f"{DATA} A prompt needs no completion here.")],
    output: Annotated[
        Path,
        typer.Option(help="JSON lines to write, which `train` reads. The same command goes on in "
                     "it after an interruption."),
    ],
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(callback=not_negative, help="0: greedy.", show_default="the server's"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(max=1.0, callback=positive, help="Nucleus.", show_default="the server's"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens an answer at most.")] = 4096,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Makes each answer's own seed.", show_default="none")
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Of targets that can think: enable_thinking "
                     "of their chat template.", show_default="the template's"),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat/--no-chat", help="Answer prompts as a user's message, or continue "
                     "them as they are, for targets without a chat format."),
    ] = True,
) -> None:  # fmt: skip
    """Let a served target write the text that its draft is trained on: it answers the prompts of
    your data, in conversations each turn of the assistant anew.

    A string, a text or a prompt is a user's message; completions are dropped.
    """
    from vllm_longspec.train.regenerate import Sampling, regenerate_answers

    with mistakes_in_a_sentence():
        sampling = Sampling(temperature, top_p, max_tokens, seed, thinking, chat)
        if not regenerate_answers(url, data, output, sampling, concurrency):
            raise typer.Exit(INTERRUPTED)
