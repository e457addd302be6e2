"""What the host knows of each request slot, beside vLLM's `RequestState`."""

import numpy as np

from vllm_longspec.runtime.controller import NONE


class Slots:
    def __init__(self, max_num_reqs: int) -> None:
        # Whose tree waits to be verified: the number of a plan, or NONE.
        self.plan = np.full(max_num_reqs, NONE, dtype=np.int64)
        # Tokens were committed that the draft has not seen.
        self.behind = np.ones(max_num_reqs, dtype=bool)
        # A grammar's masks come for every node that the scheduler made room for.
        self.has_grammar = np.zeros(max_num_reqs, dtype=bool)
        # Which request has the slot: observations that arrive late are of another one.
        self.request = np.zeros(max_num_reqs, dtype=np.int64)
        self.taken: list[int] = []  # since somebody looked, by another request

    def take(self, slot: int, has_grammar: bool) -> None:
        self.plan[slot] = NONE
        self.behind[slot] = True
        self.has_grammar[slot] = has_grammar
        self.request[slot] += 1
        self.taken.append(slot)
