"""The draft's weights in FP8: how far rounding moves them, the head's copy."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")
from vllm_longspec.draft.fp8 import E4M3, LARGEST, Fp8LinearMethod, norm_to_fp8, quantise_rows

HALF_STEP = 2.0**-4  # of a number with 3 bits behind its leading one, relative
SMALLEST = 2.0**-9  # FP8's smallest number above 0


@given(
    st.integers(1, 9), st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_rounding(rows: int, size: int, spread: float, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(rows, 1, generator=generator) * spread
    x = (torch.randn(rows, size, generator=generator) * scales).to(dtype)
    x[0] = 0
    quantised, scale = quantise_rows(x)
    assert quantised.dtype == E4M3 and scale.shape == (rows, 1) and (scale > 0).all()
    back, x = quantised.float() * scale, x.float()
    assert not back[0].any()
    error = (back - x).abs()
    assert (error <= (HALF_STEP * 1.01) * x.abs() + SMALLEST * scale).all()
    largest = back.abs().amax(1) / x.abs().amax(1)
    assert ((largest[1:] - 1).abs() < 0.01).all()


def linear(weight: torch.Tensor) -> SimpleNamespace:
    layer = SimpleNamespace(weight=torch.nn.Parameter(weight, requires_grad=False))
    layer.quant_method = Fp8LinearMethod()
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_products(device: str, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    weight = torch.randn(96, 64, generator=generator).to(device, dtype)
    x = torch.randn(5, 64, generator=generator).to(device, dtype)
    bias = torch.randn(96, generator=generator).to(device, dtype) if biased else None
    layer = linear(weight)
    got = layer.quant_method.apply(layer, x, bias)
    assert got.dtype == dtype
    exact = torch.nn.functional.linear(x.float(), weight.float(), None)
    off = (got.float() - (0 if bias is None else bias.float()) - exact).norm() / exact.norm()
    assert 1e-4 < off < 0.05
    tokens, scale = quantise_rows(x)
    rows, row_scale = quantise_rows(weight)
    rounded = (tokens.float() * scale) @ (rows.float() * row_scale).T
    expected = rounded + (0 if bias is None else bias.float())
    torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.02)
    assert LARGEST == 448


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("added", [False, True])
def test_norms_that_round(added: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    x, residual, weight = rand(7, 512), rand(9, 512)[:7], rand(512)
    layer = SimpleNamespace(weight=weight, variance_epsilon=1e-5)
    total = (x.float() + residual.float()) if added else x.float()
    expected = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
    got = norm_to_fp8(layer, x, residual if added else None)
    back = got.data.float() * got.scale
    assert got.scale.shape == (7, 1) and got.orig_dtype == torch.bfloat16
    assert ((back - expected).norm(dim=1) / expected.norm(dim=1) < 0.05).all()
    if added:
        torch.testing.assert_close(residual.float(), total, atol=0.03, rtol=0.01)
    rows = linear(rand(96, 512))
    apart = rows.quant_method.apply(rows, expected.to(torch.bfloat16)).float()
    together = rows.quant_method.apply(rows, got).float()
    assert (together - apart).norm() / apart.norm() < 0.05
