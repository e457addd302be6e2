"""What a benchmark does inside vLLM's worker: events around the parts of a step, kernel times.

`worker_extension_cls="vllm_longspec.bench.probe.CycleProbe"` adds these methods to the worker;
`LLM.collective_rpc` calls them. Nothing here runs unless a benchmark asks for it.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from vllm_longspec.bench.dummy_weights import DummyWeights

# The boundaries inside one step, in the order in which the model runner passes them.
MARKS = ("start", "sample", "sampled", "propose", "proposed")
# Time from a boundary to the next, named for what happens there.
PARTS = ("target", "head, sampling and walk", "compaction", "proposal", "between steps")

KERNEL_KINDS = (
    ("tree attention", re.compile(r"_tree_attention")),
    ("ring attention", re.compile(r"_ring_")),
    ("prefix attention", re.compile(r"flash|prepare_varlen", re.IGNORECASE)),
    ("walk", re.compile(r"_walk_kernel")),
    ("compaction", re.compile(r"_compact_kernel")),
)
OTHER_KERNELS = "rest"
LEVEL_END = "_expand_kernel"
SMALLEST_GRAPH = 10  # kernels; what is launched outside graphs comes alone


@dataclass
class Step:
    num_reqs: int
    num_tokens: int
    is_new: bool  # a request's first step
    marks: dict[str, Any] = field(default_factory=dict)  # events on a GPU, else seconds

    def mark(self, name: str) -> None:
        if not torch.cuda.is_available():
            self.marks[name] = time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks[name] = event


def milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)


class CycleProbe(DummyWeights):
    """Mixed into vLLM's worker, which has `model_runner`."""

    model_runner: Any

    def probe_steps(self) -> None:
        """Record events from the next step on."""
        runner = self.model_runner
        self._steps: list[Step] = []
        if hasattr(self, "_originals"):
            return
        self._originals = True
        execute, sample = runner.execute_model, runner.sample

        def timed_execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            step = Step(
                len(scheduler_output.num_scheduled_tokens),
                scheduler_output.total_num_scheduled_tokens,
                bool(scheduler_output.scheduled_new_reqs),
            )
            step.mark("start")
            self._steps.append(step)
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = timed_execute
        runner.sample = self._between("sample", "sampled", sample)
        if runner.speculator is not None:
            propose = runner.speculator.propose
            runner.speculator.propose = self._between("propose", "proposed", propose)

    def _between(self, before: str, after: str, function: Callable[..., Any]) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._steps:  # a dummy run
                return function(*args, **kwargs)
            self._steps[-1].mark(before)
            result = function(*args, **kwargs)
            self._steps[-1].mark(after)
            return result

        return timed

    def probe_times(self) -> list[dict[str, Any]]:
        """The recorded steps of whole batches: milliseconds of each part and of the whole cycle,
        from a step's first event to the next step's."""
        synchronize()
        times = []
        for step, following in pairwise(self._steps):
            if step.is_new or following.is_new or step.num_reqs != following.num_reqs:
                continue
            names = [name for name in MARKS if name in step.marks]
            marks = [*(step.marks[name] for name in names), following.marks["start"]]
            spent = [milliseconds(a, b) for a, b in pairwise(marks)]
            parts = dict(zip((PARTS[MARKS.index(name)] for name in names), spent, strict=True))
            times.append(
                {
                    "num_reqs": step.num_reqs,
                    "num_tokens": step.num_tokens,
                    "cycle": sum(spent),
                    "parts": parts,
                }
            )
        return times

    def probe_accept(self, rate: float) -> None:
        """From now on every node's child is accepted with probability `rate`, whatever the target
        says: dummy weights agree on nothing, and accepted nodes have to be moved."""
        import vllm_longspec.verify.sampler as tree_sampler

        walk = tree_sampler.walk

        def accepting_walk(
            target_tokens: torch.Tensor,
            node_tokens: torch.Tensor,
            cu_num_logits: torch.Tensor,
            idx_mapping: torch.Tensor,
            state: Any,
            max_nodes: int,
        ) -> Any:
            num_reqs = idx_mapping.shape[0]
            width = target_tokens.shape[0] // num_reqs
            if width > 1 and width * num_reqs == target_tokens.shape[0]:
                nodes = node_tokens.view(num_reqs, width)[:, 1:].long()
                parents = state.parents[idx_mapping, 1:width].long().clamp(min=0)
                own = target_tokens.view(num_reqs, width).gather(1, parents)
                lucky = (torch.rand_like(nodes, dtype=torch.float32) < rate) & (nodes >= 0)
                target_tokens.view(num_reqs, width).scatter_(
                    1, parents, torch.where(lucky, nodes, own)
                )
            return walk(target_tokens, node_tokens, cu_num_logits, idx_mapping, state, max_nodes)

        tree_sampler.walk = accepting_walk

    def probe_kernels(self) -> None:
        """Record every kernel from now on."""
        self._profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA]
        )
        self._profiler.start()
        self._steps = []

    def probe_kernel_times(self) -> dict[str, Any]:
        """Microseconds of GPU time a step by graph and by kind of kernel, and from start to end of
        each level of LongSpec's proposal; the slowest kernels by name. A graph's kernels share the
        correlation id of its launch."""
        synchronize()
        self._profiler.stop()
        events = [
            event
            for event in self._profiler.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA
        ]
        launches = defaultdict(list)
        for event in events:
            launches[event.correlation_id()].append(event)
        largest = max(map(len, launches.values()), default=0)
        steps = max(1, len(self._steps))
        levels: dict[int, float] = defaultdict(float)
        totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        names: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for launched in launches.values():
            graph = graph_of([event.name() for event in launched], largest)
            for level, microseconds in enumerate(level_times(launched)):
                levels[level] += microseconds / steps
            for event in launched:
                microseconds = event.duration_ns() / 1000
                totals[graph][kind_of(event.name())] += microseconds / steps
                entry = names[graph, event.name()[:120]]
                entry[0] += microseconds / steps
                entry[1] += 1 / steps
        slowest = sorted(names.items(), key=lambda item: -item[1][0])[:60]
        return {
            "steps": steps,
            "microseconds": {graph: dict(kinds) for graph, kinds in totals.items()},
            "levels": [levels[level] for level in sorted(levels)],
            "slowest": [
                {"graph": graph, "kernel": name, "microseconds": time, "launches": count}
                for (graph, name), (time, count) in slowest
            ],
        }

    def probe_memory(self) -> dict[str, float]:
        """GiB that this process holds on the GPU, as PyTorch counts them."""
        return {
            "allocated": torch.cuda.memory_allocated() / 2**30,
            "reserved": torch.cuda.memory_reserved() / 2**30,
        }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KERNEL_KINDS if pattern.search(kernel)), OTHER_KERNELS)


def graph_of(
    kernels: list[str],
    largest: int,  # kernels of the largest launch: the target's
) -> str:
    """Which graph the kernels of one launch are."""
    if len(kernels) < SMALLEST_GRAPH:
        return "outside graphs"
    is_draft = any("_ring_" in name for name in kernels) or len(kernels) < largest / 2
    return "proposal" if is_draft else "target"


def level_times(launched: list[Any]) -> list[float]:
    """Microseconds of each level among the kernels of one launch: a level ends with its beam."""
    times = []
    start: int | None = None
    for event in sorted(launched, key=lambda event: event.start_ns()):
        start = event.start_ns() if start is None else start
        if LEVEL_END in event.name():
            times.append((event.end_ns() - start) / 1000)
            start = None
    return times
