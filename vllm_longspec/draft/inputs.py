"""What a proposal reads, gathered into batch order before its CUDA graph runs."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# What to draft for a request: a tree, one path of it, or nothing.
TREE, CHAIN, OFF = range(3)


@dataclass
class ProposalInputs:
    """Persistent, so that CUDA graphs can read them."""

    slots: torch.Tensor  # [max_num_reqs] int64 request slots; -1: padding
    root_tokens: torch.Tensor  # [max_num_reqs] int64 the newest committed token
    context_lens: torch.Tensor  # [max_num_reqs] int32 tokens with target K/V; the root's position
    new_tokens: torch.Tensor  # [max_num_reqs, depth + 1] int64 committed by the last step
    new_positions: torch.Tensor  # [max_num_reqs, depth + 1] int64; -1: fewer were committed
    modes: torch.Tensor  # [max_num_reqs] int32: TREE, CHAIN or OFF

    @classmethod
    def allocate(cls, max_num_reqs: int, depth: int, device: torch.device) -> "ProposalInputs":
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(max_num_reqs, *shape, dtype=dtype, device=device)

        return cls(
            slots=zeros() - 1,
            root_tokens=zeros(),
            context_lens=zeros(dtype=torch.int32),
            new_tokens=zeros(depth + 1),
            new_positions=zeros(depth + 1) - 1,
            modes=zeros(dtype=torch.int32),
        )


@triton.jit(do_not_specialize=["num_reqs", "num_new"])
def _read_inputs_kernel(
    slots_ptr,
    root_tokens_ptr,
    context_lens_ptr,
    new_tokens_ptr,
    new_positions_ptr,
    modes_ptr,
    idx_mapping_ptr,
    num_sampled_ptr,
    last_sampled_ptr,
    last_sampled_stride,
    num_computed_tokens_ptr,
    all_token_ids_ptr,
    all_token_ids_stride,
    modes_by_slot_ptr,
    num_reqs,
    num_new,
    NEW: tl.constexpr,
):
    row = tl.program_id(0)
    back = tl.arange(0, NEW)
    new = row * num_new + back
    if row >= num_reqs:
        tl.store(slots_ptr + row, -1)
        tl.store(context_lens_ptr + row, 0)
        tl.store(new_positions_ptr + new, -1, mask=back < num_new)
        return
    slot = tl.load(idx_mapping_ptr + row).to(tl.int64)
    context_len = tl.load(num_computed_tokens_ptr + slot)
    tl.store(slots_ptr + row, slot)
    tl.store(root_tokens_ptr + row, tl.load(last_sampled_ptr + slot * last_sampled_stride))
    tl.store(context_lens_ptr + row, context_len)
    tl.store(modes_ptr + row, tl.load(modes_by_slot_ptr + slot))
    position = context_len - 1 - back
    committed = (back < num_new) & (back < tl.load(num_sampled_ptr + row)) & (position >= 0)
    token = tl.load(
        all_token_ids_ptr + slot * all_token_ids_stride + position, mask=committed, other=0
    )
    tl.store(new_tokens_ptr + new, token.to(tl.int64), mask=back < num_new)
    position = tl.where(committed, position, -1)
    tl.store(new_positions_ptr + new, position.to(tl.int64), mask=back < num_new)


def read_inputs(
    inputs: ProposalInputs,  # written
    idx_mapping: torch.Tensor,  # [num_reqs] request slots
    num_sampled: torch.Tensor,  # [num_reqs] int32 tokens committed by the last step
    last_sampled: torch.Tensor,  # [max_num_reqs, 1] int64 by slot
    num_computed_tokens: torch.Tensor,  # [max_num_reqs] int32 by slot
    all_token_ids: torch.Tensor,  # [max_num_reqs, max_model_len] int32 by slot
    modes: torch.Tensor,  # [max_num_reqs] int32 by slot
    num_rows: int,  # at least num_reqs; the rest is padding
) -> None:
    num_new = inputs.new_tokens.shape[1]
    _read_inputs_kernel[(num_rows,)](
        inputs.slots,
        inputs.root_tokens,
        inputs.context_lens,
        inputs.new_tokens,
        inputs.new_positions,
        inputs.modes,
        idx_mapping,
        num_sampled,
        last_sampled,
        last_sampled.stride(0),
        num_computed_tokens,
        all_token_ids,
        all_token_ids.stride(0),
        modes,
        idx_mapping.shape[0],
        num_new,
        NEW=triton.next_power_of_2(num_new),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["num_reqs", "width", "depth", "max_position"])
def _place_level_kernel(
    positions_ptr,
    query_starts_ptr,
    context_lens_ptr,
    num_reqs,
    width,
    depth,
    max_position,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = i < num_reqs * width
    context_len = tl.load(context_lens_ptr + i // width, mask=exists, other=0)
    position = tl.minimum(context_len + depth, max_position)
    tl.store(positions_ptr + i, position.to(tl.int64), mask=exists)
    tl.store(query_starts_ptr + i, i * width, mask=i <= num_reqs)


def place_level(
    context_lens: torch.Tensor,  # [num_reqs] int32
    width: int,  # nodes of the level
    depth: int,
    max_position: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A level's (positions [num_reqs * width] int64, query_starts [num_reqs + 1] int32)."""
    num_reqs, device = context_lens.shape[0], context_lens.device
    positions = torch.empty(num_reqs * width, dtype=torch.int64, device=device)
    query_starts = torch.empty(num_reqs + 1, dtype=torch.int32, device=device)
    block = 256
    _place_level_kernel[(triton.cdiv(max(num_reqs * width, num_reqs + 1), block),)](
        positions, query_starts, context_lens, num_reqs, width, depth, max_position, BLOCK=block
    )
    return positions, query_starts
