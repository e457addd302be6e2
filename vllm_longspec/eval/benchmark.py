"""LongSpec against plain decoding of the same prompts in one run, task by task."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_longspec import __version__
from vllm_longspec.config import read_tokenizer
from vllm_longspec.endpoint import base_url
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.acceptance import WARM_UP_TOKENS, Acceptance, check_pair, decode
from vllm_longspec.eval.completions import check_server, decode_on_server
from vllm_longspec.eval.report import comparison_plot, comparison_table
from vllm_longspec.output import claim_folder
from vllm_longspec.report import check_plotting, environment
from vllm_longspec.writing import write_json, write_text

PLAIN = "plain"
LONGSPEC = "LongSpec"
RESULT_FILES = ("results.json", "results.md", "results.png")

Prompts = dict[str, list[list[int]]]  # token ids by task
Decoder = Callable[[list[list[int]], float, int], Acceptance]  # prompts, temperature, max_tokens
Measured = tuple[str, float, Acceptance]  # task, temperature, result


@dataclass
class Comparison:
    """One task at one temperature. What needs plain decoding is None until that was measured."""

    task: str
    temperature: float
    prompts: int
    mean_prompt_tokens: float
    new_tokens: int
    verifications: int
    mean_acceptance_length: float
    per_depth: list[float]  # share of verifications that accepted at least 1, 2, ... nodes
    repeated_8grams: float
    tokens_per_second: float
    plain_tokens_per_second: float | None
    speed_up: float | None
    # Of each prompt: the first token that is not plain decoding's, None if there is none.
    first_differences: list[int | None] | None


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two outputs part; an output that stops parts from one that goes on."""
    pairs = zip(a, b, strict=False)
    shorter = min(len(a), len(b)) if len(a) != len(b) else None
    return next((i for i, (x, y) in enumerate(pairs) if x != y), shorter)


def compare(
    task: str, prompts: list[list[int]], longspec: Acceptance, plain: Acceptance | None
) -> Comparison:
    speed = differences = None
    if plain is not None:
        speed = plain.tokens_per_second
        pairs = zip(plain.outputs, longspec.outputs, strict=True)
        differences = [first_difference(a, b) for a, b in pairs]
    return Comparison(
        task=task,
        temperature=longspec.temperature,
        prompts=len(prompts),
        mean_prompt_tokens=sum(map(len, prompts)) / len(prompts),
        new_tokens=longspec.tokens,
        verifications=longspec.verifications,
        mean_acceptance_length=longspec.mean_acceptance_length,
        per_depth=longspec.per_depth,
        repeated_8grams=longspec.repeated_8grams,
        tokens_per_second=longspec.tokens_per_second,
        plain_tokens_per_second=speed,
        speed_up=longspec.tokens_per_second / speed if speed else None,
        first_differences=differences,
    )


def measure_tasks(
    decoder: Decoder, prompts: Prompts, temperatures: Sequence[float], max_tokens: int
) -> Iterator[Measured]:
    """The first prompt is decoded once before, so that no kernel is compiled while time counts."""
    for temperature in temperatures:
        first = next(iter(prompts.values()))[:1]
        decoder(first, temperature, min(WARM_UP_TOKENS, max_tokens))
    for task, together in prompts.items():
        for temperature in temperatures:
            yield task, temperature, decoder(together, temperature, max_tokens)


def measure_in_engines(
    target: str,
    speculative_config: dict[str, Any],
    prompts: Prompts,
    temperatures: Sequence[float],
    max_tokens: int,
    **engine: Any,
) -> Iterator[Measured]:
    """LongSpec, then plain decoding, each in an engine of its own, one request at a time."""
    from vllm import LLM

    for name, config in ((LONGSPEC, speculative_config), (PLAIN, None)):
        llm = LLM(target, speculative_config=config, disable_log_stats=False, **engine)

        def decoder(
            together: list[list[int]],
            temperature: float,
            new_tokens: int,
            llm: Any = llm,
            name: str = name,
        ) -> Acceptance:
            return decode(llm, name, together, temperature, new_tokens, 1, ignore_eos=False)

        yield from measure_tasks(decoder, prompts, temperatures, max_tokens)
        llm.llm_engine.engine_core.shutdown()


def measure_on_servers(
    url: str,
    plain_url: str,
    prompts: Prompts,
    temperatures: Sequence[float],
    max_tokens: int,
) -> Iterator[Measured]:
    """LongSpec, then plain decoding, one request at a time; the other server idles."""
    for name, server in ((LONGSPEC, url), (PLAIN, plain_url)):
        decoder = partial(decode_on_server, server, name)
        yield from measure_tasks(decoder, prompts, temperatures, max_tokens)


def engine_context_length(target: str, max_model_len: int | None) -> int:
    """What vLLM makes of the target's config and `max_model_len`."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        return EngineArgs(target, max_model_len=max_model_len).create_model_config().max_model_len
    except ValueError as error:
        said = str(error).splitlines()[-1].strip()
        raise LongSpecError(f"target: vLLM cannot serve {target}: {said}") from None


def room_for(prompts: Prompts, context_length: int, max_tokens: int) -> int:
    """`max_tokens`, or what the longest prompt leaves of the context if that is less."""
    longest = max(len(prompt) for together in prompts.values() for prompt in together)
    if longest >= context_length:
        raise LongSpecError(
            f"max_model_len: {context_length} leaves no room to answer a prompt of {longest} "
            "tokens; give a larger one or shorter prompts"
        )
    return min(max_tokens, context_length - longest)


def benchmark_report(
    prompts_for: Callable[[PreTrainedTokenizerBase, int], Prompts],
    frame: str,
    target: str,
    draft: str | None,
    url: str | None,
    plain_url: str | None,
    output: Path,
    temperatures: Sequence[float],
    max_tokens: int,
    nodes: int | None,
    max_model_len: int | None,
    **engine: Any,
) -> list[Comparison]:
    """Measures the prompts that `prompts_for(tokenizer, context length)` makes, in engines of this
    process (`draft`) or over two running servers (`url`, `plain_url`). `frame`: what the prompts
    are framed in, by its name in `eval/paper.py`.

    Writes results.json, results.md and results.png to `output`, anew after each measurement, so
    that a run that was cut off leaves what it measured.
    """
    claim_folder(output, RESULT_FILES, inputs=(target, draft))
    check_plotting()
    if (url is None) != (plain_url is None):
        raise LongSpecError("url: --url and --plain-url go together; give both or neither")
    if (url is None) == (draft is None):
        raise LongSpecError(
            "draft: give either --draft, to run engines here, or --url and --plain-url of running "
            "servers"
        )
    if url is not None and (nodes is not None or max_model_len is not None):
        raise LongSpecError(
            "nodes: --nodes and --max-model-len are for engines started here; set them where the "
            "server is started"
        )
    if draft is not None:
        check_pair(target, draft)
    tokenizer = read_tokenizer(target)
    setup: dict[str, Any]
    if url is not None and plain_url is not None:
        url, plain_url = base_url(url), base_url(plain_url)
        context_length = min(check_server(url, True), check_server(plain_url, False))
        prompts = prompts_for(tokenizer, context_length)
        max_tokens = room_for(prompts, context_length, max_tokens)
        measured = measure_on_servers(url, plain_url, prompts, temperatures, max_tokens)
        setup = {"url": url, "plain_url": plain_url}
        versions = {"vllm-longspec": __version__}
    else:
        context_length = engine_context_length(target, max_model_len)
        prompts = prompts_for(tokenizer, context_length)
        max_tokens = room_for(prompts, context_length, max_tokens)
        speculative_config: dict[str, Any] = {"method": "longspec", "model": draft}
        if nodes is not None:
            speculative_config["num_speculative_tokens"] = nodes
        measured = measure_in_engines(
            target,
            speculative_config,
            prompts,
            temperatures,
            max_tokens,
            max_model_len=context_length,
            **engine,
        )
        setup = {"draft": draft, "speculative_config": speculative_config, "engine": engine}
        versions = environment()
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "environment": versions,
        "target": target,
        "frame": frame,
        **setup,
        "context_length": context_length,
        "max_tokens": max_tokens,
        "seeds": "the prompt's number, from 0",
    }
    return write_results(measured, prompts, target, record, output)


def write_results(
    measured: Iterator[Measured],
    prompts: Prompts,
    target: str,
    record: Mapping[str, Any],
    output: Path,
) -> list[Comparison]:
    output.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, float], dict[str, Acceptance]] = {}
    comparisons: list[Comparison] = []
    for task, temperature, result in measured:
        found.setdefault((task, temperature), {})[result.proposer] = result
        print(
            f"{task}, T={temperature:g}, {result.proposer}: {result.tokens_per_second:.1f} "
            f"tokens/s, acceptance length {result.mean_acceptance_length:.2f}",
            flush=True,
        )
        comparisons = [
            compare(task, prompts[task], by_name[LONGSPEC], by_name.get(PLAIN))
            for (task, _), by_name in found.items()
        ]
        results = [asdict(comparison) for comparison in comparisons]
        write_json(output / "results.json", {**record, "results": results})
        table = comparison_table(comparisons, target, record["frame"])
        write_text(output / "results.md", f"{record['command']}\n\n{table}")
        comparison_plot(comparisons, target, record["frame"], output / "results.png")
    print(comparison_table(comparisons, target, record["frame"]))
    return comparisons
