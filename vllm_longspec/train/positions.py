"""Positions of packed pieces: natural, or anchor-offset indices (LongSpec, training), by which
large positions get trained on short text."""

import numpy as np

MAX_SINKS = 4
MAX_OFFSET = 30_000
END_MARGIN = 1_000
MAX_SHIFT = 4  # tokens that a draft is trained to be ahead of the target's cache


def draw_anchor_offsets(
    lengths: np.ndarray,  # [num_pieces]
    max_position: int,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # [num_pieces], [num_pieces] int64
    """Each piece's number of attention sinks, uniform in 0 ... 4, and the offset of the tokens
    behind them, uniform in 0 ... min(30000, max_position - 1000) - length."""
    max_offset = np.maximum(0, min(MAX_OFFSET, max_position - END_MARGIN) - lengths)
    sinks = generator.integers(0, MAX_SINKS, len(lengths), endpoint=True)
    return sinks, generator.integers(0, max_offset, endpoint=True)


def piece_positions(
    lengths: np.ndarray,  # [num_pieces]
    sinks: np.ndarray | int = 0,  # [num_pieces]
    offsets: np.ndarray | int = 0,  # [num_pieces]
) -> np.ndarray:  # [num_tokens] int64
    """Of each piece 0 ... s-1 for s attention sinks, then offset+s, offset+s+1, ..."""
    index = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    sinks, offsets = (
        np.repeat(np.broadcast_to(x, lengths.shape), lengths) for x in (sinks, offsets)
    )
    return np.where(index < sinks, index, index + offsets)
