"""Tokens per second of plain decoding and of LongSpec, with a text's acceptance at any shape.

As in `bench/cycle.py` weights are dummies and contexts are made up; the draft is right as often as
a text's (`bench/synthetic.py`). Everything between the requests and their tokens is the engine as
it serves. One engine each for all contexts, batch sizes and texts.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_longspec.bench.cycle import (
    Engine,
    decode_options,
    engine_to_measure,
    in_turn,
    kv_capacity,
    random_prompts,
)
from vllm_longspec.bench.report import PLAIN
from vllm_longspec.bench.shapes import check_device, draft_config, target_config, write_config
from vllm_longspec.bench.synthetic import NAMED_TEXTS
from vllm_longspec.errors import LongSpecError, listed
from vllm_longspec.output import claim_folder
from vllm_longspec.report import environment, markdown
from vllm_longspec.writing import write_json, write_text

LONGSPEC = "LongSpec"
RUNS = 2
WARM_UP_TOKENS = 64  # of each request, before its batch is timed
# More tokens than are timed, so that a lucky request does not end before the others had theirs.
SPARE_FACTOR = 3
SPARE_SLOTS = 1024  # tokens of the cache beside a request's own: its ring, its tree


@dataclass
class Throughput:
    """One engine with one text at one context length and batch size."""

    proposer: str
    text: str  # of NAMED_TEXTS; plain decoding has none: ""
    context: int
    batch: int
    runs: list[float]  # tokens/s of all requests together
    tokens_per_step: float  # of a request, over the runs
    step_ms: float  # from one step to the next, over the runs
    # Of LongSpec, over the runs: steps by plan, and the milliseconds that it expects of a step with
    # each plan of this batch size: the device's, and with what it saw of the host.
    steps: dict[str, int] = field(default_factory=dict)
    expected_ms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        return statistics.median(self.runs)


def throughput_report(
    shape: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    texts: Sequence[str],
    tokens: int,
    draft_vocab_size: int,
    output: Path,
    side_by_side: bool = False,
    **engine: Any,
) -> list[Throughput]:
    """Writes throughput.json and throughput.md to `output`, each result as it comes, and
    prints the table. Raises LongSpecError for an unknown shape or text."""
    claim_folder(output, ("throughput.json", "throughput.md"))
    unknown = [text for text in texts if text not in NAMED_TEXTS]
    if unknown:
        raise LongSpecError(f"text: {unknown[0]!r} is none of {listed(list(NAMED_TEXTS), 9)}")
    config, draft = target_config(shape), draft_config(shape)
    check_device(shape)
    if draft_vocab_size:
        draft.draft_vocab_size = draft_vocab_size
    output.mkdir(parents=True, exist_ok=True)
    points = [(context, batch) for context in contexts for batch in batches]
    results: list[Throughput] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(shape, folder / "target")
        draft.save_pretrained(folder / "draft")
        longest = max(contexts) + most_new_tokens(tokens)
        options = decode_options(folder / "target", longest, max(batches)) | engine
        extension = "vllm_longspec.bench.dummy_weights.DummyWeights"
        plain = options | {"worker_extension_cls": extension}
        longspec = {
            "speculative_config": {"method": "longspec", "model": str(folder / "draft")},
            "worker_extension_cls": "vllm_longspec.bench.synthetic_worker.SyntheticAcceptance",
        }
        vocab_size = config.vocab_size
        engines = [
            Engine(PLAIN, run_engine, plain, PLAIN, points, [""], tokens, vocab_size),
            Engine(
                LONGSPEC, run_engine, options | longspec, LONGSPEC, points, texts, tokens,
                vocab_size,
            ),
        ]  # fmt: skip
        with closing(in_turn(engines, side_by_side)) as ready:
            for process in ready:
                for result in process.measured():
                    results.append(result)
                    write_record(output, shape, tokens, results)
                    print(
                        f"{result.proposer} {result.text}: {result.batch} at once, "
                        f"{result.context:,} tokens each: {result.speed:.1f} tokens/s",
                        flush=True,
                    )
    print(throughput_table(results))
    return results


def most_new_tokens(tokens: int) -> int:
    return SPARE_FACTOR * (min(WARM_UP_TOKENS, tokens) + tokens) + SPARE_FACTOR


def run_engine(
    pipe: Connection,
    options: dict[str, Any],
    name: str,
    points: list[tuple[int, int]],
    texts: list[str],
    tokens: int,
    vocab_size: int,
) -> None:
    """In a process of its own."""
    with engine_to_measure(pipe, options, name) as llm:
        for context, batch in points:
            if batch * (context + most_new_tokens(tokens) + SPARE_SLOTS) > kv_capacity(llm):
                continue
            prompts = random_prompts(batch, context, vocab_size)
            for text in texts:
                runs = []
                for seed in range(RUNS):
                    if text:
                        llm.collective_rpc("synthetic_text", args=(text, seed))
                    runs.append(decode(llm, prompts, tokens, count_plans=bool(text)))
                pipe.send(
                    Throughput(
                        name,
                        text,
                        context,
                        batch,
                        [run.speed for run in runs],
                        statistics.fmean(run.tokens_per_step for run in runs),
                        statistics.fmean(run.step_ms for run in runs),
                        dict(sum((run.steps for run in runs), Counter())),
                        expected_ms(llm, batch, batch * context) if text else {},
                    )
                )
        pipe.send(None)


@dataclass
class Run:
    speed: float  # tokens/s of all requests together
    tokens_per_step: float  # of a request
    step_ms: float
    steps: Counter[str]  # by plan


def steps_by_plan(llm: Any) -> Counter[str]:
    return Counter(llm.collective_rpc("steps_by_plan")[0])


def expected_ms(llm: Any, num_reqs: int, num_context: int) -> dict[str, list[float]]:
    expected: dict[str, list[float]] = llm.collective_rpc(
        "expected_ms", args=(num_reqs, num_context)
    )[0]
    return expected


def decode(llm: Any, prompts: Sequence[Any], tokens: int, count_plans: bool = False) -> Run:
    """While all requests decode, for `tokens` each on average after a warm-up. It ends early with
    the first request that does. Tokens are drawn: greedy ones of dummy weights soon are the same
    for all requests, which then wake few of a target's experts."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        max_tokens=most_new_tokens(tokens), temperature=1.0, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    engine = llm.llm_engine
    names = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    warm_up = min(WARM_UP_TOKENS, tokens)
    generated = dict.fromkeys(map(str, range(len(prompts))), 0)
    started, counted, steps, ended = 0.0, 0, 0, False
    engine_steps, before = 0, Counter[str]()
    while not ended and counted < tokens * len(prompts):
        outputs = engine.step()
        for output in outputs:
            new = len(output.outputs[0].token_ids)
            generated[output.request_id] += new
            if started:
                counted, steps = counted + new, steps + 1
            ended = ended or output.finished
        engine_steps += bool(started)
        seconds = time.perf_counter() - started
        if not started and min(generated.values()) >= warm_up:
            before = steps_by_plan(llm) if count_plans else before
            started = time.perf_counter()
    used = steps_by_plan(llm) - before if count_plans else before
    engine.abort_request(names, internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    if counted == 0:
        raise LongSpecError(
            "tokens: a request ended before all others had begun; raise --kv-cache-gib or lower "
            "--batch"
        )
    return Run(counted / seconds, counted / steps, 1e3 * seconds / engine_steps, used)


def write_record(output: Path, shape: str, tokens: int, results: Sequence[Throughput]) -> None:
    record = {
        "environment": environment(),
        "shape": shape,
        "tokens": tokens,
        "results": [
            asdict(r) | {"speed": r.speed, "over_plain": over(r, results)} for r in results
        ],
    }
    write_json(output / "throughput.json", record)
    write_text(output / "throughput.md", throughput_table(results))


def over(result: Throughput, results: Sequence[Throughput]) -> float | None:
    """Over plain decoding's speed at the same point."""
    point = (PLAIN, result.context, result.batch)
    plain = [r for r in results if (r.proposer, r.context, r.batch) == point]
    return result.speed / plain[0].speed if plain else None


def throughput_table(results: Sequence[Throughput]) -> str:
    """Markdown, a row per engine, text and point."""
    header = ["context", "at once", "text", "tokens/s", "two runs", "over plain", "tokens a step"]
    header += ["ms a step", "plans"]
    rows = [header, ["---"] * len(header)]
    for r in sorted(results, key=lambda r: (r.context, r.batch)):
        ratio = over(r, results)
        rows.append(
            [
                f"{r.context:,}",
                str(r.batch),
                r.text or r.proposer,
                f"{r.speed:.1f}",
                " ".join(f"{run:.1f}" for run in r.runs),
                "" if ratio is None else f"{ratio:.2f}x",
                f"{r.tokens_per_step:.2f}",
                f"{r.step_ms:.2f}",
                "; ".join(f"{name}: {steps}" for name, steps in r.steps.items()),
            ]
        )
    return markdown(rows)
