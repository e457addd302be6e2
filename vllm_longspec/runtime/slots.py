"""What the host knows of each request slot, beside vLLM's `RequestState`."""

import numpy as np
import torch
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor

from vllm_longspec.runtime.controller import NONE


class Slots:
    def __init__(self, max_num_reqs: int) -> None:
        # What to draft for a request: TREE, CHAIN or OFF (`draft/inputs.py`).
        self.modes = UvaBackedTensor(max_num_reqs, dtype=torch.int32)  # [max_num_reqs] int32
        # Other than before: another request has the slot.
        self.generations = UvaBackedTensor(max_num_reqs, dtype=torch.int32)  # [max_num_reqs] int32
        # Whose tree waits to be verified: the number of a plan, or NONE.
        self.plan = np.full(max_num_reqs, NONE, dtype=np.int64)
        # Tokens were committed that the draft has not seen.
        self.behind = np.ones(max_num_reqs, dtype=bool)
        # A grammar's masks come for every node that the scheduler made room for.
        self.has_grammar = np.zeros(max_num_reqs, dtype=bool)
        self.taken: list[int] = []  # since somebody looked, by another request

    def take(self, slot: int, mode: int, has_grammar: bool) -> None:
        self.modes.np[slot] = mode
        self.generations.np[slot] += 1
        self.plan[slot] = NONE
        self.behind[slot] = True
        self.has_grammar[slot] = has_grammar
        self.taken.append(slot)

    def copy_to_uva(self) -> None:
        self.modes.copy_to_uva()
        self.generations.copy_to_uva()
