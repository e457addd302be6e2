"""What the draft layer is trained to do: predict the next token through the frozen head, from the
target's last-layer keys and values as they are while it drafts (LongSpec, "flash noisy training").

The next token is the text's, as in the paper, or the target's: its whole distribution.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_longspec.train.attention import Shifts
from vllm_longspec.train.loss import head_loss, most_probable
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.packing import Batch
from vllm_longspec.train.target import TargetState, run_target

MAX_SHIFT = 4


def draft_loss(
    layer: nn.Module,
    head: torch.Tensor,  # [vocab_size, hidden_size]
    state: TargetState,
    batch: Batch,
    shift: int | Shifts,
    learn_from: Literal["text", "target"] = "text",
) -> torch.Tensor:
    """Sum of the draft's next-token cross entropy, `shift` tokens behind the target's cache."""
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
) -> list[float]:
    """For each shift 1 ... max_shift, how often the draft's most probable token is the target's."""
    head = target.get_output_embeddings().weight
    hits, total = [0] * max_shift, 0
    for batch in batches:
        state = run_target(target, batch.tokens, batch.positions, batch.lengths)
        wanted = most_probable(state.hidden.flatten(0, 1), head)
        total += wanted.numel()
        for shift in range(1, max_shift + 1):
            hidden = layer(
                state.embeddings.float(), batch.positions, state.key, state.value, shift,
                batch.lengths,
            )  # fmt: skip
            hits[shift - 1] += int((most_probable(hidden.flatten(0, 1), head) == wanted).sum())
    return [count / total for count in hits]
