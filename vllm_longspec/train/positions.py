"""Positions of packed pieces: natural, or anchor-offset indices (LongSpec, training), by which
large positions get trained on short text."""

import numpy as np

MAX_SINKS = 4
MAX_OFFSET = 30_000
END_MARGIN = 1_000


def natural_positions(lengths: np.ndarray) -> np.ndarray:  # [num_pieces] -> [num_tokens] int64
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def anchor_offset_positions(
    lengths: np.ndarray,  # [num_pieces]
    max_position: int,
    generator: np.random.Generator,
) -> np.ndarray:  # [num_tokens] int64
    """Of each piece 0 ... s-1 for s attention sinks, then offset+s, offset+s+1, ...

    s is uniform in 0 ... 4 and the offset in 0 ... min(30000, max_position - 1000) - length, each
    drawn per piece.
    """
    max_offset = np.maximum(0, min(MAX_OFFSET, max_position - END_MARGIN) - lengths)
    sinks = generator.integers(0, MAX_SINKS, len(lengths), endpoint=True)
    offset = generator.integers(0, max_offset, endpoint=True)
    index = natural_positions(lengths)
    return np.where(index < np.repeat(sinks, lengths), index, index + np.repeat(offset, lengths))
