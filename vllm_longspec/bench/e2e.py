"""Tokens per second end to end: plain vLLM, its n-gram proposer, LongSpec as a chain and as a tree.

With a small trained pair inflated to a large shape (`bench/inflate.py`), acceptance is a real
draft's and the cost is the large model's.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_longspec.bench.cycle import PAPER_TREE, chosen
from vllm_longspec.bench.report import PLAIN
from vllm_longspec.config import read_tokenizer
from vllm_longspec.eval.acceptance import (
    NGRAM,
    SPARE_TOKENS,
    WARM_UP_TOKENS,
    Acceptance,
    check_pair,
    check_served_length,
    decode,
    held_out_prompts,
)
from vllm_longspec.output import claim_folder
from vllm_longspec.report import environment, markdown
from vllm_longspec.writing import write_text

RUNS = 2


@dataclass
class EndToEnd:
    context: int  # tokens of each prompt
    concurrency: int  # requests at once
    decoded: Acceptance  # of the first run
    runs: list[list[float]]  # of each run, tokens/s of each group of requests decoded together

    @property
    def speed(self) -> float:
        """Tokens/s, the median over the groups of all runs."""
        return statistics.median(speed for run in self.runs for speed in run)


def proposers(draft: str) -> dict[str, Any]:
    longspec = {"method": "longspec", "model": draft}
    chain = {"tree_shape": [1] * 5, "num_speculative_tokens": 5}
    return {
        PLAIN: None,
        "n-gram, 4 tokens": NGRAM,
        "LongSpec, chain of 5": longspec | chain,
        "LongSpec, 4 16 16 16 16, 31 nodes": longspec | PAPER_TREE,
        "LongSpec, default": longspec,
    }


def e2e_report(
    target: str,
    draft: str,
    data: Path | str,
    output: Path,
    contexts: Sequence[int],
    temperatures: Sequence[float],
    num_prompts: int,
    max_tokens: int,
    concurrencies: Sequence[int],
    only: Sequence[str] = (),
    **engine: Any,
) -> list[EndToEnd]:
    """Writes e2e.json and e2e.md to `output`, each result as it comes, and prints the table; one
    engine after the other, each on every context length, number of requests at once and
    temperature, twice."""
    claim_folder(output, ("e2e.json", "e2e.md"), inputs=(target, draft))
    configs = chosen(proposers(draft), only)
    check_pair(target, draft)
    check_served_length(target, max(contexts) + max_tokens)
    tokenizer = read_tokenizer(target)
    prompts = {
        context: held_out_prompts(
            data,
            tokenizer,
            max(num_prompts, *concurrencies),
            context,
            context,
            max_tokens=max_tokens,
        )
        for context in contexts
    }
    from vllm import LLM

    output.mkdir(parents=True, exist_ok=True)
    results: list[EndToEnd] = []
    for name, config in configs.items():
        llm = LLM(
            target,
            speculative_config=config,
            disable_log_stats=False,
            max_model_len=max(contexts) + max_tokens + SPARE_TOKENS,
            max_num_seqs=max(concurrencies),
            **engine,
        )
        for context in contexts:
            decode(llm, name, prompts[context], 0.0, WARM_UP_TOKENS, max(concurrencies))
            for concurrency in concurrencies:
                these = prompts[context][: max(num_prompts, concurrency)]
                for temperature in temperatures:
                    measured = [
                        decode(llm, name, these, temperature, max_tokens, concurrency)
                        for _ in range(RUNS)
                    ]
                    speeds = [run.speeds for run in measured]
                    results.append(EndToEnd(context, concurrency, measured[0], speeds))
                    write_record(output, max_tokens, results)
        llm.llm_engine.engine_core.shutdown()
    print(e2e_table(results))
    return results


def write_record(output: Path, max_tokens: int, results: Sequence[EndToEnd]) -> None:
    record = {
        "environment": environment(),
        "max_tokens": max_tokens,
        "results": [asdict(result) for result in results],
    }
    write_text(output / "e2e.json", json.dumps(record))
    write_text(output / "e2e.md", e2e_table(results))


def ratio(result: EndToEnd, reference: EndToEnd | None) -> str:
    return "" if reference is None else f"{result.speed / reference.speed:.2f}x"


def same(result: EndToEnd, reference: EndToEnd | None) -> str:
    """How many outputs are plain decoding's, token for token; in bf16 near-ties may flip."""
    if reference is None:
        return ""
    ours, theirs = result.decoded.outputs, reference.decoded.outputs
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return f"{equal} of {len(ours)}"


def e2e_table(results: Sequence[EndToEnd]) -> str:
    plain = {
        (r.context, r.concurrency, r.decoded.temperature): r
        for r in results
        if r.decoded.proposer == PLAIN
    }
    header = ["context", "at once", "T", "proposer", "tokens/s", "two runs", "over plain"]
    header += ["acceptance length", "same tokens", "repeated 8-grams"]
    rows = [header, ["---"] * len(header)]
    for r in sorted(results, key=lambda r: (r.context, r.concurrency, r.decoded.temperature)):
        decoded = r.decoded
        reference = plain.get((r.context, r.concurrency, decoded.temperature))
        rows.append(
            [
                f"{r.context:,}",
                str(r.concurrency),
                f"{decoded.temperature:g}",
                decoded.proposer,
                f"{r.speed:.1f}",
                " ".join(f"{statistics.median(run):.1f}" for run in r.runs),
                ratio(r, reference),
                f"{decoded.mean_acceptance_length:.2f}" if decoded.verifications else "",
                same(r, reference),
                f"{decoded.repeated_8grams:.0%}",
            ]
        )
    return markdown(rows)
