"""Hybrid tree attention as vLLM attention backends: what the CUDA and the CPU one share.

In a batch the requests under verification lead (vLLM sorts them so). Their rows take hybrid tree
attention: a kernel over the cached prefix, one over the tree merged into it; in a sliding layer one
kernel over both. All other rows, the prefills, are plain causal attention.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from vllm_longspec.config import CACHE_DTYPES
from vllm_longspec.errors import LongSpecError
from vllm_longspec.verify.tree_attention import (
    MAX_ROWS_PER_PROGRAM,
    rows_per_program,
    tree_attention,
)
from vllm_longspec.verify.window_attention import window_attention


@dataclass
class TreeRows:
    """The requests under verification, the first ones of the batch."""

    num_tokens: int
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    prefix_lens: torch.Tensor  # [num_reqs] int32 tokens before the root
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    max_query_len: int
    max_prefix_len: int  # an upper bound
    # Set by LongSpecModelState.
    ancestors: torch.Tensor | None = None  # [num_reqs, 1 + m, num_words] int64 bit masks
    positions: torch.Tensor | None = None  # [num_tokens] int64
    scheduler_metadata: torch.Tensor | None = None  # FlashAttention 3's plan for the prefix
    max_num_splits: int = 0


@dataclass
class HybridMetadata:
    tree: TreeRows | None
    rest: Any | None  # the parent backend's metadata for the other requests
    num_actual_tokens: int


def tree_requests_in_a_graph(num_reqs: int, num_tokens: int) -> int:
    """Requests whose rows a full CUDA graph computes as trees: all, or none where each has one row,
    which is plain decoding and costs what it costs without LongSpec."""
    return num_reqs if num_tokens > num_reqs else 0


class HybridBuilder:
    """What both metadata builders do: trees apart from the rest of a batch."""

    prefix_lens: torch.Tensor  # [max_num_reqs] int32, which full CUDA graphs read

    def plan_trees(self, tree: TreeRows) -> None:
        """Fills in what the prefix kernel wants to know before."""

    def build_rest(
        self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool
    ) -> Any:
        """The parent backend's metadata for the requests in prefill."""
        raise NotImplementedError

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
            self.plan_trees(tree)
        if num_tree_reqs < common.num_reqs:
            others = requests_from(common, num_tree_reqs) if num_tree_reqs else common
            rest = self.build_rest(common_prefix_len, others, fast_build)
        return HybridMetadata(tree, rest, common.num_actual_tokens)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> HybridMetadata:
        common = common_attn_metadata
        num_tree_reqs = tree_requests_in_a_graph(common.num_reqs, common.num_actual_tokens)
        return self.build(0, common, num_tree_reqs=num_tree_reqs)


class HybridImpl:
    """What both attention layers do: the prefix by a fast kernel, the tree merged into it; the
    rows of requests in prefill as the parent backend has them."""

    scale: float
    window: int | None  # tokens that a query sees, itself included; None: all
    sinks: torch.Tensor | None  # [num_heads] logits of a key without a value

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
        """Raises LongSpecError for what a layer asks of its backend and a tree's rows would drop:
        the prefix and tree kernels know none of it."""
        for asked, name in (
            (alibi_slopes is not None, "ALiBi"),
            (kv_cache_dtype not in CACHE_DTYPES, f"the quantised KV cache {kv_cache_dtype}"),
            (bool(logits_soft_cap), "a cap on attention logits"),
            (kv_sharing_target_layer_name is not None, "layers that share a KV cache"),
            (attn_type != AttentionType.DECODER, f"{attn_type} attention"),
        ):
            if asked:
                raise LongSpecError(f"model: LongSpec does not support targets with {name}")
        self.window, self.sinks = sliding_window, sinks
        self.set_up(num_heads, head_size, scale, num_kv_heads or num_heads, kv_cache_dtype)

    def set_up(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, kv_cache_dtype: str
    ) -> None:
        """The parent's constructor; `window` and `sinks` are set."""
        raise NotImplementedError

    def attend_to_prefix(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        tree: TreeRows,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size], written
    ) -> torch.Tensor:  # [num_heads, num_tokens] float32 log-sum-exp
        raise NotImplementedError

    def attend_causally(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        rest: Any,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size], written
    ) -> None:
        raise NotImplementedError

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_size]
        kv_cache: torch.Tensor,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        attn_metadata: HybridMetadata | None,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size], written
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output.fill_(0)
        tree, rest = attn_metadata.tree, attn_metadata.rest
        first = 0
        if tree is not None:
            first = tree.num_tokens
            self.attend_in_trees(query[:first], key, value, kv_cache, tree, output[:first])
        if rest is not None:
            rows = slice(first, None)
            self.attend_causally(
                layer, query[rows], key[rows], value[rows], kv_cache, rest, output[rows]
            )
        return output

    def attend_in_trees(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_size]
        key: torch.Tensor,  # [at least num_tokens, num_kv_heads, head_size]
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        tree: TreeRows,
        output: torch.Tensor,  # [num_tokens, num_heads, head_size], written
    ) -> None:
        assert tree.ancestors is not None and tree.positions is not None
        if self.window is not None:
            window_attention(
                output,
                query,
                kv_cache,
                tree.block_table,
                key,
                value,
                tree.ancestors,
                tree.positions,
                tree.query_start_loc,
                tree.prefix_lens,
                self.window,
                self.scale,
                self.sinks,
            )
            return
        # Sinks enter with the tree: the prefix's log-sum-exp is without them.
        lse = self.attend_to_prefix(query, kv_cache, tree, output)
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
            self.sinks,
        )


def attention_programs(
    impl: Any,  # a layer's HybridImpl without a window
    sizes: Iterable[tuple[int, int]],  # requests and nodes of each, the root included, of batches
    ancestors: torch.Tensor,  # [max_num_reqs, 1 + m, num_words] int64
    dtype: torch.dtype,
) -> Iterator[Callable[[], Any]]:
    """Calls that launch each program of `tree_attention` once, for no node at all."""
    num_heads, num_kv_heads = impl.num_heads, impl.num_kv_heads
    by_rows = {
        rows_per_program(
            nodes * num_heads // num_kv_heads, reqs * num_kv_heads, MAX_ROWS_PER_PROGRAM
        ): (reqs, nodes)
        for reqs, nodes in sizes
    }
    device = ancestors.device
    for reqs, nodes in by_rows.values():
        query = torch.empty(1, num_heads, impl.head_size, dtype=dtype, device=device)
        key = torch.empty(1, num_kv_heads, impl.head_size, dtype=dtype, device=device)
        lse = torch.empty(num_heads, 1, dtype=torch.float32, device=device)
        starts = torch.zeros(reqs + 1, dtype=torch.int32, device=device)
        yield partial(
            tree_attention, torch.empty_like(query), lse, query, key, key,
            ancestors[:reqs, :nodes], starts, starts[:reqs], impl.scale, impl.sinks,
        )  # fmt: skip


def tree_rows(
    common: CommonAttentionMetadata,
    num_tree_reqs: int,
    prefix_lens: torch.Tensor,  # [max_num_reqs] int32, written
) -> TreeRows:
    starts = common.query_start_loc[: num_tree_reqs + 1]
    lens = prefix_lens[:num_tree_reqs]
    torch.sub(common.seq_lens[:num_tree_reqs], starts[1:] - starts[:-1], out=lens)
    num_tokens, max_query_len = common.num_actual_tokens, common.max_query_len
    if num_tree_reqs < common.num_reqs:
        starts_cpu = common.query_start_loc_cpu[: num_tree_reqs + 1]
        num_tokens = int(starts_cpu[-1])
        max_query_len = int((starts_cpu[1:] - starts_cpu[:-1]).max())
    return TreeRows(
        num_tokens=num_tokens,
        query_start_loc=starts,
        prefix_lens=lens,
        block_table=common.block_table_tensor[:num_tree_reqs],
        max_query_len=max_query_len,
        max_prefix_len=common.max_seq_len,
    )


def requests_from(common: CommonAttentionMetadata, first: int) -> CommonAttentionMetadata:
    """The batch without its first requests."""
    start = int(common.query_start_loc_cpu[first])
    starts_cpu = common.query_start_loc_cpu[first:] - start

    def requests(values: Any) -> Any:
        return None if values is None else values[first:]

    return common.replace(
        query_start_loc=common.query_start_loc[first:] - start,
        query_start_loc_cpu=starts_cpu,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - start,
        max_query_len=int((starts_cpu[1:] - starts_cpu[:-1]).max()),
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[start:],
        positions=None if common.positions is None else common.positions[start:],
        is_prefilling=requests(common.is_prefilling),
        seq_lens_cpu_upper_bound=requests(common.seq_lens_cpu_upper_bound),
        req_idx=requests(common.req_idx),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
