"""Mean acceptance length of a draft, served through vLLM on held-out text."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from vllm_longspec.config import (
    check_shape,
    context_length,
    read_target_config,
    read_tokenizer,
    resolve_tree,
)
from vllm_longspec.draft.checkpoint import check_checkpoint, fetch_draft, read_draft_config
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.server import ACCEPTED_BY_DEPTH, DRAFTS, Counters
from vllm_longspec.output import claim_file
from vllm_longspec.records import read_documents
from vllm_longspec.train.tokens import first_token
from vllm_longspec.writing import write_json

REPEAT_LENGTH = 8
WARM_UP_TOKENS = 32  # they also fill the prefix cache, so that the prompts are not timed
# Of the engine's max_model_len, beyond prompt and output. vLLM's scheduler counts a tree in flight
# as if all of it were accepted and cuts the next at max_model_len: the deepest nodes go first.
SPARE_TOKENS = 256
KINDS = ("code",)  # of held-out text, where none is asked for
PROPOSERS = ("tree", "chain", "ngram")
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
    speeds: list[float] = field(default_factory=list)  # the same of each group, where measured


def held_out_prompts(
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    shortest: int,
    longest: int,
    kinds: Collection[str] = KINDS,
    *,
    max_tokens: int,
) -> list[list[int]]:
    """`count` different prompts of evenly spread lengths, taken in turn from the documents of these
    kinds that have `max_tokens` more than the longest, from places spread over each document.

    `path`: any source that `records.py` reads. Raises LongSpecError for one that cannot be read
    and for too little text.
    """
    texts = [
        document.text
        for document in read_documents(path, tokenizer)
        if document.kind is None or document.kind in kinds
    ]
    named, first = " or ".join(kinds), first_token(tokenizer)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    documents = [ids for ids in documents if len(ids) >= longest + max_tokens]
    if not documents:
        raise LongSpecError(
            f"data: no {named} document in {path} has {longest + max_tokens} tokens, prompt and "
            "output; give longer documents or a shorter context"
        )
    turns = -(-count // len(documents))
    prompts = []
    for i in range(count):
        ids = documents[i % len(documents)]
        length = shortest + i * (longest - shortest) // max(1, count - 1)
        start = i // len(documents) * (len(ids) - length - max_tokens) // turns
        prompts.append(ids[start : start + length])
    prompts = prompt_ends(prompts, longest, first)
    if len(set(map(tuple, prompts))) < count:
        raise LongSpecError(
            f"data: {path} has too few {named} documents for {count} different prompts of "
            f"{longest} tokens; ask for fewer prompts"
        )
    return prompts


def prompt_ends(
    prompts: Sequence[Sequence[int]], context: int, first: int | None
) -> list[list[int]]:
    """The last `context` tokens of each, the first of which is what the tokenizer puts before a
    text, if anything."""
    ends = [list(prompt[-context:]) for prompt in prompts]
    return ends if first is None else [[first, *end[1:]] for end in ends]


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
    prompts: Mapping[Any, list[list[int]]],
    temperatures: Sequence[float],
    max_tokens: int,
    **engine: Any,
) -> Iterator[tuple[Any, Acceptance]]:
    """One vLLM engine per proposer (a `speculative_config` each, None: plain decoding); the prompts
    of one key together at every temperature, as (key, result)."""
    from vllm import LLM

    for name, speculative_config in proposers.items():
        llm = LLM(target, speculative_config=speculative_config, disable_log_stats=False, **engine)
        for key, together in prompts.items():
            decode(llm, name, together, 0.0, WARM_UP_TOKENS, len(together))
            for temperature in temperatures:
                yield key, decode(llm, name, together, temperature, max_tokens, len(together))
        llm.llm_engine.engine_core.shutdown()


def decode(
    llm: Any,
    proposer: str,
    prompts: list[list[int]],
    temperature: float,
    max_tokens: int,
    concurrency: int,
    ignore_eos: bool = True,
) -> Acceptance:
    """All prompts, `concurrency` at a time, seeded by their number.

    With `ignore_eos` outputs run to `max_tokens`, end-of-text tokens included, so that all
    proposers decode the same number of tokens.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=i,
            ignore_eos=ignore_eos,
            detokenize=False,
        )
        for i in range(len(prompts))
    ]
    before = read_counters(llm)
    outputs: list[list[int]] = []
    groups: list[tuple[int, float]] = []  # tokens decoded together and how long it took
    for start in range(0, len(prompts), concurrency):
        together = slice(start, start + concurrency)
        finished = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts[together]],
            params[together],
            use_tqdm=False,
        )
        outputs += [list(request.outputs[0].token_ids) for request in finished]
        decoded = sum(len(request.outputs[0].token_ids) - 1 for request in finished)
        first = min(request.metrics.first_token_ts for request in finished)
        last = max(request.metrics.last_token_ts for request in finished)
        groups.append((decoded, last - first))
    after = read_counters(llm)
    decoded, seconds = sum(tokens for tokens, _ in groups), sum(time for _, time in groups)
    result = summary(proposer, temperature, outputs, before, after, decoded, seconds)
    result.speeds = [tokens / time for tokens, time in groups if time > 0]
    return result


def summary(
    proposer: str,
    temperature: float,
    outputs: list[list[int]],
    before: Counters,
    after: Counters,
    decoded: int,
    seconds: float,
) -> Acceptance:
    """`outputs` with what the counters rose by meanwhile. `decoded` tokens, each request's first
    left out, took `seconds`."""
    drafts = after.drafts - before.drafts
    accepted = [a - b for a, b in zip(after.depths, before.depths, strict=True)]
    return Acceptance(
        proposer=proposer,
        temperature=temperature,
        tokens=sum(map(len, outputs)),
        verifications=drafts,
        mean_acceptance_length=1 + sum(accepted) / max(1, drafts),
        per_depth=[a / max(1, drafts) for a in accepted if a],
        repeated_8grams=repeated_share(outputs),
        tokens_per_second=decoded / seconds if decoded else 0.0,
        outputs=outputs,
    )


def read_counters(llm: Any) -> Counters:
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if DRAFTS not in metrics:
        return Counters(0, [])
    return Counters(metrics[DRAFTS].value, list(metrics[ACCEPTED_BY_DEPTH].values))


def proposer_configs(
    draft: str, chosen: Sequence[str], nodes: Sequence[int], tree_shapes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`speculative_config`s of the proposers chosen among PROPOSERS; the tree's once for each
    number of `nodes` and tree shape."""
    unknown = [name for name in chosen if name not in PROPOSERS]
    if unknown:
        raise LongSpecError(f"proposer: {unknown[0]!r} is none of {', '.join(PROPOSERS)}")
    # The tree that was asked for at every step, whatever is accepted: that is what is measured.
    longspec = {"method": "longspec", "model": draft, "enable_adaptive_verification": False}
    chain = {"tree_shape": [1] * 5, "num_speculative_tokens": 5}
    configs: dict[str, dict[str, dict[str, Any]]] = {
        "tree": {
            f"LongSpec, {count} nodes of {shape}": longspec
            | resolve_tree(shape, count).model_dump()
            for shape in tree_shapes
            for count in nodes
        },
        "chain": {"LongSpec, chain of 5": longspec | chain},
        "ngram": {"vLLM n-gram, 4 tokens": NGRAM},
    }
    return {name: config for kind in chosen for name, config in configs[kind].items()}


def check_pair(target: str, draft: str) -> None:
    """Raises LongSpecError for a draft that an engine with this target would refuse, only later."""
    folder = fetch_draft(draft)
    config = read_draft_config(folder)
    check_checkpoint(folder, config)
    check_shape(config, read_target_config(target))


def check_served_length(target: str, tokens: int) -> None:
    """Raises LongSpecError for prompt and output longer than the target is made for."""
    longest = context_length(read_target_config(target))
    if tokens > longest:
        raise LongSpecError(
            f"context: prompt and output of {tokens} tokens are more than the target's {longest} "
            "positions; lower --context or --max-tokens"
        )


def acceptance_report(
    target: str,
    draft: str,
    data: Path | str,
    output: Path | None,
    contexts: Sequence[int],
    proposers: Sequence[str],
    nodes: Sequence[int],
    tree_shapes: Sequence[str],
    temperatures: Sequence[float],
    max_tokens: int,
    num_prompts: int,
    max_model_len: int | None,
    kinds: Collection[str] = KINDS,
    **engine: Any,
) -> None:
    """Prints a row for each proposer, context length and temperature as it is measured; `output`
    holds at any time what is measured so far.

    Without `contexts`: prompts of 1k to 4k tokens. With them, a prompt of a shorter context is the
    end of the one of the longest, so that all are continued at the same places of the text.
    """
    if output is not None:
        claim_file(output, ("context", "proposer", "per_depth"), inputs=(target, draft))
    configs = proposer_configs(draft, proposers, nodes, tree_shapes)
    check_pair(target, draft)
    check_served_length(target, max(contexts, default=4000) + max_tokens)
    tokenizer = read_tokenizer(target)
    longest = max(contexts, default=4000)
    shortest = longest if contexts else 1000
    whole = held_out_prompts(
        data, tokenizer, num_prompts, shortest, longest, kinds, max_tokens=max_tokens
    )
    first = first_token(tokenizer)
    prompts: dict[Any, list[list[int]]] = {
        context: prompt_ends(whole, context, first) for context in contexts
    }
    prompts = prompts or {"1k to 4k": whole}
    engine["max_model_len"] = max_model_len or longest + max_tokens + SPARE_TOKENS
    console = Console(width=120)
    table = Table(title=f"{num_prompts} prompts a context length, {max_tokens} new tokens each")
    for column in ("proposer", "context", "T", "acceptance length", "accepted to depth 1, 2, ...",
                   "repeats", "tokens/s"):  # fmt: skip
        table.add_column(column)
    rows = []
    for context, result in measure(target, configs, prompts, temperatures, max_tokens, **engine):
        cells = (
            result.proposer,
            str(context),
            f"{result.temperature:g}",
            f"{result.mean_acceptance_length:.2f}",
            " ".join(f"{share:.2f}" for share in result.per_depth),
            f"{result.repeated_8grams:.0%}",
            f"{result.tokens_per_second:.1f}",
        )
        console.print(" | ".join(cells))
        table.add_row(*cells)
        rows.append({"context": context, **asdict(result)})
        if output is not None:
            write_json(output, rows)
    console.print(table)
