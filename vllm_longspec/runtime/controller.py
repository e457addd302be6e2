"""Which plan the next step verifies: the one with the most expected tokens per millisecond.

A plan is a tree that has its CUDA graphs; plan `NONE` is plain decoding. Outputs do not depend on
the choice. What it rests on are costs that were measured at start-up (`runtime/costs.py`) and how
often the draft was right for each request, which comes back from the device two steps late, so that
nobody waits and every tensor-parallel rank decides alike.
"""

from collections.abc import Sequence

import numpy as np

from vllm_longspec.runtime.costs import Costs
from vllm_longspec.runtime.pace import Pace
from vllm_longspec.tree import budget
from vllm_longspec.tree.budget import Plan, Text, reach

NONE = -1

# How good a draft can be: from never right to nearly always. Further guesses are worth less to a
# weak draft, along the line through the texts that `tree/budget.py` was fitted to.
QUALITIES = tuple(Text(first, 0.02 + 0.45 * first * first) for first in np.linspace(0.0, 0.98, 25))
# A length that no quality explains is noise, not proof.
LEAST_LIKELY = 1e-3
# Of what is known of a request, kept at each further verification: about the last sixteen count.
OF_A_REQUEST = 0.94
# Of what is known of all requests, which is worth a few verifications to each of them.
OF_ALL = 0.98
WORTH_OF_ALL = 0.08
OF_COPIES = 0.3  # weight of the newest number of copied tokens that are expected
# No quality is ruled out by more than this, in nats: text changes, and a draft that was wrong for
# a thousand tokens is believed after two or three that it got right.
MOST_EVIDENCE = 12.0
MOST_EVIDENCE_OF_ALL = 40.0
# Where plain decoding is the best plan, the share of time that goes into finding out whether it
# still is; each probe that fails doubles the steps to the next one until the share is kept.
PROBING = 0.005
PROBING_THE_NEW = 0.02  # while a request is in the batch of which nothing is known
LEAST_STEPS_BETWEEN_PROBES = 4
# The gain at which plain decoding ends: the draft has to catch up first, which no plan's cost has.
WORTH_A_SWITCH = 1.015
MOST_STEPS_BETWEEN_PROBES = 400


def length_likelihoods(plan: Plan, qualities: Sequence[Text] = QUALITIES) -> np.ndarray:
    """Log-probabilities [1 + depth, num_qualities] that 0, 1, ... levels of a tree are accepted."""
    depth = len(plan.tree_shape)
    table = np.zeros((1 + depth, len(qualities)))
    for column, text in enumerate(qualities):
        at_least = np.array([1.0, *reach(plan.tree_shape, plan.m, text.guesses()), 0.0])
        table[:, column] = at_least[:-1] - at_least[1:]
    return np.log(np.maximum(table, LEAST_LIKELY))


def expected_tokens(plan: Plan, qualities: Sequence[Text] = QUALITIES) -> np.ndarray:
    """Tokens of one verification, [num_qualities], the bonus token included."""
    return np.array([budget.expected_tokens(plan, text) for text in qualities])


class Controller:
    """State of one worker, on the host; requests are known by their slot."""

    def __init__(
        self,
        plans: Sequence[Plan],
        costs: Costs,
        max_num_reqs: int,
        pace: Pace | None = None,
    ) -> None:
        self.plans = tuple(plans)
        self.costs = costs
        self.likelihoods = [length_likelihoods(plan) for plan in plans]
        self.expected = np.stack([expected_tokens(plan) for plan in plans])  # [plans, qualities]
        self.nodes = np.array([plan.m for plan in plans])  # [plans]
        # Sums of log-likelihoods, decayed: what each request and all of them say of the draft.
        self.evidence = np.zeros((max_num_reqs, len(QUALITIES)))
        self.of_all = np.zeros(len(QUALITIES))
        # Tokens that copies of the text itself are expected to give, decayed.
        self.copies = np.zeros(max_num_reqs)
        self.is_new = np.ones(max_num_reqs, dtype=bool)  # nothing verified yet
        self.steps_without = 0  # since anything was verified
        self.steps_to_probe = LEAST_STEPS_BETWEEN_PROBES
        # Milliseconds by batch size, as `Costs.of_batch`.
        self.by_batch: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # What steps take beyond the device's time; None where ranks have to choose alike.
        self.pace = pace
        # Of the last choice that was none: for whom, and how many steps it holds if nothing is
        # learned.
        self.resting: tuple[int, bytes] | None = None
        self.steps_to_rest = 0.0

    def forget(self, slots: Sequence[int]) -> None:
        """Other requests have these slots now."""
        if not len(slots):
            return
        self.resting = None
        self.evidence[slots] = 0.0
        self.copies[slots] = 0.0
        self.is_new[slots] = True

    def observe(
        self,
        plan: int,
        slots: np.ndarray,  # [num_verified] int, no slot twice
        accepted: np.ndarray,  # [num_verified] int nodes accepted of trees of `plan`
        copied: np.ndarray,  # [num_verified] int of them, proposed by the text itself only
    ) -> None:
        depth = len(self.plans[plan].tree_shape)
        self.resting = None
        self.is_new[slots] = False
        if depth == 0 or not len(slots):
            return
        levels = np.minimum(accepted - np.minimum(copied, accepted), depth)
        seen = self.likelihoods[plan][levels]  # [num_verified, qualities]
        evidence = OF_A_REQUEST * self.evidence[slots] + seen
        most = evidence.max(axis=1, keepdims=True)
        self.evidence[slots] = np.maximum(evidence - most, -MOST_EVIDENCE)
        of_all = OF_ALL * self.of_all + seen.mean(axis=0)
        self.of_all = np.maximum(of_all - of_all.max(), -MOST_EVIDENCE_OF_ALL)
        if 2 * (levels == depth).sum() > len(slots):  # of many requests some are lucky each time
            self.steps_to_probe = LEAST_STEPS_BETWEEN_PROBES

    def expect_copies(
        self,
        slots: np.ndarray,  # [num_reqs] int, no slot twice
        expected: np.ndarray,  # [num_reqs] tokens (`Lookup.expected`)
    ) -> None:
        self.resting = None
        self.copies[slots] += OF_COPIES * (expected - self.copies[slots])

    def tokens(self, slots: np.ndarray) -> np.ndarray:
        """Expected tokens of one verification by each plan: [plans], of all `slots` together."""
        belief = self.evidence[slots] + WORTH_OF_ALL * self.of_all
        belief = np.exp(belief - belief.max(axis=1, keepdims=True))
        belief /= belief.sum(axis=1, keepdims=True)
        tokens = belief @ self.expected.T  # [slots, plans]
        copies = 1.0 + np.minimum(self.copies[slots, None], self.nodes)
        return np.maximum(tokens, copies).sum(axis=0)

    def choose(
        self,
        menu: Sequence[int],  # plans that may be taken, cheapest first
        slots: np.ndarray,  # of the batch's requests that want drafts
        num_context: int,  # tokens in the cache, of the whole batch
        num_without: int = 0,  # requests of the batch that want none
    ) -> int:
        """A plan of `menu`, or NONE."""
        num_reqs = len(slots) + num_without
        if not menu or len(slots) == 0:
            return NONE
        asking = (num_reqs, slots.tobytes())
        if asking == self.resting and self.steps_without + 1 < self.steps_to_rest:
            self.steps_without += 1
            return NONE
        self.resting = None
        if self.pace is not None and self.pace.asks_for_plain(num_reqs):
            self.steps_without += 1
            return NONE
        milliseconds = self.milliseconds(num_reqs, num_context)
        plain, cycles = milliseconds[NONE], milliseconds[list(menu)]
        tokens = self.tokens(slots) + num_without
        gains = tokens[list(menu)] / num_reqs * plain / cycles
        best = int(np.argmax(gains))
        if gains[best] > (WORTH_A_SWITCH if self.steps_without else 1.0):
            self.steps_without, self.steps_to_probe = 0, LEAST_STEPS_BETWEEN_PROBES
            return menu[best]
        self.steps_without += 1
        overhead = max(0.0, cycles[0] - plain) / plain
        most = min(max(overhead / PROBING, LEAST_STEPS_BETWEEN_PROBES), MOST_STEPS_BETWEEN_PROBES)
        due = float(self.steps_to_probe)
        if self.is_new[slots].any():
            due = min(due, most * PROBING / PROBING_THE_NEW)
        if self.steps_without < due:
            self.resting, self.steps_to_rest = asking, due
            return NONE
        self.steps_without, self.steps_to_probe = 0, min(2 * self.steps_to_probe, int(most))
        return menu[0]

    def milliseconds(self, num_reqs: int, num_context: int) -> np.ndarray:
        """Of a step with each plan, [plans + 1], the last one plain decoding."""
        of_device = self.of_device(num_reqs, num_context)
        return of_device if self.pace is None else self.pace.milliseconds(num_reqs, of_device)

    def of_device(self, num_reqs: int, num_context: int) -> np.ndarray:
        """The same, of the device alone."""
        if num_reqs not in self.by_batch:
            self.by_batch[num_reqs] = self.costs.of_batch(num_reqs)
        base, per_token = self.by_batch[num_reqs]
        cost: np.ndarray = base + per_token * num_context
        return cost

    def took(self, plan: int, num_reqs: int, num_context: int, prompts: bool) -> None:
        """A step was launched whose next tree is of this plan; with `prompts` it took longer."""
        if self.pace is None:
            return
        if prompts:
            self.pace.interrupted()
        self.pace.step(plan, num_reqs, float(self.of_device(num_reqs, num_context)[plan]))
