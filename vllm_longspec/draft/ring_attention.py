"""The draft's self-attention: over the ring of committed tokens and over the tree's own nodes, in
one online softmax; where a GPU would be left idle, in parts that are merged."""

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
    attend,
    head_block,
    keys_per_step,
    load_nodes,
    load_paged,
    precision_of,
    rows_per_program,
    visible_nodes,
)


@triton.jit(do_not_specialize=["ancestors_stride_req", "first_node", "width", "num_keys", "depth"])
def _ring_attention_kernel(
    out_ptr,
    lse_ptr,
    query_ptr,
    ring_ptr,
    ring_stride_block,
    ring_stride_head,
    ring_stride_slot,
    ring_table_ptr,
    ring_table_stride,
    key_ptr,
    value_ptr,
    kv_stride_req,
    kv_stride_node,
    ancestors_ptr,
    ancestors_stride_req,
    context_lens_ptr,
    first_node,
    width,
    num_keys,
    depth,
    scale,
    WINDOW: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    RING_KEYS: tl.constexpr,
    TREE_KEYS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    req = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2) % SPLITS
    row = tl.program_id(2) // SPLITS * ROWS + tl.arange(0, ROWS)
    node = row // GROUP
    head = kv_head * GROUP + row % GROUP
    dim = tl.arange(0, HEAD_BLOCK)
    row_exists = node < width
    in_row = row_exists[:, None] & (dim < HEAD)[None, :]
    out_row = (req * width + node) * NUM_HEADS + head
    query = tl.load(query_ptr + out_row[:, None] * HEAD + dim[None, :], mask=in_row, other=0.0)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, HEAD_BLOCK), tl.float32)

    context_len = tl.load(context_lens_ptr + req)
    oldest = tl.maximum(context_len + depth - WINDOW, 0)
    first_slot = 0
    num_slots = tl.minimum(context_len, CAPACITY)
    if SPLITS > 1:
        # The last split begins past the ring: the tree's keys are its part.
        first_slot = split * KEYS_PER_SPLIT
        num_slots = tl.minimum(num_slots, first_slot + KEYS_PER_SPLIT)
        num_keys = tl.where(split == SPLITS - 1, num_keys, 0)
    for start in range(first_slot, num_slots, RING_KEYS):
        slot = start + tl.arange(0, RING_KEYS)
        # The newest position whose slot this is.
        position = context_len - 1 - (context_len - 1 - slot) % CAPACITY
        exists = (slot < num_slots) & (position >= oldest)
        key, value = load_paged(
            ring_ptr, ring_stride_block, ring_stride_head, ring_stride_slot,
            ring_table_ptr + req * ring_table_stride, slot, exists, kv_head, dim, SLOTS_PER_BLOCK,
            HEAD,
        )  # fmt: skip
        visible = row_exists[:, None] & exists[None, :]
        row_max, row_sum, acc = attend(
            query, key, value, visible, row_max, row_sum, acc, scale, PRECISION
        )

    for start in range(0, num_keys, TREE_KEYS):
        column = start + tl.arange(0, TREE_KEYS)
        exists = column < num_keys
        key, value = load_nodes(
            key_ptr + req * kv_stride_req, kv_stride_node, value_ptr + req * kv_stride_req,
            kv_stride_node, column, exists, kv_head, dim, HEAD,
        )  # fmt: skip
        visible = visible_nodes(
            ancestors_ptr + req * ancestors_stride_req,
            first_node + node,
            column,
            row_exists[:, None] & exists[None, :],
            NUM_WORDS,
            WORD_BITS,
        )
        row_max, row_sum, acc = attend(
            query, key, value, visible, row_max, row_sum, acc, scale, PRECISION
        )
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_row = out_row * SPLITS + split
    tl.store(
        out_ptr + out_row[:, None] * HEAD + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_row,
    )
    if SPLITS > 1:
        # -inf, a weight of 0, where nothing of the split is visible.
        lse = row_max + tl.log(tl.where(row_sum == 0.0, 1.0, row_sum))
        tl.store(lse_ptr + out_row, lse, mask=row_exists)


def rows_and_splits(
    num_reqs: int,
    width: int,  # nodes of the level
    heads: tuple[int, int],  # queries', keys'
    head_size: int,
    capacity: int,  # slots of a ring
) -> tuple[int, int]:
    """Rows of a program, and among how many programs the keys of a row are split: of all that is
    compiled into a proposal's kernels, what depends on the number of requests."""
    num_rows, num_pairs = width * heads[0] // heads[1], num_reqs * heads[1]
    rows = rows_per_program(num_rows, num_pairs, long_steps(head_size)[0])
    if splits_help(num_pairs * triton.cdiv(num_rows, rows)):
        return rows, triton.cdiv(capacity, KEYS_PER_SPLIT) + 1
    return rows, 1


def ring_attention(
    query: torch.Tensor,  # [num_reqs, width, num_heads, head_size] one level's nodes
    ring: torch.Tensor,  # [num_blocks, num_kv_heads, slots_per_block, 2 * head_size]
    ring_table: torch.Tensor,  # [num_reqs, blocks_per_ring] int32
    key: torch.Tensor,  # [num_reqs, max_nodes, num_kv_heads, head_size] of the tree so far
    value: torch.Tensor,  # [num_reqs, max_nodes, num_kv_heads, head_size]
    ancestors: torch.Tensor,  # [num_reqs, max_nodes, num_words] int64 bit masks
    context_lens: torch.Tensor,  # [num_reqs] int32; the root stands at this position
    first_node: int,
    depth: int,
    window: int,
    scale: float,
) -> torch.Tensor:  # [num_reqs, width, num_heads, head_size]
    """The draft's self-attention for the nodes first_node ... first_node + width - 1 at `depth`:
    the committed tokens at most `window` positions before the node, from the ring; the root, its
    ancestors and itself, from the tree's own keys.
    """
    num_reqs, width, num_heads, head_size = query.shape
    num_kv_heads = ring.shape[1]
    group = num_heads // num_kv_heads
    slots_per_block = ring.shape[2]
    capacity = ring_table.shape[1] * slots_per_block
    assert key.stride() == value.stride() and key.stride(2) == head_size
    # The kernel's offsets are int32.
    assert query.numel() < 2**31 and num_reqs * key.stride(0) < 2**31
    out = torch.empty_like(query)
    _, ring_keys, stages = long_steps(head_size)
    rows, splits = rows_and_splits(num_reqs, width, (num_heads, num_kv_heads), head_size, capacity)
    row_programs = triton.cdiv(width * group, rows)
    parts, lse = outputs_of_parts(out, splits)
    _ring_attention_kernel[(num_reqs, num_kv_heads, row_programs * splits)](
        parts,
        lse,
        query,
        ring,
        ring.stride(0),
        ring.stride(1),
        ring.stride(2),
        ring_table,
        ring_table.stride(0),
        key,
        value,
        key.stride(0),
        key.stride(1),
        ancestors,
        ancestors.stride(0),
        context_lens,
        first_node,
        width,
        first_node + width,
        depth,
        scale,
        WINDOW=window,
        SLOTS_PER_BLOCK=slots_per_block,
        CAPACITY=capacity,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD=head_size,
        HEAD_BLOCK=head_block(head_size),
        ROWS=rows,
        SPLITS=splits,
        KEYS_PER_SPLIT=KEYS_PER_SPLIT,
        RING_KEYS=keys_per_step(window, ring_keys),
        TREE_KEYS=keys_per_step(key.shape[1], TREE_KEYS_PER_STEP),
        NUM_WORDS=ancestors.shape[2],
        WORD_BITS=WORD_BITS,
        PRECISION=precision_of(query.dtype),
        num_stages=stages,
    )
    if splits > 1:
        merge_splits(out, parts, lse)
    return out
