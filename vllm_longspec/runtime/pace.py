"""How long steps really take, beside what the device needs for them.

`runtime/costs.py` has the device's time. Small steps wait for the host: for the scheduler, for
launches, and verifications for more of them than plain steps. What is seen of that corrects the
device's times, for each plan and size of batch.
"""

import time

import numpy as np

STEADY = 3  # steps of one plan and batch, one after another, before their intervals count
WEIGHT = 0.1  # of the newest interval
NO_STEP = 3.0  # times the expected: nobody asked for tokens meanwhile
FORGETTING = 0.999  # of what was seen of other plans, at each step: a host is not always as busy
SIZES = 16  # of batches: 1, 2 to 3, 4 to 7, ...


class Pace:
    """On the host of one worker; plan -1 is plain decoding.

    `slowness`: [SIZES, plans + 1] an interval between steps over the device's time, at least 1.
    """

    def __init__(self, num_plans: int) -> None:
        self.slowness = np.ones((SIZES, num_plans + 1))
        self.kind = (0, 0)  # plan and number of requests of the last step
        self.steady = 0  # steps of that kind so far
        self.at = 0.0  # seconds, when it was seen

    def of(self, num_reqs: int) -> np.ndarray:  # [plans + 1], the last one plain decoding
        return self.slowness[size_of(num_reqs)]

    def step(self, plan: int, num_reqs: int, milliseconds: float, now: float | None = None) -> None:
        """A step was launched, `milliseconds` the device's time for one of this kind."""
        now = time.perf_counter() if now is None else now
        interval, self.at = 1e3 * (now - self.at), now
        kind = (plan, num_reqs)
        self.steady = self.steady + 1 if kind == self.kind else 0
        self.kind = kind
        slowness = self.of(num_reqs)
        slowness += (1.0 - slowness) * (1.0 - FORGETTING)
        if self.steady >= STEADY and interval < NO_STEP * milliseconds * slowness[plan]:
            slowness[plan] += WEIGHT * (max(1.0, interval / milliseconds) - slowness[plan])

    def interrupted(self) -> None:
        """A step had prompts in it."""
        self.steady = 0


def size_of(num_reqs: int) -> int:
    return min(num_reqs.bit_length(), SIZES) - 1
