"""`vllm-longspec eval ...`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_longspec.commands import fail
from vllm_longspec.config import LongSpecError

app = typer.Typer(help="Measure drafts served through vLLM.", no_args_is_help=True)


@app.command()
def acceptance(
    target: Annotated[str, typer.Option(help="Target model, folder or repository.")],
    draft: Annotated[str, typer.Option(help="LongSpec draft, folder or repository.")],
    data: Annotated[Path, typer.Option(help='JSON lines with "text" and "kind"; .xz too.')],
    output: Annotated[
        Path | None, typer.Option(help="Write the results here as JSON, each as it comes.")
    ] = None,
    context: Annotated[
        list[int], typer.Option(help="Prompt tokens; repeatable. Without it: spread over 1k to 4k.")
    ] = [],  # noqa: B006
    proposer: Annotated[list[str], typer.Option(help="tree, chain or ngram; repeatable.")] = [  # noqa: B006
        "tree",
        "chain",
        "ngram",
    ],
    nodes: Annotated[list[int], typer.Option(help="Nodes of the tree verified; repeatable.")] = [  # noqa: B006
        68,
        31,
    ],
    temperature: Annotated[list[float], typer.Option(help="Repeatable.")] = [0.0, 0.8, 1.0],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 128,
    num_prompts: Annotated[int, typer.Option(help="Held-out code prompts per context.")] = 20,
    max_model_len: Annotated[
        int | None, typer.Option(help="vLLM's max_model_len; by default what the prompts need.")
    ] = None,
    kv_cache_gib: Annotated[float, typer.Option(help="Memory for the KV cache.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="vLLM's dtype.")] = "auto",
) -> None:
    """Mean acceptance length on held-out prompts by context length and temperature: LongSpec with
    the given numbers of verified nodes, as a chain of 5, and vLLM's n-gram proposer.

    One engine a proposer, eager; all prompts of a context length at once. `bench e2e` measures
    speed as served.
    """
    from vllm_longspec.eval.acceptance import acceptance_report

    try:
        acceptance_report(
            target,
            draft,
            data,
            output,
            context,
            proposer,
            nodes,
            temperature,
            max_tokens,
            num_prompts,
            max_model_len,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            dtype=dtype,
            enforce_eager=True,
        )
    except LongSpecError as error:
        fail(str(error))


@app.command()
def replay(
    target: Annotated[Path, typer.Option(help="Folder of the target model.")],
    draft: Annotated[list[Path], typer.Option(help="Folder of a LongSpec draft; repeatable.")],
    data: Annotated[Path, typer.Option(help='JSON lines with "text" and "kind"; .xz too.')],
    context: Annotated[list[int], typer.Option(help="Prompt tokens; repeatable.")] = [  # noqa: B006
        2048,
        8192,
        16384,
    ],
    temperature: Annotated[list[float], typer.Option(help="Repeatable.")] = [0.0, 0.8],  # noqa: B006
    nodes: Annotated[list[int], typer.Option(help="Nodes verified; repeatable.")] = [68],  # noqa: B006
    tree_shape: Annotated[str, typer.Option(help="Nodes per level.")] = "4 16 16 16 16",
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out code prompts.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here, as .png or .svg.")] = None,
) -> None:
    """Mean acceptance length of many drafts by context length, without serving them: the target
    writes each continuation once and every draft is replayed against it.

    On a GPU where there is one (bf16), else on the CPU (float32). Gives what `eval acceptance`
    counts, in seconds a draft; speed is measured by `bench e2e`.
    """
    from vllm_longspec.train.acceptance import replay_report

    try:
        replay_report(
            target, draft, data, context, temperature, nodes, tree_shape, num_prompts, max_tokens,
            output, plot,
        )  # fmt: skip
    except LongSpecError as error:
        fail(str(error))
