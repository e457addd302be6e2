"""What the draft layer is trained to do: predict the next token through the frozen head, from the
target's last-layer keys and values as they are while it drafts (LongSpec, "flash noisy training").

The next token is the text's, as in the paper, or the target's: its whole distribution.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_longspec.train.attention import Shifts
from vllm_longspec.train.loss import IGNORED, head_loss, most_probable
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.packing import Batch
from vllm_longspec.train.target import TargetState, run_target


@dataclass
class DraftedHead:
    """The rows of the target's head that a draft chooses among."""

    weight: torch.Tensor  # [num_rows, hidden_size]
    row_of: torch.Tensor | None = None  # [vocab_size] int64, IGNORED without one; None: its own


def drafted_head(
    head: torch.Tensor,  # [vocab_size, hidden_size]
    token_ids: torch.Tensor | None,  # [num_rows] int64; None: all tokens
) -> DraftedHead:
    if token_ids is None:
        return DraftedHead(head)
    row_of = torch.full((len(head),), IGNORED, device=head.device)
    row_of[token_ids] = torch.arange(len(token_ids), device=head.device)
    return DraftedHead(head[token_ids], row_of)


def labels_in(
    head: DraftedHead,
    labels: torch.Tensor,  # [num_tokens] int64 tokens, or IGNORED
) -> torch.Tensor:  # [num_tokens] int64 rows of the head; IGNORED for a token that has none
    if head.row_of is None:
        return labels
    return torch.where(labels == IGNORED, IGNORED, head.row_of[labels.clamp(min=0)])


def draft_loss(
    layer: nn.Module,
    head: torch.Tensor,  # [num_rows, hidden_size] which the batch's labels are rows of
    state: TargetState,
    batch: Batch,
    shift: int | Shifts,
    learn_from: Literal["text", "target"] = "text",
) -> torch.Tensor:
    """Sum of the draft's next-token cross entropy, `shift` tokens behind the target's cache. With a
    part of the head it is that of distributions over that part, without the places where the text
    goes on outside of it."""
    hidden = layer(
        state.embeddings.float(), batch.positions, state.key, state.value, shift, batch.lengths
    )
    wanted = state.hidden.flatten(0, 1) if learn_from == "target" else None
    return head_loss(hidden.flatten(0, 1), head, batch.labels, wanted)


@torch.no_grad()
def agreement(
    layer: DraftLayer,
    target: PreTrainedModel,
    batches: Iterable[Batch],
    max_shift: int,
) -> tuple[list[int], int]:
    """For each shift 1 ... max_shift, how often the draft's most probable token is the target's, at
    the places that are learned; how many these are."""
    head, ids = target.get_output_embeddings().weight, layer.draft_token_ids
    drafted = drafted_head(head, ids).weight
    hits, total = [0] * max_shift, 0
    for batch in batches:
        state = run_target(target, batch.tokens, batch.positions, batch.lengths)
        places = batch.labels != IGNORED
        wanted = most_probable(state.hidden.flatten(0, 1)[places], head)
        total += wanted.numel()
        for shift in range(1, max_shift + 1):
            hidden = layer(
                state.embeddings.float(), batch.positions, state.key, state.value, shift,
                batch.lengths,
            )  # fmt: skip
            best = most_probable(hidden.flatten(0, 1)[places], drafted)
            hits[shift - 1] += int(((best if ids is None else ids[best]) == wanted).sum())
    return hits, total


def chain_acceptance(rates: Sequence[float]) -> float:
    """Tokens a verification that a chain as long as `rates` is expected to give at T=0, from its
    agreement at shift 1, 2, ...: a node counts if all before it agree, each taken by itself."""
    return 1 + sum(accumulate(rates, mul))
