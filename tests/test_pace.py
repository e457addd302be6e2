"""Steps that the host makes longer than the device needs."""

from collections.abc import Callable

import numpy as np
import pytest
from test_controller import EXPERTS, FAIR, GOOD, PLANS, Simulation, costs_of, step_ms

from vllm_longspec.runtime.controller import NONE, Controller
from vllm_longspec.runtime.costs import Costs
from vllm_longspec.runtime.pace import PLAIN, STEADY, TREE, TREES_COST_MORE, TRIAL, Pace, size_of
from vllm_longspec.tree.budget import Text

SMALL = costs_of(1.0, (1.2, 1.5, 1.5), (0.5, 1.0, 1.6))  # half a billion parameters


def run(pace: Pace, plan: int, num_reqs: int, device: float, seen: float, steps: int) -> None:
    """Steps of one kind, from where the clock stands."""
    for _ in range(steps):
        pace.step(plan, num_reqs, device, pace.at + seen / 1e3)


def host_of(pace: Pace, num_reqs: int) -> list[float]:
    return [float(ms) for ms in pace.host[size_of(num_reqs)]]


def test_it_learns_what_the_host_needs() -> None:
    pace = Pace()
    run(pace, 1, 4, device=2.0, seen=3.0, steps=STEADY)
    assert host_of(pace, 4) == [0.0, 0.0]  # not steady yet
    run(pace, 1, 4, 2.0, 3.0, 100)
    plain, tree = host_of(pace, 7)  # a batch alike
    assert tree == pytest.approx(3.0, rel=0.02) and plain == pytest.approx(tree / TREES_COST_MORE)
    assert host_of(pace, 8) == [0.0, 0.0]
    device = np.array([4.0, 2.0, 1.0])  # two plans, plain decoding
    assert pace.milliseconds(4, device).tolist() == [4.0, tree, plain]
    assert pace.milliseconds(8, device).tolist() == device.tolist()


@pytest.mark.parametrize("times", [1.5, 4.0, 30.0])
def test_however_slow_it_is(times: float) -> None:
    pace = Pace()
    run(pace, NONE, 1, 1.0, times, 150)
    assert host_of(pace, 1)[PLAIN] == pytest.approx(times, rel=0.02)


def test_a_pause_is_no_step() -> None:
    pace = Pace()
    run(pace, 0, 1, 2.0, 2.5, 100)
    before = host_of(pace, 1)[TREE]
    run(pace, 0, 1, 2.0, 5000.0, 1)
    assert host_of(pace, 1)[TREE] < 1.11 * before
    pace.interrupted()
    run(pace, 0, 1, 2.0, 40.0, STEADY - 1)
    assert host_of(pace, 1)[TREE] < 1.11 * before


def test_a_host_that_changes_does_so_for_both_kinds() -> None:
    pace = Pace()
    run(pace, NONE, 4, 1.0, 4.0, 100)
    run(pace, 1, 4, 1.0, 6.0, 100)
    assert host_of(pace, 4) == pytest.approx([4.0, 6.0], rel=0.05)
    run(pace, 1, 4, 1.0, 3.0, 100)
    assert host_of(pace, 4) == pytest.approx([2.0, 3.0], rel=0.05)
    # A device that is as slow as the steps says only that the host is not slower.
    run(pace, 1, 4, 2.0, 2.0, 100)
    assert max(host_of(pace, 4)) <= 2.001


def test_plain_steps_are_tried_where_trees_wait() -> None:
    pace = Pace()
    assert not pace.asks_for_plain(1)
    run(pace, 0, 1, 2.0, 2.0, 20)
    assert not pace.asks_for_plain(1)  # the device is what takes time
    run(pace, 0, 1, 2.0, 4.0, 20)
    assert [pace.asks_for_plain(1) for _ in range(TRIAL + 1)] == [True] * TRIAL + [False]
    other = Pace()
    run(other, 0, 1, 2.0, 4.0, 20)
    run(other, NONE, 1, 2.0, 2.0, STEADY + 1)
    assert not other.asks_for_plain(1)


def test_sizes() -> None:
    assert [size_of(n) for n in (1, 2, 3, 4, 1024, 1 << 20)] == [0, 1, 1, 2, 10, 15]


def play(
    costs: Costs, text: Text, seconds_of: Callable[[int, float], float], pace: Pace | None
) -> tuple[float, float]:
    """Tokens a millisecond and the share of trees over 4,000 steps of one request."""
    simulation = Simulation(costs, 1)
    simulation.controller = Controller(PLANS, costs, 1, pace)
    accepted, right = [0], simulation.accept

    def accept(plan: object, text: Text) -> int:
        accepted[0] = right(plan, text)  # type: ignore[arg-type]
        return accepted[0]

    simulation.accept = accept  # type: ignore[method-assign]
    tokens, ms, trees = 0, 0.0, 0
    for _ in range(4000):
        accepted[0] = 0
        plan = simulation.run([text], 1)["plans"][0]
        device = step_ms(costs, plan, 1, 4096)
        seen = seconds_of(plan, device)
        if pace is not None:
            pace.step(plan, 1, device, pace.at + seen / 1e3)
        tokens, ms, trees = tokens + 1 + accepted[0], ms + seen, trees + (plan != NONE)
    return tokens / ms, trees / 4000


@pytest.mark.parametrize("host", [1.0, 6.0])
def test_a_slow_host_turns_trees_off(host: float) -> None:
    """By the device's time a fair text gains a little with experts; with a host that needs longer
    for a verification, and not for a plain step, it would lose."""
    rate, trees = play(EXPERTS, FAIR, lambda p, ms: ms if p == NONE else max(ms, host), Pace())
    assert trees < 0.2 if host > 5 else trees > 0.5
    assert rate > 0.98 / step_ms(EXPERTS, NONE, 1, 4096)


@pytest.mark.parametrize("host", [(3.0, 5.0), (3.6, 5.0), (5.0, 6.0), (8.0, 8.0)])
@pytest.mark.parametrize("text", [GOOD, FAIR])
def test_knowing_the_host_never_loses(host: tuple[float, float], text: Text) -> None:
    """One that is several times slower than the device, for plain steps too."""

    def seen(plan: int, device: float) -> float:
        return max(device, host[0] if plan == NONE else host[1])

    without, _ = play(SMALL, text, seen, None)
    knowing, _ = play(SMALL, text, seen, Pace())
    plain = 1 / max(host[0], step_ms(SMALL, NONE, 1, 4096))
    assert knowing > 0.95 * max(without, plain)
