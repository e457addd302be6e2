"""One line of the log when the plan changes that most steps take."""

import time
from collections import deque
from collections.abc import Sequence

from vllm.logger import init_logger

logger = init_logger("vllm.longspec")

STEPS = 256
SECONDS_BETWEEN_LINES = 60.0


class UsualPlan:
    """`plans`: what each plan is called."""

    def __init__(self, plans: Sequence[str]) -> None:
        self.plans = plans
        self.counts = [0] * len(plans)  # of the last steps
        self.last: deque[int] = deque()
        self.usual: int | None = None
        self.logged = -SECONDS_BETWEEN_LINES

    def observe(self, plan: int) -> None:
        """A step took this plan."""
        self.last.append(plan)
        self.counts[plan] += 1
        if len(self.last) <= STEPS:
            if len(self.last) < STEPS:
                return
        else:
            self.counts[self.last.popleft()] -= 1
        # The others have too few steps, or had before and were not named for a minute.
        if plan == self.usual or 2 * self.counts[plan] <= STEPS:
            return
        now = time.monotonic()
        if now - self.logged < SECONDS_BETWEEN_LINES:
            return
        self.usual, self.logged = plan, now
        logger.info(
            "LongSpec: usual plan now: %s (%d%% of the last %d steps)",
            self.plans[plan], round(100 * self.counts[plan] / STEPS), STEPS,
        )  # fmt: skip
