"""The draft's weights in FP8: a level of a tree costs the bytes it reads, and these are half.

What a draft proposes never changes the output, only how much of it is accepted at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ROWS_AT_ONCE = 4096  # of a weight while it is rounded, in float32
CUTLASS_MULTIPLE = 16  # of both sizes of a weight, for vLLM's products in FP8


def quantise_rows(
    x: torch.Tensor,  # [num_rows, size]
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows, size] FP8, [num_rows, 1] float32
    """Each row rounded to FP8 times a scale of its own; a row of zeros has the scale 1."""
    quantised = torch.empty_like(x, dtype=E4M3)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    for first in range(0, x.shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        scale = x[rows].abs().amax(dim=1, keepdim=True).float() / LARGEST
        scales[rows] = torch.where(scale == 0, 1.0, scale)
        quantised[rows] = (x[rows] / scales[rows]).clamp(-LARGEST, LARGEST).to(E4M3)
    return quantised, scales


def fits_fp8(weight: torch.Tensor) -> bool:
    """Whether vLLM's fast products in FP8 take a weight of this shape."""
    return all(size % CUTLASS_MULTIPLE == 0 for size in weight.shape)


class Fp8LinearMethod(LinearMethodBase):
    """In the place of the method of an unquantised layer: once its weights are loaded they get a
    scale for each row, and its inputs one for each token as they come (vLLM's `fp8_per_channel`).
    A CPU multiplies the rounded numbers in the dtype they had.
    """

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the unquantised layer made its weights")

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale = quantise_rows(layer.weight.data)
        if not weight.is_cuda:
            weight = (weight.float() * scale).to(layer.weight.dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor | QuantizedActivation,  # [num_tokens, input_size]
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(x, QuantizedActivation):
            x = tokens_to_fp8(x)
        if x.data.is_cuda:
            return ops.cutlass_scaled_mm(
                x.data, layer.weight.t(), x.scale, layer.weight_scale, x.orig_dtype, bias
            )
        return linear((x.data.float() * x.scale).to(x.orig_dtype), layer.weight, bias)


def tokens_to_fp8(
    x: torch.Tensor,  # [num_tokens, size]
) -> QuantizedActivation:
    if not x.is_cuda:
        return _activation(*quantise_rows(x), x.dtype)
    return _round(x, x.shape[1])


def norm_to_fp8(
    layer: RMSNorm,
    x: torch.Tensor,  # [num_tokens, size]
    residual: torch.Tensor | None = None,  # [num_tokens, size]; `x` is added to it, in place
) -> QuantizedActivation:
    """The norm of `x`, or of the sum, as the next product wants it."""
    return _round(x, x.shape[1], added=residual, kept=residual, layer=layer)


def embed_to_fp8(
    layer: RMSNorm,
    table: torch.Tensor,  # [vocab_size, size]
    ids: torch.Tensor,  # [num_tokens] int32 or int64
) -> tuple[QuantizedActivation, torch.Tensor]:
    """The norm of the tokens' embeddings and these themselves, [num_tokens, size]."""
    embeddings = table.new_empty(len(ids), table.shape[1])
    return _round(table, table.shape[1], ids, kept=embeddings, layer=layer), embeddings


def gated_to_fp8(
    gate_up: torch.Tensor,  # [num_tokens, 2 * size]
) -> QuantizedActivation:
    """silu(gate) * up."""
    return _round(gate_up, gate_up.shape[1] // 2, gated=True)


@triton.jit
def _round_kernel(
    data_ptr,
    scale_ptr,
    x_ptr,
    x_stride,
    ids_ptr,
    added_ptr,
    added_stride,
    kept_ptr,
    kept_stride,
    weight_ptr,
    epsilon,
    size,
    BY_ID: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    source = token
    if BY_ID:
        source = tl.load(ids_ptr + token).to(tl.int64)
    x_ptr += source * x_stride
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + size + column, mask=inside, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    if ADD:
        x += tl.load(added_ptr + token * added_stride + column, mask=inside, other=0.0)
    if KEEP:
        kept = x.to(kept_ptr.dtype.element_ty)
        tl.store(kept_ptr + token * kept_stride + column, kept, mask=inside)
        x = kept.to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + epsilon) * weight
    scale = tl.max(tl.abs(x), axis=0) / LARGEST
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + token, scale)
    x = tl.clamp(x / scale, -LARGEST, LARGEST)
    tl.store(data_ptr + token * size + column, x.to(data_ptr.dtype.element_ty), mask=inside)


def _round(
    x: torch.Tensor,  # [num_tokens, size], if gated twice as wide, by id a table
    size: int,
    ids: torch.Tensor | None = None,  # [num_tokens] int32 or int64 rows of `x`; None: in order
    gated: bool = False,
    added: torch.Tensor | None = None,  # [num_tokens, size]
    kept: torch.Tensor | None = None,  # [num_tokens, size], written: what is rounded, before norm
    layer: RMSNorm | None = None,
) -> QuantizedActivation:
    """Rounds `x`, gated, added to, kept and normed in this order, in one kernel: between products
    of few rows a launch costs more than the work."""
    assert x.stride(1) == 1
    num_tokens = len(x if ids is None else ids)
    data = torch.empty(num_tokens, size, dtype=E4M3, device=x.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    _round_kernel[(num_tokens,)](
        data,
        scale,
        x,
        x.stride(0),
        x if ids is None else ids,
        x if added is None else added,
        0 if added is None else added.stride(0),
        x if kept is None else kept,
        0 if kept is None else kept.stride(0),
        x if layer is None else layer.weight,
        0.0 if layer is None else layer.variance_epsilon,
        size,
        BY_ID=ids is not None,
        GATED=gated,
        ADD=added is not None,
        KEEP=kept is not None,
        NORM=layer is not None,
        LARGEST=LARGEST,
        BLOCK=block,
        num_warps=8 if block <= 8192 else 16,
    )
    return _activation(data, scale, x.dtype)


def _activation(
    data: torch.Tensor,  # [num_tokens, size] FP8
    scale: torch.Tensor,  # [num_tokens, 1] float32
    dtype: torch.dtype,
) -> QuantizedActivation:
    return QuantizedActivation(data, scale, dtype, data.shape, kFp8DynamicTokenSym)
