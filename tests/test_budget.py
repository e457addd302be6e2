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
    MENU_BATCH,
    SMALL_NODES,
    TEXTS,
    UNKNOWN_GPU,
    Gpu,
    Plan,
    Prices,
    Shape,
    Text,
    accepted_tokens,
    cycle_seconds,
    experts_read,
    gpu_named,
    node_budgets,
    plain_seconds,
    proposal_seconds,
    reach,
    target_seconds,
)
from vllm_longspec.tree.lookup import COPY_DEPTH

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
def test_budgets_cover_every_batch_size(shape: Shape, gpu: Gpu, max_batch: int) -> None:
    budgets = node_budgets(gpu, shape, max_batch)
    assert (budgets[0].first_batch, budgets[-1].last_batch) == (1, max_batch)
    for before, after in itertools.pairwise(budgets):
        assert after.first_batch == before.last_batch + 1
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
            assert 1 + sum(plan.tree_shape) + COPY_DEPTH <= 128  # one block of the kernels
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


# What docs/performance-history.md says of an 8B Llama in FP8 on an H200.
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
        if batch > MENU_BATCH:
            assert budget.plans == (budget.default,)
            continue
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


def test_the_model_of_dense_targets_is_as_it_was() -> None:
    """Before it learned experts, devices and context."""
    in_fp8 = replace(LLAMA_8B, draft_weight_bytes=FP8_WEIGHT_BYTES)
    for batch, rows, milliseconds in (
        (1, 1, 4.623503), (1, 32, 5.169337), (8, 12, 6.130160), (32, 1, 6.769711),
    ):  # fmt: skip
        seconds = target_seconds(H200, LLAMA_8B, batch, rows)
        assert seconds * 1e3 == pytest.approx(milliseconds, rel=1e-6), (batch, rows)
    for shape, tree, milliseconds in (
        (LLAMA_8B, (4, 16, 16, 16, 16), 1.377790), (in_fp8, (8, 16, 16, 16, 16), 0.993907),
    ):  # fmt: skip
        seconds = proposal_seconds(H200, shape, 1, tree)
        assert seconds * 1e3 == pytest.approx(milliseconds, rel=1e-6)


def test_context_is_read_by_each_request() -> None:
    for seconds, layers in (
        (lambda batch, context: target_seconds(H200, LLAMA_8B, batch, 8, context), 32),
        (lambda batch, context: proposal_seconds(H200, LLAMA_8B, batch, (4, 4), context), 2),
    ):
        more = seconds(4, 32768) - seconds(4, CONTEXT)
        assert more == pytest.approx(
            4 * layers * LLAMA_8B.kv_bytes * (32768 - CONTEXT) / H200.bandwidth
        )
    at = {context: plain_seconds(H200, LLAMA_8B, 8, context) for context in (CONTEXT, 32768)}
    assert at[CONTEXT] == plain_seconds(H200, LLAMA_8B, 8) < at[32768]
    # Attention costs a cycle as much as a plain step.
    cycle = cycle_seconds(H200, LLAMA_8B, 8, (4, 4), 7, 32768)
    assert cycle / at[32768] < cycle_seconds(H200, LLAMA_8B, 8, (4, 4), 7) / at[CONTEXT]


ATTENTION = 2048 * (2 * 4096 + 2 * 512)
QWEN3_30B = Shape(
    num_layers=48,
    layer_weights=ATTENTION,
    head_weights=2048 * 151936,
    draft_layer_weights=ATTENTION + 2 * 2048 * 4096 + 3 * 2048 * 6144,
    draft_head_weights=2048 * 151936,
    kv_bytes=2 * 2 * 4 * 128,
    draft_weight_bytes=FP8_WEIGHT_BYTES,
    num_expert_layers=48,
    num_experts=128,
    experts_per_token=8,
    expert_weights=3 * 2048 * 768,
)


def test_experts() -> None:
    assert experts_read(LLAMA_8B, 4, 8) == 0
    assert experts_read(QWEN3_30B, 1, 1) == pytest.approx(8)
    assert experts_read(QWEN3_30B, 2, 1) == pytest.approx(8 + 8 * 120 / 128)
    assert 8 < experts_read(QWEN3_30B, 1, 8) < experts_read(QWEN3_30B, 8, 1) < 64
    assert experts_read(QWEN3_30B, 64, 8) == pytest.approx(128, rel=1e-3)


@pytest.mark.parametrize("batch, plain, cycle", [(1, 2.51, 8.55), (4, 4.3, 13.4), (16, 8.5, 14.2)])
def test_cycles_with_experts_measured_on_an_h100(batch: int, plain: float, cycle: float) -> None:
    """24 layers, dummy weights, 2,000 tokens, 31 nodes, issue 15."""
    shape = replace(QWEN3_30B, num_layers=24, num_expert_layers=24)
    gpu = gpu_named("NVIDIA H100 80GB HBM3")
    assert plain_seconds(gpu, shape, batch) * 1e3 == pytest.approx(plain, rel=0.07)
    modelled = cycle_seconds(gpu, shape, batch, (8, 16, 16), 31)
    assert modelled * 1e3 == pytest.approx(cycle, rel=0.07)


def test_experts_leave_few_nodes_to_few_requests() -> None:
    """Few requests wake few experts and each node wakes more; many wake all of them anyway."""
    budgets = node_budgets(gpu_named("NVIDIA H100"), QWEN3_30B, 1024)
    at = {
        batch: next(b for b in budgets if b.first_batch <= batch <= b.last_batch)
        for batch in (1, 4, 16, 64)
    }
    assert at[1].default is None and at[1].plans[0].m == 1
    assert all(at[batch].default is not None for batch in (16, 64))
    assert max(plan.m for plan in at[1].plans) < at[16].default.m  # type: ignore[union-attr]
    assert len({plan.m for budget in budgets for plan in budget.plans}) <= 10


def test_quantised_weights_and_shared_layers_take_less_time() -> None:
    whole = target_seconds(H200, LLAMA_8B, 1, 1)
    in_fp8 = target_seconds(H200, replace(LLAMA_8B, weight_bytes=1.0), 1, 1)
    saved = 32 * LAYER / H200.bandwidth
    assert whole - in_fp8 == pytest.approx(saved, rel=0.01)
    half = replace(
        LLAMA_8B, layer_weights=LAYER // 2, head_weights=LLAMA_8B.head_weights // 2,
        num_devices=2, hidden_size=4096,
    )  # fmt: skip
    alone = replace(half, num_devices=1)
    reduced = target_seconds(H200, half, 1, 1) - target_seconds(H200, alone, 1, 1)
    assert reduced == pytest.approx(64 * (H200.reduce_seconds + 2 * 4096 / H200.link))
    assert target_seconds(H200, half, 1, 1) < whole
