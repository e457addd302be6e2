"""The draft's weights in FP8: a level of a tree costs the bytes it reads, and these are half.

What a draft proposes never changes the output, only how much of it is accepted at once.
"""

from typing import Any

import torch
from torch.nn.functional import linear
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ROWS_AT_ONCE = 4096  # of a weight while it is rounded, in float32


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
    if x.is_cuda:
        tokens, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    else:
        tokens, scale = quantise_rows(x)
    return QuantizedActivation(tokens, scale, x.dtype, x.shape, kFp8DynamicTokenSym)


def norm_to_fp8(
    layer: RMSNorm,
    x: torch.Tensor,  # [num_tokens, size], on a GPU
    residual: torch.Tensor | None = None,  # [num_tokens, size]; `x` is added to it, in place
) -> QuantizedActivation:
    """The norm of `x`, or of the sum, as the next product wants it: in one kernel."""
    tokens, scale = ops.rms_norm_dynamic_per_token_quant(
        x, layer.weight, layer.variance_epsilon, E4M3, residual=residual
    )
    return QuantizedActivation(tokens, scale, x.dtype, x.shape, kFp8DynamicTokenSym)
