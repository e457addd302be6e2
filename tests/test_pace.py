"""Steps that the host makes longer than the device needs."""

import numpy as np
import pytest

pytest.importorskip("vllm")
from test_controller import EXPERTS, FAIR, PLANS, Simulation

from vllm_longspec.runtime.controller import NONE, Controller
from vllm_longspec.runtime.pace import NO_STEP, STEADY, Pace, size_of


def run(pace: Pace, plan: int, num_reqs: int, device: float, seen: float, steps: int) -> float:
    """Steps of one kind, from where the clock stands; what the last one leaves."""
    for _ in range(steps):
        pace.step(plan, num_reqs, device, pace.at + seen / 1e3)
    return float(pace.of(num_reqs)[plan])


def test_it_learns_what_the_host_adds() -> None:
    pace = Pace(3)
    assert run(pace, 1, 4, device=2.0, seen=3.0, steps=STEADY) == 1.0  # not steady yet
    assert run(pace, 1, 4, 2.0, 3.0, 100) == pytest.approx(1.5, rel=0.02)
    assert pace.of(4)[NONE] == pace.of(4)[0] == 1.0
    assert pace.of(8)[1] == 1.0 and pace.of(7)[1] > 1.4  # of batches alike
    # A device that the host keeps busy is never faster than measured.
    assert run(pace, 1, 4, 2.0, 1.5, 200) == pytest.approx(1.0, abs=0.01)


def test_pauses_and_prompts_do_not_count() -> None:
    pace = Pace(3)
    run(pace, 0, 1, 2.0, 2.0, 10)
    assert run(pace, 0, 1, 2.0, 2.0 * NO_STEP + 1, 5) == 1.0
    pace.interrupted()
    assert run(pace, 0, 1, 2.0, 4.0, STEADY - 1) == 1.0


def test_what_was_seen_is_forgotten() -> None:
    pace = Pace(3)
    run(pace, 1, 4, 2.0, 4.0, 100)
    before = pace.of(4)[1]
    run(pace, 2, 4, 2.0, 2.0, 5000)
    assert before > 1.9 and pace.of(4)[1] < 1.02


def test_sizes() -> None:
    assert [size_of(n) for n in (1, 2, 3, 4, 1024, 1 << 20)] == [0, 1, 1, 2, 10, 15]


@pytest.mark.parametrize("host", [1.0, 6.0])
def test_a_slow_host_turns_trees_off(host: float) -> None:
    """By the device's time alone a fair text gains a little with experts; with a host that needs
    longer for a verification it would lose."""
    pace = Pace(len(PLANS))
    simulation = Simulation(EXPERTS, 1)
    simulation.controller = Controller(PLANS, EXPERTS, 1, pace)
    kinds = simulation.run([FAIR], 40)["plans"]
    for _ in range(3000):
        plan = simulation.run([FAIR], 1)["plans"][0]
        device = EXPERTS.step(plan, 1, 4096)
        seen = device if plan == NONE else max(device, host)
        pace.step(plan, 1, device, pace.at + seen / 1e3)
        kinds.append(plan)
    trees = np.mean(np.array(kinds[1000:]) != NONE)
    assert trees < 0.1 if host > 5 else trees > 0.5
