"""The oracle of the draft layer, in plain fp32 torch: one function, every key and mask spelled out.

The vLLM layer (`draft/model.py`) and the transformers layer (`train/model.py`) agree with it.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from vllm_longspec.config import LongSpecConfig
from vllm_longspec.verify.reference import masked_attention


def draft_layer(
    weights: Mapping[str, torch.Tensor],  # named as in a checkpoint
    config: LongSpecConfig,
    embeddings: torch.Tensor,  # [num_tokens, hidden_size] the target's, of every token
    positions: torch.Tensor,  # [num_tokens]
    self_mask: torch.Tensor,  # [num_tokens, num_tokens] bool: token i sees token j
    target_key: torch.Tensor,  # [num_target, num_kv_heads, head_dim] last layer's cache, rotated
    target_value: torch.Tensor,  # [num_target, num_kv_heads, head_dim]
    cross_mask: torch.Tensor,  # [num_tokens, num_target] bool
) -> torch.Tensor:  # [num_tokens, hidden_size], ready for the target's head
    """x + self_attn(norm(x)), + cross_attn(norm(x)), + mlp(norm(x)); no norm before the head."""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    scale = config.head_dim**-0.5

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return x * weights[f"{name}.weight"]

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        projected = linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        return projected.unflatten(-1, (-1, config.head_dim))

    cos, sin = LlamaRotaryEmbedding(config)(embeddings.float(), positions[None])

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)[0][0]

    x = embeddings.float()
    h = norm(x, "input_layernorm")
    out = masked_attention(
        rotate(heads(h, "self_attn.q_proj")),
        rotate(heads(h, "self_attn.k_proj")),
        heads(h, "self_attn.v_proj"),
        self_mask,
        scale,
    )
    x = x + linear(out.flatten(1), weights["self_attn.o_proj.weight"])

    h = norm(x, "post_self_attention_layernorm")
    query = rotate(heads(h, "cross_attn.q_proj"))
    out = masked_attention(query, target_key, target_value, cross_mask, scale)
    x = x + linear(out.flatten(1), weights["cross_attn.o_proj.weight"])

    h = norm(x, "post_cross_attention_layernorm")
    gate = silu(linear(h, weights["mlp.gate_proj.weight"]))
    up = linear(h, weights["mlp.up_proj.weight"])
    return x + linear(gate * up, weights["mlp.down_proj.weight"])
