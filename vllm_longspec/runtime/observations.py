"""What verifications accepted, on its way from the device: nobody waits for it.

It decides a later step. The lag is a number of steps and not whatever has arrived, so that all
tensor-parallel ranks decide alike.
"""

from collections import deque
from dataclasses import dataclass, field, fields

import numpy as np
import torch

LAG = 2  # steps; a scheduler that runs ahead has seen the output of the step before the last


@dataclass
class Verification:
    """Of the requests of one step that had a tree."""

    plans: np.ndarray  # [num_verified]
    slots: np.ndarray  # [num_verified]
    requests: np.ndarray  # [num_verified] `Slots.request` of them
    context_lens: np.ndarray  # [num_verified] tokens
    # What arrives later: nodes, and those of them that only the text itself proposed.
    accepted: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))
    copied: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.int64))

    def of(self, which: np.ndarray) -> "Verification":  # [num_verified] bool
        return Verification(*(getattr(self, name.name)[which] for name in fields(self)))


@dataclass
class _Pending:
    verification: Verification
    rows: np.ndarray  # of the batch
    buffer: torch.Tensor
    event: torch.cuda.Event | None


class Observations:
    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.free = [
            torch.zeros(2, max_num_reqs, dtype=torch.int32, pin_memory=self.on_gpu)
            for _ in range(LAG + 1)
        ]
        self.pending: deque[_Pending | None] = deque([None] * LAG)

    def send(
        self,
        verification: Verification,
        rows: np.ndarray,  # [num_verified] batch rows
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_copied: torch.Tensor | None,  # [num_reqs] int32
    ) -> None:
        buffer = self.free.pop()
        num_reqs = len(num_sampled)
        buffer[0, :num_reqs].copy_(num_sampled, non_blocking=True)
        if num_copied is not None:
            buffer[1, :num_reqs].copy_(num_copied, non_blocking=True)
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.pending.append(_Pending(verification, rows, buffer, event))

    def skip(self) -> None:
        """Nothing was verified in this step."""
        self.pending.append(None)

    def receive(self) -> Verification | None:
        """Of `LAG` steps ago. Called once a step, after `send` or `skip`."""
        pending = self.pending.popleft()
        if pending is None:
            return None
        if pending.event is not None:
            pending.event.synchronize()  # long done
        values = pending.buffer.numpy()[:, pending.rows]
        self.free.append(pending.buffer)
        verification = pending.verification
        verification.accepted = values[0].astype(np.int64) - 1
        verification.copied = values[1].astype(np.int64)
        return verification
