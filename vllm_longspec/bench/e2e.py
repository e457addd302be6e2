"""Tokens per second end to end: plain vLLM, its n-gram proposer, LongSpec as a chain and as a tree.

With a small trained pair inflated to a large shape (`bench/inflate.py`), acceptance is a real
draft's and the cost is the large model's.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vllm_longspec.bench.cycle import PAPER_TREE, PLAIN, environment
from vllm_longspec.eval.acceptance import NGRAM, Acceptance, decode, held_out_prompts

WARM_UP_TOKENS = 32  # they also fill the prefix cache, so that the prompts are not timed


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
    data: Path,
    output: Path,
    contexts: Sequence[int],
    temperatures: Sequence[float],
    num_prompts: int,
    max_tokens: int,
    concurrency: int,
    only: Sequence[str] = (),
    **engine: Any,
) -> list[tuple[int, Acceptance]]:
    """Writes e2e.json and e2e.md to `output` and prints the table; `concurrency` requests at a
    time, one engine after the other, each on every context length and temperature."""
    from vllm import LLM

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = {
        context: held_out_prompts(data, tokenizer, num_prompts, context, context)
        for context in contexts
    }
    output.mkdir(parents=True, exist_ok=True)
    results: list[tuple[int, Acceptance]] = []
    for name, config in proposers(draft).items():
        if only and name not in only:
            continue
        llm = LLM(
            target,
            speculative_config=config,
            disable_log_stats=False,
            max_model_len=max(contexts) + max_tokens + 64,
            max_num_seqs=concurrency,
            **engine,
        )
        for context in contexts:
            decode(llm, name, prompts[context], 0.0, WARM_UP_TOKENS, concurrency)
            for temperature in temperatures:
                result = decode(llm, name, prompts[context], temperature, max_tokens, concurrency)
                results.append((context, result))
        llm.llm_engine.engine_core.shutdown()
    rows = [{"context": context} | asdict(result) for context, result in results]
    record = {
        "environment": environment(),
        "max_tokens": max_tokens,
        "concurrency": concurrency,
        "results": rows,
    }
    (output / "e2e.json").write_text(json.dumps(record))
    table = e2e_table(results)
    (output / "e2e.md").write_text(table)
    print(table)
    return results


def ratio(result: Acceptance, reference: Acceptance | None) -> str:
    if reference is None:
        return ""
    return f"{result.tokens_per_second / reference.tokens_per_second:.2f}x"


def same(result: Acceptance, reference: Acceptance | None) -> str:
    """How many outputs are plain decoding's, token for token; in bf16 near-ties may flip."""
    if reference is None:
        return ""
    equal = sum(a == b for a, b in zip(result.outputs, reference.outputs, strict=True))
    return f"{equal} of {len(result.outputs)}"


def e2e_table(results: Sequence[tuple[int, Acceptance]]) -> str:
    plain = {
        (context, result.temperature): result
        for context, result in results
        if result.proposer == PLAIN
    }
    header = ["context", "T", "proposer", "tokens/s", "over plain", "acceptance length"]
    header += ["same tokens", "repeated 8-grams"]
    rows = [header, ["---"] * len(header)]
    for context, result in sorted(results, key=lambda r: (r[0], r[1].temperature)):
        reference = plain.get((context, result.temperature))
        rows.append(
            [
                f"{context:,}",
                f"{result.temperature:g}",
                result.proposer,
                f"{result.tokens_per_second:.1f}",
                ratio(result, reference),
                f"{result.mean_acceptance_length:.2f}" if result.verifications else "",
                same(result, reference),
                f"{result.repeated_8grams:.0%}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
