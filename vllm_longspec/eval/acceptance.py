"""Mean acceptance length of a draft, served through vLLM on held-out text."""

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_longspec.config import LongSpecError

REPEAT_LENGTH = 8
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4,
         "prompt_lookup_min": 2}  # fmt: skip


@dataclass
class Acceptance:
    """One proposer at one temperature."""

    proposer: str
    temperature: float
    tokens: int
    verifications: int
    mean_acceptance_length: float  # tokens per verification, the bonus token included
    per_depth: list[float]  # share of verifications that accepted at least 1, 2, ... nodes
    repeated_8grams: float  # share of the output's 8-grams that the output held before
    # From the first token to the last of the prompts decoded together, prefill left out.
    tokens_per_second: float
    outputs: list[list[int]]


def held_out_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    shortest: int,
    longest: int,
    kind: str = "code",
) -> list[list[int]]:
    """`count` prompts of evenly spread lengths, taken in turn from the documents of `kind` that are
    long enough, each further into its document than the last one from it."""
    if not path.is_file():
        raise LongSpecError(f"data: {path} is not a file; give JSON lines, plain or .xz")
    opened = lzma.open(path, "rt") if path.suffix == ".xz" else path.open()
    with opened as lines:
        records = [json.loads(line) for line in lines]
    texts = [record["text"] for record in records if record.get("kind", kind) == kind]
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    documents = [ids for ids in documents if len(ids) >= 2 * longest]
    if not documents:
        raise LongSpecError(f"data: no {kind} document in {path} has {2 * longest} tokens")
    prompts = []
    for i in range(count):
        ids = documents[i % len(documents)]
        length = shortest + i * (longest - shortest) // max(1, count - 1)
        start = (i // len(documents) * longest) % (len(ids) - length)
        prompts.append(ids[start : start + length])
    return prompts


def repeated_share(outputs: Sequence[Sequence[int]], length: int = REPEAT_LENGTH) -> float:
    """Share of the n-grams of each output that stand earlier in the same output."""
    repeated = total = 0
    for tokens in outputs:
        seen = set()
        for i in range(len(tokens) - length + 1):
            gram = tuple(tokens[i : i + length])
            repeated += gram in seen
            total += 1
            seen.add(gram)
    return repeated / max(1, total)


def measure(
    target: str,
    proposers: Mapping[str, dict[str, Any] | None],
    prompts: list[list[int]],
    temperatures: Sequence[float],
    max_tokens: int,
    **engine: Any,
) -> list[Acceptance]:
    """One vLLM engine per proposer (a `speculative_config` each, None: plain decoding); all prompts
    together at every temperature."""
    from vllm import LLM

    results = []
    for name, speculative_config in proposers.items():
        llm = LLM(target, speculative_config=speculative_config, disable_log_stats=False, **engine)
        for temperature in temperatures:
            results.append(decode(llm, name, prompts, temperature, max_tokens, len(prompts)))
        llm.llm_engine.engine_core.shutdown()
    return results


def decode(
    llm: Any,
    proposer: str,
    prompts: list[list[int]],
    temperature: float,
    max_tokens: int,
    concurrency: int,
) -> Acceptance:
    """All prompts, `concurrency` at a time, seeded by their number.

    Outputs run to `max_tokens`, end-of-text tokens included, so that all proposers decode the same
    number of tokens.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=i,
            ignore_eos=True,
            detokenize=False,
        )
        for i in range(len(prompts))
    ]
    before = read_counters(llm)
    outputs, decoded, seconds = [], 0, 0.0
    for start in range(0, len(prompts), concurrency):
        together = slice(start, start + concurrency)
        finished = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts[together]],
            params[together],
            use_tqdm=False,
        )
        outputs += [list(request.outputs[0].token_ids) for request in finished]
        decoded += sum(len(request.outputs[0].token_ids) - 1 for request in finished)
        first = min(request.metrics.first_token_ts for request in finished)
        seconds += max(request.metrics.last_token_ts for request in finished) - first
    after = read_counters(llm)
    drafts = after["drafts"] - before["drafts"]
    accepted = [a - b for a, b in zip(after["depths"], before["depths"], strict=True)]
    return Acceptance(
        proposer=proposer,
        temperature=temperature,
        tokens=sum(map(len, outputs)),
        verifications=drafts,
        mean_acceptance_length=1 + sum(accepted) / max(1, drafts),
        per_depth=[a / max(1, drafts) for a in accepted if a],
        repeated_8grams=repeated_share(outputs),
        tokens_per_second=decoded / seconds,
        outputs=outputs,
    )


def read_counters(llm: Any) -> dict[str, Any]:
    """vLLM's spec-decode counters: verifications, and accepted nodes by depth."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in metrics:
        return {"drafts": 0, "depths": []}
    per_depth = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"]
    return {
        "drafts": metrics["vllm:spec_decode_num_drafts"].value,
        "depths": list(per_depth.values),
    }


def acceptance_report(
    target: str,
    draft: str,
    data: Path,
    output: Path | None,
    nodes: Sequence[int],
    temperatures: Sequence[float],
    max_tokens: int,
    num_prompts: int,
    **engine: Any,
) -> None:
    console = Console(width=120)
    prompts = held_out_prompts(
        data, AutoTokenizer.from_pretrained(target), num_prompts, shortest=1000, longest=4000
    )
    proposers: dict[str, dict[str, Any]] = {
        f"LongSpec, {count} nodes": {
            "method": "longspec", "model": draft, "num_speculative_tokens": count,
        }
        for count in nodes
    }  # fmt: skip
    proposers["LongSpec, chain of 5"] = {
        "method": "longspec", "model": draft, "tree_shape": [1] * 5, "num_speculative_tokens": 5,
    }  # fmt: skip
    proposers["vLLM n-gram, 4 tokens"] = NGRAM
    results = measure(target, proposers, prompts, temperatures, max_tokens, **engine)
    table = Table(title=f"{num_prompts} prompts of 1k to 4k tokens, {max_tokens} new tokens each")
    for column in ("proposer", "T", "acceptance length", "accepted to depth 1, 2, ...", "repeats"):
        table.add_column(column)
    for result in results:
        table.add_row(
            result.proposer,
            f"{result.temperature:g}",
            f"{result.mean_acceptance_length:.2f}",
            " ".join(f"{share:.2f}" for share in result.per_depth),
            f"{result.repeated_8grams:.0%}",
        )
    console.print(table)
    if output is not None:
        output.write_text(json.dumps([asdict(result) for result in results], indent=1))
