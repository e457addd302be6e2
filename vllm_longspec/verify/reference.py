"""The oracle of every attention here: dense, masked, fp32, obviously right. No vLLM here."""

import torch


def masked_attention(
    query: torch.Tensor,  # [num_queries, num_heads, head_size]
    key: torch.Tensor,  # [num_keys, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_keys, num_kv_heads, head_size]
    mask: torch.Tensor,  # [num_queries, num_keys] bool; True: seen
    scale: float,
    sinks: torch.Tensor | None = None,  # [num_heads] logits of a key without a value
) -> torch.Tensor:  # [num_queries, num_heads, head_size] float32
    """Grouped-query attention; a query that sees no key gets zeros."""
    group = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(group, dim=1)
    value = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value)


def path_mask(
    parents: list[int],  # of each node of a tree; -1: of the root, which is the first
    prefix_len: int,
    window: int | None = None,
) -> torch.Tensor:  # [num_nodes, prefix_len + num_nodes] bool
    """What each node sees of the prefix and of the tree, as plain decoding of the path to it would:
    of that path the last `window` tokens, itself included; None: all of it."""
    mask = torch.zeros(len(parents), prefix_len + len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        path = []
        ancestor = node
        while ancestor >= 0:
            path.append(prefix_len + ancestor)
            ancestor = parents[ancestor]
        text = [*range(prefix_len), *reversed(path)]
        mask[node, text if window is None else text[-window:]] = True
    return mask
