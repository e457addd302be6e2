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
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_longspec.attention.backend import (
    HybridMetadata,
    check_plain_attention,
    requests_from,
    tree_rows,
)
from vllm_longspec.attention.kernels import tree_attention
from vllm_longspec.attention.prefix import gather_pages, torch_prefix_attention


@dataclass
class CausalRows:
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32


class LongSpecCpuBuilder(AttentionMetadataBuilder[HybridMetadata]):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        max_num_reqs = self.vllm_config.scheduler_config.max_num_seqs
        self.prefix_lens = torch.zeros(max_num_reqs, dtype=torch.int32)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        num_tree_reqs: int = 0,
    ) -> HybridMetadata:
        common = common_attn_metadata
        tree, rest = None, None
        if num_tree_reqs > 0:
            tree = tree_rows(common, num_tree_reqs, self.prefix_lens)
        if num_tree_reqs < common.num_reqs:
            others = requests_from(common, num_tree_reqs) if num_tree_reqs else common
            rest = CausalRows(others.query_start_loc, others.seq_lens, others.block_table_tensor)
        return HybridMetadata(tree, rest, common.num_actual_tokens)


class LongSpecCpuImpl(AttentionImpl[HybridMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        check_plain_attention(
            alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap, sinks,
            kv_sharing_target_layer_name,
        )  # fmt: skip
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
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

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: HybridMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size], written
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        tree = attn_metadata.tree
        first = 0
        if tree is not None:
            first = tree.num_tokens
            lse = torch_prefix_attention(
                query[:first],
                kv_cache,
                tree.block_table,
                tree.prefix_lens,
                tree.query_start_loc,
                self.scale,
                output[:first],
            )
            assert tree.ancestors is not None
            tree_attention(
                output,
                lse,
                query,
                key,
                value,
                tree.ancestors,
                tree.query_start_loc,
                tree.prefix_lens,
                self.scale,
            )
        if attn_metadata.rest is not None:
            self.causal(query[first:], kv_cache, attn_metadata.rest, output[first:])
        return output

    def causal(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: CausalRows,
        output: torch.Tensor,
    ) -> None:
        starts = rows.query_start_loc.tolist()
        for req, seq_len in enumerate(rows.seq_lens.tolist()):
            tokens = slice(starts[req], starts[req + 1])
            num_queries = tokens.stop - tokens.start
            if num_queries == 0:
                continue
            key, value = gather_pages(kv_cache, rows.block_table[req], seq_len)
            mask = torch.ones(num_queries, seq_len, dtype=torch.bool).tril(seq_len - num_queries)
            out = scaled_dot_product_attention(
                query[tokens].transpose(0, 1)[None],
                key[None],
                value[None],
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )
            output[tokens] = out[0].transpose(0, 1)


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

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLNHC,)
