"""A sliding layer's attention for the rows of trees: over the window of the cached prefix and over
the tree's own nodes, in one online softmax; where a GPU would be left idle, in parts that are
merged.

FlashAttention's window counts rows, but a tree's rows are not positions: each node stands `depth`
tokens behind the root and sees the last `window` tokens of the path to it, as plain decoding of
that path would.
"""

import torch
import triton
import triton.language as tl

from vllm_longspec.tree.shape import WORD_BITS
from vllm_longspec.verify.splits import (
    KEYS_PER_SPLIT,
    TREE_KEYS_PER_STEP,
    long_steps,
    merge_splits,
    outputs_of_parts,
    splits_help,
)
from vllm_longspec.verify.tree_attention import (
    add_sink,
    attend,
    head_block,
    keys_per_step,
    load_nodes,
    load_paged,
    precision_of,
    rows_per_program,
    visible_nodes,
)

MOST_SPLITS = 15  # of a window, beside the tree's: with it a power of two


@triton.jit(do_not_specialize=["ancestors_stride_req", "block_table_stride"])
def _window_attention_kernel(
    out_ptr,
    out_stride_token,
    lse_ptr,
    query_ptr,
    query_stride_token,
    cache_ptr,
    cache_stride_block,
    cache_stride_head,
    cache_stride_slot,
    block_table_ptr,
    block_table_stride,
    key_ptr,
    key_stride_token,
    value_ptr,
    value_stride_token,
    ancestors_ptr,
    ancestors_stride_req,
    positions_ptr,
    query_start_loc_ptr,
    prefix_lens_ptr,
    sinks_ptr,
    scale,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    PREFIX_KEYS: tl.constexpr,
    TREE_KEYS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    req = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2) % SPLITS
    first_row = tl.program_id(2) // SPLITS * ROWS
    first = tl.load(query_start_loc_ptr + req)
    num_nodes = tl.load(query_start_loc_ptr + req + 1) - first
    if first_row >= num_nodes * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    node = row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, HEAD_BLOCK)
    row_exists = node < num_nodes
    in_row = row_exists[:, None] & (dim < HEAD)[None, :]
    token = (first + node).to(tl.int64)
    query = tl.load(
        query_ptr + token[:, None] * query_stride_token + head[:, None] * HEAD + dim[None, :],
        mask=in_row,
        other=0.0,
    )
    root_position = tl.load(positions_ptr + first)
    depth = tl.load(positions_ptr + token, mask=row_exists, other=0) - root_position
    depth = depth.to(tl.int32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)

    # The root sees furthest back. What is before its window may be another request's by now.
    prefix_len = tl.load(prefix_lens_ptr + req)
    first_key = tl.maximum(prefix_len + 1 - WINDOW, 0)
    last_key = prefix_len
    num_tree_keys = num_nodes
    if SPLITS > 1:
        # The last split begins past the window: the tree's keys are its part.
        first_key += split * KEYS_PER_SPLIT
        last_key = tl.minimum(last_key, first_key + KEYS_PER_SPLIT)
        num_tree_keys = tl.where(split == SPLITS - 1, num_nodes, 0)
    for start in range(first_key, last_key, PREFIX_KEYS):
        position = start + tl.arange(0, PREFIX_KEYS)
        exists = position < last_key
        key, value = load_paged(
            cache_ptr, cache_stride_block, cache_stride_head, cache_stride_slot,
            block_table_ptr + req * block_table_stride, position, exists, kv_head, dim, BLOCK_SIZE,
            HEAD,
        )  # fmt: skip
        behind = prefix_len + depth[:, None] - position[None, :]
        visible = row_exists[:, None] & exists[None, :] & (behind < WINDOW)
        row_max, row_sum, acc = attend(
            query, key, value, visible, row_max, row_sum, acc, scale, PRECISION
        )

    for start in range(0, num_tree_keys, TREE_KEYS):
        column = start + tl.arange(0, TREE_KEYS)
        exists = column < num_nodes
        key_token = (first + column).to(tl.int64)
        key, value = load_nodes(
            key_ptr, key_stride_token, value_ptr, value_stride_token, key_token, exists, kv_head,
            dim, HEAD,
        )  # fmt: skip
        key_depth = tl.load(positions_ptr + key_token, mask=exists, other=0) - root_position
        visible = visible_nodes(
            ancestors_ptr + req * ancestors_stride_req,
            node,
            column,
            row_exists[:, None] & exists[None, :],
            NUM_WORDS,
            WORD_BITS,
        ) & (depth[:, None] - key_depth.to(tl.int32)[None, :] < WINDOW)
        row_max, row_sum, acc = attend(
            query, key, value, visible, row_max, row_sum, acc, scale, PRECISION
        )
    if HAS_SINKS:  # noqa: SIM102 - known when compiled, the other one is not
        if split == SPLITS - 1:
            sink = tl.load(sinks_ptr + head, mask=row_exists, other=0.0).to(tl.float32)
            row_max, row_sum, acc = add_sink(sink, row_max, row_sum, acc)
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if SPLITS > 1:
        part = (token * NUM_HEADS + head) * SPLITS + split
        # -inf, a weight of 0, where nothing of the split is visible.
        lse = row_max + tl.log(tl.where(row_sum == 0.0, 1.0, row_sum))
        tl.store(lse_ptr + part, lse, mask=row_exists)
        out_offset = part[:, None] * HEAD + dim[None, :]
    else:
        out_offset = token[:, None] * out_stride_token + head[:, None] * HEAD + dim[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=in_row)


def window_attention(
    out: torch.Tensor,  # [num_tokens, num_heads, head_size], written
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_table: torch.Tensor,  # [num_reqs, max_blocks] int32; right where the window is
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size] of the tree's own nodes
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    ancestors: torch.Tensor,  # [num_reqs, max_nodes, num_words] int64 bit masks
    positions: torch.Tensor,  # [num_tokens] int64; read as distances from the root
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    prefix_lens: torch.Tensor,  # [num_reqs] int32 tokens before the root
    window: int,  # tokens that a query sees, itself included
    scale: float,
    sinks: torch.Tensor | None = None,  # [num_heads] logits of a key without a value
) -> None:
    """Each node's attention over the last `window` tokens of its path: the tokens before the root,
    from the cache, the root, its ancestors and itself. Other rows of `out` are left alone."""
    num_reqs, max_nodes, num_words = ancestors.shape
    _, num_heads, head_size = query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    most_rows, prefix_keys, stages = long_steps(head_size)
    rows = rows_per_program(max_nodes * group, num_reqs * num_kv_heads, most_rows)
    row_programs = triton.cdiv(max_nodes * group, rows)
    splits, keys_per_split = 1, KEYS_PER_SPLIT
    if splits_help(num_reqs * num_kv_heads * row_programs) and out.is_contiguous():
        while keys_per_split * MOST_SPLITS < window:
            keys_per_split *= 2
        # The root's window holds one token less before it.
        splits = triton.cdiv(window - 1, keys_per_split) + 1
    parts, lse = outputs_of_parts(out, splits)
    _window_attention_kernel[(num_reqs, num_kv_heads, row_programs * splits)](
        parts,
        out.stride(0),
        lse,
        query,
        query.stride(0),
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.stride(2),
        block_table,
        block_table.stride(0),
        key,
        key.stride(0),
        value,
        value.stride(0),
        ancestors,
        ancestors.stride(0),
        positions,
        query_start_loc,
        prefix_lens,
        out if sinks is None else sinks,
        scale,
        WINDOW=window,
        BLOCK_SIZE=kv_cache.shape[2],
        HAS_SINKS=sinks is not None,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD=head_size,
        HEAD_BLOCK=head_block(head_size),
        ROWS=rows,
        SPLITS=splits,
        KEYS_PER_SPLIT=keys_per_split,
        PREFIX_KEYS=keys_per_step(window, prefix_keys),
        TREE_KEYS=keys_per_step(max_nodes, TREE_KEYS_PER_STEP),
        NUM_WORDS=num_words,
        WORD_BITS=WORD_BITS,
        PRECISION=precision_of(query.dtype),
        num_stages=stages,
    )
    if splits > 1:
        merge_splits(out, parts, lse)
