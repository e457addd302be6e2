"""CPU stand-ins for the two vLLM sampling kernels that Triton's interpreter cannot serve.

An interpreted kernel costs milliseconds a program: Gumbel sampling, one program per row and 1,024
tokens, would dominate every CPU step. It is replaced by a vectorised version through vLLM's own
registry for this (`vllm.triton_utils.dispatcher`). vLLM's top-k/top-p kernel fails in the
interpreter, so that call takes vLLM's PyTorch version.
"""

from typing import Any

import numpy as np
import torch

GUMBEL_KERNEL = "vllm.v1.worker.gpu.sample.gumbel._gumbel_sample_kernel"

DRAFT_NOISE_SALT = 1 << 30


def register_cpu_kernels() -> None:
    """Idempotent. To be called only where kernels are interpreted."""
    from vllm.triton_utils.dispatcher import _registry, register_kernels
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu.sample import gumbel

    if GUMBEL_KERNEL in _registry:
        return
    interpreted = gumbel._gumbel_sample_kernel

    def gumbel_sample_kernel(
        local_argmax: torch.Tensor,  # [num_rows, num_blocks] int64, written
        local_argmax_stride: int,
        local_max: torch.Tensor,  # [num_rows, num_blocks] float32, written
        local_max_stride: int,
        logits_cache: torch.Tensor | None,
        logits_cache_stride_0: int,
        logits_cache_stride_1: int,
        logits_cache_col: torch.Tensor | None,
        logits_cache_source: torch.Tensor | None,
        logits_cache_source_stride: int,
        logits: torch.Tensor,  # [num_rows, vocab_size]
        logits_stride: int,
        expanded_idx_mapping: torch.Tensor,  # [num_rows]
        seeds: torch.Tensor,  # [max_num_reqs] int64
        pos: torch.Tensor,  # [num_rows]
        temp: torch.Tensor,  # [max_num_reqs] float32
        vocab_size: int,
        **constants: Any,
    ) -> None:
        if logits_cache is not None or constants["USE_FP64"]:
            interpreted[local_argmax.shape](
                local_argmax, local_argmax_stride, local_max, local_max_stride, logits_cache,
                logits_cache_stride_0, logits_cache_stride_1, logits_cache_col,
                logits_cache_source, logits_cache_source_stride, logits, logits_stride,
                expanded_idx_mapping, seeds, pos, temp, vocab_size, **constants,
            )  # fmt: skip
            return
        values = noised_logits(
            logits, expanded_idx_mapping, seeds, pos, temp,
            constants["APPLY_TEMPERATURE"], constants["IS_DRAFTING"],
        )  # fmt: skip
        num_rows, num_blocks = local_argmax.shape
        block_size = constants["BLOCK_SIZE"]
        padded = values.new_full((num_rows, num_blocks * block_size), float("-inf"))
        padded[:, :vocab_size] = values
        best, index = padded.view(num_rows, num_blocks, block_size).max(dim=-1)
        local_max.copy_(best)
        local_argmax.copy_(index + torch.arange(num_blocks) * block_size)

    register_kernels({GUMBEL_KERNEL: gumbel_sample_kernel})
    # vLLM's own switch between its Triton and its PyTorch top-k/top-p, read at every call.
    topk_topp_sampler.HAS_TRITON = False


def noised_logits(
    logits: torch.Tensor,  # [num_rows, vocab_size]
    expanded_idx_mapping: torch.Tensor,  # [num_rows] row -> request slot; -1: no request
    seeds: torch.Tensor,  # [max_num_reqs] int64
    pos: torch.Tensor,  # [num_rows] position of each row's own token
    temperature: torch.Tensor,  # [max_num_reqs]
    apply_temperature: bool,
    is_drafting: bool,
) -> torch.Tensor:  # [num_rows, vocab_size] float32
    """Logits plus the Gumbel noise of (seed, position, token); `gumbel_noised_argmax` in vLLM."""
    slot = expanded_idx_mapping.clamp(min=0).long()
    temp = torch.where(expanded_idx_mapping >= 0, temperature[slot].float(), 0.0)
    values = logits.float()
    random = (temp != 0.0).nonzero().flatten()
    if random.numel() == 0:
        return values
    values = values.clone()
    noisy = values[random]
    if apply_temperature:
        noisy = noisy / temp[random, None]
    positions = pos[random].long() + (DRAFT_NOISE_SALT if is_drafting else 0)
    uniform = murmur3_uniform32(seeds[slot[random]].numpy(), positions.numpy(), logits.shape[1])
    values[random] = noisy - torch.log(-log1p_neg_stable(torch.from_numpy(uniform)))
    return values


def murmur3_uniform32(
    seed: np.ndarray,  # [num_rows] int64
    pos: np.ndarray,  # [num_rows] int64
    num_keys: int,
) -> np.ndarray:  # [num_rows, num_keys] float32 in (0, 1)
    def rotl(value: np.ndarray, shift: int) -> np.ndarray:
        return (value << np.uint32(shift)) | (value >> np.uint32(32 - shift))

    def mix(h: np.ndarray, key: np.ndarray) -> np.ndarray:
        key = rotl(key * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        return rotl(h ^ key, 13) * np.uint32(5) + np.uint32(0xE6546B64)

    def low_word(value: np.ndarray) -> np.ndarray:
        return (value & 0xFFFFFFFF).astype(np.uint32)[:, None]

    h = np.zeros((len(seed), 1), dtype=np.uint32)
    for word in (low_word(seed), low_word(seed >> 32), low_word(pos)):
        h = mix(h, word)
    h = mix(h, np.arange(num_keys, dtype=np.uint32)[None, :]) ^ np.uint32(16)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    high = (h >> np.uint32(16)).astype(np.float32)
    low = (h & np.uint32(0xFFFF)).astype(np.float32)
    return high * np.float32(2.0**-16) + (low + np.float32(0.5)) * np.float32(2.0**-32)


def log1p_neg_stable(value: torch.Tensor) -> torch.Tensor:
    """log(1 - value) as `vllm...gumbel._log1p_neg_stable`: a series below 0.25, else direct."""
    polynomial = torch.full_like(value, 1.0 / 8.0)
    for divisor in range(7, 0, -1):
        polynomial = 1.0 / divisor + value * polynomial
    direct = torch.log(torch.clamp(1.0 - value, min=5.960464477539063e-08))
    return torch.where(value < 0.25, -value * polynomial, direct)
