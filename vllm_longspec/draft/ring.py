"""The draft's constant-size cache: a ring of the last tokens' keys and values, in vLLM's own pool.

vLLM gives every KV-cache group blocks of the same bytes. Where a block of the target holds
`block_size` tokens of L layers, a block of the ring holds L x block_size tokens of the draft's one
layer, so a window of 512 tokens takes one block of a 32-layer target at any context length. Of a
target with sliding layers L counts those with full attention: they share a block, and vLLM puts as
many sliding ones into each of theirs. A
request claims its ring once; it never grows and is never prefix-cached, since it can be rebuilt
from token ids at any time. Position p is in slot p mod capacity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
)
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import CircularBufferSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

TOKENS_PER_PROGRAM = 16


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """`block_size` is the target's, so that the scheduler's granularity stays the target's; a
    block of the ring still holds `slots_per_block` tokens."""

    slots_per_block: int
    blocks_per_ring: int

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return self.slots_per_block

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.blocks_per_ring * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.blocks_per_ring


class RingManager(CircularBufferManager):
    """Claims a ring's blocks with a request's first allocation and holds them to its end."""

    kv_cache_spec: RingSpec

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        return 0 if self.req_to_blocks.get(request_id) else self.kv_cache_spec.blocks_per_ring

    def _claim_ring_block(
        self, request_id: str, record_for_zeroing: bool = True
    ) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        claimed = self.block_pool.get_new_blocks(self.kv_cache_spec.blocks_per_ring)
        blocks.extend(claimed)
        return claimed


# Runs wherever a RingSpec is unpickled, the scheduler's process included. vLLM registers its own
# specs only into an empty registry, so they have to be there first.
register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(RingSpec, RingManager, uniform_type_base_spec=RingSpec)


def ring_spec(
    window: int,
    num_full_layers: int,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
) -> RingSpec:
    """A ring of at least `window` slots whose blocks have the bytes of the target's blocks."""
    slots_per_block = num_full_layers * block_size
    return RingSpec(
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        dcp_sharded=False,
        slots_per_block=slots_per_block,
        blocks_per_ring=-(-window // slots_per_block),
    )


class RingMetadataBuilder(AttentionMetadataBuilder[None]):
    """The proposer addresses the ring itself: no metadata."""

    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)

    def build(self, *args: Any, **kwargs: Any) -> None:
        return None


class RingBackend(AttentionBackend):
    """Makes vLLM lay out the pool block by block, which lets the two groups share it."""

    @staticmethod
    def get_name() -> str:
        return "LONGSPEC_RING"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the proposer attends to the ring itself")

    @staticmethod
    def get_builder_cls() -> type[RingMetadataBuilder]:
        return RingMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLNHC,)


class Ring(torch.nn.Module, AttentionLayerBase):
    """The layer that makes vLLM allocate the ring; `kv_cache` is bound by vLLM."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        name: str,
        window: int,
        num_full_layers: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.window = window
        self.num_full_layers = num_full_layers
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.dtype = dtype
        self.impl = None
        self.kv_cache = torch.tensor([])  # [num_blocks, num_kv_heads, slots, 2 * head_size]
        vllm_config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return RingBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RingSpec:
        return ring_spec(
            self.window,
            self.num_full_layers,
            vllm_config.cache_config.block_size,
            self.num_kv_heads,
            self.head_size,
            self.dtype,
        )


@triton.jit(do_not_specialize=["num_tokens"])
def _write_ring_kernel(
    key_ptr,
    value_ptr,
    kv_stride,
    rows_ptr,
    positions_ptr,
    num_tokens,
    ring_ptr,
    ring_stride_block,
    ring_stride_head,
    ring_stride_slot,
    table_ptr,
    table_stride,
    SLOTS_PER_BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1)
    dim = tl.arange(0, HEAD_BLOCK)
    position = tl.load(positions_ptr + token, mask=token < num_tokens, other=-1)
    written = position >= 0
    row = tl.load(rows_ptr + token, mask=written, other=0)
    slot = position % CAPACITY
    block = tl.load(
        table_ptr + row * table_stride + slot // SLOTS_PER_BLOCK, mask=written, other=0
    ).to(tl.int64)
    cell = (
        block * ring_stride_block
        + (slot % SLOTS_PER_BLOCK) * ring_stride_slot
        + kv_head * ring_stride_head
    )
    mask = written[:, None] & (dim < HEAD)[None, :]
    source = token[:, None] * kv_stride + kv_head * HEAD + dim[None, :]
    target = ring_ptr + cell[:, None] + dim[None, :]
    tl.store(target, tl.load(key_ptr + source, mask=mask), mask=mask)
    tl.store(target + HEAD, tl.load(value_ptr + source, mask=mask), mask=mask)


def write_ring(
    key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
    rows: torch.Tensor,  # [num_tokens] int64 row of the table
    positions: torch.Tensor,  # [num_tokens] int64; -1: not written
    ring: torch.Tensor,  # [num_blocks, num_kv_heads, slots_per_block, 2 * head_size]
    table: torch.Tensor,  # [num_reqs, blocks_per_ring] int32
) -> None:
    """No two written tokens of a row may be a capacity apart: their slots would be the same."""
    num_tokens, num_kv_heads, head_size = key.shape
    slots_per_block = ring.shape[2]
    assert key.stride() == value.stride() and key.stride(1) == head_size
    _write_ring_kernel[(triton.cdiv(num_tokens, TOKENS_PER_PROGRAM), num_kv_heads)](
        key,
        value,
        key.stride(0),
        rows,
        positions,
        num_tokens,
        ring,
        ring.stride(0),
        ring.stride(1),
        ring.stride(2),
        table,
        table.stride(0),
        SLOTS_PER_BLOCK=slots_per_block,
        CAPACITY=table.shape[1] * slots_per_block,
        HEAD=head_size,
        HEAD_BLOCK=triton.next_power_of_2(head_size),
        TOKENS=TOKENS_PER_PROGRAM,
    )
