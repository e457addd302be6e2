"""`vllm-longspec bench ...`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_longspec.commands import DATA, fail, kv_cache, mistakes_in_a_sentence
from vllm_longspec.commands.values import check_local, not_negative, positive
from vllm_longspec.errors import LongSpecError
from vllm_longspec.records import check_source

SHAPES = (
    "llama3-8b, vicuna-7b, qwen2-32b, qwen3-30b-a3b (48 layers, 61 GB) or qwen3-30b-a3b-half "
    "(24 layers)."
)

Contexts = Annotated[list[int], typer.Option(min=1, help="Tokens of context; repeatable.")]
PromptTokens = Annotated[list[int], typer.Option(min=1, help="Prompt tokens; repeatable.")]
Batches = Annotated[list[int], typer.Option(min=1, help="Concurrent requests; repeatable.")]
Temperatures = Annotated[list[float], typer.Option(callback=not_negative, help="Repeatable.")]

app = typer.Typer(help="Measure what LongSpec costs and gains.", no_args_is_help=True)


def engines_memory(kv_cache_gib: float | None, side_by_side: bool) -> dict[str, int]:
    engine = kv_cache(kv_cache_gib)
    if side_by_side and kv_cache_gib is None:
        fail("--side-by-side: needs --kv-cache-gib, the engines share the GPU's memory")
    return engine


@app.command()
def inflate(
    target: Annotated[Path, typer.Option(help="Folder of a small Llama.")],
    shape: Annotated[str, typer.Option(help="llama3-8b, vicuna-7b, qwen2-32b or tiny.")],
    output: Annotated[Path, typer.Option(help="Folder to write the large model to.")],
    draft: Annotated[Path | None, typer.Option(help="Folder of its LongSpec draft.")] = None,
    draft_output: Annotated[Path | None, typer.Option(help="Folder for the large draft.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float32; by default the small models'.")
    ] = None,
) -> None:
    """Embed a small model and its draft in a large shape: the same logits at the large shape's
    cost, to measure real acceptance at real cost."""
    if (draft is None) != (draft_output is None):
        fail("draft: --draft and --draft-output go together; give both or neither")
    with mistakes_in_a_sentence():
        check_local(target.resolve(), "target")
        check_local(draft and draft.resolve(), "draft")
        from vllm_longspec.bench.inflate import inflate_draft, inflate_target
        from vllm_longspec.bench.shapes import target_config
        from vllm_longspec.output import claim_folder, is_within

        config = target_config(shape)
        # Both before either is written.
        claim_folder(output, inputs=(target, draft))
        if draft_output is not None:
            if is_within(draft_output, output) or is_within(output, draft_output):
                raise LongSpecError(
                    f"draft_output: {draft_output} and {output} overlap; name two folders"
                )
            claim_folder(draft_output, inputs=(target, draft), option="draft_output")
        if draft is not None and draft_output is not None:
            inflate_draft(draft, target, config, draft_output, dtype)
        inflate_target(target, config, output, dtype)


@app.command()
def cycle(
    output: Annotated[Path, typer.Option(help="Folder for cycle.json, cycle.md and plots.")],
    shape: Annotated[str, typer.Option(help=SHAPES)] = "llama3-8b",
    context: Contexts = [
        4096,
        32768,
        100000,
    ],
    batch: Batches = [
        1,
        2,
        4,
        8,
        16,
        32,
    ],
    draft_vocab_size: Annotated[
        int, typer.Option(min=0, help="Draft vocabulary, beside the full one; 0: full only.")
    ] = 32768,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time at each point, twice.")] = 40,
    only: Annotated[list[str], typer.Option(help="Only this proposer; repeatable.")] = [],
    side_by_side: Annotated[
        bool, typer.Option(help="Start all engines at once; needs --kv-cache-gib.")
    ] = False,
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            callback=positive, help="Memory for each KV cache; all that is free if left out."
        ),
    ] = None,
) -> None:
    """What a cycle costs: plain decoding, vLLM's EAGLE chains and LongSpec, with dummy weights.

    Points whose contexts do not fit the KV cache are left out of the table.
    """
    engine = engines_memory(kv_cache_gib, side_by_side)
    with mistakes_in_a_sentence():
        from vllm_longspec.bench.cycle import cycle_report

        cycle_report(
            shape, context, batch, draft_vocab_size, output, only, side_by_side, steps, **engine
        )


@app.command()
def throughput(
    output: Annotated[Path, typer.Option(help="Folder for throughput.json and throughput.md.")],
    shape: Annotated[str, typer.Option(help=SHAPES)] = "llama3-8b",
    context: Contexts = [
        4096,
        32768,
    ],
    batch: Batches = [
        1,
        4,
        16,
    ],
    text: Annotated[
        list[str],
        typer.Option(
            help="How often the draft is right: t0, t0.8, t1 (as nano's at these temperatures) or "
            "none; repeatable."
        ),
    ] = ["t0", "t0.8", "t1", "none"],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens a request to time, twice.")] = 256,
    draft_vocab_size: Annotated[
        int, typer.Option(min=0, help="Draft vocabulary; 0: the full one.")
    ] = 32768,
    side_by_side: Annotated[
        bool, typer.Option(help="Start both engines at once; needs --kv-cache-gib.")
    ] = False,
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            callback=positive, help="Memory for each KV cache; all that is free if left out."
        ),
    ] = None,
) -> None:
    """Tokens per second of plain decoding and of LongSpec with dummy weights, the acceptance drawn
    as a text would have it.

    Points whose contexts do not fit the KV cache are left out of the table.
    """
    engine = engines_memory(kv_cache_gib, side_by_side)
    with mistakes_in_a_sentence():
        from vllm_longspec.bench.throughput import throughput_report

        throughput_report(
            shape, context, batch, text, tokens, draft_vocab_size, output, side_by_side, **engine
        )


@app.command()
def startup(
    output: Annotated[Path, typer.Option(help="Folder for startup.json and startup.md.")],
    shape: Annotated[str, typer.Option(help=SHAPES)] = "llama3-8b",
    draft_vocab_size: Annotated[
        int, typer.Option(min=0, help="Draft vocabulary; 0: the full one.")
    ] = 32768,
    only: Annotated[list[str], typer.Option(help="Only this proposer; repeatable.")] = [],
) -> None:
    """How long engines take to start, with empty and with filled caches, and how much smaller the
    KV cache is beside LongSpec; dummy weights, vLLM's defaults, one engine after the other."""
    with mistakes_in_a_sentence():
        from vllm_longspec.bench.startup import startup_report

        startup_report(shape, draft_vocab_size, output, only)


@app.command()
def e2e(
    target: Annotated[str, typer.Option(help="Target model, folder or repository.")],
    draft: Annotated[str, typer.Option(help="LongSpec draft, folder or repository.")],
    data: Annotated[str, typer.Option(help=f"{DATA} Of those with a kind, code only.")],
    output: Annotated[Path, typer.Option(help="Folder for e2e.json and e2e.md.")],
    context: PromptTokens = [
        8192,
        16384,
        30000,
    ],
    temperature: Temperatures = [
        0.0,
        0.6,
        1.0,
    ],
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out code prompts per length.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 256,
    concurrency: Batches = [1],
    only: Annotated[list[str], typer.Option(help="Only this proposer; repeatable.")] = [],
    kv_cache_gib: Annotated[
        float | None,
        typer.Option(
            callback=positive, help="Memory for the KV cache; all that is free if left out."
        ),
    ] = None,
) -> None:
    """Tokens per second and acceptance length: plain vLLM, its n-gram proposer, LongSpec as a
    chain, with the paper's tree and as served by default."""
    with mistakes_in_a_sentence():
        check_source(data)
        check_local(target, "target")
        check_local(draft, "draft")
        from vllm_longspec.bench.e2e import e2e_report

        e2e_report(
            target,
            draft,
            data,
            output,
            context,
            temperature,
            num_prompts,
            max_tokens,
            concurrency,
            only,
            **kv_cache(kv_cache_gib),
        )


@app.command()
def train_step(
    shape: Annotated[
        str,
        typer.Option(
            help="llama3-8b, llama3-70b, qwen3-32b, qwen3-30b-a3b, vicuna-7b, qwen2-32b or tiny."
        ),
    ] = "llama3-8b",
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 32768,
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences of a batch, on each process.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute the layer in the backward pass.")
    ] = False,
    shard_target: Annotated[
        bool | None,
        typer.Option(
            "--shard-target/--no-shard-target",
            help="Whether several processes (accelerate launch -m vllm_longspec.cli bench ...) "
            "share the target.",
            show_default="if it does not fit",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
) -> None:
    """Time and peak memory of a training step of a draft, with random weights: target forward,
    draft forward and backward, AdamW."""
    with mistakes_in_a_sentence():
        from vllm_longspec.bench.train_step import train_step_report

        train_step_report(
            shape, sequence_length, sequences, gradient_checkpointing, output, shard_target
        )
