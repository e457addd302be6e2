"""The memory that a run needs, computed from configs before anything is loaded.

Weights, gradients and AdamW are exact; activations count what the operations of a step keep for the
backward pass and what is alive beside it at the peak (`tests/test_train_memory.py` compares both
with torch's own tensors). What kernels use within themselves is left to `MARGIN`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vllm_longspec.config import LongSpecConfig
from vllm_longspec.train.loss import MAX_LOGITS
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.recipe import Recipe
from vllm_longspec.train.sharding import decoder_layers

GIB = 2**30
MARGIN = 0.08  # of a device, for fragments, kernels' own memory and the driver
WHOLE_LAYERS = 3  # of a sharded target at a time: one computes, one arrives, as it is sent and kept
FLOAT = 4  # bytes
BYTES_PER_LOGIT = 14  # two chunks' float32, one's rounded logits and its exponentials


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    layers: int  # the target's, its part of them if they are sharded
    whole_layers: int  # those of a sharded target that are whole at a time
    shared: int  # embeddings, final norm and head; the rows of a head that a draft is left with
    draft: int  # weights, gradients, AdamW
    activations: int  # of a batch of so many
    tokens: int

    @property
    def total(self) -> int:
        return self.layers + self.whole_layers + self.shared + self.draft + self.activations


def memory_of(
    target: PreTrainedModel,
    draft: LongSpecConfig,
    device: torch.device,
    processes: int,
    sharded: bool,
    tokens: int,
    learn_from_target: bool = False,
) -> Memory:
    """`target`: without memory (`empty_target`), in the dtype that it has on `device`. `tokens`: of
    a batch."""
    layers = decoder_layers(target)
    own = processes if sharded else 1
    largest = max(weight_bytes(layer.parameters()) for layer in layers)
    half = device.type == "cuda"
    return Memory(
        weight_bytes(layers.parameters(), own),
        WHOLE_LAYERS * largest if sharded else 0,
        shared_bytes(target, draft),
        draft_bytes(draft, half),
        activation_bytes(target.config, draft, tokens, half, learn_from_target),
        tokens,
    )


def run_memory(
    recipe: Recipe,
    target: PreTrainedModel,
    draft: LongSpecConfig,
    device: torch.device,
    processes: int,
    sharded: bool,
) -> Memory:
    """Of the stage that needs most."""
    return max(
        (
            memory_of(
                target, draft, device, processes, sharded,
                stage.sequence_length
                * min(stage.sequences_per_batch, ceil(stage.sequences_per_step / processes)),
                stage.learn_from == "target",
            )
            for stage in recipe.stages
        ),
        key=lambda memory: memory.total,
    )  # fmt: skip


def weight_bytes(parameters: Iterator[nn.Parameter], processes: int = 1) -> int:
    """Of one process's part: FSDP2 cuts each by its first dimension, and fills up the last part."""
    return sum(
        ceil(p.shape[0] / processes) * prod(p.shape[1:]) * p.element_size() for p in parameters
    )


def shared_bytes(target: PreTrainedModel, draft: LongSpecConfig) -> int:
    every, layers = (
        weight_bytes(module.parameters()) for module in (target, decoder_layers(target))
    )
    head = target.get_output_embeddings().weight
    rows = draft.draft_vocab_size or 0
    return every - layers + rows * head.shape[1] * head.element_size()


def draft_bytes(draft: LongSpecConfig, half: bool) -> int:
    """In float32, whatever the target has."""
    with torch.device("meta"):
        parameters = list(DraftLayer(draft).parameters())
    every = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # Gradients and two moments; weights once more as they are rounded for products.
    return FLOAT * every + trained * (3 * FLOAT + 2 * half)


def activation_bytes(
    target: PreTrainedConfig,
    draft: LongSpecConfig,
    tokens: int,
    half: bool,
    learn_from_target: bool = False,
) -> int:
    """The most that is alive at one time beside weights, gradients and AdamW. Recomputing the one
    layer (`gradient_checkpointing`) does not change it.

    `half`: products in bf16 on a GPU, whose kernels want keys and values of as many heads as
    queries; else all is float32.
    """
    number = 2 if half else FLOAT  # bytes of a product's inputs and outputs
    hidden, inner = draft.hidden_size, draft.intermediate_size
    query = draft.num_attention_heads * draft.head_dim
    key = draft.num_key_value_heads * draft.head_dim
    # What the target gives: embeddings, hidden states, keys and values.
    state = number * (2 * hidden + 2 * key)
    inputs = state + FLOAT * hidden  # the draft computes in float32 between its products
    kept = kept_bytes(hidden, inner, query, key, number)
    loss = 2 * number * hidden  # the layer's output as the head reads it, its gradient
    rows = draft.draft_vocab_size or draft.vocab_size
    logits = BYTES_PER_LOGIT * min(tokens * rows * (1 + learn_from_target), MAX_LOGITS)
    backward = 2 * number * inner + 2 * FLOAT * hidden  # of the MLP, the widest
    reads_target = number * tokens * (widest_mlp(target) + 6 * hidden)
    trains = tokens * (inputs + kept + loss) + max(logits, tokens * backward)
    return max(reads_target, trains)


def kept_bytes(hidden: int, inner: int, query: int, key: int, number: int) -> int:
    """Of a token, what the draft's layer keeps for its backward pass."""
    heads = query if number < FLOAT else key
    # The first norm keeps its result, the others what they read as well.
    norms = FLOAT * hidden * 5
    # A product keeps its input: rounded for each of the six, or once for each norm.
    read = number * hidden * 6 if number < FLOAT else FLOAT * hidden * 3
    # Queries, keys, values, the result; before its queries were moved to their places, too.
    own = number * (2 * query + 2 * heads)
    cross = number * (3 * query + 2 * heads)
    mlp = number * 4 * inner  # gate, its activation, up, their product
    return norms + read + own + cross + mlp


def widest_mlp(config: PreTrainedConfig) -> int:
    """Numbers a token within an MLP of the target: gate, up and their product; of experts for each
    one that a token is sent to, with its input and output, before and after it is weighed."""
    dense = 3 * config.intermediate_size
    experts = getattr(config, "num_experts_per_tok", None) or 0
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return max(dense, experts * 3 * (config.hidden_size + inner))


def device_room(device: torch.device) -> int | None:
    """Bytes of this process; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        every = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return every // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return None


def fits(memory: Memory, room: int | None) -> bool:
    return room is None or memory.total <= (1 - MARGIN) * room
