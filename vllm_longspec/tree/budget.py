"""How many nodes to verify at which batch size: the tree of most tokens per millisecond.

A cost model of one cycle, from the target's shape and what a GPU was measured to do, against how
often a draft's guesses are right. Verifying more nodes is nearly free while a forward waits for the
weights and costs in full once it waits for arithmetic, so the budget falls as requests share a
batch, to none where plain decoding is faster.
"""

import heapq
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

DEPTHS = (2, 3, 4, 5, 6, 8)
WIDTHS = (1, 2, 4, 8, 16)
NODES = (1, 2, 3, 5, 7, 11, 15, 23, 31)
FIRST_WIDTH = 8  # the first level has one parent, whose further children are rarely right
# Short: attention costs a cycle and a plain step alike, so longer contexts favour speculation.
CONTEXT = 2048
HOST_SECONDS = 1.5e-3  # a step's work on the host; the GPU waits for it with small targets
MAX_GUESSES = 16
MARGIN = 1.05  # of tokens per millisecond over plain decoding, below which there is no tree
TIE = 0.99  # of the best tree's tokens per millisecond; the model cannot tell such trees apart
# What a weight of the draft costs in FP8, in bytes: its smaller matrices wait for memory rather
# than read it, and inputs are rounded.
FP8_WEIGHT_BYTES = 1.2


@dataclass(frozen=True)
class Text:
    """How often a draft is right about the next token."""

    first: float  # probability that its first guess is the target's token
    further: float  # of each further guess, once all before it were wrong

    def guesses(self) -> list[float]:
        return [self.first] + [
            (1 - self.first) * self.further * (1 - self.further) ** rank
            for rank in range(MAX_GUESSES - 1)
        ]


# Fitted to acceptance lengths that a nano draft was measured at on held-out code, as a chain and
# with 31 nodes, at T=1, 0.8 and 0 (docs/performance.md, "Node budget").
TEXTS = (Text(0.43, 0.14), Text(0.62, 0.28), Text(0.89, 0.42))


@dataclass(frozen=True)
class Gpu:
    """Effective rates of one device."""

    bandwidth: float  # bytes/s of weights and cache read by a forward
    arithmetic: float  # bf16 operations/s of its matrix products
    layer_seconds: float  # of the small kernels of a layer, attention's least time included
    tree_seconds: float  # more a layer, with a tree
    level_seconds: float  # of the small kernels of a level of the proposal
    step_seconds: float  # beside the forwards: sampling, block tables


# "H200" from cycles measured there (docs/performance.md); the others scaled from it by the vendors'
# datasheets. The first name that the device's name contains counts.
H200 = Gpu(4.0e12, 680e12, 22e-6, 15e-6, 80e-6, 100e-6)
GPUS = (
    ("GH200", replace(H200, bandwidth=3.3e12)),
    ("H200", H200),
    ("H100", replace(H200, bandwidth=2.8e12)),
    ("B200", replace(H200, bandwidth=6.6e12, arithmetic=1400e12)),
    ("A100", replace(H200, bandwidth=1.6e12, arithmetic=220e12)),
    ("L40", replace(H200, bandwidth=0.72e12, arithmetic=240e12)),
)
UNKNOWN_GPU = replace(H200, bandwidth=1.6e12, arithmetic=220e12)


@dataclass(frozen=True)
class Shape:
    """Of one device's share of a target and its draft; numbers of weights."""

    num_layers: int
    layer_weights: int
    head_weights: int
    draft_layer_weights: int
    draft_head_weights: int
    kv_bytes: int  # of one token in one layer
    draft_weight_bytes: float = 2.0  # of one weight; FP8_WEIGHT_BYTES in FP8


@dataclass(frozen=True)
class Budget:
    """The tree for the batch sizes first_batch ... last_batch."""

    first_batch: int
    last_batch: int
    m: int  # nodes verified; 0: plain decoding
    tree_shape: tuple[int, ...]
    speedup: float  # expected over plain decoding, on the hardest text


def gpu_named(name: str) -> Gpu:
    return next((gpu for key, gpu in GPUS if key in name), UNKNOWN_GPU)


def accepted_tokens(tree_shape: Sequence[int], m: int, guesses: Sequence[float]) -> float:
    """Expected acceptance length, the bonus token included, of the `m` most probable nodes."""
    room = list(tree_shape)
    waiting = [(-guesses[0], 0, 0, 1.0)]  # (-probability, depth, rank, parent's probability)
    total, chosen = 1.0, 0
    while waiting and chosen < m:
        negative, depth, rank, parent = heapq.heappop(waiting)
        if rank + 1 < len(guesses):
            heapq.heappush(waiting, (-parent * guesses[rank + 1], depth, rank + 1, parent))
        if room[depth] == 0:
            continue
        room[depth] -= 1
        chosen += 1
        total -= negative
        if depth + 1 < len(tree_shape):
            heapq.heappush(waiting, (negative * guesses[0], depth + 1, 0, -negative))
    return total


def products(gpu: Gpu, weights: int, rows: int, weight_bytes: float = 2.0) -> float:
    """Seconds of a forward's matrix products: reading the weights and computing overlap in part."""
    read = weights * weight_bytes / gpu.bandwidth
    return math.hypot(read, 2 * weights * rows / gpu.arithmetic)


def target_seconds(gpu: Gpu, shape: Shape, batch: int, rows: int) -> float:
    """One forward of the target over `rows` rows each of `batch` requests, and the head."""
    cache = shape.num_layers * shape.kv_bytes * CONTEXT * batch / gpu.bandwidth
    return (
        products(gpu, shape.num_layers * shape.layer_weights, batch * rows)
        + products(gpu, shape.head_weights, batch * rows)
        + shape.num_layers * (gpu.layer_seconds + (rows > 1) * gpu.tree_seconds)
        + gpu.step_seconds
        + cache
    )


def proposal_seconds(gpu: Gpu, shape: Shape, batch: int, tree_shape: Sequence[int]) -> float:
    weights = shape.draft_layer_weights + shape.draft_head_weights
    cache = shape.kv_bytes * CONTEXT * batch / gpu.bandwidth
    return sum(
        products(gpu, weights, batch * width, shape.draft_weight_bytes) + cache + gpu.level_seconds
        for width in (1, *tree_shape[:-1])
    )


def plain_seconds(gpu: Gpu, shape: Shape, batch: int) -> float:
    """One step of plain decoding."""
    return max(HOST_SECONDS, target_seconds(gpu, shape, batch, 1))


def cycle_seconds(gpu: Gpu, shape: Shape, batch: int, tree_shape: Sequence[int], m: int) -> float:
    """One proposal and the verification of its `m` most probable nodes."""
    verification = target_seconds(gpu, shape, batch, 1 + m)
    return max(HOST_SECONDS, verification + proposal_seconds(gpu, shape, batch, tree_shape))


def candidates() -> Iterator[tuple[tuple[int, ...], int]]:
    for depth in DEPTHS:
        for width in WIDTHS:
            tree_shape = (min(width, FIRST_WIDTH), *[width] * (depth - 1))
            for m in NODES:
                if depth <= m <= sum(tree_shape):
                    yield tree_shape, m
    yield (1,), 1


def best_budget(gpu: Gpu, shape: Shape, first_batch: int, last_batch: int) -> Budget:
    """Chosen for `last_batch`, the costliest, by the geometric mean over the texts, among the trees
    that gain on each; of the best ones that the model cannot tell apart, the shallowest."""
    plain = plain_seconds(gpu, shape, last_batch)
    trees = []
    for tree_shape, m in candidates():
        cycle = cycle_seconds(gpu, shape, last_batch, tree_shape, m)
        speedups = [
            accepted_tokens(tree_shape, m, text.guesses()) * plain / cycle for text in TEXTS
        ]
        if min(speedups) >= MARGIN:
            budget = Budget(first_batch, last_batch, m, tree_shape, min(speedups))
            trees.append((statistics.geometric_mean(speedups), budget))
    if not trees:
        return Budget(first_batch, last_batch, 0, (), 1.0)
    best = max(gain for gain, _ in trees)
    ties = [(-len(tree.tree_shape), gain, tree) for gain, tree in trees if gain >= TIE * best]
    return max(ties, key=lambda tie: tie[:2])[-1]


def node_budgets(gpu: Gpu, shape: Shape, max_batch: int) -> list[Budget]:
    """Consecutive budgets from one request to `max_batch`, never rising; equal neighbours joined.

    One tree shape per number of nodes: vLLM's scheduler names the number only.
    """
    budgets: list[Budget] = []
    first = 1
    while first <= max_batch:
        last = min(max_batch, 1 << (first - 1).bit_length())
        budget = best_budget(gpu, shape, first, last)
        previous = budgets[-1] if budgets else None
        if previous is not None and budget.m >= previous.m:
            budgets[-1] = Budget(
                previous.first_batch, last, previous.m, previous.tree_shape, budget.speedup
            )
        else:
            budgets.append(budget)
        first = last + 1
    return budgets
