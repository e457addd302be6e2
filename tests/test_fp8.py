"""The draft's weights in FP8: how far rounding moves them, the head's copy."""

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longspec.draft import fp8
from vllm_longspec.draft.fp8 import (
    E4M3,
    LARGEST,
    Fp8LinearMethod,
    embed_to_fp8,
    gated_to_fp8,
    norm_to_fp8,
    quantise_rows,
    tokens_to_fp8,
)

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


def exact(
    x: torch.Tensor,
    ids: torch.Tensor | None,
    gated: bool,
    added: torch.Tensor | None,
    keep: bool,
    layer: SimpleNamespace | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is rounded, and before its norm, in float64."""
    out = (x if ids is None else x[ids]).double()
    if gated:
        gate, up = out.chunk(2, dim=1)
        out = torch.nn.functional.silu(gate) * up
    if added is not None:
        out = out + added.double()
    if keep:
        out = out.to(x.dtype).double()
    before = out
    if layer is not None:
        mean = out.pow(2).mean(1, keepdim=True)
        out = out * torch.rsqrt(mean + layer.variance_epsilon) * layer.weight.double()
    return out, before


@given(
    rows=st.integers(1, 5), size=st.integers(1, 300), by_id=st.booleans(), gated=st.booleans(),
    add=st.booleans(), keep=st.booleans(), normed=st.booleans(), zeros=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**31),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
def test_kernel(
    device, rows, size, by_id, gated, add, keep, normed, zeros, dtype, seed, ids_dtype
) -> None:
    """Any of its steps together. The interpreter cannot round to FP8 (126 becomes 64), so there
    the numbers are compared as they are before."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 3).to(dtype).to(device)

    x = rand(rows, size * (1 + gated) + 2)[:, :-2]
    if zeros:
        x = x * 0
    ids = torch.randint(0, rows, (7,), generator=generator).to(device, ids_dtype)
    ids = ids if by_id else None
    num_tokens = 7 if by_id else rows
    kept = rand(num_tokens, size) if add or keep else None
    added = kept if add else None
    layer = SimpleNamespace(weight=rand(size), variance_epsilon=1e-5) if normed else None
    wanted, before = exact(x, ids, gated, added, keep, layer)
    target = E4M3 if device.type == "cuda" else torch.float32
    with patch.object(fp8, "E4M3", target):
        got = fp8._round(x, size, ids, gated, added, kept if keep else None, layer)
    assert got.data.dtype == target and got.scale.shape == (num_tokens, 1)
    if keep:
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(kept.double(), before, atol=1e-5, rtol=2 * step)
    back, scale = got.data.double() * got.scale, got.scale.double()
    largest = wanted.abs().amax(1, keepdim=True)
    expected = torch.where(largest == 0, 1.0, largest / LARGEST)
    # A sum that lies between two numbers of its dtype may be kept as either.
    loose = 0.02 if keep and dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(scale, expected, rtol=loose, atol=1e-9)
    rounding = HALF_STEP * 1.01 * wanted.abs() + SMALLEST * scale if target == E4M3 else 0
    assert ((back - wanted).abs() <= rounding + loose * (wanted.abs() + largest * 1e-2)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("size", [64, 4096, 14336, 27648])
def test_what_the_layer_rounds(size: int) -> None:
    """Embeddings, sums, gates and plain rows, as torch rounds them and as products take them."""
    generator = torch.Generator("cuda").manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    def assert_near(got, wanted: torch.Tensor) -> None:
        tokens, scale = quantise_rows(wanted.to(torch.bfloat16))
        back, expected = got.data.float() * got.scale, tokens.float() * scale
        assert ((back - expected).norm(dim=1) <= 0.05 * expected.norm(dim=1)).all()
        assert got.orig_dtype == torch.bfloat16
        rows = linear(rand(96, size))
        apart = rows.quant_method.apply(rows, wanted.to(torch.bfloat16)).float()
        together = rows.quant_method.apply(rows, got).float()
        assert (together - apart).norm() / apart.norm() < 0.05

    layer = SimpleNamespace(weight=rand(size), variance_epsilon=1e-5)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * layer.weight.float()

    x, residual, gate_up = rand(7, size), rand(9, size)[:7], rand(7, 2 * size)
    assert_near(tokens_to_fp8(x), x)
    assert_near(norm_to_fp8(layer, x), norm(x.float()))
    total = x.float() + residual.float()
    assert_near(norm_to_fp8(layer, x, residual), norm(total))
    torch.testing.assert_close(residual.float(), total, atol=0.03, rtol=0.01)
    gate, up = gate_up.float().chunk(2, dim=1)
    assert_near(gated_to_fp8(gate_up), torch.nn.functional.silu(gate) * up)
    table, ids = rand(50, size), torch.tensor([3, 49, 0, 3], device="cuda")
    got, embeddings = embed_to_fp8(layer, table, ids)
    assert torch.equal(embeddings, table[ids])
    assert_near(got, norm(table[ids].float()))
