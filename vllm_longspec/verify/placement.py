"""The trees' positions and masks in batch order, before the target's forward reads them."""

import torch
import triton
import triton.language as tl

from vllm_longspec.verify.tree_state import TreeState


@triton.jit
def _place_trees_kernel(
    idx_mapping_ptr,
    query_start_loc_ptr,
    cu_num_logits_ptr,
    num_computed_tokens_ptr,
    prefill_lens_ptr,
    depths_ptr,
    depths_stride,
    ancestors_ptr,
    causal_ptr,
    input_ids_ptr,
    positions_ptr,
    out_ancestors_ptr,
    MASK_SIZE: tl.constexpr,
    NODES: tl.constexpr,
    MASK_BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    num_nodes = tl.load(cu_num_logits_ptr + req + 1) - tl.load(cu_num_logits_ptr + req)
    if num_nodes == 1:
        return
    row = tl.load(idx_mapping_ptr + req)
    first = tl.load(query_start_loc_ptr + req)
    root = tl.load(num_computed_tokens_ptr + row)
    word = tl.arange(0, MASK_BLOCK)
    # Drafts before the first sampled token are vLLM's padding: no tree yet, a chain never accepted.
    if root >= tl.load(prefill_lens_ptr + row):
        node = tl.arange(0, NODES)
        exists = node < num_nodes
        depth = tl.load(depths_ptr + row * depths_stride + node, mask=exists, other=0)
        tl.store(positions_ptr + first + node, root + depth, mask=exists)
        token = tl.load(input_ids_ptr + first + node, mask=exists, other=0)
        tl.store(input_ids_ptr + first + node, tl.maximum(token, 0), mask=exists)
        mask = tl.load(ancestors_ptr + row * MASK_SIZE + word, mask=word < MASK_SIZE, other=0)
    else:
        mask = tl.load(causal_ptr + word, mask=word < MASK_SIZE, other=0)
    tl.store(out_ancestors_ptr + req * MASK_SIZE + word, mask, mask=word < MASK_SIZE)


def place_trees(
    state: TreeState,
    idx_mapping: torch.Tensor,  # [num_reqs] int64 request slots
    query_start_loc: torch.Tensor,  # [num_reqs + 1] int32
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    num_computed_tokens: torch.Tensor,  # [max_num_reqs] int32
    prefill_lens: torch.Tensor,  # [max_num_reqs] int32
    input_ids: torch.Tensor,  # [num_tokens] int32; the -1 of unused nodes becomes 0
    positions: torch.Tensor,  # [max_num_tokens] int64, written at the trees' rows
    ancestors: torch.Tensor,  # [max_num_reqs, 1 + m, num_words] int64, written
) -> None:
    max_nodes, num_words = ancestors.shape[1:]
    _place_trees_kernel[(idx_mapping.shape[0],)](
        idx_mapping,
        query_start_loc,
        cu_num_logits,
        num_computed_tokens,
        prefill_lens,
        state.depths,
        state.depths.stride(0),
        state.ancestors,
        state.causal,
        input_ids,
        positions,
        ancestors,
        MASK_SIZE=max_nodes * num_words,
        NODES=triton.next_power_of_2(max_nodes),
        MASK_BLOCK=triton.next_power_of_2(max_nodes * num_words),
    )
