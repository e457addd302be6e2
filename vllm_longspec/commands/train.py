"""`vllm-longspec train`."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vllm_longspec.commands import fail
from vllm_longspec.config import LongSpecError


def train(
    target: Annotated[Path, typer.Option(help="Folder of the target model, Llama-shaped.")],
    data: Annotated[Path, typer.Option(help='JSON lines, each "text" or {"text": ...}; .xz too.')],
    output: Annotated[Path, typer.Option(help="Folder to write the draft to.")],
    init: Annotated[
        Path | None, typer.Option(help="Start from this draft: a next stage, on longer text.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 3000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    sequences_per_step: Annotated[int, typer.Option(help="Sequences per optimiser step.")] = 64,
    sequences_per_batch: Annotated[
        int, typer.Option(help="Sequences at once; lower it to fit memory, results stay the same.")
    ] = 64,
    max_sequences: Annotated[int | None, typer.Option(help="Use only the first so many.")] = None,
    anchor_offset: Annotated[
        bool, typer.Option(help="Train large positions on short text (anchor-offset indices).")
    ] = True,
    seed: Annotated[int, typer.Option(help="Data order, positions, shifts, initial weights.")] = 0,
) -> None:
    """Train a draft layer for a target model; on a GPU where there is one, else on the CPU."""
    options = dict(locals())
    from vllm_longspec.train import loop

    try:
        loop.train(loop.TrainOptions(**options))
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        fail(f"{option}: {first['input']!r} is not valid: {first['msg']}")
    except LongSpecError as error:
        fail(str(error))
