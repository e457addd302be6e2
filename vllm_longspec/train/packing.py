"""Documents to rows of at most `length` tokens, and rows to the batches of a step.

A document is cut into pieces of `length` tokens, each a row; the remainders of neighbouring
documents share a row. No text is dropped but a piece of which nothing is learned: a remainder of
one token, which has no next one, and one in which no answer is (`train/tokens.py`). A piece is
trained as if it were alone (`train/attention.py`), with positions of its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from vllm_longspec.train.attention import Lengths, Shifts
from vllm_longspec.train.loss import IGNORED
from vllm_longspec.train.positions import draw_anchor_offsets, piece_positions


@dataclass(frozen=True)
class Rows:
    starts: np.ndarray  # [num_pieces] int64, in the flat tokens
    lengths: np.ndarray  # [num_pieces] int64
    num_labels: np.ndarray  # [num_pieces] int64, tokens to learn
    first: np.ndarray  # [num_rows + 1] int64, each row's first piece

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, rows: slice) -> "Rows":
        """Neighbouring rows."""
        start, stop, _ = rows.indices(len(self))
        first = self.first[start : stop + 1]
        pieces = slice(first[0], first[-1])
        return Rows(
            self.starts[pieces], self.lengths[pieces], self.num_labels[pieces], first - first[0]
        )


@dataclass
class Batch:
    tokens: torch.Tensor  # [1, num_tokens] int64
    positions: torch.Tensor  # [1, num_tokens] int64
    # [num_tokens] int64, the next token; IGNORED at a piece's end and before what is not learned
    labels: torch.Tensor
    lengths: Lengths
    shifts: Shifts  # of each piece
    # The pieces cut where positions jump, for layers with a window: they do not see across it.
    runs: Lengths | None = None

    def to(self, device: torch.device) -> "Batch":
        def move(x: torch.Tensor) -> torch.Tensor:
            return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

        return Batch(move(self.tokens), move(self.positions), move(self.labels), self.lengths,
                     self.shifts, self.runs)  # fmt: skip


@dataclass(frozen=True)
class StepData:
    """What one optimiser step reads; the same on every process."""

    rows: list[Rows]  # [sequences_per_step] of one row each
    sinks: list[np.ndarray]  # of each row, of each piece
    offsets: list[np.ndarray]
    shifts: list[np.ndarray]
    num_tokens: int
    num_labels: int


def pack(
    document_lengths: np.ndarray,
    length: int,
    tokens: np.ndarray | None = None,  # [num_tokens] int32 as stored; None: all are learned
) -> Rows:
    starts: list[int] = []
    lengths: list[int] = []
    first = [0]
    waiting: list[tuple[int, int]] = []  # remainders for a common row
    waiting_tokens = 0

    def close_row() -> None:
        nonlocal waiting_tokens
        if waiting:
            starts.extend(start for start, _ in waiting)
            lengths.extend(size for _, size in waiting)
            first.append(len(starts))
            waiting.clear()
            waiting_tokens = 0

    def learns(start: int, size: int) -> bool:
        return tokens is None or bool((tokens[start + 1 : start + size] >= 0).any())

    start = 0
    for size in document_lengths.tolist():
        whole, rest = divmod(size, length)
        for piece in range(whole):
            if learns(start + piece * length, length):
                starts.append(start + piece * length)
                lengths.append(length)
                first.append(len(starts))
        if rest > 1 and learns(start + whole * length, rest):
            if waiting_tokens + rest > length:
                close_row()
            waiting.append((start + whole * length, rest))
            waiting_tokens += rest
        start += size
    close_row()
    num_labels = [
        size - 1 if tokens is None else np.count_nonzero(tokens[start + 1 : start + size] >= 0)
        for start, size in zip(starts, lengths, strict=True)
    ]
    return Rows(*(np.asarray(x, dtype=np.int64) for x in (starts, lengths, num_labels, first)))


def step_data(
    rows: Rows,
    step: int,
    seed: tuple[int, ...],
    sequences: int,
    max_shift: int,
    anchor_offset_up_to: int | None,
) -> StepData:
    """Everything drawn for a step follows from (seed, step) alone: a run can go on anywhere.

    Rows come in a new order each epoch. `anchor_offset_up_to`: the largest position the target
    knows, None for natural positions.
    """
    at = np.arange(step * sequences, (step + 1) * sequences)
    chosen = np.empty(sequences, dtype=np.int64)
    for epoch in np.unique(at // len(rows)):
        here = at // len(rows) == epoch
        chosen[here] = _epoch_order(len(rows), (*seed, int(epoch)))[at[here] % len(rows)]
    read = [rows[row : row + 1] for row in chosen.tolist()]
    generator = np.random.default_rng((*seed, step, 1))
    lengths = np.concatenate([row.lengths for row in read])
    shifts = generator.integers(1, max_shift, len(lengths), endpoint=True)
    sinks = offsets = np.zeros_like(lengths)
    if anchor_offset_up_to is not None:
        sinks, offsets = draw_anchor_offsets(lengths, anchor_offset_up_to, generator)
    ends = np.cumsum([len(row.lengths) for row in read])[:-1]
    num_tokens = int(lengths.sum())
    return StepData(
        read, np.split(sinks, ends), np.split(offsets, ends), np.split(shifts, ends), num_tokens,
        sum(int(row.num_labels.sum()) for row in read),
    )  # fmt: skip


@lru_cache(maxsize=2)  # a step touches two epochs at most when rows are enough
def _epoch_order(num_rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng((*seed, 0)).permutation(num_rows)


def step_batches(
    tokens: np.ndarray,
    data: StepData,
    share: range,
    sequences: int,
    first_token: int | None = None,
) -> Iterator[Batch]:
    """Batches of `sequences` rows of this process's `share` of a step."""
    for start in range(share.start, share.stop, sequences):
        some = slice(start, min(start + sequences, share.stop))
        sinks, offsets, shifts = (
            np.concatenate(x[some]) for x in (data.sinks, data.offsets, data.shifts)
        )
        yield make_batch(tokens, data.rows[some], sinks, offsets, shifts, first_token)


def make_batch(
    tokens: np.ndarray,
    rows: list[Rows],
    sinks: np.ndarray | int = 0,
    offsets: np.ndarray | int = 0,
    shifts: np.ndarray | int = 1,
    first_token: int | None = None,
) -> Batch:
    """`first_token` stands at the beginning of each piece, as it does of each prompt; one cut from
    within a document has it in place of its own. `tokens`: as stored (`train/tokens.py`)."""
    starts, lengths = (
        np.concatenate([getattr(row, name) for row in rows]) for name in ("starts", "lengths")
    )
    stored = np.concatenate(
        [tokens[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    ).astype(np.int64)
    ids = np.where(stored < 0, ~stored, stored)
    if first_token is not None:
        ids[np.cumsum(lengths) - lengths] = first_token
    labels = np.roll(np.where(stored < 0, IGNORED, ids), -1)
    labels[np.cumsum(lengths) - 1] = IGNORED
    return Batch(
        torch.from_numpy(ids)[None],
        torch.from_numpy(piece_positions(lengths, sinks, offsets))[None],
        torch.from_numpy(labels),
        tuple(lengths.tolist()),
        tuple(np.broadcast_to(shifts, lengths.shape).tolist()),
        unbroken_runs(lengths, sinks, offsets),
    )


def unbroken_runs(
    lengths: np.ndarray,  # [num_pieces]
    sinks: np.ndarray | int,
    offsets: np.ndarray | int,
) -> Lengths:
    """Of each piece whose positions jump, its sinks and the rest; any other as it is."""
    first = np.minimum(lengths, np.where(np.asarray(offsets) > 0, sinks, 0))
    runs = np.stack([first, lengths - first], 1).flatten()
    return tuple(runs[runs > 0].tolist())
