"""The draft layer in transformers, for training: the same layer as `draft/model.py` serves."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from vllm_longspec.config import LongSpecConfig
from vllm_longspec.draft.checkpoint import TOKEN_IDS, read_draft, read_draft_config
from vllm_longspec.train.attention import Lengths, Shifts, shifted_attention, window_attention

WEIGHTS_FILE = "model.safetensors"
# A Llama's angles, of which a config may ask for fewer than a head has.
RotaryEmbedding = Glm4MoeRotaryEmbedding


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

    def merge(self, out: torch.Tensor) -> torch.Tensor:  # [num_tokens, hidden_size]
        return self.o_proj(out.flatten(1))


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
        self.rotary = RotaryEmbedding(config)
        self.recompute = False  # in the backward pass, instead of keeping activations
        self.draft_token_ids: torch.Tensor | None = None  # [draft_vocab_size]; None: any token
        if config.draft_vocab_size is not None:
            self.keep_tokens(torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        # In every checkpoint, never used: keys and values come from the target.
        self.cross_attn.k_proj.requires_grad_(False)
        self.cross_attn.v_proj.requires_grad_(False)

    def keep_tokens(self, ids: torch.Tensor) -> None:  # [draft_vocab_size] int64, increasing
        """Let the layer propose these tokens only."""
        self.config.draft_vocab_size = len(ids)
        del self.draft_token_ids
        self.register_buffer(TOKEN_IDS, ids)

    def forward(
        self,
        embeddings: torch.Tensor,  # [batch, length, hidden_size]
        positions: torch.Tensor,  # [batch, length]
        target_key: torch.Tensor,  # [batch, num_kv_heads, length, head_dim], rotated
        target_value: torch.Tensor,  # [batch, num_kv_heads, length, head_dim]
        shift: int | Shifts,
        lengths: Lengths | None = None,
    ) -> torch.Tensor:  # [batch, length, hidden_size]
        """Query i sees the target's cache up to i - shift, as a node `shift - 1` levels below the
        root does; the first `shift` queries see nothing of it. One shift, or one for each piece.

        `lengths`: the pieces that the rows, one after another, consist of; each row is one piece if
        left out.
        """
        lengths = lengths or (positions.shape[1],) * positions.shape[0]
        arguments = (embeddings, positions, target_key, target_value, shift, lengths)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, *arguments, use_reentrant=False)
        return self.run(*arguments)

    def run(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        target_key: torch.Tensor,
        target_value: torch.Tensor,
        shift: int | Shifts,
        lengths: Lengths,
    ) -> torch.Tensor:
        cos, sin = self.rotary(x, positions)
        out = self.attend_to_window(self.input_layernorm(x), cos, sin, lengths)
        x = x + out.view_as(x)
        h = self.post_self_attention_layernorm(x)
        out = self.attend_to_target(h, cos, sin, target_key, target_value, shift, lengths)
        x = x + out.view_as(x)
        return x + self.mlp(self.post_cross_attention_layernorm(x))

    def attend_to_window(
        self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: Lengths
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        attn = self.self_attn
        value = attn.heads(attn.v_proj(h))
        query, key = (
            rotate(attn.heads(projection(h)), cos, sin).to(value.dtype)
            for projection in (attn.q_proj, attn.k_proj)
        )
        q, k, v = (packed_heads(x) for x in (query, key, value))
        return attn.merge(window_attention(q, k, v, self.config.window, lengths))

    def attend_to_target(
        self,
        h: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shift: int | Shifts,
        lengths: Lengths,
    ) -> torch.Tensor:  # [num_tokens, hidden_size]
        """Flash noisy attention: causal between queries[shift:] and keys[:-shift]."""
        attn = self.cross_attn
        projected = attn.heads(attn.q_proj(h))
        query = rotate(projected, cos, sin).to(projected.dtype)
        q, k, v = (packed_heads(x.to(projected.dtype)) for x in (query, key, value))
        return attn.merge(shifted_attention(q, k, v, shift, lengths))


def rotate(
    x: torch.Tensor,  # [batch, heads, length, head_dim]
    cos: torch.Tensor,  # [batch, length, rotary_dim]
    sin: torch.Tensor,
) -> torch.Tensor:  # as x
    """Of each head the first `rotary_dim` numbers."""
    size = cos.shape[-1]
    part = x[..., :size]
    turned = part * cos[:, None] + rotate_half(part) * sin[:, None]
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], -1)


def packed_heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, heads, length, head_dim] -> [batch * length, heads, head_dim]"""
    return x.transpose(1, 2).flatten(0, 1)


def init_weights(layer: DraftLayer, generator: torch.Generator, zero_outputs: bool = True) -> None:
    """Normal(0, initializer_range) matrices, zero biases; with `zero_outputs` the branches start at
    zero output."""
    for name, parameter in sorted(layer.named_parameters()):
        ends_branch = "o_proj" in name or "down_proj" in name
        if name.endswith("bias") or (zero_outputs and ends_branch):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=layer.config.initializer_range, generator=generator)


def save_draft(
    layer: DraftLayer,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    layer.config.save_pretrained(folder)
    weights = {name: p.detach().to("cpu", dtype) for name, p in layer.named_parameters()}
    if layer.draft_token_ids is not None:
        weights[TOKEN_IDS] = layer.draft_token_ids.cpu()
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt", **metadata})


def load_draft(folder: Path) -> DraftLayer:
    config = read_draft_config(folder)
    layer, tensors = DraftLayer(config), read_draft(folder, config)
    layer.load_state_dict({name: tensors[name] for name in layer.state_dict()})
    return layer
