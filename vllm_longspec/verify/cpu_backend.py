"""The CPU backend: torch over the prefix and for prefills, the Triton tree kernel interpreted.

vLLM's own CPU kernel cannot read a block-outermost cache, which the ring needs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_longspec.verify.hybrid import HybridBuilder, HybridImpl, HybridMetadata, TreeRows
from vllm_longspec.verify.prefix import gather_pages, torch_prefix_attention
from vllm_longspec.verify.reference import masked_attention


@dataclass
class CausalRows:
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32


class LongSpecCpuBuilder(HybridBuilder, AttentionMetadataBuilder[HybridMetadata]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        max_num_reqs = self.vllm_config.scheduler_config.max_num_seqs
        self.prefix_lens = torch.zeros(max_num_reqs, dtype=torch.int32)

    def build_rest(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> CausalRows:
        return CausalRows(common.query_start_loc, common.seq_lens, common.block_table_tensor)


class LongSpecCpuImpl(HybridImpl, AttentionImpl[HybridMetadata]):
    def set_up(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, kv_cache_dtype: str
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        slot_mapping: torch.Tensor,  # [num_tokens]; -1: padding
    ) -> None:
        written = (slot_mapping >= 0).nonzero().flatten()
        slots, block_size = slot_mapping[written], kv_cache.shape[2]
        tokens = torch.cat([key[written], value[written]], dim=-1)
        kv_cache[slots // block_size, :, slots % block_size] = tokens.to(kv_cache.dtype)

    def attend_to_prefix(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tree: TreeRows,
        output: torch.Tensor,
    ) -> torch.Tensor:
        return torch_prefix_attention(
            query,
            kv_cache,
            tree.block_table,
            tree.prefix_lens,
            tree.query_start_loc,
            self.scale,
            output,
        )

    def attend_causally(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rest: CausalRows,
        output: torch.Tensor,
    ) -> None:
        starts = rest.query_start_loc.tolist()
        for req, seq_len in enumerate(rest.seq_lens.tolist()):
            tokens = slice(starts[req], starts[req + 1])
            num_queries = tokens.stop - tokens.start
            if num_queries == 0:
                continue
            # What is before the first query's window may be another request's by now.
            seen_from = 0
            if self.window is not None:
                seen_from = max(0, seq_len - num_queries + 1 - self.window)
            key, value = gather_pages(kv_cache, rest.block_table[req], seq_len, seen_from)
            mask = causal_mask(num_queries, seq_len - seen_from, self.window)
            if self.sinks is not None:
                output[tokens] = masked_attention(
                    query[tokens],
                    key.transpose(0, 1),
                    value.transpose(0, 1),
                    mask,
                    self.scale,
                    self.sinks,
                )
                continue
            out = scaled_dot_product_attention(
                query[tokens].transpose(0, 1)[None],
                key[None],
                value[None],
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )
            output[tokens] = out[0].transpose(0, 1)


def causal_mask(
    num_queries: int, num_keys: int, window: int | None
) -> torch.Tensor:  # [num_queries, num_keys] bool
    """Of the last `num_queries` tokens."""
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return mask if window is None else mask.triu(num_keys - num_queries + 1 - window)


class LongSpecCpuBackend(AttentionBackend):
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[LongSpecCpuImpl]:
        return LongSpecCpuImpl

    @staticmethod
    def get_builder_cls() -> type[LongSpecCpuBuilder]:
        return LongSpecCpuBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLNHC,)
