"""The CPU stand-ins for vLLM's sampling kernels, and what Triton's interpreter is spared."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from processes import own_process

from vllm_longspec.runtime.triton_cpu import kernels
from vllm_longspec.runtime.triton_cpu.interpreter import lighten_interpreter

if torch.cuda.is_available():
    pytest.skip("kernels are compiled, not interpreted, on a GPU", allow_module_level=True)

from vllm.triton_utils.dispatcher import _registry
from vllm.v1.worker.gpu.sample import gumbel

kernels.register_cpu_kernels()
INTERPRETED, _ = _registry[kernels.GUMBEL_KERNEL]


@pytest.mark.parametrize("vocab_size", [7, 1024, 2500])
@pytest.mark.parametrize("apply_temperature", [False, True])
def test_gumbel_sampling_equals_the_interpreted_kernel(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, apply_temperature: bool
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(6, vocab_size, generator=generator) * 3
    slots = torch.tensor([0, 1, 1, 2, 3, -1])
    temperature = torch.tensor([0.0, 1.0, 0.7, 2.0])
    seeds = torch.tensor([3, -(2**62), 2**63 - 1, 12345])
    positions = torch.tensor([5, 9, 10, 2**31, 70_000, 1])

    def sample() -> torch.Tensor:
        return gumbel.gumbel_sample(
            logits, slots, temperature, seeds, positions, apply_temperature, is_drafting=False
        )

    assert gumbel._gumbel_sample_kernel is not INTERPRETED
    vectorised = sample()
    monkeypatch.setattr(gumbel, "_gumbel_sample_kernel", INTERPRETED)
    assert sample().tolist() == vectorised.tolist()


def test_uniforms_are_uniform() -> None:
    sample = kernels.murmur3_uniform32(np.arange(64), np.arange(64) * 7, 1000).ravel()
    assert 0 < sample.min() and sample.max() < 1
    counts, _ = np.histogram(sample, bins=20, range=(0, 1))
    expected = len(sample) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 df, p = 0.001


def test_gpus_are_left_to_their_own_compilers() -> None:
    from triton.backends.compiler import GPUTarget

    from vllm_longspec.runtime.triton_cpu.compiler import InterpreterBackend

    assert not InterpreterBackend.supports_target(GPUTarget("cuda", 90, 32))


@triton.jit
def _folded(x, by, COLUMNS: tl.constexpr):
    return tl.where(x > by, x - by, 3 * x + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _mixed_kernel(
    whole_ptr, half_ptr, wide_ptr, out_ptr, sums_ptr, count, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Helpers, ours and Triton's; scalars, blocks, broadcasts, products; all the dtypes we have."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    cell = (tl.program_id(0) * ROWS + row)[:, None] * COLUMNS + column[None, :]
    mask = cell < count
    whole = tl.load(whole_ptr + cell, mask=mask, other=-1)
    half = tl.load(half_ptr + cell, mask=mask, other=0.5).to(tl.float32)
    wide = tl.load(wide_ptr + cell, mask=mask, other=0)
    bits = ((wide >> (column[None, :] % 7)) & 1) != 0
    folded = _folded(whole, 1 << 30, COLUMNS)  # some run over
    product = tl.dot(half, tl.trans(half), input_precision="ieee")
    sums = tl.sum(half, axis=1) + tl.max(product, axis=1) + tl.cumsum(row, axis=0) // 3
    sums += tl.sum((bits & mask).to(tl.int32), axis=1)
    tl.store(sums_ptr + tl.program_id(0) * ROWS + row, sums)
    tl.store(out_ptr + cell, tl.where(bits, folded, -whole), mask=mask)


def results_and_patches() -> tuple[list[list[Any]], int]:
    """Of that kernel, and how often parts of `triton.language` were looked through for it."""
    from triton.runtime import interpreter

    generator = torch.Generator().manual_seed(0)
    limits = -(2**31), 2**31 - 1
    whole = torch.randint(*limits, (37, 16), generator=generator, dtype=torch.int32)
    half = torch.randn(48, 16, generator=generator).bfloat16()
    wide = torch.randint(-(2**62), 2**62, (37, 16), generator=generator)
    out, sums = torch.zeros_like(whole), torch.zeros(48)
    with patch.object(
        interpreter, "_patch_builtin", side_effect=interpreter._patch_builtin
    ) as patches:
        for _ in range(2):
            _mixed_kernel[(3,)](whole, half, wide, out, sums, whole.numel(), ROWS=16, COLUMNS=16)
    return [out.tolist(), sums.tolist()], patches.call_count


def before_and_after() -> list[Any]:
    """In a process of its own, whose interpreter is Triton's."""
    from triton.runtime import interpreter

    before = results_and_patches()
    lighten_interpreter()
    lighten_interpreter()
    after = results_and_patches()
    replaced = [
        interpreter._patch_lang, interpreter._get_np_dtype, tl.core.block_type.__init__,
        tl.core.tensor.__init__, interpreter.interpreter_semantic.broadcast_impl_value,
    ]  # fmt: skip
    return [
        before, after, {function.__module__ for function in replaced},
        interpreter.interpreter_builder.options.sanitize_overflow,
    ]  # fmt: skip


def test_a_lighter_interpreter_computes_the_same() -> None:
    """And all of it fits the Triton that is installed: what does not is left out silently."""
    with own_process() as pool:
        before, after, modules, checks = pool.submit(before_and_after).result()
    assert before[0] == after[0]
    assert len({abs(number) for row in after[0][0] for number in row}) > 500
    assert modules == {lighten_interpreter.__module__} and checks is False
    assert after[1] < before[1] / 5, (before[1], after[1])
