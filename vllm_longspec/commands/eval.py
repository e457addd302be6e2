"""`vllm-longspec eval ...`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_longspec.commands import DATA, kv_cache, mistakes_in_a_sentence
from vllm_longspec.commands.values import (
    check_local,
    not_negative,
    one_of,
    positive,
    vllm_dtype,
)
from vllm_longspec.errors import LongSpecError
from vllm_longspec.records import check_source

app = typer.Typer(help="Measure drafts served through vLLM.", no_args_is_help=True)

Target = Annotated[str, typer.Option(help="Target model, folder or repository.")]
# What `longbench` and `aime` share.
Draft = Annotated[
    str | None, typer.Option(help="LongSpec draft, folder or repository: run engines here.")
]
Url = Annotated[
    str | None,
    typer.Option(help="Running server with LongSpec, http://HOST:PORT, in place of one."),
]
PlainUrl = Annotated[
    str | None, typer.Option(help="Running server of the same target without a draft.")
]
Output = Annotated[Path, typer.Option(help="Folder for results.json, results.md, results.png.")]
Temperatures = Annotated[list[float], typer.Option(callback=not_negative, help="Repeatable.")]
Samples = Annotated[int | None, typer.Option(min=1, help="So many prompts a task; all by default.")]
Nodes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Nodes verified, 68 in the paper; as `vllm serve` chooses by default."
    ),
]
TreeNodes = Annotated[
    list[int], typer.Option(min=1, help="Nodes of the tree verified; repeatable.")
]
Kinds = Annotated[
    list[str], typer.Option(help="Of the data's records that have a kind; repeatable.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Context length; the target's own by default.")
]
KvCache = Annotated[
    float | None,
    typer.Option(callback=positive, help="Memory for the KV cache; all that is free by default."),
]
Dtype = Annotated[str, typer.Option(callback=vllm_dtype, help="vLLM's dtype.")]


def engine_options(kv_cache_gib: float | None, dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, **kv_cache(kv_cache_gib)}


@app.command()
def acceptance(
    target: Target,
    draft: Annotated[str, typer.Option(help="LongSpec draft, folder or repository.")],
    data: Annotated[str, typer.Option(help=DATA)],
    output: Annotated[
        Path | None, typer.Option(help="Write the results here as JSON, each as it comes.")
    ] = None,
    context: Annotated[
        list[int],
        typer.Option(min=1, help="Prompt tokens; repeatable. Without it: spread over 1k to 4k."),
    ] = [],
    proposer: Annotated[list[str], typer.Option(help="tree, chain or ngram; repeatable.")] = [
        "tree",
        "chain",
        "ngram",
    ],
    nodes: TreeNodes = [
        68,
        31,
    ],
    tree_shape: Annotated[list[str], typer.Option(help="Nodes per level; repeatable.")] = [
        "4 16 16 16 16"
    ],
    temperature: Temperatures = [0.0, 0.8, 1.0],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts per context.")] = 20,
    kind: Kinds = ["code"],
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, help="vLLM's max_model_len; by default what the prompts need."),
    ] = None,
    kv_cache_gib: Annotated[
        float, typer.Option(callback=positive, help="Memory for the KV cache.")
    ] = 1.0,
    dtype: Dtype = "auto",
) -> None:
    """Mean acceptance length on held-out prompts by context length and temperature: LongSpec with
    the given numbers of verified nodes, as a chain of 5, and vLLM's n-gram proposer.

    One engine a proposer, eager; all prompts of a context length at once. `bench e2e` measures
    speed as served.
    """
    with mistakes_in_a_sentence():
        check_source(data)
        check_local(target, "target")
        check_local(draft, "draft")
        from vllm_longspec.eval.acceptance import acceptance_report

        acceptance_report(
            target,
            draft,
            data,
            output,
            context,
            proposer,
            nodes,
            tree_shape,
            temperature,
            max_tokens,
            num_prompts,
            max_model_len,
            kind,
            **kv_cache(kv_cache_gib),
            dtype=dtype,
            enforce_eager=True,
        )


@app.command()
def longbench(
    data: Annotated[Path, typer.Option(help="Folder of LongBench's files, gov_report.jsonl, ...")],
    target: Target,
    output: Output,
    draft: Draft = None,
    url: Url = None,
    plain_url: PlainUrl = None,
    task: Annotated[
        str, typer.Option(help="Comma-separated.")
    ] = "gov_report,qmsum,multi_news,lcc,repobench-p",
    temperature: Temperatures = [0.0, 1.0],
    num_samples: Samples = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens a prompt at most.")] = 1024,
    prompts: Annotated[
        str,
        typer.Option(
            callback=one_of("longbench", "paper"),
            metavar="longbench|paper",
            help="LongBench's own templates, or the frame of the paper's authors, in which the "
            "published drafts were tuned, with their filter of lengths.",
        ),
    ] = "longbench",
    chat_template: Annotated[
        bool, typer.Option(help="Put prompts, but those of code, in the target's chat format.")
    ] = False,
    min_prompt_tokens: Annotated[int, typer.Option(min=0, help="Prompts longer than this.")] = 1200,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="And shorter than this; context length - 2000 by default, for the paper's "
            "prompts the one the paper gives its target.",
        ),
    ] = None,
    nodes: Nodes = None,
    max_model_len: MaxModelLen = None,
    kv_cache_gib: KvCache = None,
    dtype: Dtype = "auto",
) -> None:
    """The paper's protocol on LongBench: acceptance length, decoding speed and speed-up over plain
    vLLM measured in the same run, one request at a time.

    In engines started here (--draft) or over two running servers (--url, --plain-url), of which
    --nodes, --max-model-len, --kv-cache-gib and --dtype are set where they are started. Without the
    data it says which file to fetch.
    """
    with mistakes_in_a_sentence():
        check_local(target, "target")
        check_local(draft, "draft")
        if prompts == "paper" and chat_template:
            raise LongSpecError(
                "chat_template: the paper's prompts have a frame of their own; leave "
                "--chat-template or --prompts paper out"
            )
        from vllm_longspec.eval.benchmark import benchmark_report
        from vllm_longspec.eval.longbench import longbench_prompts, paper_prompts, task_files

        files = task_files(data, task.replace(",", " ").split())
        some = (num_samples, min_prompt_tokens, max_prompt_tokens)
        benchmark_report(
            lambda tokenizer, length: (
                paper_prompts(files, tokenizer, length, target, *some)
                if prompts == "paper"
                else longbench_prompts(files, tokenizer, length, chat_template, *some)
            ),
            "longbench-chat" if chat_template else prompts,
            target, draft, url, plain_url, output, temperature, max_tokens, nodes, max_model_len,
            **engine_options(kv_cache_gib, dtype),
        )  # fmt: skip


@app.command()
def aime(
    data: Annotated[
        Path, typer.Option(help="AIME as parquet or JSON lines (id, problem), or its folder.")
    ],
    target: Target,
    output: Output,
    draft: Draft = None,
    url: Url = None,
    plain_url: PlainUrl = None,
    temperature: Temperatures = [0.0],
    num_samples: Samples = None,
    prompts: Annotated[
        str,
        typer.Option(
            callback=one_of("chat", "paper"),
            metavar="chat|paper",
            help="The target's chat format with its own system prompt, or with that of the "
            "paper's authors.",
        ),
    ] = "chat",
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens a problem at most.")] = 32768,
    nodes: Nodes = None,
    max_model_len: MaxModelLen = None,
    kv_cache_gib: KvCache = None,
    dtype: Dtype = "auto",
) -> None:
    """The paper's protocol on AIME 2024 (ids 60 to 89 of AI-MO/aimo-validation-aime), in the
    target's chat format: what `eval longbench` measures, on long answers.

    In engines started here (--draft) or over two running servers (--url, --plain-url). Without the
    data it says which file to fetch.
    """
    with mistakes_in_a_sentence():
        check_local(target, "target")
        check_local(draft, "draft")
        from vllm_longspec.eval.aime import PAPER_SYSTEM, aime_prompts, problem_file
        from vllm_longspec.eval.benchmark import benchmark_report

        path = problem_file(data)
        system = PAPER_SYSTEM if prompts == "paper" else None
        benchmark_report(
            lambda tokenizer, _: aime_prompts(path, tokenizer, num_samples, system),
            prompts,
            target, draft, url, plain_url, output, temperature, max_tokens, nodes, max_model_len,
            **engine_options(kv_cache_gib, dtype),
        )  # fmt: skip


@app.command()
def replay(
    target: Annotated[str, typer.Option(help="Target model, folder or repository.")],
    draft: Annotated[list[Path], typer.Option(help="Folder of a LongSpec draft; repeatable.")],
    data: Annotated[str, typer.Option(help=DATA)],
    context: Annotated[list[int], typer.Option(min=1, help="Prompt tokens; repeatable.")] = [
        2048,
        8192,
        16384,
    ],
    temperature: Temperatures = [0.0, 0.8],
    nodes: Annotated[list[int], typer.Option(min=1, help="Nodes verified; repeatable.")] = [68],
    tree_shape: Annotated[str, typer.Option(help="Nodes per level.")] = "4 16 16 16 16",
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 20,
    kind: Kinds = ["code"],
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here, as .png or .svg.")] = None,
) -> None:
    """Mean acceptance length of many drafts by context length, without serving them: the target
    writes each continuation once and every draft is replayed against it.

    On a GPU where there is one (bf16), else on the CPU (float32). Gives what `eval acceptance`
    counts, but for copies of the text, in seconds a draft; speed is measured by `bench e2e`.
    """
    with mistakes_in_a_sentence():
        check_source(data)
        check_local(target, "target")
        for folder in draft:
            check_local(folder, "draft")
        from vllm_longspec.eval.replay import replay_report

        replay_report(
            target, draft, data, context, temperature, nodes, tree_shape, num_prompts, max_tokens,
            output, plot, kind,
        )  # fmt: skip
