"""The draft's cache in vLLM's own block manager: constant size, no padding."""

from types import SimpleNamespace

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
except ModuleNotFoundError:  # before 0.33
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import Request

from vllm_longspec.draft.ring import RingSpec, ring_spec

WINDOW = 512
BLOCK_SIZE = 16
# (layers, KV heads, head size) of the six targets with published drafts
PUBLISHED = {
    "vicuna-7b-v1.5-16k": (32, 32, 128),
    "vicuna-13b-v1.5-16k": (40, 40, 128),
    "longchat-7b-v1.5-32k": (32, 32, 128),
    "longchat-13b-16k": (40, 40, 128),
    "Llama-3-8B-Instruct-262k": (32, 8, 128),
    "QwQ-32B-Preview": (64, 8, 128),
}
MIB = 2**20


def config() -> SimpleNamespace:
    """What vLLM's grouping reads of a VllmConfig."""
    cache = SimpleNamespace(
        block_size=BLOCK_SIZE,
        enable_prefix_caching=True,
        prefix_match_unit=None,
        num_gpu_blocks_override=None,
        prefix_cache_retention_interval=None,
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLNHC,
    )
    return SimpleNamespace(
        cache_config=cache,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        model_config=SimpleNamespace(max_model_len=131072),
        speculative_config=None,
        kv_transfer_config=None,
    )


def specs(layers: int, kv_heads: int, head_size: int) -> dict[str, KVCacheSpec]:
    full = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=kv_heads, head_size=head_size, dtype=torch.bfloat16
    )
    ring = ring_spec(WINDOW, layers, BLOCK_SIZE, kv_heads, head_size, torch.bfloat16)
    return {f"model.layers.{i}.self_attn.attn": full for i in range(layers)} | {
        f"longspec.layers.{layers}.self_attn": ring
    }


def pool(shape: tuple[int, int, int], num_blocks: int) -> KVCacheConfig:
    layers, kv_heads, head_size = shape
    groups = get_kv_cache_groups(config(), specs(*shape))
    block = layers * BLOCK_SIZE * kv_heads * 2 * head_size * 2
    return get_kv_cache_config_from_groups(config(), groups, num_blocks * block)


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_shapes_lose_no_bytes(model: str) -> None:
    layers, kv_heads, head_size = shape = PUBLISHED[model]
    kv = pool(shape, 1000)
    target_block = layers * BLOCK_SIZE * kv_heads * 2 * head_size * 2
    used = {
        name: spec.page_size_bytes
        for group in kv.kv_cache_groups
        for name, spec in group.kv_cache_spec.kv_cache_specs.items()
    }
    ring_page = used.pop(f"longspec.layers.{layers}.self_attn")
    assert kv.num_blocks == 1000  # the ring made no block larger
    assert sum(used.values()) == target_block == ring_page
    assert len(kv.kv_cache_groups) == 2
    ring = ring_spec(WINDOW, layers, BLOCK_SIZE, kv_heads, head_size, torch.bfloat16)
    assert ring.blocks_per_ring == 1
    assert ring.slots_per_block >= WINDOW
    print(f"{model}: {target_block / MIB:g} MiB a block, padding 0 bytes, 1 draft block a request")


def manager_for(pool: KVCacheConfig) -> KVCacheManager:
    kv = generate_scheduler_kv_cache_config([pool])
    scheduler_block, hash_block = resolve_kv_cache_block_sizes(kv, config())
    assert scheduler_block == hash_block == BLOCK_SIZE  # prefix hits stay fine-grained
    return KVCacheManager(
        kv,
        max_model_len=131072,
        scheduler_block_size=scheduler_block,
        hash_block_size=hash_block,
        enable_caching=True,
    )


def request(name: str, length: int) -> Request:
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    params = SamplingParams(max_tokens=10)
    return Request(name, list(range(length)), params, None, block_hasher=hasher)


@pytest.mark.parametrize(
    "shape, draft_blocks",
    [((32, 8, 128), 1), ((28, 4, 128), 2), ((4, 2, 64), 8)],
    ids=["llama-3-8b", "qwen2.5-7b", "nano"],
)
def test_draft_blocks_do_not_grow_with_the_context(shape, draft_blocks) -> None:
    held = {}
    for length in (1_000, 100_000):
        manager = manager_for(pool(shape, 8_000))
        ring = next(
            i
            for i, m in enumerate(manager.coordinator.single_type_managers)
            if isinstance(m.kv_cache_spec, RingSpec)
        )
        req = request(str(length), length)
        free = manager.block_pool.get_num_free_blocks()
        # In chunks, then a verification and its rejection.
        done = 0
        while done < length:
            step = min(8192, length - done)
            assert manager.allocate_slots(req, step) is not None
            done += step
            req.num_computed_tokens = done
        assert manager.allocate_slots(req, 32) is not None
        blocks = manager.get_block_ids(req.request_id)
        held[length] = len(blocks[ring])
        target = len(blocks[1 - ring])
        assert free - manager.block_pool.get_num_free_blocks() == held[length] + target
        manager.free(req)
        assert manager.block_pool.get_num_free_blocks() == free
    print(f"draft blocks held: {held[1_000]} at 1k tokens, {held[100_000]} at 100k tokens")
    assert held[1_000] == held[100_000] == draft_blocks


def test_admission_counts_the_ring() -> None:
    manager = manager_for(pool((4, 2, 64), 12))  # 8 blocks a ring; one block is vLLM's null block
    assert manager.allocate_slots(request("fits", 3 * BLOCK_SIZE), 3 * BLOCK_SIZE) is not None
    assert manager.allocate_slots(request("waits", BLOCK_SIZE), BLOCK_SIZE) is None
