"""Moving the accepted nodes' keys and values to where a chain would have put them."""

import torch
import triton
import triton.language as tl


@triton.jit
def _compact_kernel(
    cache_ptr,
    cache_stride_layer,
    cache_stride_block,
    cache_stride_head,
    cache_stride_slot,
    slots_ptr,
    slots_stride_group,
    query_start_loc_ptr,
    idx_mapping_ptr,
    path_ptr,
    path_stride,
    path_len_ptr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    CONTENT: tl.constexpr,
    CONTENT_BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    first = tl.load(query_start_loc_ptr + req)
    row = tl.load(idx_mapping_ptr + req)
    length = tl.load(path_len_ptr + row)
    slots_ptr += tl.program_id(2).to(tl.int64) * slots_stride_group
    head = tl.arange(0, HEAD_BLOCK)
    content = tl.arange(0, CONTENT_BLOCK)
    mask = (head < NUM_KV_HEADS)[:, None] & (content < CONTENT)[None, :]
    offset = head[:, None] * cache_stride_head + content[None, :]
    base = cache_ptr + layer * cache_stride_layer
    # A node never stands left of its place in the chain, so moving them in order never overwrites
    # one that is still to be moved.
    for i in range(length):
        node = tl.load(path_ptr + row * path_stride + i)
        if node != i + 1:
            source = tl.load(slots_ptr + first + node)
            target = tl.load(slots_ptr + first + i + 1)
            from_ptr = (
                base
                + source // BLOCK_SIZE * cache_stride_block
                + source % BLOCK_SIZE * cache_stride_slot
            )
            to_ptr = (
                base
                + target // BLOCK_SIZE * cache_stride_block
                + target % BLOCK_SIZE * cache_stride_slot
            )
            moved = tl.load(from_ptr + offset, mask=mask)
            tl.store(to_ptr + offset, moved, mask=mask)


def compact(
    caches: torch.Tensor,  # [num_layers, num_blocks, num_kv_heads, block_size, 2 * head_size]
    slots: torch.Tensor,  # [num_groups, num_tokens] int64 cache slot of each token of the batch
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    idx_mapping: torch.Tensor,  # [num_reqs] int64 request slots
    path: torch.Tensor,  # [max_num_reqs + 1, depth] int32 accepted nodes of each request slot
    path_len: torch.Tensor,  # [max_num_reqs + 1] int32
) -> None:
    """Accepted node i of a path goes to the slot of node i + 1, in every layer of the blocks of
    every group, in place."""
    num_layers, _, num_kv_heads, block_size, content = caches.shape
    assert caches.stride(4) == 1
    _compact_kernel[(idx_mapping.shape[0], num_layers, slots.shape[0])](
        caches,
        caches.stride(0),
        caches.stride(1),
        caches.stride(2),
        caches.stride(3),
        slots,
        slots.stride(0),
        query_start_loc,
        idx_mapping,
        path,
        path.stride(0),
        path_len,
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_BLOCK=triton.next_power_of_2(num_kv_heads),
        CONTENT=content,
        CONTENT_BLOCK=triton.next_power_of_2(content),
    )


def stack_layers(groups: list[list[torch.Tensor]]) -> torch.Tensor:
    """One view of the layers' caches, which vLLM lays out side by side at a constant stride, each
    group's from the start of a block: a block belongs to one of them.

    Each cache is [num_blocks, num_kv_heads, block_size, 2 * head_size]; the view has in front the
    layers of the largest group. Where a group has fewer, what the view has more is padding of its
    blocks. Raises RuntimeError if the layers are not so laid out.
    """
    largest = max(groups, key=len)
    first = largest[0]
    size = first.element_size()
    stride = (largest[1].data_ptr() - first.data_ptr()) // size if len(largest) > 1 else 0
    for caches in groups:
        for i, cache in enumerate(caches):
            alike = cache.shape == first.shape and cache.stride() == first.stride()
            if not alike or cache.data_ptr() != first.data_ptr() + i * stride * size:
                raise RuntimeError("the target's layers do not share one block-outermost KV cache")
    return first.as_strided((len(largest), *first.shape), (stride, *first.stride()))
