"""The cost model: acceptance against every path of a small tree, schedules, measured cycles."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_longspec.tree.budget import (
    CONTEXT,
    EASY,
    FP8_WEIGHT_BYTES,
    GPUS,
    H200,
    HARD,
    SMALL_NODES,
    TEXTS,
    UNKNOWN_GPU,
    Gpu,
    Plan,
    Prices,
    Shape,
    Text,
    accepted_tokens,
    gpu_named,
    node_budgets,
    proposal_seconds,
    reach,
    target_seconds,
)

# Of Llama-3-8B with a draft head of 32,768 tokens.
LAYER = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
LLAMA_8B = Shape(
    num_layers=32,
    layer_weights=LAYER,
    head_weights=4096 * 128256,
    draft_layer_weights=LAYER + 2 * 4096 * 4096,
    draft_head_weights=4096 * 32768,
    kv_bytes=2 * 2 * 8 * 128,
)


@st.composite
def guess_lists(draw: st.DrawFn, most: int = 4) -> list[float]:
    """Probabilities of a first, second, ... guess: falling, at most 1 in sum."""
    shares = draw(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=most))
    total = draw(st.floats(0.1, 1.0))
    return sorted((total * share / sum(shares) for share in shares), reverse=True)


def best_nodes(shape: list[int], m: int, guesses: list[float]) -> float:
    """The draft's way: each level keeps its most probable nodes, then the tree its best `m`."""
    level, tree = [1.0], []
    for width in shape:
        children = [above * guess for above in level for guess in guesses]
        level = sorted(children, reverse=True)[:width]
        tree += level
    return 1 + sum(sorted(tree, reverse=True)[:m])


@given(guess_lists(), st.integers(1, 3), st.integers(1, 90))
def test_expected_acceptance_is_that_of_the_best_paths(
    guesses: list[float], depth: int, m: int
) -> None:
    paths = [
        math.prod(path)
        for length in range(1, depth + 1)
        for path in itertools.product(guesses, repeat=length)
    ]
    widths = [len(guesses) ** length for length in range(1, depth + 1)]  # room for all
    expected = 1 + sum(sorted(paths, reverse=True)[:m])
    assert accepted_tokens(widths, m, guesses) == pytest.approx(expected)


@given(guess_lists(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_full_levels_leave_the_nodes_to_others(
    guesses: list[float], shape: list[int], data: st.DataObject
) -> None:
    m = data.draw(st.integers(1, sum(shape)))
    assert accepted_tokens(shape, m, guesses) == pytest.approx(best_nodes(shape, m, guesses))


@given(guess_lists(16), st.lists(st.integers(1, 16), min_size=1, max_size=6))
def test_more_nodes_accept_no_less(guesses: list[float], shape: list[int]) -> None:
    lengths = [accepted_tokens(shape, m, guesses) for m in range(sum(shape) + 1)]
    assert lengths[0] == 1
    for m, (fewer, more) in enumerate(itertools.pairwise(lengths), start=1):
        assert fewer <= more <= 1 + min(m, len(shape)) + 1e-9


@given(guess_lists(), st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_reach_is_the_probability_of_each_level(
    guesses: list[float], shape: list[int], data: st.DataObject
) -> None:
    m = data.draw(st.integers(0, sum(shape)))
    levels = reach(shape, m, guesses)
    assert len(levels) == len(shape)
    assert 1 + sum(levels) == accepted_tokens(shape, m, guesses)
    for above, below in itertools.pairwise((1.0, *levels)):
        assert 0 <= below <= above + 1e-9


def test_reach_of_small_trees() -> None:
    assert reach([1, 1, 1], 2, [0.5]) == (0.5, 0.25, 0.0)
    # Of two levels of two the path of two second guesses is the fourth most probable node.
    assert reach([2, 2], 3, [0.6, 0.3]) == pytest.approx((0.9, 0.36))
    assert reach([2, 2], 4, [0.6, 0.3]) == pytest.approx((0.9, 0.54))
    assert reach([], 3, [0.6]) == ()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("length", [1, 3, 5, 8])
def test_a_chain(text: Text, length: int) -> None:
    first = text.first
    expected = sum(first**i for i in range(length + 1))
    guesses = text.guesses()
    assert sum(guesses) < 1
    assert accepted_tokens([1] * length, length, guesses) == pytest.approx(expected)


# Acceptance lengths of the nano draft at T=1, 0.8, 0 (docs/measurements.md).
@pytest.mark.parametrize(
    ("text", "chain", "tree"),
    [*zip(TEXTS, (1.73, 2.50, 4.55), (2.33, 3.48, 5.31), strict=True)],
)
def test_the_texts_fit_what_was_measured(text: Text, chain: float, tree: float) -> None:
    guesses = text.guesses()
    assert accepted_tokens([1] * 5, 5, guesses) == pytest.approx(chain, rel=0.02)
    assert accepted_tokens([4, 16, 16, 16, 16], 31, guesses) == pytest.approx(tree, rel=0.02)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    millions = st.integers(1, 2000).map(lambda n: n * 10**6)
    return Shape(
        num_layers=draw(st.integers(1, 96)),
        layer_weights=draw(millions),
        head_weights=draw(millions),
        draft_layer_weights=draw(millions),
        draft_head_weights=draw(millions),
        kv_bytes=draw(st.sampled_from([512, 4096, 16384])),
    )


@given(
    shapes(),
    st.sampled_from([gpu for _, gpu in GPUS] + [UNKNOWN_GPU]),
    st.sampled_from([1, 3, 17, 64, 300]),
)
def test_budgets_cover_every_batch_size_and_never_rise(
    shape: Shape, gpu: Gpu, max_batch: int
) -> None:
    budgets = node_budgets(gpu, shape, max_batch)
    assert (budgets[0].first_batch, budgets[-1].last_batch) == (1, max_batch)
    shapes: dict[int, tuple[int, ...]] = {}
    for before, after in itertools.pairwise(budgets):
        assert after.first_batch == before.last_batch + 1
        assert after.m <= before.m
        assert (after.plans, after.default) != (before.plans, before.default)
    for budget in budgets:
        assert budget.first_batch <= budget.last_batch
        assert budget.m == max((plan.m for plan in budget.plans), default=0)
        assert budget.default is None or budget.default in budget.plans
        assert len(set(budget.plans)) == len(budget.plans) <= 3
        prices = Prices(gpu, shape, budget.last_batch)
        costs = [prices.cost(plan) for plan in budget.plans]
        assert costs == sorted(costs)
        for plan in budget.plans:
            assert shapes.setdefault(plan.m, plan.tree_shape) == plan.tree_shape
            assert len(plan.tree_shape) <= plan.m <= sum(plan.tree_shape)
            assert accepted_tokens(plan.tree_shape, plan.m, HARD.guesses()) > 1


def test_llama_8b_on_an_h200() -> None:
    budgets = node_budgets(gpu_named("NVIDIA H200"), LLAMA_8B, 1024)
    nodes = {
        batch: budget.default.m
        for budget in budgets
        for batch in range(budget.first_batch, budget.last_batch + 1)
        if budget.default
    }
    assert nodes[1] == 31
    assert 0 < nodes[32] < nodes[8] < 31


# What docs/performance.md says of an 8B Llama in FP8 on an H200.
DEFAULTS = {
    1: ((8, 16, 16, 16, 16), 31), 2: ((8, 16, 16, 16, 16), 31), 4: ((8, 8, 8, 8, 8), 23),
    8: ((8, 8, 8, 8, 8), 11), 16: ((4, 4, 4, 4), 5), 32: ((1, 1, 1), 3), 64: ((1, 1, 1), 3),
    256: ((1, 1), 2), 512: ((1,), 1),
}  # fmt: skip


def test_a_menu_has_a_plan_for_each_kind_of_text() -> None:
    shape = replace(LLAMA_8B, draft_weight_bytes=FP8_WEIGHT_BYTES)
    budgets = node_budgets(H200, shape, 1024)
    for batch, default in DEFAULTS.items():
        (budget,) = (b for b in budgets if b.first_batch <= batch <= b.last_batch)
        assert budget.default == Plan(*default), batch
        assert 2 <= len(budget.plans) <= 3
        small, deep = budget.plans[0], budget.plans[-1]
        assert small.m <= SMALL_NODES and len(deep.tree_shape) >= 5
        prices = Prices(H200, shape, budget.last_batch)
        assert prices.speedup(deep, EASY) > 1.02 * prices.speedup(budget.default, EASY)
    # The graphs of the target are as many as these, each for its own batch sizes.
    assert len({plan.m for budget in budgets for plan in budget.plans}) <= 10


def test_no_tree_where_the_draft_costs_too_much() -> None:
    heavy = Shape(2, 10**6, 10**6, 10**10, 10**10, 4096)
    (budget,) = node_budgets(H200, heavy, 8)
    assert (budget.first_batch, budget.last_batch, budget.m) == (1, 8, 0)
    assert (budget.plans, budget.default, budget.speedup) == ((), None, 1.0)


def test_a_small_plan_where_only_easy_text_pays() -> None:
    costly = Shape(8, 10**8, 10**8, 2 * 10**9, 10**9, 4096)
    (budget,) = node_budgets(H200, costly, 1)
    assert budget.default is None and budget.plans and budget.plans[0].m <= SMALL_NODES


def test_gpus_by_name() -> None:
    names = {
        "NVIDIA H200": "H200", "NVIDIA GH200 480GB": "GH200", "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA L40S": "L40", "NVIDIA B200": "B200",
    }  # fmt: skip
    rates = dict(GPUS)
    for name, key in names.items():
        assert gpu_named(name) == rates[key], name
    for name in ("", "Tesla T4", "CPU"):
        assert gpu_named(name) == UNKNOWN_GPU


def test_cycles_measured_on_an_h200() -> None:
    """One request with 4,096 tokens (docs/performance/cycle-bf16.json, cycle.json); the model takes
    CONTEXT."""
    assert CONTEXT <= 4096
    in_fp8 = replace(LLAMA_8B, draft_weight_bytes=FP8_WEIGHT_BYTES)
    measured = {  # milliseconds
        "plain": (target_seconds(H200, LLAMA_8B, 1, 1), 4.88),
        "verification": (target_seconds(H200, LLAMA_8B, 1, 32), 5.46),
        "proposal": (proposal_seconds(H200, LLAMA_8B, 1, (4, 16, 16, 16, 16)), 1.38),
        "proposal in FP8": (proposal_seconds(H200, in_fp8, 1, (8, 16, 16, 16, 16)), 0.92),
    }
    for name, (seconds, milliseconds) in measured.items():
        assert seconds * 1000 == pytest.approx(milliseconds, rel=0.15), name
