"""The draft layer in vLLM: the target's embeddings, one layer, the target's head.

The layer owns no attention state: the proposer passes in how its queries attend, to the ring and
the tree (`attention/kernels.py`) and to the target's last-layer cache.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.llama import LlamaMLP

from vllm_longspec.config import LongSpecConfig

# checkpoint name -> (parameter of this module, its shard)
STACKED = {
    "self_attn.q_proj": ("self_attn.qkv_proj", "q"),
    "self_attn.k_proj": ("self_attn.qkv_proj", "k"),
    "self_attn.v_proj": ("self_attn.qkv_proj", "v"),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}
UNUSED = ("cross_attn.k_proj", "cross_attn.v_proj")


@dataclass
class TargetParts:
    """What the draft shares with its target. Not a module: the draft does not own these."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    compute_logits: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]


class SelfAttention(nn.Module):
    def __init__(self, config: LongSpecConfig, prefix: str) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=True,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            prefix=f"{prefix}.o_proj",
        )


class CrossAttention(nn.Module):
    """A query only: keys and values are the target's."""

    def __init__(self, config: LongSpecConfig, prefix: str) -> None:
        super().__init__()
        size = config.num_attention_heads * config.head_dim
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, size, bias=True, prefix=f"{prefix}.q_proj"
        )
        self.o_proj = RowParallelLinear(
            size, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )


class LongSpecDraftModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        tp_size = get_tensor_model_parallel_world_size()
        self.config = config
        self.head_size = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.scale = config.head_dim**-0.5
        self.window: int = getattr(config, "window", 512)
        self.max_position = vllm_config.model_config.max_model_len - 1

        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, f"{prefix}.self_attn")
        self.post_self_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cross_attn = CrossAttention(config, f"{prefix}.cross_attn")
        self.post_cross_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, prefix=f"{prefix}.mlp"
        )
        self.target: TargetParts

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.target.embed(input_ids)

    def self_attention_inputs(
        self,
        x: torch.Tensor,  # [num_tokens, hidden_size]
        positions: torch.Tensor,  # [num_tokens]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each [num_tokens, heads, head_size]; rotated."""
        qkv, _ = self.self_attn.qkv_proj(self.input_layernorm(x))
        q_size, kv_size = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        query, key, value = qkv.split([q_size, kv_size, kv_size], dim=-1)
        query, key = self.target.rotary(positions, query.contiguous(), key.contiguous())
        return self._heads(query), self._heads(key), self._heads(value.contiguous())

    def keys_and_values(
        self,
        tokens: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the ring stores: a token's key and value depend on it and its position alone."""
        _, key, value = self.self_attention_inputs(self.embed_input_ids(tokens), positions)
        return key, value

    def forward(
        self,
        input_ids: torch.Tensor,  # [num_tokens]
        positions: torch.Tensor,  # [num_tokens]
        attend_to_tree: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        attend_to_target: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # [num_tokens, hidden_size], ready for the target's head
        """`attend_to_tree` takes query, key and value, `attend_to_target` a query; each
        [num_tokens, heads, head_size]; both return [num_tokens, heads, head_size]."""
        x = self.embed_input_ids(input_ids)
        query, key, value = self.self_attention_inputs(x, positions)
        out, _ = self.self_attn.o_proj(attend_to_tree(query, key, value).flatten(1))
        x = x + out
        query, _ = self.cross_attn.q_proj(self.post_self_attention_layernorm(x))
        query, _ = self.target.rotary(positions, query, None)
        out, _ = self.cross_attn.o_proj(attend_to_target(self._heads(query)).flatten(1))
        x = x + out
        return x + self.mlp(self.post_cross_attention_layernorm(x))

    def top_tokens(
        self,
        hidden: torch.Tensor,  # [num_tokens, hidden_size]
        k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `k` most probable next tokens of each row and their log-probabilities (float32),
        each [num_tokens, k]."""
        logits = self.target.compute_logits(hidden)
        top, tokens = logits.topk(k, dim=-1)
        return top.float() - logits.float().logsumexp(dim=-1, keepdim=True), tokens

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            module, _, kind = name.rpartition(".")
            if module in UNUSED:
                continue
            stacked, shard = STACKED.get(module, (module, None))
            parameter = parameters[f"{stacked}.{kind}"]
            loader: Any = getattr(parameter, "weight_loader", None)
            if shard is not None:
                loader(parameter, tensor, shard)
            elif loader is not None:
                loader(parameter, tensor)
            else:
                parameter.data.copy_(tensor)
            loaded.add(f"{stacked}.{kind}")
        return loaded

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_size))
