"""Attention of a few queries over a long paged prefix that all of them see: no mask.

On a GPU FlashAttention, which returns the log-sum-exp with the output; on a CPU, torch.
"""

import torch


def torch_prefix_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    prefix_lens: torch.Tensor,  # [num_reqs] int32 tokens of the prefix
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    scale: float,
    out: torch.Tensor,  # [num_tokens, num_heads, head_size], written
) -> torch.Tensor:  # [num_heads, num_tokens] float32 log-sum-exp, -inf for an empty prefix
    """One request after the other."""
    num_kv_heads, head_size = kv_cache.shape[1], query.shape[2]
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=torch.float32)
    starts = query_start_loc.tolist()
    for req, prefix_len in enumerate(prefix_lens.tolist()):
        tokens = slice(starts[req], starts[req + 1])
        if tokens.start == tokens.stop or prefix_len == 0:
            out[tokens] = 0
            continue
        key, value = gather_pages(kv_cache, block_table[req], prefix_len)
        grouped = query[tokens].float().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("qhgd,hkd->hgqk", grouped, key.float()) * scale
        lse[:, tokens] = scores.logsumexp(dim=-1).flatten(0, 1)
        attended = torch.einsum("hgqk,hkd->qhgd", scores.softmax(dim=-1), value.float())
        out[tokens] = attended.reshape(-1, query.shape[1], head_size).to(out.dtype)
    return lse


def gather_pages(
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    blocks: torch.Tensor,  # [max_blocks] int32
    length: int,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_kv_heads, length - first, head_size] each
    block_size = kv_cache.shape[2]
    first_block = first // block_size
    pages = kv_cache[blocks[first_block : -(-length // block_size)].long()]
    start = first_block * block_size
    tokens = pages.transpose(0, 1).flatten(1, 2)[:, first - start : length - start]
    key, value = tokens.chunk(2, dim=-1)
    return key, value
