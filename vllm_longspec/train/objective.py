"""What the draft layer is trained to do: predict the next token through the frozen head, from the
target's last-layer keys and values as they are while it drafts (LongSpec, "flash noisy training").
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from vllm_longspec.train.model import DraftLayer

MAX_SHIFT = 4


@dataclass
class TargetState:
    """What the frozen target gives the draft for a batch."""

    embeddings: torch.Tensor  # [batch, length, hidden_size]
    key: torch.Tensor  # [batch, num_kv_heads, length, head_dim] last layer, rotated
    value: torch.Tensor  # [batch, num_kv_heads, length, head_dim]


@torch.no_grad()
def run_target(
    target: PreTrainedModel,
    tokens: torch.Tensor,  # [batch, length]
    positions: torch.Tensor,  # [batch, length]
) -> TargetState:
    out = target.model(input_ids=tokens, position_ids=positions, use_cache=True)
    last = out.past_key_values.layers[-1]
    embeddings = target.get_input_embeddings()(tokens)
    return TargetState(embeddings, last.keys, last.values)


def draft_loss(
    layer: nn.Module,
    head: nn.Module,
    state: TargetState,
    tokens: torch.Tensor,  # [batch, length]
    positions: torch.Tensor,  # [batch, length]
    shift: int,
) -> torch.Tensor:
    """Mean next-token cross entropy of the draft, `shift` tokens behind the target's cache."""
    hidden = layer(state.embeddings.float(), positions, state.key, state.value, shift)
    logits = head(hidden[:, :-1].to(head.weight.dtype))
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten().long())


@torch.no_grad()
def agreement(
    layer: DraftLayer,
    target: PreTrainedModel,
    tokens: torch.Tensor,  # [batch, length]
    max_shift: int,
) -> list[float]:
    """For each shift 1 ... max_shift, how often the draft's most probable token is the target's."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    state = run_target(target, tokens, positions)
    head = target.get_output_embeddings()
    wanted = target(input_ids=tokens).logits.argmax(-1)
    rates = []
    for shift in range(1, max_shift + 1):
        hidden = layer(state.embeddings.float(), positions, state.key, state.value, shift)
        predicted = head(hidden.to(head.weight.dtype)).argmax(-1)
        rates.append((predicted == wanted).float().mean().item())
    return rates
