"""The command line `vllm-longspec`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vllm_longspec.config import LongSpecError

app = typer.Typer(
    help="LongSpec for vLLM: train and measure drafts; serve them with `vllm serve`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


eval_app = typer.Typer(help="Measure drafts served through vLLM.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")


def fail(message: str) -> None:
    print(f"vllm-longspec: {message}", file=sys.stderr)
    raise typer.Exit(2)


@app.command()
def train(
    target: Annotated[Path, typer.Option(help="Folder of the target model, Llama-shaped.")],
    data: Annotated[Path, typer.Option(help='JSON lines, each "text" or {"text": ...}; .xz too.')],
    output: Annotated[Path, typer.Option(help="Folder to write the draft to.")],
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


@eval_app.command()
def acceptance(
    target: Annotated[str, typer.Option(help="Target model, folder or repository.")],
    draft: Annotated[str, typer.Option(help="LongSpec draft, folder or repository.")],
    data: Annotated[Path, typer.Option(help='JSON lines with "text" and "kind"; .xz too.')],
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    nodes: Annotated[list[int], typer.Option(help="Nodes verified; repeatable.")] = [68, 31],  # noqa: B006
    temperature: Annotated[list[float], typer.Option(help="Repeatable.")] = [0.0, 0.8, 1.0],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 128,
    num_prompts: Annotated[int, typer.Option(help="Held-out code prompts.")] = 20,
    max_model_len: Annotated[int, typer.Option(help="vLLM's max_model_len.")] = 8192,
    kv_cache_gib: Annotated[float, typer.Option(help="Memory for the KV cache.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "auto",
) -> None:
    """Mean acceptance length on held-out prompts of 1k to 4k tokens: LongSpec with the given
    numbers of verified nodes, as a chain of 5, and vLLM's n-gram proposer."""
    from vllm_longspec.eval.acceptance import acceptance_report

    try:
        acceptance_report(
            target,
            draft,
            data,
            output,
            nodes,
            temperature,
            max_tokens,
            num_prompts,
            max_model_len=max_model_len,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            dtype=dtype,
            enforce_eager=True,
        )
    except LongSpecError as error:
        fail(str(error))


if __name__ == "__main__":
    app()
