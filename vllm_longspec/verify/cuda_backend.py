"""The CUDA backend: FlashAttention over the prefix, the Triton tree kernel over the tree."""

from typing import Any

import torch
from vllm.utils.math_utils import round_up
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import (
    flash_attn_supports_sinks,
    flash_attn_varlen_func,
    get_flash_attn_version,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_longspec.errors import LongSpecError
from vllm_longspec.verify.hybrid import HybridBuilder, HybridImpl, TreeRows


def flash_prefix_attention(
    query: torch.Tensor,  # [num_tokens, num_heads, head_size]
    kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    block_table: torch.Tensor,  # [num_reqs, max_blocks] int32
    prefix_lens: torch.Tensor,  # [num_reqs] int32
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    max_query_len: int,
    max_prefix_len: int,
    scale: float,
    out: torch.Tensor,  # [num_tokens, num_heads, head_size], written
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
) -> torch.Tensor:  # [num_heads, num_tokens] float32 log-sum-exp; undefined for an empty prefix
    key, value = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    _, lse = flash_attn_varlen_func(
        q=query,
        k=canonicalize_singleton_dim_strides(key),
        v=canonicalize_singleton_dim_strides(value),
        out=out,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=max_query_len,
        seqused_k=prefix_lens,
        max_seqlen_k=max_prefix_len,
        softmax_scale=scale,
        causal=False,
        block_table=block_table,
        return_softmax_lse=True,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        fa_version=get_flash_attn_version(head_size=query.shape[-1]),
    )
    return lse


class LongSpecFlashBuilder(HybridBuilder, FlashAttentionMetadataBuilder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        max_num_reqs = self.vllm_config.scheduler_config.max_num_seqs
        self.prefix_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=self.device)
        # A plan of its own: one batch may hold trees and prefills. Sized as vLLM sizes its plan.
        # Not `aot_schedule`, which the parent turns off once it sees layers of several windows:
        # trees ask for a plan in layers without one only.
        self.plans_ahead = self.aot_schedule
        size = max(max_num_reqs, self.max_cudagraph_size or 0)
        self.prefix_plan = torch.zeros(
            1 + round_up(size, 4) * 4, dtype=torch.int32, device=self.device
        )

    @classmethod
    def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
        """Full graphs hold verifications of uniform width only."""
        return AttentionCGSupport.UNIFORM_BATCH

    def plan_trees(self, tree: TreeRows) -> None:
        if isinstance(self.kv_cache_spec, SlidingWindowSpec):
            return
        if self.use_full_cuda_graph and tree.num_tokens <= (self.max_cudagraph_size or 0):
            tree.max_num_splits = self.max_num_splits
        tree.scheduler_metadata = self.plan_prefix(tree)

    def build_rest(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> Any:
        return FlashAttentionMetadataBuilder.build(self, common_prefix_len, common, fast_build)

    def plan_prefix(self, tree: TreeRows) -> torch.Tensor | None:
        plan = self._get_scheduler_metadata(
            aot_schedule=self.plans_ahead,
            batch_size=tree.prefix_lens.shape[0],
            cu_query_lens=tree.query_start_loc,
            max_query_len=tree.max_query_len,
            seqlens=tree.prefix_lens,
            max_seq_len=tree.max_prefix_len,
            causal=False,
            max_num_splits=tree.max_num_splits,
        )
        if plan is None or not self.use_full_cuda_graph:
            return plan
        # Full graphs read the plan from the memory it had at capture.
        size = plan.shape[0]
        self.prefix_plan[:size] = plan
        self.prefix_plan[size:] = 0
        return self.prefix_plan[:size]


class LongSpecFlashImpl(HybridImpl, FlashAttentionImpl):
    def set_up(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, kv_cache_dtype: str
    ) -> None:
        if self.sinks is not None and not flash_attn_supports_sinks():
            raise LongSpecError(
                "model: LongSpec needs FlashAttention 3 or later for attention sinks, which vLLM "
                "has on Hopper and later GPUs"
            )
        FlashAttentionImpl.__init__(
            self,
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            None,
            self.window,
            kv_cache_dtype,
            sinks=self.sinks,
        )

    def attend_to_prefix(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tree: TreeRows,
        output: torch.Tensor,
    ) -> torch.Tensor:
        return flash_prefix_attention(
            query,
            kv_cache,
            tree.block_table,
            tree.prefix_lens,
            tree.query_start_loc,
            tree.max_query_len,
            tree.max_prefix_len,
            self.scale,
            output,
            tree.scheduler_metadata,
            tree.max_num_splits,
        )

    def attend_causally(self, *args: Any) -> None:
        FlashAttentionImpl.forward(self, *args)


class LongSpecFlashBackend(FlashAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LongSpecFlashImpl]:
        return LongSpecFlashImpl

    @staticmethod
    def get_builder_cls() -> type[LongSpecFlashBuilder]:
        return LongSpecFlashBuilder
