"""Many prompts through vLLM's `LLM` with LongSpec, and what was accepted.

python examples/offline_batch.py [--prompts FILE] [--target TARGET --draft DRAFT]
"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from served import DRAFT, TARGET, engine_options

from vllm_longspec.commands import fail
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.acceptance import read_counters
from vllm_longspec.output import claim_file
from vllm_longspec.records import read_objects, string_field


def read_prompts(path: Path) -> list[str]:
    """The field `prompt` or `text` of each line. Raises LongSpecError."""
    return [
        string_field(record, "prompt" if "prompt" in record else "text", where)
        for where, record in read_objects(path)
    ]


def python_prompts() -> list[str]:
    """The beginnings of some modules of Python's own library."""
    modules = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    texts = [path.read_text() for path in modules if path.stat().st_size > 20_000]
    return [text[: 1000 + 100 * i] for i, text in enumerate(texts[:12])]


def main(
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines with "prompt" or "text"; else Python modules.')
    ] = None,
    target: Annotated[str, typer.Option(help="Target model.")] = TARGET,
    draft: Annotated[str, typer.Option(help="Its LongSpec draft.")] = DRAFT,
    max_tokens: Annotated[int, typer.Option(help="New tokens a prompt at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    output: Annotated[Path | None, typer.Option(help="Write the outputs here, JSON lines.")] = None,
) -> None:
    """Generate for many prompts at once, offline, and print what was accepted."""
    try:
        if output is not None:
            claim_file(output, ("prompt", "output"), inputs=(target, draft))
        texts = read_prompts(prompts) if prompts else python_prompts()
    except LongSpecError as error:
        fail(str(error))
    from vllm import LLM, SamplingParams

    llm = LLM(
        target, speculative_config={"method": "longspec", "model": draft},
        disable_log_stats=False, **engine_options(),
    )  # fmt: skip
    start = time.perf_counter()
    answers = llm.generate(texts, SamplingParams(temperature=temperature, max_tokens=max_tokens))
    seconds = time.perf_counter() - start
    counters = read_counters(llm)
    if output:
        lines = (
            json.dumps({"prompt": text, "output": answer.outputs[0].text})
            for text, answer in zip(texts, answers, strict=True)
        )
        output.write_text("".join(f"{line}\n" for line in lines))

    tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
    verifications = max(1, counters.drafts)
    table = Table(title=f"{len(texts)} prompts, {tokens} tokens in {seconds:.1f} s")
    table.add_column("nodes accepted by a verification, at least")
    table.add_column("share", justify="right")
    for depth, accepted in enumerate(counters.depths, start=1):
        if accepted:
            table.add_row(str(depth), f"{accepted / verifications:.0%}")
    mean = 1 + sum(counters.depths) / verifications
    table.add_row("mean acceptance length", f"{mean:.2f}", style="bold")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
