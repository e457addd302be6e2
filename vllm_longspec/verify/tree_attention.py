"""Attention of a tree's nodes over the tree itself, merged into that over their prefix: LongSpec's
hybrid tree attention, after the prefix kernel.

The steps of its online softmax are shared with the draft's (`draft/ring_attention.py`). Kernels run
compiled on a GPU and interpreted on a CPU.
"""

import torch
import triton
import triton.language as tl

from vllm_longspec.tree.shape import WORD_BITS

# Fewer where fewer programs than a GPU has multiprocessors would run.
MAX_ROWS_PER_PROGRAM = 64
FILLING_PROGRAMS = 128
TREE_KEYS_PER_STEP = 16
LEAST_HEAD_BLOCK = 16  # of a tensor core's product
# An interpreted kernel costs by the operation, not by the element: few, wide steps.
INTERPRETED_KEYS_PER_STEP = 512


@triton.jit
def attend(
    query,  # [ROWS, HEAD]
    key,  # [KEYS, HEAD]
    value,  # [KEYS, HEAD]
    visible,  # [ROWS, KEYS]
    row_max,  # [ROWS]
    row_sum,  # [ROWS]
    acc,  # [ROWS, HEAD]
    scale,
    PRECISION: tl.constexpr,
):
    if PRECISION == "ieee":
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has seen nothing yet keeps -inf; exp(-inf - -inf) would be NaN.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp(scores - safe_max[:, None])
    keep = tl.exp(row_max - safe_max)
    row_sum = row_sum * keep + tl.sum(weights, axis=1)
    acc = acc * keep[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit
def add_sink(
    sink,  # [ROWS] logit of a key without a value
    row_max,  # [ROWS]
    row_sum,  # [ROWS]
    acc,  # [ROWS, HEAD]
):
    new_max = tl.maximum(row_max, sink)
    keep = tl.exp(row_max - new_max)
    return new_max, row_sum * keep + tl.exp(sink - new_max), acc * keep[:, None]


@triton.jit
def visible_nodes(
    masks_ptr,  # [..., num_words] int64 of the first query's node, rows of the tree follow
    node,  # [ROWS] query's row of masks_ptr
    column,  # [KEYS] node number
    seen,  # [ROWS, KEYS] rows and columns that exist
    NUM_WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
):
    word = tl.load(
        masks_ptr + node[:, None] * NUM_WORDS + column[None, :] // WORD_BITS, mask=seen, other=0
    )
    is_ancestor = ((word >> (column[None, :] % WORD_BITS)) & 1) != 0
    # A node sees itself whatever its mask says.
    return seen & (is_ancestor | (column[None, :] == node[:, None]))


@triton.jit
def load_nodes(
    key_ptr,
    key_stride,
    value_ptr,
    value_stride,
    node,  # [KEYS] rows of both
    exists,  # [KEYS]
    kv_head,
    dim,  # [HEAD_BLOCK]
    HEAD: tl.constexpr,
):
    """Keys and values of a tree's nodes, [KEYS, HEAD_BLOCK] each, one KV head's."""
    offset = kv_head * HEAD + dim[None, :]
    in_key = exists[:, None] & (dim < HEAD)[None, :]
    key = tl.load(key_ptr + node[:, None] * key_stride + offset, mask=in_key, other=0.0)
    value = tl.load(value_ptr + node[:, None] * value_stride + offset, mask=in_key, other=0.0)
    return key, value


@triton.jit
def load_paged(
    cache_ptr,
    cache_stride_block,
    cache_stride_head,
    cache_stride_slot,
    table_ptr,  # of the request
    slot,  # [KEYS] in the order of the request's blocks
    exists,  # [KEYS]
    kv_head,
    dim,  # [HEAD_BLOCK]
    SLOTS_PER_BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
):
    """The same of a paged cache, in which values follow their keys."""
    block = tl.load(table_ptr + slot // SLOTS_PER_BLOCK, mask=exists, other=0).to(tl.int64)
    cell = (
        block * cache_stride_block
        + (slot % SLOTS_PER_BLOCK) * cache_stride_slot
        + kv_head * cache_stride_head
    )
    in_key = exists[:, None] & (dim < HEAD)[None, :]
    key = tl.load(cache_ptr + cell[:, None] + dim[None, :], mask=in_key, other=0.0)
    value = tl.load(cache_ptr + cell[:, None] + HEAD + dim[None, :], mask=in_key, other=0.0)
    return key, value


@triton.jit(do_not_specialize=["prefix_lse_stride_head", "ancestors_stride_req"])
def _tree_attention_kernel(
    out_ptr,
    out_stride_token,
    prefix_lse_ptr,
    prefix_lse_stride_head,
    query_ptr,
    query_stride_token,
    key_ptr,
    key_stride_token,
    value_ptr,
    value_stride_token,
    ancestors_ptr,
    ancestors_stride_req,
    query_start_loc_ptr,
    prefix_lens_ptr,
    sinks_ptr,
    scale,
    HAS_SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    req = tl.program_id(0)
    kv_head = tl.program_id(1)
    first = tl.load(query_start_loc_ptr + req)
    num_nodes = tl.load(query_start_loc_ptr + req + 1) - first
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(2) * ROWS >= num_nodes * GROUP:
        return
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
    out_offset = token[:, None] * out_stride_token + head[:, None] * HEAD + dim[None, :]
    # The prefix enters as one key of weight exp(lse) whose value is the prefix attention's output.
    has_prefix = node < tl.where(tl.load(prefix_lens_ptr + req) > 0, num_nodes, 0)
    row_max = tl.load(
        prefix_lse_ptr + head * prefix_lse_stride_head + token,
        mask=has_prefix,
        other=float("-inf"),
    )
    row_sum = tl.where(has_prefix, 1.0, 0.0)
    acc = tl.load(out_ptr + out_offset, mask=in_row & has_prefix[:, None], other=0.0).to(tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=row_exists, other=0.0).to(tl.float32)
        row_max, row_sum, acc = add_sink(sink, row_max, row_sum, acc)

    for start in range(0, num_nodes, KEYS):
        column = start + tl.arange(0, KEYS)
        exists = column < num_nodes
        key_token = (first + column).to(tl.int64)
        key, value = load_nodes(
            key_ptr, key_stride_token, value_ptr, value_stride_token, key_token, exists, kv_head,
            dim, HEAD,
        )  # fmt: skip
        visible = visible_nodes(
            ancestors_ptr + req * ancestors_stride_req,
            node,
            column,
            row_exists[:, None] & exists[None, :],
            NUM_WORDS,
            WORD_BITS,
        )
        row_max, row_sum, acc = attend(
            query, key, value, visible, row_max, row_sum, acc, scale, PRECISION
        )
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=in_row)


def tree_attention(
    out: torch.Tensor,  # [num_tokens, num_heads, head_size] in: over the prefix; out: over all
    prefix_lse: torch.Tensor,  # [num_heads, num_tokens] float32, natural log
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size] of the tree's own nodes
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    ancestors: torch.Tensor,  # [num_reqs, max_nodes, num_words] int64 bit masks
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    prefix_lens: torch.Tensor,  # [num_reqs] int32; with 0, `out` and `prefix_lse` are not read
    scale: float,
    sinks: torch.Tensor | None = None,  # [num_heads] logits that are in no row of `prefix_lse`
) -> None:
    """Attention over each tree's own nodes, merged into the attention over its prefix, in place.

    LongSpec's steps (2) and (3) of hybrid tree attention in one kernel: nothing but `out` is
    written.
    """
    num_reqs, max_nodes, num_words = ancestors.shape
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    rows = rows_per_program(max_nodes * group, num_reqs * num_kv_heads, MAX_ROWS_PER_PROGRAM)
    _tree_attention_kernel[(num_reqs, num_kv_heads, triton.cdiv(max_nodes * group, rows))](
        out,
        out.stride(0),
        prefix_lse,
        prefix_lse.stride(0),
        query,
        query.stride(0),
        key,
        key.stride(0),
        value,
        value.stride(0),
        ancestors,
        ancestors.stride(0),
        query_start_loc,
        prefix_lens,
        out if sinks is None else sinks,
        scale,
        HAS_SINKS=sinks is not None,
        GROUP=group,
        HEAD=head_size,
        HEAD_BLOCK=head_block(head_size),
        ROWS=rows,
        KEYS=keys_per_step(max_nodes, TREE_KEYS_PER_STEP),
        NUM_WORDS=num_words,
        WORD_BITS=WORD_BITS,
        PRECISION=precision_of(query.dtype),
    )


def head_block(head_size: int) -> int:
    return max(LEAST_HEAD_BLOCK, triton.next_power_of_2(head_size))


def rows_per_program(
    num_rows: int,  # queries of one request and KV head
    num_pairs: int,  # of a request and a KV head
    most: int,
) -> int:
    most = max(16, min(most, triton.next_power_of_2(num_rows)))
    if triton.knobs.runtime.interpret:
        return most
    rows = 16
    while rows < most and num_pairs * triton.cdiv(num_rows, rows) > FILLING_PROGRAMS:
        rows *= 2
    return rows


def keys_per_step(num_keys: int, compiled: int) -> int:
    if not triton.knobs.runtime.interpret:
        return compiled
    return max(16, min(INTERPRETED_KEYS_PER_STEP, triton.next_power_of_2(num_keys)))


def precision_of(dtype: torch.dtype) -> str:
    """fp32 products of fp32 inputs are exact products, not TF32. Triton's interpreter multiplies
    bf16 numbers' bit patterns, so there everything is fp32."""
    exact = dtype == torch.float32 or triton.knobs.runtime.interpret
    return "ieee" if exact else "tf32"
