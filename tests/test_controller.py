"""The controller against drafts that are right, wrong, and right for some: simulated steps, in
which trees are accepted as often as `tree/budget.py` says of a text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_longspec.runtime import costs as costs_module
from vllm_longspec.runtime.controller import NONE, Controller, expected_tokens, length_likelihoods
from vllm_longspec.runtime.costs import (
    Costs,
    Curve,
    cost_file,
    read_costs,
    sizes_to_time,
    write_costs,
)
from vllm_longspec.runtime.measure import curve
from vllm_longspec.tree.budget import Plan, Text, reach

PLANS = (Plan((2, 2), 3), Plan((8, 16, 16, 16, 16), 31), Plan((8, 8, 8, 8, 8, 8, 8, 8), 31))
LAG = 2  # of observations, in steps
GOOD, FAIR, WRONG = Text(0.93, 0.5), Text(0.62, 0.28), Text(0.01, 0.001)


def costs_of(plain: float, verifications: Sequence[float], proposals: Sequence[float]) -> Costs:
    """Milliseconds at one request; at 64 requests twice that."""

    def curve(ms: float, per_token: float = 0.0) -> Curve:
        return Curve((1, 64), (ms, 2 * ms), per_token)

    rows = {1: curve(plain, 1e-5)}
    for plan, ms in zip(PLANS, verifications, strict=True):
        rows[1 + plan.m] = curve(ms, 1.1e-5)
    return Costs(tuple(p.m for p in PLANS), rows, tuple(curve(ms) for ms in proposals), (0.1, 1e-4))


DENSE = costs_of(4.6, (4.9, 5.2, 5.2), (0.5, 1.0, 1.6))  # an 8B model
EXPERTS = costs_of(2.5, (4.2, 7.5, 7.5), (0.4, 1.0, 1.6))  # 128 experts, 8 used


def step_ms(costs: Costs, plan: int, num_reqs: int, num_context: int) -> float:
    base, per_token = costs.of_batch(num_reqs)
    return float(base[plan] + per_token[plan] * num_context)


class Simulation:
    def __init__(self, costs: Costs, max_num_reqs: int = 8, seed: int = 0) -> None:
        self.controller = Controller(PLANS, costs, max_num_reqs)
        self.costs = costs
        self.rng = np.random.default_rng(seed)
        self.waiting: list[Any] = [None] * LAG

    def run(self, texts: Sequence[Text], steps: int, context: int = 4096) -> dict[str, Any]:
        """One request a text. Tokens and milliseconds, and the plan of each step."""
        slots = np.arange(len(texts))
        tokens, ms, chosen = 0, 0.0, []
        for _ in range(steps):
            plan = self.controller.choose(range(len(PLANS)), slots, context * len(texts))
            chosen.append(plan)
            ms += step_ms(self.costs, plan, len(texts), context * len(texts))
            tokens += len(texts)
            seen = None
            if plan != NONE:
                accepted = np.array([self.accept(PLANS[plan], text) for text in texts])
                tokens += int(accepted.sum())
                seen = (plan, slots, accepted, np.zeros_like(accepted))
            self.waiting.append(seen)
            arrived = self.waiting.pop(0)
            if arrived is not None:
                self.controller.observe(*arrived)
        return {"rate": tokens / ms, "plans": chosen}

    def accept(self, plan: Plan, text: Text) -> int:
        at_least = reach(plan.tree_shape, plan.m, text.guesses())
        return int((self.rng.random() < np.array(at_least)).sum())

    def plain_rate(self, num_reqs: int, context: int = 4096) -> float:
        return num_reqs / step_ms(self.costs, NONE, num_reqs, context * num_reqs)

    def best_fixed(self, texts: Sequence[Text], context: int = 4096) -> float:
        """Of one plan for all steps, expected."""
        n = len(texts)
        rates = [self.plain_rate(n)]
        for i, plan in enumerate(PLANS):
            of_each = (1 + sum(reach(plan.tree_shape, plan.m, t.guesses())) for t in texts)
            rates.append(sum(of_each) / step_ms(self.costs, i, n, context * n))
        return max(rates)


@pytest.mark.parametrize("costs", [DENSE, EXPERTS])
@pytest.mark.parametrize("num_reqs", [1, 4])
def test_a_wrong_draft_costs_next_to_nothing(costs: Costs, num_reqs: int) -> None:
    simulation = Simulation(costs)
    begun = simulation.run([WRONG] * num_reqs, 60)
    got = simulation.run([WRONG] * num_reqs, 2000)
    probes = sum(plan != NONE for plan in got["plans"])
    print(f"{begun['plans'][:12]}, then {probes} probes of 2000 steps")
    assert begun["rate"] > 0.80 * simulation.plain_rate(num_reqs)
    assert got["rate"] > 0.99 * simulation.plain_rate(num_reqs)
    assert 2 <= probes < 100


@pytest.mark.parametrize("costs", [DENSE, EXPERTS])
@pytest.mark.parametrize("text", [GOOD, FAIR])
def test_a_right_draft_gets_nearly_the_best_plan(costs: Costs, text: Text) -> None:
    simulation = Simulation(costs)
    simulation.run([text], 30)
    got = simulation.run([text], 1500)
    assert got["rate"] > 0.95 * simulation.best_fixed([text])


def test_right_for_one_of_two() -> None:
    """One step verifies both; the plan follows what both together gain."""
    for costs in (DENSE, EXPERTS):
        simulation = Simulation(costs)
        simulation.run([GOOD, WRONG], 30)
        got = simulation.run([GOOD, WRONG], 1500)
        assert got["rate"] > 0.95 * simulation.best_fixed([GOOD, WRONG])


@pytest.mark.parametrize("costs", [DENSE, EXPERTS])
def test_a_text_that_changes_its_nature(costs: Costs) -> None:
    simulation = Simulation(costs)
    simulation.run([WRONG], 1000)
    found = simulation.run([GOOD], 1000)["plans"]
    first = next(i for i, plan in enumerate(found) if plan > 0)
    print(f"a larger plan than the probe's after {first} steps")
    assert first < 600
    lost = simulation.run([WRONG], 1000)["plans"]
    assert sum(plan != NONE for plan in lost[:40]) < 30
    assert sum(plan != NONE for plan in lost[40:]) < 60


def test_copies_count_up_to_the_nodes_of_a_plan() -> None:
    controller = Controller((*PLANS, Plan((), 31)), costs_with_a_copy(), 4)
    slots = np.array([0, 1])
    for _ in range(40):  # a wrong draft
        controller.observe(0, slots, np.zeros(2, int), np.zeros(2, int))
    assert controller.choose(range(4), slots, 8000) == NONE
    for _ in range(20):  # of one request the text repeats itself
        controller.expect_copies(slots, np.array([9.0, 0.0]))
    tokens = controller.tokens(slots)
    assert tokens[3] == pytest.approx(1 + 9 + 1, rel=0.02)
    assert tokens[0] == pytest.approx(1 + 3 + 1, rel=0.05)  # of three nodes
    assert controller.choose(range(4), slots, 8000) == 3  # the copy, without the draft's time
    controller.forget([0])
    assert controller.copies.tolist() == [0, 0, 0, 0]


def costs_with_a_copy() -> Costs:
    proposals = (*DENSE.proposals, Curve((1, 64), (0.05, 0.05), 0.0))
    return Costs((*DENSE.nodes, 31), DENSE.target, proposals, DENSE.sampling)


def test_requests_without_drafts_gain_nothing() -> None:
    """A plan has to pay for all that share the step."""
    simulation = Simulation(EXPERTS)
    simulation.run([GOOD], 200)
    slots = np.array([0])
    alone = simulation.controller.choose(range(len(PLANS)), slots, 4096)
    simulation.controller.steps_without = 0
    assert alone != NONE
    assert simulation.controller.choose(range(len(PLANS)), slots, 4096 * 40, 40) == NONE


def test_another_request_starts_anew() -> None:
    simulation = Simulation(EXPERTS)
    simulation.run([WRONG], 600)
    simulation.controller.of_all[:] = 0.0
    simulation.controller.forget([0])
    assert simulation.controller.is_new[0] and not simulation.controller.evidence[0].any()
    assert any(plan != NONE for plan in simulation.run([GOOD], 3)["plans"])


def test_nothing_to_choose_from() -> None:
    controller = Controller(PLANS, DENSE, 4)
    assert controller.choose([], np.array([0]), 100) == NONE
    assert controller.choose([0], np.array([], dtype=np.int64), 0) == NONE


def test_likelihoods_are_of_lengths() -> None:
    for plan in (*PLANS, Plan((), 16)):
        table = np.exp(length_likelihoods(plan, [FAIR]))[:, 0]
        assert table.shape == (1 + len(plan.tree_shape),)
        assert table.sum() == pytest.approx(1.0, abs=0.02)
        mean = float(table @ np.arange(len(table)))
        assert 1 + mean == pytest.approx(expected_tokens(plan, [FAIR])[0], abs=0.05)


def test_costs_grow_with_rows_requests_and_context() -> None:
    assert step_ms(DENSE, NONE, 1, 0) < step_ms(DENSE, 0, 1, 0) < step_ms(DENSE, 1, 1, 0)
    assert step_ms(DENSE, 1, 2, 0) > step_ms(DENSE, 1, 1, 0)
    assert step_ms(DENSE, 1, 1, 9999) > step_ms(DENSE, 1, 1, 0)
    assert step_ms(DENSE, NONE, 1, 0) == pytest.approx(4.6 + 0.1 + 1e-4)
    assert step_ms(DENSE, NONE, 640, 0) == pytest.approx(9.2 + 0.1 + 0.064)  # beyond what was timed


@pytest.mark.parametrize("most_context", [2, 60, 448, 1000, 5000, 40_000])
def test_a_curve_of_noisy_times(most_context: int) -> None:
    """8 ms at one request, 9 at 32; 1e-5 more for each token in the cache."""
    rng = np.random.default_rng(0)
    asked = []

    def run(batch: int, context: int) -> float:
        asked.append(context)
        return 8 + (batch - 1) / 31 + 1e-5 * batch * context + float(rng.normal(0, 0.01))

    got = curve([1, 2, 4, 8, 16, 32], run, most_context)
    assert 0 < min(asked) and max(asked) <= most_context
    for batch in (1, 5, 32):
        for context in (most_context // 2, most_context):
            true = 8 + (batch - 1) / 31 + 1e-5 * batch * context
            assert got.at(batch, batch * context) == pytest.approx(true, rel=0.05)


def test_a_curve_no_flatter_than_another() -> None:
    """More rows read the cache for no less: what two noisy times say against it is noise."""
    got = curve([1, 8], lambda batch, context: 8.0, 40_000, least_per_token=1e-5)
    assert got.per_token == 1e-5
    steeper = curve([8], lambda batch, context: 8 + 1e-4 * batch * context, 40_000, 1e-5)
    assert steeper.per_token == pytest.approx(1e-4)


def test_sizes_to_time() -> None:
    assert sizes_to_time([1, 2, 3, 4, 5, 6, 7, 8]) == [1, 2, 3, 5, 7, 8]
    assert sizes_to_time([4]) == [4]


OF = {"gpu": "NVIDIA H100", "plans": [[[2, 2], 3]]}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        costs_module.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    return lines


def test_costs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    file = cost_file(OF)
    assert file.is_relative_to(tmp_path) and file != cost_file(OF | {"gpu": "NVIDIA H200"})
    assert read_costs(file, OF) is None and not warnings
    write_costs(file, OF, DENSE)
    assert read_costs(file, OF) == DENSE and not warnings
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\xff",
        lambda text: json.dumps(json.loads(text) | {"format": 99}),
        lambda text: json.dumps(json.loads(text) | {"of": {"gpu": "another"}}),
        lambda text: text.replace('"sampling": [0.1, 0.0001]', '"sampling": [0.1]'),
        lambda text: text.replace("4.6", "NaN"),
        lambda text: text.replace("4.6", "-4.6"),
        lambda text: text.replace("4.6", "Infinity"),
        lambda text: text.replace("4.6", "1e999"),
        lambda text: text.replace("4.6", "0.0"),
        lambda text: text.replace("0.0001]", "NaN]"),
        lambda text: text.replace('"nodes": [3', '"nodes": [1e999'),
        lambda text: "[" * 100_000,
        lambda text: text.replace('"per_token"', '"per_tok"'),
        lambda text: text.replace("[1, 64]", "[64, 1]"),
        lambda text: text.replace('"32":', '"33":'),
    ],
)
def test_damaged_costs_are_measured_anew(damage: Any, tmp_path: Path, warnings: list[str]) -> None:
    file = tmp_path / "costs.json"
    write_costs(file, OF, DENSE)
    text = file.read_text()
    assert damage(text) != text
    file.write_text(damage(text))
    assert read_costs(file, OF) is None
    assert len(warnings) == 1 and "\n" not in warnings[0] and str(file) in warnings[0]
    write_costs(file, OF, DENSE)
    assert read_costs(file, OF) == DENSE


def test_a_folder_that_cannot_be_written(tmp_path: Path, warnings: list[str]) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder belongs")
    write_costs(blocked / "longspec" / "costs.json", OF, DENSE)
    assert len(warnings) == 1 and "cannot be kept" in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("num_reqs", [1, 4, 8])
def test_a_weak_draft_of_many_requests_costs_no_more_than_probing(num_reqs: int) -> None:
    """Of eight small trees one is accepted whole nearly each time; that is no reason to ask again
    at once."""
    simulation = Simulation(EXPERTS, num_reqs)
    texts = [Text(0.3, 0.06)] * num_reqs
    simulation.run(texts, 200)
    seen = simulation.run(texts, 2000)
    assert seen["rate"] > 0.99 * simulation.plain_rate(num_reqs)
    assert np.mean(np.array(seen["plans"]) != NONE) < 0.02
