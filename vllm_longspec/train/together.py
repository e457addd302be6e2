"""What the processes of a run decide together, by words on the host: no device is waited for."""

from datetime import timedelta

import torch
from accelerate import Accelerator


class Together:
    def __init__(self, accelerator: Accelerator, timeout: timedelta) -> None:
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether one of the processes has it set. All have to ask."""
        if self.group is None:
            return list(flags)
        words = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(words, torch.distributed.ReduceOp.MAX, self.group)
        return [bool(word) for word in words.tolist()]
