"""The draft's weights in FP8: a level of a tree costs the bytes it reads, and these are half.

What a draft proposes never changes the output, only how much of it is accepted at once.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearMethodBase

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ROWS_AT_ONCE = 4096  # of a weight while it is rounded, in float32


def quantise_rows(
    x: torch.Tensor,  # [num_rows, size]
) -> tuple[torch.Tensor, torch.Tensor]:  # [num_rows, size] FP8, [num_rows, 1] float32
    """Each row rounded to FP8 times a scale of its own; a row of zeros has the scale 1."""
    quantised = torch.empty_like(x, dtype=FP8)
    scale = x.abs().amax(dim=1, keepdim=True).float() / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    for rows in torch.arange(x.shape[0], device=x.device).split(ROWS_AT_ONCE):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        quantised[part] = (x[part] / scale[part]).clamp(-LARGEST, LARGEST).to(FP8)
    return quantised, scale


class Fp8LinearMethod(LinearMethodBase):
    """In the place of the method of an unquantised layer: once its weights are loaded they get a
    scale for each row, and its inputs one for each token as they come (vLLM's `fp8_per_channel`).
    """

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the unquantised layer made its weights")

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale = quantise_rows(layer.weight.data)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,  # [num_tokens, input_size]
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if x.is_cuda:
            tokens, scale = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
            return ops.cutlass_scaled_mm(
                tokens, layer.weight.t(), scale, layer.weight_scale, x.dtype, bias
            )
        tokens, scale = quantise_rows(x)
        out = (tokens.float() @ layer.weight.float().t()) * scale * layer.weight_scale.t()
        return (out if bias is None else out + bias).to(x.dtype)
