"""Anchor-offset indices (LongSpec, training): large positions get trained on short text."""

import torch

MAX_SINKS = 4
MAX_OFFSET = 30_000
END_MARGIN = 1_000


def anchor_offset_positions(
    num_sequences: int,
    length: int,
    max_position: int,
    generator: torch.Generator,
) -> torch.Tensor:  # [num_sequences, length] int64
    """0 ... s-1 for s attention sinks, then offset+s, offset+s+1, ...

    s is uniform in 0 ... 4 and the offset in 0 ... min(30000, max_position - 1000) - length, each
    drawn per sequence.
    """
    max_offset = max(0, min(MAX_OFFSET, max_position - END_MARGIN) - length)
    sinks = torch.randint(0, MAX_SINKS + 1, (num_sequences, 1), generator=generator)
    offset = torch.randint(0, max_offset + 1, (num_sequences, 1), generator=generator)
    index = torch.arange(length).expand(num_sequences, -1)
    return torch.where(index < sinks, index, index + offset)
