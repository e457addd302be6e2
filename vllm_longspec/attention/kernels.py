"""The Triton kernels of verification and drafting, each beside its launcher.

Both are one online softmax: over a part that another kernel or the ring holds, then over the few
keys of the tree under the ancestor masks. They run compiled on a GPU and interpreted on a CPU.
"""

import torch
import triton
import triton.language as tl

from vllm_longspec.tree.shape import WORD_BITS

# Fewer where fewer programs than a GPU has multiprocessors would run.
MAX_ROWS_PER_PROGRAM = 64
FILLING_PROGRAMS = 128
TREE_KEYS_PER_STEP = 16
RING_KEYS_PER_STEP = 128
RING_TREE_KEYS_PER_STEP = 32
PIPELINE_STAGES = 3  # Triton's default
LEAST_HEAD_BLOCK = 16  # of a tensor core's product
# Where even small programs leave half of the GPU idle, the ring's keys are split among several.
KEYS_PER_SPLIT = 128
MERGE_ROWS_PER_PROGRAM = 4
# An interpreted kernel costs by the operation, not by the element: few, wide steps.
INTERPRETED_KEYS_PER_STEP = 512


@triton.jit
def _attend(
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
def _visible_nodes(
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
    scale,
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

    for start in range(0, num_nodes, KEYS):
        column = start + tl.arange(0, KEYS)
        exists = column < num_nodes
        key_token = (first + column).to(tl.int64)
        offset = kv_head * HEAD + dim[None, :]
        in_key = exists[:, None] & (dim < HEAD)[None, :]
        key = tl.load(
            key_ptr + key_token[:, None] * key_stride_token + offset, mask=in_key, other=0.0
        )
        value = tl.load(
            value_ptr + key_token[:, None] * value_stride_token + offset, mask=in_key, other=0.0
        )
        visible = _visible_nodes(
            ancestors_ptr + req * ancestors_stride_req,
            node,
            column,
            row_exists[:, None] & exists[None, :],
            NUM_WORDS,
            WORD_BITS,
        )
        row_max, row_sum, acc = _attend(
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
) -> None:
    """Attention over each tree's own nodes, merged into the attention over its prefix, in place.

    LongSpec's steps (2) and (3) of hybrid tree attention in one kernel: nothing but `out` is
    written.
    """
    num_reqs, max_nodes, num_words = ancestors.shape
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    rows = _rows_per_program(max_nodes * group, num_reqs * num_kv_heads, MAX_ROWS_PER_PROGRAM)
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
        scale,
        GROUP=group,
        HEAD=head_size,
        HEAD_BLOCK=_head_block(head_size),
        ROWS=rows,
        KEYS=_keys_per_step(max_nodes, TREE_KEYS_PER_STEP),
        NUM_WORDS=num_words,
        WORD_BITS=WORD_BITS,
        PRECISION=_precision(query.dtype),
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
        block = tl.load(
            ring_table_ptr + req * ring_table_stride + slot // SLOTS_PER_BLOCK,
            mask=exists,
            other=0,
        ).to(tl.int64)
        cell = (
            block * ring_stride_block
            + (slot % SLOTS_PER_BLOCK) * ring_stride_slot
            + kv_head * ring_stride_head
        )
        in_key = exists[:, None] & (dim < HEAD)[None, :]
        key = tl.load(ring_ptr + cell[:, None] + dim[None, :], mask=in_key, other=0.0)
        value = tl.load(ring_ptr + cell[:, None] + HEAD + dim[None, :], mask=in_key, other=0.0)
        visible = row_exists[:, None] & exists[None, :]
        row_max, row_sum, acc = _attend(
            query, key, value, visible, row_max, row_sum, acc, scale, PRECISION
        )

    for start in range(0, num_keys, TREE_KEYS):
        column = start + tl.arange(0, TREE_KEYS)
        exists = column < num_keys
        cell = req * kv_stride_req + column * kv_stride_node + kv_head * HEAD
        in_key = exists[:, None] & (dim < HEAD)[None, :]
        key = tl.load(key_ptr + cell[:, None] + dim[None, :], mask=in_key, other=0.0)
        value = tl.load(value_ptr + cell[:, None] + dim[None, :], mask=in_key, other=0.0)
        visible = _visible_nodes(
            ancestors_ptr + req * ancestors_stride_req,
            first_node + node,
            column,
            row_exists[:, None] & exists[None, :],
            NUM_WORDS,
            WORD_BITS,
        )
        row_max, row_sum, acc = _attend(
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


@triton.jit(do_not_specialize=["num_rows"])
def _merge_ring_splits_kernel(
    out_ptr,
    parts_ptr,
    lse_ptr,
    num_rows,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS_BLOCK)
    dim = tl.arange(0, HEAD_BLOCK)
    part = row[:, None] * SPLITS + split[None, :]
    exists = (row < num_rows)[:, None] & (split < SPLITS)[None, :]
    # Every row sees itself, so its maximum is a number; one past the last row gets 0.
    lse = tl.load(lse_ptr + part, mask=exists, other=float("-inf"))
    row_max = tl.where(row < num_rows, tl.max(lse, axis=1), 0.0)
    weight = tl.exp(lse - row_max[:, None])
    parts = tl.load(
        parts_ptr + part[:, :, None] * HEAD + dim[None, None, :],
        mask=exists[:, :, None] & (dim < HEAD)[None, None, :],
        other=0.0,
    )
    total = tl.sum(weight, axis=1)
    out = tl.sum(parts * weight[:, :, None], axis=1) / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + row[:, None] * HEAD + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(row < num_rows)[:, None] & (dim < HEAD)[None, :],
    )


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
    most_rows, ring_keys, stages = ring_steps(head_size)
    rows = _rows_per_program(width * group, num_reqs * num_kv_heads, most_rows)
    row_programs = triton.cdiv(width * group, rows)
    splits = 1
    if _splits_help(num_reqs * num_kv_heads * row_programs):
        splits = triton.cdiv(capacity, KEYS_PER_SPLIT) + 1
    parts, lse = out, out
    if splits > 1:
        parts = query.new_empty(*query.shape[:3], splits, head_size, dtype=torch.float32)
        lse = query.new_empty(*query.shape[:3], splits, dtype=torch.float32)
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
        HEAD_BLOCK=_head_block(head_size),
        ROWS=rows,
        SPLITS=splits,
        KEYS_PER_SPLIT=KEYS_PER_SPLIT,
        RING_KEYS=_keys_per_step(window, ring_keys),
        TREE_KEYS=_keys_per_step(key.shape[1], RING_TREE_KEYS_PER_STEP),
        NUM_WORDS=ancestors.shape[2],
        WORD_BITS=WORD_BITS,
        PRECISION=_precision(query.dtype),
        num_stages=stages,
    )
    if splits > 1:
        num_rows = num_reqs * width * num_heads
        _merge_ring_splits_kernel[(triton.cdiv(num_rows, MERGE_ROWS_PER_PROGRAM),)](
            out,
            parts,
            lse,
            num_rows,
            SPLITS=splits,
            SPLITS_BLOCK=triton.next_power_of_2(splits),
            HEAD=head_size,
            HEAD_BLOCK=triton.next_power_of_2(head_size),
            ROWS=MERGE_ROWS_PER_PROGRAM,
        )
    return out


def ring_steps(head_size: int) -> tuple[int, int, int]:
    """Most rows of a program, ring keys of a step and stages of the pipeline, so that every GPU's
    shared memory holds them: 99 KB on the smallest (`tests/test_compile.py`)."""
    if head_size <= 128:
        return MAX_ROWS_PER_PROGRAM, RING_KEYS_PER_STEP, PIPELINE_STAGES
    return MAX_ROWS_PER_PROGRAM // 2, RING_KEYS_PER_STEP // 2, PIPELINE_STAGES - 1


def _head_block(head_size: int) -> int:
    return max(LEAST_HEAD_BLOCK, triton.next_power_of_2(head_size))


def _splits_help(num_programs: int) -> bool:
    return num_programs < FILLING_PROGRAMS // 2 and not triton.knobs.runtime.interpret


def _rows_per_program(
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


def _keys_per_step(num_keys: int, compiled: int) -> int:
    if not triton.knobs.runtime.interpret:
        return compiled
    return max(16, min(INTERPRETED_KEYS_PER_STEP, triton.next_power_of_2(num_keys)))


def _precision(dtype: torch.dtype) -> str:
    """fp32 products of fp32 inputs are exact products, not TF32. Triton's interpreter multiplies
    bf16 numbers' bit patterns, so there everything is fp32."""
    exact = dtype == torch.float32 or triton.knobs.runtime.interpret
    return "ieee" if exact else "tf32"
