"""The cost of a cycle: plain decoding, vLLM's EAGLE chains and LongSpec on the same GPU.

Weights are dummies of a named shape and the context is vLLM's own DecodeBenchConnector's random
keys and values, so that no prompt has to be computed and no draft trained; acceptance is synthetic
for EAGLE (vLLM's own) and LongSpec (`CycleProbe.probe_accept`). Everything else is the engine as it
serves: scheduler, CUDA graphs, sampling, compaction.
"""

import json
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_longspec.bench.report import PLAIN, cycle_table, kernel_table, parts_plot, ratio_plot
from vllm_longspec.bench.shapes import check_device, draft_config, target_config, write_config
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_folder
from vllm_longspec.report import check_plotting, environment
from vllm_longspec.tree.budget import DEEP_DEPTHS, DEPTHS
from vllm_longspec.writing import write_json, write_text

ACCEPT_RATE = 0.8
WARM_UP_STEPS = 8
RUNS = 2
PAPER_TREE = {"tree_shape": [4, 16, 16, 16, 16], "num_speculative_tokens": 31}


@dataclass
class Cycle:
    """One proposer at one context length and batch size; milliseconds, medians over the steps."""

    proposer: str
    context: int
    batch: int
    steps: int
    cycle: float
    runs: list[float]  # the median of each run
    parts: dict[str, float]
    tokens_per_step: int  # rows of the target's forward
    kernels: dict[str, Any] = field(default_factory=dict)  # batch 1 only


def proposers(folder: Path, shape: str, draft_vocab_size: int) -> dict[str, Any]:
    """Each proposer's speculative_config; the drafts are config-only folders under `folder`."""
    # A Llama's layer also for a target with experts.
    eagle = {k: v for k, v in target_config(shape).to_dict().items() if "expert" not in k}
    eagle |= {"architectures": ["EagleLlamaForCausalLM"], "model_type": "llama"}
    eagle |= {"num_hidden_layers": 1}
    (folder / "eagle").mkdir()
    (folder / "eagle/config.json").write_text(json.dumps(eagle))
    configs: dict[str, Any] = {PLAIN: None}
    for length in (3, 5):
        configs[f"EAGLE, chain of {length}"] = {
            "method": "eagle",
            "model": str(folder / "eagle"),
            "num_speculative_tokens": length,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [ACCEPT_RATE ** (i + 1) for i in range(length)],
        }
    draft_config(shape).save_pretrained(folder / "longspec")
    # One tree at each batch size, whatever is accepted: it is its cycle that is measured.
    longspec = {
        "method": "longspec",
        "model": str(folder / "longspec"),
        "enable_adaptive_verification": False,
    }
    configs["LongSpec, 31 nodes"] = longspec | PAPER_TREE
    if draft_vocab_size:
        trimmed = draft_config(shape)
        trimmed.draft_vocab_size = draft_vocab_size
        trimmed.save_pretrained(folder / "trimmed")
        longspec |= {"model": str(folder / "trimmed")}
        name = f"LongSpec, 31 nodes, head of {draft_vocab_size}"
        configs[name] = longspec | PAPER_TREE
        configs[f"{name}, not in FP8"] = longspec | PAPER_TREE | {"quantization": "none"}
        configs[f"LongSpec, by batch size, head of {draft_vocab_size}"] = longspec
    else:
        configs["LongSpec, by batch size"] = longspec
    return configs


def measure_cycles(
    llm: Any,
    name: str,
    points: Sequence[tuple[int, int]],
    vocab_size: int,
    most_accepted: int,
    steps: int,
) -> Iterator[Cycle]:
    """All (context, batch) points that fit this engine's KV cache, each as it is measured."""
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    capacity = kv_capacity(llm)
    # The prompt's step and the last one, which nothing follows, are not timed.
    new_tokens = (WARM_UP_STEPS + steps + 2) * (1 + most_accepted)
    params = SamplingParams(
        max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )
    for context, batch in points:
        if batch * (context + new_tokens + 1024) > capacity:
            continue
        prompts = random_prompts(batch, context, vocab_size)
        runs = []
        for _ in range(RUNS):
            llm.collective_rpc("probe_steps")
            llm.generate(prompts, params, use_tqdm=False)
            (recorded,) = llm.collective_rpc("probe_times")
            whole = [step for step in recorded if step["num_reqs"] == batch]
            rows = max(step["num_tokens"] for step in whole)
            runs.append([step for step in whole if step["num_tokens"] == rows][WARM_UP_STEPS:])
        all_steps = [step for run in runs for step in run]
        result = Cycle(
            proposer=name,
            context=context,
            batch=batch,
            steps=len(all_steps),
            cycle=statistics.median(step["cycle"] for step in all_steps),
            runs=[statistics.median(step["cycle"] for step in run) for run in runs],
            parts={
                part: statistics.median(step["parts"][part] for step in all_steps)
                for part in all_steps[0]["parts"]
            },
            tokens_per_step=rows,
        )
        if batch == 1 and current_platform.is_cuda():
            llm.collective_rpc("probe_kernels")
            llm.generate(prompts, params, use_tqdm=False)
            (result.kernels,) = llm.collective_rpc("probe_kernel_times")
        yield result


def cycle_report(
    shape: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    draft_vocab_size: int,
    output: Path,
    only: Sequence[str] = (),
    side_by_side: bool = False,
    steps: int = 40,
    **engine: Any,
) -> list[Cycle]:
    """Writes cycle.json and cycle.md to `output`, with each result as it comes, then the plots
    cycle.png and cycle-parts.png, and prints the table.

    The engines run one after the other, each with the GPU to itself; `side_by_side` starts all
    first, which takes one start-up's time and needs `kv_cache_memory_bytes`. The others then idle.
    """
    claim_folder(output, ("cycle.json", "cycle.md", "cycle.png", "cycle-parts.png"))
    check_plotting()
    console = Console(width=150)
    points = [(context, batch) for context in contexts for batch in batches]
    results: list[Cycle] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(shape, folder / "target")
        configs = proposers(folder, shape, draft_vocab_size)
        configs = chosen(configs, only)
        check_device(shape)
        output.mkdir(parents=True, exist_ok=True)
        engine |= decode_options(folder / "target", max(contexts) + 2048, max(batches))
        engine |= {"worker_extension_cls": "vllm_longspec.bench.probe.CycleProbe"}
        vocab_size = target_config(shape).vocab_size
        waiting = [
            Engine(
                name,
                run_engine,
                engine | {"speculative_config": config},
                name,
                points,
                vocab_size,
                steps,
            )
            for name, config in configs.items()
        ]
        with closing(in_turn(waiting, side_by_side)) as ready:
            for process in ready:
                before = len(results)
                for measured in process.measured():
                    if isinstance(measured, Cycle):
                        results.append(measured)
                        write_record(output, shape, results)
                    else:
                        memory = measured
                gib = ", ".join(f"{kind} {size:.2f} GiB" for kind, size in memory.items())
                points_done = len(results) - before
                console.print(f"{process.name}: {points_done} points, PyTorch memory {gib}")
    print(table(results))
    ratio_plot(results, output / "cycle.png")
    parts_plot(results, output / "cycle-parts.png")
    return results


def decode_options(target: Path, max_model_len: int, max_num_seqs: int) -> dict[str, Any]:
    """Of an engine with dummy weights that finds its prompts' keys and values made up."""
    return {
        "model": str(target),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_transfer_config": {
            "kv_connector": "DecodeBenchConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"startup_fill": True, "fill_std": 0.5},
        },
    }


def random_prompts(count: int, length: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """The same ones at every call."""
    generator = random.Random(0)
    return [
        {"prompt_token_ids": [generator.randrange(10, vocab_size - 10) for _ in range(length)]}
        for _ in range(count)
    ]


def kv_capacity(llm: Any) -> int:
    """Tokens that an engine's KV cache holds."""
    config = llm.llm_engine.vllm_config.cache_config
    return config.num_gpu_blocks * config.block_size


def chosen(configs: dict[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """Those named in `only`, in that order; all if it is empty."""
    unknown = [name for name in only if name not in configs]
    if unknown:
        raise LongSpecError(f"only: {unknown[0]!r} is none of {', '.join(map(repr, configs))}")
    return {name: configs[name] for name in only} or configs


def table(results: Sequence[Cycle]) -> str:
    return "\n".join(filter(None, (cycle_table(results), kernel_table(results))))


def write_record(output: Path, shape: str, results: Sequence[Cycle]) -> None:
    cycles = [asdict(result) for result in results]
    record = {"environment": environment(), "shape": shape, "cycles": cycles}
    write_json(output / "cycle.json", record)
    write_text(output / "cycle.md", table(results))


class Engine:
    """A vLLM engine in a process of its own; `run` takes the process's end of a pipe first."""

    def __init__(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, self.theirs = context.Pipe()
        self.process = context.Process(target=run, args=(self.theirs, *arguments))

    def start(self) -> None:
        self.process.start()
        self.theirs.close()  # a killed engine then ends `measure` with EOFError

    def wait_until_ready(self) -> None:
        self.receive()

    def measured(self) -> Generator[Any, None, None]:
        """Each thing that `run` sends once it is told to measure, until None; the engine stops."""
        self.pipe.send("measure")
        while (result := self.receive()) is not None:
            yield result
        self.process.join()

    def close(self) -> None:
        """Ends an engine that still waits to measure: its pipe closes."""
        self.pipe.close()

    def receive(self) -> Any:
        """Raises what ended the engine, EOFError if it was killed."""
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def in_turn(engines: Sequence[Engine], side_by_side: bool) -> Generator[Engine, None, None]:
    """Each engine once it is ready: started one after the other, or all first."""
    try:
        for engine in engines if side_by_side else ():
            engine.start()
        for engine in engines if side_by_side else ():
            engine.wait_until_ready()
        for engine in engines:
            if not side_by_side:
                engine.start()
                engine.wait_until_ready()
            yield engine
    finally:
        for engine in engines:
            engine.close()


def run_engine(
    pipe: Connection,
    options: dict[str, Any],
    name: str,
    points: list[tuple[int, int]],
    vocab_size: int,
    steps: int,
) -> None:
    with engine_to_measure(pipe, options, name) as llm:
        config = options["speculative_config"]
        if config is not None and config["method"] == "longspec":
            llm.collective_rpc("probe_accept", args=(ACCEPT_RATE,))
        accepted = _most_accepted(config)
        for cycle in measure_cycles(llm, name, points, vocab_size, accepted, steps):
            pipe.send(cycle)
        (memory,) = llm.collective_rpc("probe_memory")
        pipe.send(memory)
        pipe.send(None)


@contextmanager
def engine_to_measure(
    pipe: Connection, options: dict[str, Any], name: str
) -> Generator[Any, None, None]:
    """`Engine`'s other end: an LLM once it is told to measure. What ends it is sent."""
    from vllm import LLM

    llm = None
    try:
        llm = LLM(**options)
        pipe.send("ready")
        pipe.recv()
        yield llm
    except Exception as error:
        pipe.send(RuntimeError(f"{name}: {error}"))
        raise
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def _most_accepted(config: dict[str, Any] | None) -> int:
    """Upper bound on the tokens that one verification accepts, so that enough are asked for."""
    if config is None:
        return 0
    if config["method"] != "longspec":
        return config["num_speculative_tokens"]
    return len(config["tree_shape"]) if "tree_shape" in config else max(*DEPTHS, *DEEP_DEPTHS)
