"""The CPU stand-ins for vLLM's sampling kernels."""

import numpy as np
import pytest
import torch

from vllm_longspec.runtime.triton_cpu import kernels

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
