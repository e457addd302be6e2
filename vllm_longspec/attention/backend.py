"""Hybrid tree attention as vLLM attention backends: what the CUDA and the CPU one share.

In a batch the requests under verification lead (vLLM sorts them so). Their rows take hybrid tree
attention: a kernel over the cached prefix, one over the tree merged into it. All other rows, the
prefills, are plain causal attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_longspec.config import LongSpecError

UNQUANTISED = ("auto", "bfloat16", "float16", "float32")


@dataclass
class TreeRows:
    """The requests under verification, the first ones of the batch."""

    num_tokens: int
    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    prefix_lens: torch.Tensor  # [num_reqs] int32 tokens before the root
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32
    max_query_len: int
    max_prefix_len: int  # an upper bound
    # [num_reqs, 1 + m, num_words] int64 bit masks; set by LongSpecModelState
    ancestors: torch.Tensor | None = None
    scheduler_metadata: torch.Tensor | None = None  # FlashAttention 3's plan for the prefix
    max_num_splits: int = 0


@dataclass
class HybridMetadata:
    tree: TreeRows | None
    rest: Any | None  # the parent backend's metadata for the other requests
    num_actual_tokens: int


def check_plain_attention(
    alibi_slopes: Any = None,
    sliding_window: int | None = None,
    kv_cache_dtype: str = "auto",
    logits_soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    kv_sharing_target_layer_name: str | None = None,
) -> None:
    """Raises LongSpecError for what an attention layer asks of its backend and a tree's rows would
    drop: the prefix and tree kernels know none of it."""
    for asked, name in (
        (alibi_slopes is not None, "ALiBi"),
        (sliding_window is not None, "sliding-window attention"),
        (kv_cache_dtype not in UNQUANTISED, f"the quantised KV cache {kv_cache_dtype}"),
        (bool(logits_soft_cap), "a cap on attention logits"),
        (sinks is not None, "attention sinks"),
        (kv_sharing_target_layer_name is not None, "layers that share a KV cache"),
    ):
        if asked:
            raise LongSpecError(f"model: LongSpec does not support targets with {name}")


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
