"""The draft layer in transformers, for training: the same layer as `draft/model.py` serves."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from vllm_longspec.config import LongSpecConfig

WEIGHTS_FILE = "model.safetensors"


class DraftAttention(nn.Module):
    """Both attentions have these parameters; the cross-attention uses only its query's."""

    def __init__(self, config: LongSpecConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def heads(self, projected: torch.Tensor) -> torch.Tensor:  # [batch, heads, length, head_dim]
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge(self, out: torch.Tensor) -> torch.Tensor:  # [batch, length, hidden_size]
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DraftLayer(nn.Module):
    """One decoder layer over the target's embeddings: windowed self-attention, cross-attention
    into the target's last-layer keys and values, MLP."""

    def __init__(self, config: LongSpecConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.post_self_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = DraftAttention(config)
        self.post_cross_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.rotary = LlamaRotaryEmbedding(config)
        # In every checkpoint, never used: keys and values come from the target.
        self.cross_attn.k_proj.requires_grad_(False)
        self.cross_attn.v_proj.requires_grad_(False)

    def forward(
        self,
        embeddings: torch.Tensor,  # [batch, length, hidden_size]
        positions: torch.Tensor,  # [batch, length]
        target_key: torch.Tensor,  # [batch, num_kv_heads, length, head_dim], rotated
        target_value: torch.Tensor,  # [batch, num_kv_heads, length, head_dim]
        shift: int,
    ) -> torch.Tensor:  # [batch, length, hidden_size]
        """Query i sees the target's cache up to i - shift, as a node `shift - 1` levels below the
        root does; the first `shift` queries see nothing of it."""
        cos, sin = self.rotary(embeddings, positions)
        x = embeddings
        x = x + self.attend_to_window(self.input_layernorm(x), cos, sin)
        h = self.post_self_attention_layernorm(x)
        x = x + self.attend_to_target(h, cos, sin, target_key, target_value, shift)
        return x + self.mlp(self.post_cross_attention_layernorm(x))

    def attend_to_window(
        self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        attn = self.self_attn
        query, key = apply_rotary_pos_emb(
            attn.heads(attn.q_proj(h)), attn.heads(attn.k_proj(h)), cos, sin
        )
        index = torch.arange(h.shape[1], device=h.device)
        distance = index[:, None] - index[None, :]
        mask = (distance >= 0) & (distance <= self.config.window)
        value = attn.heads(attn.v_proj(h))
        group = query.shape[1] // key.shape[1]
        # torch has a fused kernel for a mask and one for grouped heads, none for both.
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        return attn.merge(scaled_dot_product_attention(query, key, value, attn_mask=mask))

    def attend_to_target(
        self,
        h: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shift: int,
    ) -> torch.Tensor:
        """Flash noisy attention: causal between queries[shift:] and keys[:-shift]."""
        attn = self.cross_attn
        query = attn.heads(attn.q_proj(h))
        query = apply_rotary_pos_emb(query, query, cos, sin)[0]
        length = query.shape[2] - shift
        out = scaled_dot_product_attention(
            query[:, :, shift:],
            key[:, :, :length].to(query.dtype),
            value[:, :, :length].to(query.dtype),
            is_causal=True,
            enable_gqa=True,
        )
        return attn.merge(pad(out, (0, 0, shift, 0)))


def init_weights(layer: DraftLayer, generator: torch.Generator) -> None:
    """Normal(0, initializer_range) matrices, zero biases; the branches start at zero output."""
    for name, parameter in sorted(layer.named_parameters()):
        if name.endswith("bias") or "o_proj" in name or "down_proj" in name:
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=layer.config.initializer_range, generator=generator)


def save_draft(layer: DraftLayer, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    layer.config.save_pretrained(folder)
    weights = {name: p.detach().to("cpu", dtype) for name, p in layer.named_parameters()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_draft(folder: Path) -> DraftLayer:
    layer = DraftLayer(LongSpecConfig.from_pretrained(folder))
    layer.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    )
    return layer
