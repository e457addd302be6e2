"""What verifications accepted, on its way from the device: nobody waits for it.

It decides a later step. The lag is a number of steps and not whatever has arrived, so that all
tensor-parallel ranks decide alike.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

LAG = 2  # steps; a scheduler that runs ahead has seen the output of the step before the last


@dataclass
class Batch:
    """The requests of one step."""

    slots: np.ndarray  # [num_reqs]
    generations: np.ndarray  # [num_reqs] `Slots.generations` of them
    plans: np.ndarray  # [num_reqs] whose tree was verified; NONE: none was
    context_lens: np.ndarray  # [num_reqs] tokens
    # What arrives later, [num_reqs]: nodes accepted, those of them that only the text itself
    # proposed, and of the next tree how many copied tokens are expected to be accepted.
    accepted: np.ndarray
    copied: np.ndarray
    copies_expected: np.ndarray | None

    def of(self, which: np.ndarray) -> "Batch":  # [num_reqs] bool
        expected = self.copies_expected
        return Batch(
            self.slots[which],
            self.generations[which],
            self.plans[which],
            self.context_lens[which],
            self.accepted[which],
            self.copied[which],
            None if expected is None else expected[which],
        )


@dataclass
class _Buffers:
    numbers: torch.Tensor  # [2, max_num_reqs] int32
    expected: torch.Tensor  # [max_num_reqs] float32


class Observations:
    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.free = [
            _Buffers(
                torch.zeros(2, max_num_reqs, dtype=torch.int32, pin_memory=self.on_gpu),
                torch.zeros(max_num_reqs, dtype=torch.float32, pin_memory=self.on_gpu),
            )
            for _ in range(LAG + 1)
        ]
        self.pending: deque[tuple[Batch, _Buffers, torch.cuda.Event | None] | None] = deque(
            [None] * LAG
        )

    def send(
        self,
        batch: Batch,
        num_sampled: torch.Tensor,  # [num_reqs] int32
        num_copied: torch.Tensor,  # [num_reqs] int32
        copies_expected: torch.Tensor | None,  # [num_reqs] float32
    ) -> None:
        """Once a step, after `receive`."""
        buffers = self.free.pop()
        num_reqs = len(num_sampled)
        buffers.numbers[0, :num_reqs].copy_(num_sampled, non_blocking=True)
        buffers.numbers[1, :num_reqs].copy_(num_copied, non_blocking=True)
        batch.copies_expected = None
        if copies_expected is not None:
            buffers.expected[:num_reqs].copy_(copies_expected, non_blocking=True)
            batch.copies_expected = buffers.expected[:num_reqs].numpy()
        event = None
        if self.on_gpu:
            event = torch.cuda.Event()
            event.record()
        self.pending.append((batch, buffers, event))

    def skip(self) -> None:
        """In place of `send` where there is nothing to observe."""
        self.pending.append(None)

    def receive(self) -> Batch | None:
        """Of `LAG` steps ago; its arrays are good until the next `send`."""
        pending = self.pending.popleft()
        if pending is None:
            return None
        batch, buffers, event = pending
        if event is not None:
            event.synchronize()  # long done
        numbers = buffers.numbers.numpy()[:, : len(batch.slots)]
        batch.accepted, batch.copied = numbers[0].astype(np.int64) - 1, numbers[1].astype(np.int64)
        self.free.append(buffers)
        return batch
