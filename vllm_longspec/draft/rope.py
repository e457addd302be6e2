"""From the fused QKV projection to where its parts are read, rotated on the way, in one kernel.

Queries become contiguous; keys and values go straight into the tree's scratch buffers or the ring.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from vllm_longspec.draft.ring import write_ring

ROWS_PER_PROGRAM = 8
# An interpreted kernel costs by the operation, not by the element.
INTERPRETED_ROWS_PER_PROGRAM = 4096


@triton.jit(do_not_specialize=["num_rows", "width"])
def _rotate_kernel(
    qkv_ptr,
    qkv_stride,
    positions_ptr,
    cos_sin_ptr,
    cos_sin_stride,
    query_ptr,
    key_ptr,
    value_ptr,
    stride_block,
    stride_slot,
    stride_head,
    rows_ptr,
    table_ptr,
    table_stride,
    num_rows,
    width,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    FIRST_HEAD: tl.constexpr,
    LAST_HEAD: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
    NEOX: tl.constexpr,
    TO_RING: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    token = (row // (LAST_HEAD - FIRST_HEAD)).to(tl.int64)
    head = FIRST_HEAD + row % (LAST_HEAD - FIRST_HEAD)
    dim = tl.arange(0, HEAD_BLOCK)
    position = tl.load(positions_ptr + token, mask=exists, other=0)
    if TO_RING:
        exists = exists & (position >= 0)

    if NEOX:
        partner = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim - ROTARY // 2)
        angle = dim % (ROTARY // 2)
        negated = dim < ROTARY // 2
    else:
        partner = dim ^ 1
        angle = dim // 2
        negated = dim % 2 == 0
    in_row = exists[:, None] & (dim < HEAD)[None, :]
    rotated = in_row & (dim < ROTARY)[None, :] & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
    source = qkv_ptr + token[:, None] * qkv_stride + head[:, None] * HEAD
    x = tl.load(source + dim[None, :], mask=in_row, other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=rotated, other=0.0).to(tl.float32)
    angles = cos_sin_ptr + position[:, None] * cos_sin_stride + angle[None, :]
    cos = tl.load(angles, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(angles + ROTARY // 2, mask=rotated, other=0.0).to(tl.float32)
    out = x * cos + tl.where(negated[None, :], -other, other) * sin

    if FIRST_HEAD < NUM_HEADS:
        target = query_ptr + (token[:, None] * NUM_HEADS + head[:, None]) * HEAD + dim[None, :]
        is_query = in_row & (head < NUM_HEADS)[:, None]
        tl.store(target, out.to(query_ptr.dtype.element_ty), mask=is_query)
    if LAST_HEAD > NUM_HEADS:
        if TO_RING:
            slot = position % CAPACITY
            table_row = tl.load(rows_ptr + token, mask=exists, other=0)
            block = tl.load(
                table_ptr + table_row * table_stride + slot // SLOTS_PER_BLOCK,
                mask=exists,
                other=0,
            ).to(tl.int64)
            slot = slot % SLOTS_PER_BLOCK
        else:
            block = token // width
            slot = token % width
        kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
        cell = block * stride_block + slot * stride_slot + kv_head * stride_head
        target = cell[:, None] + dim[None, :]
        out = out.to(key_ptr.dtype.element_ty)
        is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
        is_key = (head >= NUM_HEADS)[:, None] & (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
        tl.store(key_ptr + target, out, mask=in_row & is_key)
        tl.store(value_ptr + target, out, mask=in_row & is_value)


def _launch(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
    positions: torch.Tensor,  # [num_tokens] int64
    rotary: RotaryEmbedding,
    num_heads: int,
    heads: range,  # of the query's, the key's and the value's, in this order: those written
    query: torch.Tensor,  # [num_tokens, num_heads, head_size], contiguous
    key: torch.Tensor,  # [blocks, slots, num_kv_heads, head_size], strided
    value: torch.Tensor,  # [blocks, slots, num_kv_heads, head_size], strides of `key`
    rows: torch.Tensor | None = None,  # [num_tokens] int64 rows of the table
    table: torch.Tensor | None = None,  # [num_reqs, blocks_per_ring] int32; None: in order
) -> None:
    assert key.stride() == value.stride() and key.stride(3) == 1 and qkv.stride(1) == 1
    num_kv_heads, head_size = key.shape[2:]
    num_rows = qkv.shape[0] * len(heads)
    per_program = ROWS_PER_PROGRAM
    if triton.knobs.runtime.interpret:
        per_program = min(INTERPRETED_ROWS_PER_PROGRAM, triton.next_power_of_2(num_rows))
    _rotate_kernel[(triton.cdiv(num_rows, per_program),)](
        qkv,
        qkv.stride(0),
        positions,
        rotary.cos_sin_cache,
        rotary.cos_sin_cache.stride(0),
        query,
        key,
        value,
        key.stride(0),
        key.stride(1),
        key.stride(2),
        rows if rows is not None else positions,
        table if table is not None else positions,
        table.stride(0) if table is not None else 0,
        num_rows,
        key.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        FIRST_HEAD=heads.start,
        LAST_HEAD=heads.stop,
        HEAD=head_size,
        HEAD_BLOCK=triton.next_power_of_2(head_size),
        ROTARY=rotary.rotary_dim,
        NEOX=rotary.is_neox_style,
        TO_RING=table is not None,
        SLOTS_PER_BLOCK=key.shape[1] if table is not None else 0,
        CAPACITY=table.shape[1] * key.shape[1] if table is not None else 0,
        ROWS=per_program,
    )


def is_plain(rotary: Any, head_size: int) -> bool:
    """Whether its table of cosines and sines says all about it: so do vLLM's that only compute
    another table (Llama 3, YaRN, linear scaling), not those with a forward of their own."""
    methods = ("forward_native", "forward_cuda", "forward_static")
    return (
        isinstance(rotary, RotaryEmbedding)
        and all(getattr(type(rotary), m) is getattr(RotaryEmbedding, m) for m in methods)
        and rotary.head_size == head_size
        and rotary.cos_sin_cache.shape[-1] == rotary.rotary_dim
    )


def use_kernel(rotary: Any, head_size: int) -> bool:
    # Interpreted, it takes milliseconds for what vLLM's CPU kernel does in microseconds.
    return is_plain(rotary, head_size) and not triton.knobs.runtime.interpret


def split_and_rotate(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
    positions: torch.Tensor,  # [num_tokens] int64
    rotary: Any,
    num_heads: int,
    key: torch.Tensor,  # [num_reqs, width, num_kv_heads, head_size], strided; written
    value: torch.Tensor,  # [num_reqs, width, num_kv_heads, head_size], strides of `key`; written
) -> torch.Tensor:  # [num_tokens, num_heads, head_size] the query
    """`num_reqs * width` is `num_tokens`."""
    num_kv_heads, head_size = key.shape[2:]
    if use_kernel(rotary, head_size):
        query = qkv.new_empty(qkv.shape[0], num_heads, head_size)
        heads = range(num_heads + 2 * num_kv_heads)
        _launch(qkv, positions, rotary, num_heads, heads, query, key, value)
        return query
    sizes = [num_heads * head_size, *[num_kv_heads * head_size] * 2]
    q, k, v = qkv.split(sizes, dim=-1)
    q, k = rotary(positions, q.contiguous(), k.contiguous())
    key.copy_(k.view(key.shape))
    value.copy_(v.unflatten(0, value.shape[:2]).unflatten(-1, value.shape[2:]))
    return q.view(-1, num_heads, head_size)


def rotate_into_ring(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_size]
    positions: torch.Tensor,  # [num_tokens] int64; -1: not written
    rotary: Any,
    num_heads: int,
    rows: torch.Tensor,  # [num_tokens] int64 row of the table
    ring: torch.Tensor,  # [num_blocks, num_kv_heads, slots_per_block, 2 * head_size]
    table: torch.Tensor,  # [num_reqs, blocks_per_ring] int32
) -> None:
    """As `write_ring`, whose rule about the written positions holds here too."""
    num_kv_heads, head_size = ring.shape[1], ring.shape[3] // 2
    if use_kernel(rotary, head_size):
        key, value = ring.transpose(1, 2).split(head_size, dim=-1)
        heads = range(num_heads, num_heads + 2 * num_kv_heads)
        _launch(qkv, positions, rotary, num_heads, heads, qkv, key, value, rows, table)
        return
    key, value = qkv.new_empty(2, 1, qkv.shape[0], num_kv_heads, head_size)
    split_and_rotate(qkv, positions.clamp(min=0), rotary, num_heads, key, value)
    write_ring(key[0], value[0], rows, positions, ring, table)


def rotate_query(
    query: torch.Tensor,  # [num_tokens, num_heads * head_size]
    positions: torch.Tensor,  # [num_tokens] int64
    rotary: Any,
    head_size: int,
) -> torch.Tensor:  # [num_tokens, num_heads, head_size]
    if not use_kernel(rotary, head_size):
        one_head = query[:, :head_size].contiguous()  # vLLM's LongRoPE wants a key
        return rotary(positions, query, one_head)[0].unflatten(-1, (-1, head_size))
    # Not in place: a program's threads read each other's elements.
    out = query.new_empty(query.shape[0], query.shape[1] // head_size, head_size)
    num_heads = out.shape[1]
    unused = out[:, None]
    _launch(query, positions, rotary, num_heads, range(num_heads), out, unused, unused)
    return out
