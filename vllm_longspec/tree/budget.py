"""Which trees to prepare for which batch size: those of most tokens per millisecond.

A cost model of one cycle, from the target's shape and what a GPU was measured to do, against how
often a draft's guesses are right. Verifying more nodes is nearly free while a forward waits for the
weights and costs in full once it waits for arithmetic, so the budget falls as requests share a
batch, to none where plain decoding is faster.
"""

import heapq
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from vllm_longspec.config import MAX_VERIFIED_NODES

DEPTHS = (2, 3, 4, 5, 6, 8)
WIDTHS = (1, 2, 4, 8, 16)
NODES = (1, 2, 3, 5, 7, 11, 15, 23, 31)
SMALL_NODES = 5  # of the plan for hard text, at most: it is what probes whether a draft is right
# Requests beyond which the default is the only plan: their texts are of all kinds, and each plan
# more has CUDA graphs for many batch sizes.
MENU_BATCH = 64
# Of a tree, with the root and a copy (`tree/lookup.py`): what one block of the kernels holds that
# trees of usual sizes share. Larger ones would be compiled apart, at start-up.
MOST_DRAFTED = 110
DEEP_DEPTHS = (4, 5, 6, 8, 10)
DEEP_NODES = (*NODES[2:], 47, 63)
FIRST_WIDTH = 8  # the first level has one parent, whose further children are rarely right
# Short: attention costs a cycle and a plain step alike, so longer contexts favour speculation.
CONTEXT = 2048
HOST_SECONDS = 1.5e-3  # a step's work on the host; the GPU waits for it with small targets
MAX_GUESSES = 16
MARGIN = 1.05  # of tokens per millisecond over plain decoding, below which there is no tree
TIE = 0.99  # of the best tree's tokens per millisecond; the model cannot tell such trees apart
REUSE = 0.98  # of the best plan's, from which a plan of other batch sizes will do: fewer graphs
# Nodes of one tree are tokens of one text and take experts in common: `rows` of them wake as many
# as rows ** ALIKE unrelated ones. From 24 layers of Qwen3-30B-A3B's shape with 32 rows on an H100.
ALIKE = 0.73
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
# with 31 nodes, at T=1, 0.8 and 0 (docs/performance-history.md, "The cost model").
TEXTS = (Text(0.43, 0.14), Text(0.62, 0.28), Text(0.89, 0.42))
HARD, USUAL, _ = TEXTS
EASY = Text(0.93, 0.5)  # text that repeats itself, at T=0


@dataclass(frozen=True)
class Gpu:
    """Effective rates of one device."""

    bandwidth: float  # bytes/s of weights and cache read by a forward
    arithmetic: float  # bf16 operations/s of its GEMMs
    layer_seconds: float  # of the small kernels of a layer, attention's least time included
    tree_seconds: float  # more a layer, with a tree
    level_seconds: float  # of the small kernels of a level of the proposal
    step_seconds: float  # beside the forwards: sampling, block tables
    expert_seconds: float = 25e-6  # more a layer with experts: routing, sorting, summing
    # Between devices, by datasheets and not measured.
    reduce_seconds: float = 8e-6  # least time of an all-reduce
    link: float = 300e9  # bytes/s of an all-reduce
    has_fp8: bool = True


# "H200" from cycles measured there (docs/performance-history.md), `expert_seconds` from an H100's;
# the others scaled from it by the vendors' datasheets. The first name that the device's name
# contains counts.
H200 = Gpu(4.0e12, 680e12, 22e-6, 15e-6, 80e-6, 100e-6)
GPUS = (
    ("GH200", replace(H200, bandwidth=3.3e12)),
    ("H200", H200),
    ("H100", replace(H200, bandwidth=2.8e12)),
    ("B200", replace(H200, bandwidth=6.6e12, arithmetic=1400e12)),
    ("A100", replace(H200, bandwidth=1.6e12, arithmetic=220e12, has_fp8=False)),
    ("L40", replace(H200, bandwidth=0.72e12, arithmetic=240e12)),
)
UNKNOWN_GPU = replace(H200, bandwidth=1.6e12, arithmetic=220e12, has_fp8=False)


@dataclass(frozen=True)
class Shape:
    """Of one device's share of a target and its draft; numbers of weights."""

    num_layers: int
    layer_weights: int  # that every token reads, experts' not included; the mean over the layers
    head_weights: int
    draft_layer_weights: int
    draft_head_weights: int
    kv_bytes: int  # of one token in one layer
    draft_weight_bytes: float = 2.0  # of one weight; FP8_WEIGHT_BYTES in FP8
    weight_bytes: float = 2.0  # of one weight of the target's layers; its head has 2
    num_expert_layers: int = 0
    num_experts: int = 0  # of each of these layers
    experts_per_token: int = 0
    expert_weights: int = 0  # of one expert
    num_devices: int = 1  # that share each layer
    hidden_size: int = 0  # what they sum after each half of a layer
    num_sliding_layers: int = 0  # of `num_layers`, which read a window of the context
    window: int = 0


@dataclass(frozen=True)
class Plan:
    """A tree to draft and how much of it is verified."""

    tree_shape: tuple[int, ...]  # nodes per level
    m: int  # nodes verified, the most probable ones; at least one


@dataclass(frozen=True)
class Budget:
    """The plans to choose among for the batch sizes first_batch ... last_batch, beside none."""

    first_batch: int
    last_batch: int
    plans: tuple[Plan, ...]  # ascending in cost; (): no tree pays on any text
    default: Plan | None  # of `plans`: the one for unknown text; None: plain decoding
    speedup: float  # of the default, expected over plain decoding, on the hardest text

    @property
    def m(self) -> int:
        """The most nodes of a plan; 0: plain decoding only."""
        return max((plan.m for plan in self.plans), default=0)


def gpu_named(name: str) -> Gpu:
    return next((gpu for key, gpu in GPUS if key in name), UNKNOWN_GPU)


def reach(tree_shape: Sequence[int], m: int, guesses: Sequence[float]) -> tuple[float, ...]:
    """The probability that at least 1, 2, ... levels of the `m` most probable nodes are accepted,
    one for each level of the tree: nodes of one level exclude each other, so their sum."""
    room = list(tree_shape)
    reached = [0.0] * len(room)
    # (-probability, depth, rank, parent's probability)
    waiting = [(-guesses[0], 0, 0, 1.0)] if room else []
    chosen = 0
    while waiting and chosen < m:
        negative, depth, rank, parent = heapq.heappop(waiting)
        if rank + 1 < len(guesses):
            heapq.heappush(waiting, (-parent * guesses[rank + 1], depth, rank + 1, parent))
        if room[depth] == 0:
            continue
        room[depth] -= 1
        chosen += 1
        reached[depth] -= negative
        if depth + 1 < len(room):
            heapq.heappush(waiting, (negative * guesses[0], depth + 1, 0, -negative))
    return tuple(reached)


def accepted_tokens(tree_shape: Sequence[int], m: int, guesses: Sequence[float]) -> float:
    """Expected acceptance length, the bonus token included, of the `m` most probable nodes."""
    return 1.0 + sum(reach(tree_shape, m, guesses))


@cache
def expected_tokens(plan: Plan, text: Text) -> float:
    """`accepted_tokens` of a plan; each is asked for at every batch size."""
    return accepted_tokens(plan.tree_shape, plan.m, text.guesses())


def products(
    gpu: Gpu, weights: float, rows: float, weight_bytes: float = 2.0, used: float | None = None
) -> float:
    """Seconds of a forward's GEMMs: reading `weights` and computing overlap in part.
    `used`: the weights that one row is multiplied by; None: all."""
    read = weights * weight_bytes / gpu.bandwidth
    return math.hypot(read, 2 * (weights if used is None else used) * rows / gpu.arithmetic)


def experts_read(shape: Shape, batch: int, rows: int) -> float:
    """Expected distinct experts of a layer, of uniform draws. Real routers prefer some, which makes
    it fewer."""
    if shape.num_experts == 0:
        return 0.0
    unrelated = batch * rows**ALIKE
    missed = (1 - shape.experts_per_token / shape.num_experts) ** unrelated
    return shape.num_experts * (1 - missed)


def reduce_seconds(gpu: Gpu, shape: Shape, rows: int) -> float:
    """Summing one half of a layer over the devices that share it."""
    if shape.num_devices == 1:
        return 0.0
    sent = 2 * (shape.num_devices - 1) / shape.num_devices * rows * shape.hidden_size * 2
    return gpu.reduce_seconds + sent / gpu.link


def target_seconds(gpu: Gpu, shape: Shape, batch: int, rows: int, context: int = CONTEXT) -> float:
    """One forward of the target over `rows` rows each of `batch` requests with `context` tokens,
    and the head."""
    full_layers = shape.num_layers - shape.num_sliding_layers
    read_tokens = full_layers * context + shape.num_sliding_layers * min(context, shape.window)
    cache = read_tokens * shape.kv_bytes * batch / gpu.bandwidth
    dense = shape.num_layers * shape.layer_weights
    expert = shape.num_expert_layers * shape.expert_weights
    read = dense + expert * experts_read(shape, batch, rows)
    used = dense + expert * shape.experts_per_token
    layer_seconds = gpu.layer_seconds + (rows > 1) * gpu.tree_seconds
    return (
        products(gpu, read, batch * rows, shape.weight_bytes, used)
        + products(gpu, shape.head_weights, batch * rows)
        + shape.num_layers * layer_seconds
        + shape.num_expert_layers * gpu.expert_seconds
        + shape.num_layers * 2 * reduce_seconds(gpu, shape, batch * rows)
        + gpu.step_seconds
        + cache
    )


def proposal_seconds(
    gpu: Gpu, shape: Shape, batch: int, tree_shape: Sequence[int], context: int = CONTEXT
) -> float:
    """Growing a tree for each of `batch` requests: one forward of the draft a level."""
    weights = shape.draft_layer_weights + shape.draft_head_weights
    cache = shape.kv_bytes * context * batch / gpu.bandwidth
    return sum(
        products(gpu, weights, batch * width, shape.draft_weight_bytes)
        + 3 * reduce_seconds(gpu, shape, batch * width)  # after each attention and the MLP
        + cache
        + gpu.level_seconds
        for width in (1, *tree_shape[:-1])
    )


def plain_seconds(gpu: Gpu, shape: Shape, batch: int, context: int = CONTEXT) -> float:
    """One step of plain decoding."""
    return max(HOST_SECONDS, target_seconds(gpu, shape, batch, 1, context))


def cycle_seconds(
    gpu: Gpu,
    shape: Shape,
    batch: int,
    tree_shape: Sequence[int],
    m: int,
    context: int = CONTEXT,
) -> float:
    """One proposal and the verification of its `m` most probable nodes."""
    verification = target_seconds(gpu, shape, batch, 1 + m, context)
    proposal = proposal_seconds(gpu, shape, batch, tree_shape, context)
    return max(HOST_SECONDS, verification + proposal)


def candidates(depths: Sequence[int] = DEPTHS, nodes: Sequence[int] = NODES) -> Iterator[Plan]:
    for depth in depths:
        for width in WIDTHS:
            tree_shape = (min(width, FIRST_WIDTH), *[width] * (depth - 1))
            if sum(tree_shape) > MOST_DRAFTED:
                continue
            for m in nodes:
                if depth <= m <= min(sum(tree_shape), MAX_VERIFIED_NODES):
                    yield Plan(tree_shape, m)
    yield Plan((1,), 1)


class Prices:
    """Plans at one batch size."""

    def __init__(self, gpu: Gpu, shape: Shape, batch: int) -> None:
        self.gpu, self.shape, self.batch = gpu, shape, batch
        self.plain = plain_seconds(gpu, shape, batch)

    def cost(self, plan: Plan) -> float:
        return cycle_seconds(self.gpu, self.shape, self.batch, plan.tree_shape, plan.m)

    def speedup(self, plan: Plan, text: Text) -> float:
        return expected_tokens(plan, text) * self.plain / self.cost(plan)


def best_default(prices: Prices, before: Plan | None) -> tuple[Plan | None, float]:
    """By the geometric mean over the texts, among the trees that gain on each; of the best ones
    that the model cannot tell apart, the shallowest. With its speedup on the hardest text.

    `before`: of fewer requests. Of more nodes than that only where it pays, as with experts, which
    many requests wake anyway.
    """
    trees = {}
    for plan in candidates():
        speedups = [prices.speedup(plan, text) for text in TEXTS]
        if min(speedups) >= MARGIN:
            trees[plan] = (statistics.geometric_mean(speedups), min(speedups))
    if not trees:
        return None, 1.0
    best = max(gain for gain, _ in trees.values())
    ties = [plan for plan, (gain, _) in trees.items() if gain >= TIE * best]
    plan = max(ties, key=lambda plan: (-len(plan.tree_shape), trees[plan]))
    if before in trees and plan.m >= before.m and trees[before][0] >= REUSE * best:
        plan = before
    return plan, trees[plan][1]


def best_plan(
    prices: Prices, text: Text, plans: Iterable[Plan], known: Collection[Plan]
) -> Plan | None:
    """For one kind of text: the best plan, or one that comes close and of which other batch sizes
    have the CUDA graphs, of all of it or of as many nodes."""
    speedups = {plan: prices.speedup(plan, text) for plan in plans}
    if not speedups:
        return None
    enough = REUSE * max(speedups.values())
    close = {plan: speedup for plan, speedup in speedups.items() if speedup >= enough}
    nodes = {plan.m for plan in known}
    return max(close, key=lambda plan: (plan in known, plan.m in nodes, close[plan]))


def menu(prices: Prices, default: Plan | None, known: list[Plan]) -> tuple[Plan, ...]:
    """A small plan for hard text, the default (where none gains on every text, the best for usual
    text) and a deep plan for easy text, as far as they differ and pay on some text. They are added
    to `known`."""
    plans: list[Plan] = []

    def gain(plan: Plan | None, text: Text) -> float:
        return 0.0 if plan is None else prices.speedup(plan, text)

    def add(plan: Plan | None, text: Text, least: float) -> None:
        if plan is not None and plan not in plans and gain(plan, text) >= least:
            plans.append(plan)

    usual = default or best_plan(prices, USUAL, candidates(), known)
    add(usual, USUAL, MARGIN)
    small = best_plan(prices, HARD, [p for p in candidates() if p.m <= SMALL_NODES], known)
    add(small, EASY, MARGIN)
    without = max((gain(plan, EASY) for plan in plans), default=MARGIN)
    deep = best_plan(prices, EASY, candidates(DEEP_DEPTHS, DEEP_NODES), known)
    add(deep, EASY, without / REUSE)
    known += [plan for plan in plans if plan not in known]
    return tuple(sorted(plans, key=lambda plan: (prices.cost(plan), plan.m)))


def node_budgets(gpu: Gpu, shape: Shape, max_batch: int) -> list[Budget]:
    """Consecutive budgets from one request to `max_batch`, each for its last batch size, the
    costliest. Neighbours of the same plans are joined."""
    ranges: list[tuple[int, int]] = []
    while not ranges or ranges[-1][1] < max_batch:
        first = ranges[-1][1] + 1 if ranges else 1
        ranges.append((first, min(max_batch, 1 << (first - 1).bit_length())))
    defaults: list[tuple[Plan | None, float]] = []
    for _, last in ranges:
        before = defaults[-1][0] if defaults else None
        defaults.append(best_default(Prices(gpu, shape, last), before))
    known = [plan for plan, _ in defaults if plan is not None]
    budgets: list[Budget] = []
    for (first, last), (default, speedup) in zip(ranges, defaults, strict=True):
        plans: tuple[Plan, ...] = () if default is None else (default,)
        if last <= MENU_BATCH:
            plans = menu(Prices(gpu, shape, last), default, known)
        if budgets and (budgets[-1].plans, budgets[-1].default) == (plans, default):
            first = budgets.pop().first_batch
        budgets.append(Budget(first, last, plans, default, speedup))
    return budgets
