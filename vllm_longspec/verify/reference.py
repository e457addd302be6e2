"""The oracle of every attention here: dense, masked, fp32, obviously right. No vLLM here."""

import torch


def masked_attention(
    query: torch.Tensor,  # [num_queries, num_heads, head_size]
    key: torch.Tensor,  # [num_keys, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_keys, num_kv_heads, head_size]
    mask: torch.Tensor,  # [num_queries, num_keys] bool; True: seen
    scale: float,
) -> torch.Tensor:  # [num_queries, num_heads, head_size] float32
    """Grouped-query attention; a query that sees no key gets zeros."""
    group = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(group, dim=1)
    value = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value)
