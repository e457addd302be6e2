"""How long steps really take, beside what the device needs for them.

`runtime/costs.py` has the device's time. Small steps wait for the host: for the scheduler and for
launches, and verifications for more of them than plain steps do. A step takes what the slower of
the two takes. The host's time is learned from the intervals between steps, for plain steps and for
all others, by the size of the batch.
"""

import time

import numpy as np

PLAIN, TREE = 0, 1  # kinds of steps
TREES_COST_MORE = 1.25  # a guess, while only one kind was seen
STEADY = 3  # steps of one plan and batch, one after another, before their intervals count
WEIGHT = 0.1  # of the newest interval
MOST_GROWTH = 2.0  # of what one interval is believed: a pause is no step
SETTLED = 40  # intervals, until what is learned is no longer where it began
WAITING = 1.05  # times the device's time: from here on the host is waited for
SIZES = 16  # of batches: 1, 2 to 3, 4 to 7, ...
TRIAL = 16  # plain steps at most, where trees wait for the host, to see whether plain ones do


class Pace:
    """On the host of one worker; plan -1 is plain decoding.

    `host`: [SIZES, 2] milliseconds, 0 where nothing is known. `seen`: [SIZES, 2] intervals that
    counted. `trials`: [SIZES] plain steps that were asked for.
    """

    def __init__(self) -> None:
        self.host = np.zeros((SIZES, 2))
        self.seen = np.zeros((SIZES, 2), dtype=np.int64)
        self.trials = np.zeros(SIZES, dtype=np.int64)
        self.last = (0, 0)  # plan and number of requests of the last step
        self.steady = 0  # steps like it so far
        self.at = 0.0  # seconds, when it was launched

    def milliseconds(
        self,
        num_reqs: int,
        device: np.ndarray,  # [plans + 1] milliseconds, the last one plain decoding
    ) -> np.ndarray:  # the same, with the host
        plain, tree = self.host[size_of(num_reqs)]
        return np.maximum(device, np.append(np.full(len(device) - 1, tree), plain))

    def asks_for_plain(self, num_reqs: int) -> bool:
        """Whether to decode plainly once, since trees wait for the host and nobody knows whether
        plain steps would."""
        size = size_of(num_reqs)
        waits = self.host[size, TREE] > 0.0 and self.seen[size, TREE] > 0
        if not waits or self.seen[size, PLAIN] > 0 or self.trials[size] >= TRIAL:
            return False
        self.trials[size] += 1
        return True

    def step(self, plan: int, num_reqs: int, device: float, now: float | None = None) -> None:
        """A step was launched that takes `device` milliseconds of the device."""
        now = time.perf_counter() if now is None else now
        interval, self.at = 1e3 * (now - self.at), now
        self.steady = self.steady + 1 if (plan, num_reqs) == self.last else 0
        self.last = (plan, num_reqs)
        if self.steady >= STEADY:
            self.learn(size_of(num_reqs), PLAIN if plan < 0 else TREE, interval, device)

    def learn(self, size: int, kind: int, interval: float, device: float) -> None:
        host, other = self.host[size], 1 - kind
        self.seen[size, kind] += 1
        before = host[kind]
        if interval <= WAITING * device:
            host[kind] = min(before, interval)  # it needs no longer than that
        else:
            start = max(before, device)
            host[kind] = start + WEIGHT * (min(interval, MOST_GROWTH * start) - start)
        if self.seen[size, other] == 0:
            guess = TREES_COST_MORE if other == TREE else 1 / TREES_COST_MORE
            host[other] = guess * host[kind]
        elif before > 0.0 and self.seen[size, kind] > SETTLED:
            # The host got slower or faster, for both.
            host[other] *= host[kind] / before

    def interrupted(self) -> None:
        """A step had prompts in it."""
        self.steady = 0


def size_of(num_reqs: int) -> int:
    return min(num_reqs.bit_length(), SIZES) - 1
