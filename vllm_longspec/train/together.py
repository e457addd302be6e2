"""What the processes of a run decide together, by words on the host: no device is waited for."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

from vllm_longspec.errors import LongSpecError

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # with which processes wait for the one that tokenises


@dataclass(frozen=True)
class Together:
    """Of one process alone, if nothing is given. What is asked here all processes have to ask, in
    the same order."""

    rank: int = 0
    size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether one of the processes has it set."""
        return [bool(word) for word in self.most(*flags)]

    def most(self, *counts: int) -> list[int]:
        return self._reduced(counts, torch.distributed.ReduceOp.MAX)

    def sum(self, *counts: int) -> list[int]:
        return self._reduced(counts, torch.distributed.ReduceOp.SUM)

    def on_main(self, do: Callable[[], object]) -> None:
        """The others wait. Raises its LongSpecError on all processes, which would wait in vain."""
        error = None
        if self.rank == 0:
            try:
                do()
            except LongSpecError as mistake:
                error = mistake
        self.fail(error)

    def main_first(self, do: Callable[[], T]) -> T:
        """On each process, by the main one alone before."""
        done: list[T] = []
        self.on_main(lambda: done.append(do()))
        return done[0] if done else do()

    def fail(self, error: LongSpecError | None) -> None:
        """Raises LongSpecError on all processes where one of them has one."""
        said: list[str | None] = [str(error) if error else None]
        if self.group is not None:
            said = [None] * self.size
            torch.distributed.all_gather_object(said, str(error) if error else None, self.group)
        for sentence in said:
            if sentence is not None:
                raise LongSpecError(sentence) from error

    def _reduced(
        self, numbers: tuple[int, ...], how: torch.distributed.ReduceOp.RedOpType
    ) -> list[int]:
        words = torch.tensor(numbers, dtype=torch.int64)
        if self.group is not None:
            torch.distributed.all_reduce(words, how, self.group)
        return words.tolist()


def settings_for_processes() -> list[KwargsHandler]:
    """For an Accelerator. Gradients lie where they are averaged, in place of twice."""
    return [
        InitProcessGroupKwargs(timeout=PATIENCE),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]


def processes_of(accelerator: Accelerator) -> Together:
    group = None
    if accelerator.num_processes > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return Together(accelerator.process_index, accelerator.num_processes, group)
