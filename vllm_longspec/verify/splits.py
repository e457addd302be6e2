"""What the kernels over many keys and a tree share, the draft's over its ring and a sliding layer's
over its window: their steps, and the merge of their parts where whole rows would leave a GPU idle.
"""

import torch
import triton
import triton.language as tl

from vllm_longspec.verify.tree_attention import FILLING_PROGRAMS, MAX_ROWS_PER_PROGRAM

KEYS_PER_STEP = 128
TREE_KEYS_PER_STEP = 32
PIPELINE_STAGES = 3  # Triton's default
# Where even small programs leave half of the GPU idle, the keys are split among several.
KEYS_PER_SPLIT = 128
MERGE_ROWS_PER_PROGRAM = 4


def long_steps(head_size: int) -> tuple[int, int, int]:
    """Most rows of a program, keys of a step and stages of the pipeline, so that every GPU's shared
    memory holds them: 99 KB on the smallest (`tests/test_compile.py`)."""
    if head_size <= 128:
        return MAX_ROWS_PER_PROGRAM, KEYS_PER_STEP, PIPELINE_STAGES
    return MAX_ROWS_PER_PROGRAM // 2, KEYS_PER_STEP // 2, PIPELINE_STAGES - 1


def splits_help(num_programs: int) -> bool:
    return num_programs < FILLING_PROGRAMS // 2 and not triton.knobs.runtime.interpret


def outputs_of_parts(
    out: torch.Tensor,  # [..., head_size]
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where parts write their outputs and log-sum-exps, as `merge_splits` takes them; a row that is
    one part writes to `out` and has no log-sum-exp."""
    if splits == 1:
        return out, out
    rows, head_size = out.shape[:-1], out.shape[-1]
    parts = out.new_empty(*rows, splits, head_size, dtype=torch.float32)
    return parts, out.new_empty(*rows, splits, dtype=torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_splits_kernel(
    out_ptr,
    parts_ptr,
    lse_ptr,
    num_rows,
    SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS_BLOCK)
    dim = tl.arange(0, HEAD_BLOCK)
    part = row[:, None] * SPLITS + split[None, :]
    exists = (row < num_rows)[:, None] & (split < SPLITS)[None, :]
    # Every row sees itself, so its maximum is a number; one past the last row gets 0.
    lse = tl.load(lse_ptr + part, mask=exists, other=float("-inf"))
    row_max = tl.where(row < num_rows, tl.max(lse, axis=1), 0.0)
    weight = tl.exp(lse - row_max[:, None])
    parts = tl.load(
        parts_ptr + part[:, :, None] * HEAD + dim[None, None, :],
        mask=exists[:, :, None] & (dim < HEAD)[None, None, :],
        other=0.0,
    )
    total = tl.sum(weight, axis=1)
    out = tl.sum(parts * weight[:, :, None], axis=1) / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + row[:, None] * HEAD + dim[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(row < num_rows)[:, None] & (dim < HEAD)[None, :],
    )


def merge_splits(
    out: torch.Tensor,  # [..., head_size] contiguous, written
    parts: torch.Tensor,  # [..., splits, head_size] float32
    lse: torch.Tensor,  # [..., splits] float32; -inf where a part saw nothing
) -> None:
    splits, head_size = parts.shape[-2:]
    num_rows = out.numel() // head_size
    _merge_splits_kernel[(triton.cdiv(num_rows, MERGE_ROWS_PER_PROGRAM),)](
        out,
        parts,
        lse,
        num_rows,
        SPLITS=splits,
        SPLITS_BLOCK=triton.next_power_of_2(splits),
        HEAD=head_size,
        HEAD_BLOCK=triton.next_power_of_2(head_size),
        ROWS=MERGE_ROWS_PER_PROGRAM,
    )
