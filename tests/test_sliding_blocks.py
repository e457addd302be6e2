"""KV-cache groups of targets with sliding layers: what they lose to padding beside the draft's
ring, and which blocks vLLM frees while a tree is in flight."""

import pytest
import torch
from test_ring import (
    BLOCK_SIZE,
    WINDOW,
    config,
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    manager_for,
    request,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_longspec.draft.ring import RingSpec, ring_spec

# Of each target: full layers, sliding ones, window, KV heads, head size; draft blocks
# a request; of the blocks of sliding layers the share that is padding, with the ring and without.
TARGETS = {
    "gemma-3-27b": ((10, 52, 1024, 16, 128), 4, 8 / 60),
    "gemma-3-4b": ((5, 29, 1024, 4, 256), 7, 1 / 30),
    "gpt-oss-20b": ((12, 12, 128, 8, 64), 3, 0.0),
    "gpt-oss-120b": ((18, 18, 128, 8, 64), 2, 0.0),
    "Qwen3-30B-A3B": ((48, 0, 0, 4, 128), 1, 0.0),
    "c4ai-command-r7b": ((8, 24, 4096, 8, 128), 4, 0.0),
    "EXAONE-4.0-32B": ((16, 48, 4096, 8, 128), 2, 0.0),
}


def specs(shape: tuple[int, ...], with_ring: bool = True) -> dict[str, KVCacheSpec]:
    full, sliding, window, kv_heads, head_size = shape
    sizes = {"num_kv_heads": kv_heads, "head_size": head_size, "dtype": torch.bfloat16}
    layers: dict[str, KVCacheSpec] = {}
    for i in range(full + sliding):
        slides = (i + 1) * full // (full + sliding) == i * full // (full + sliding)
        kind = (
            SlidingWindowSpec(block_size=BLOCK_SIZE, sliding_window=window, **sizes)
            if slides
            else FullAttentionSpec(block_size=BLOCK_SIZE, **sizes)
        )
        layers[f"model.layers.{i}.self_attn.attn"] = kind
    if with_ring:
        ring = ring_spec(WINDOW, full, BLOCK_SIZE, kv_heads, head_size, torch.bfloat16)
        layers[f"longspec.layers.{full + sliding}.self_attn"] = ring
    return layers


def pool(shape: tuple[int, ...], num_blocks: int, with_ring: bool = True) -> KVCacheConfig:
    full, _, _, kv_heads, head_size = shape
    groups = get_kv_cache_groups(config(), specs(shape, with_ring))
    block = full * BLOCK_SIZE * kv_heads * 2 * head_size * 2
    return get_kv_cache_config_from_groups(config(), groups, num_blocks * block)


def layers_of(kv: KVCacheConfig, kind: type) -> list[int]:
    """How many layers each group of a kind has."""
    counts = []
    for group in kv.kv_cache_groups:
        spec = group.kv_cache_spec
        first = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        if isinstance(first, kind):
            counts.append(len(group.layer_names))
    return counts


@pytest.mark.parametrize("model", TARGETS)
def test_what_groups_lose_to_padding(model: str) -> None:
    """The ring costs none: blocks are as large as without it, with as many layers in each. What is
    lost, Gemma 3's 8 of 60 places, plain vLLM loses too."""
    shape, ring_blocks, padding = TARGETS[model]
    kv, plain = pool(shape, 1000), pool(shape, 1000, with_ring=False)
    assert kv.num_blocks == plain.num_blocks == 1000
    assert layers_of(kv, FullAttentionSpec) == layers_of(plain, FullAttentionSpec) == [shape[0]]
    sliding = layers_of(kv, SlidingWindowSpec)
    assert sorted(sliding) == sorted(layers_of(plain, SlidingWindowSpec))
    lost = sum(shape[0] - layers for layers in sliding)
    assert lost / max(1, len(sliding) * shape[0]) == pytest.approx(padding)
    assert layers_of(kv, RingSpec) == [1]
    ring = next(s for s in specs(shape).values() if isinstance(s, RingSpec))
    assert ring.blocks_per_ring == ring_blocks
    assert ring.slots_per_block * ring_blocks >= WINDOW
    print(f"{model}: {len(sliding)} sliding groups, {lost} layers' places lost, as without a draft")


def group_of(manager: KVCacheManager, kind: type) -> int:
    managers = manager.coordinator.single_type_managers
    return next(i for i, m in enumerate(managers) if isinstance(m.kv_cache_spec, kind))


def test_draft_blocks_do_not_grow_with_the_context() -> None:
    held = {}
    for length in (1_000, 100_000):
        manager = manager_for(pool(TARGETS["gpt-oss-20b"][0], 8_000))
        req = request(str(length), length)
        free = manager.block_pool.get_num_free_blocks()
        done = 0
        while done < length:
            step = min(8192, length - done)
            assert manager.allocate_slots(req, step) is not None
            done += step
            req.num_computed_tokens = done
        assert manager.allocate_slots(req, 32) is not None
        held[length] = len(manager.get_block_ids(req.request_id)[group_of(manager, RingSpec)])
        manager.free(req)
        assert manager.block_pool.get_num_free_blocks() == free
    assert held[1_000] == held[100_000] == 3


@pytest.mark.parametrize("window", [16, 17, 40, 128])
@pytest.mark.parametrize("nodes", [7, 31, 63])
def test_no_block_that_a_rejected_tree_needs_is_freed(window: int, nodes: int) -> None:
    """Steps overlap: the next one is scheduled as if all nodes of the one in flight were accepted,
    while its root may stand right behind the first of them. What tells vLLM is
    `num_in_flight_tokens`."""
    check_freed_blocks(window, nodes)
    with pytest.raises(AssertionError):
        check_freed_blocks(window, nodes=63, in_flight_counts=False)


def check_freed_blocks(window: int, nodes: int, in_flight_counts: bool = True) -> None:
    manager = manager_for(pool((2, 2, window, 2, 64), 500))
    sliding = group_of(manager, SlidingWindowSpec)
    req = request("wrong", 300)
    assert manager.allocate_slots(req, 300) is not None
    req.num_computed_tokens = 300
    committed = 300
    null = manager.block_pool.null_block.block_id
    for _ in range(60):
        scheduled = []
        for _ in range(2):
            assert manager.allocate_slots(req, 1 + nodes) is not None
            req.num_computed_tokens += 1 + nodes
            req.num_in_flight_tokens += (1 + nodes) * in_flight_counts
            scheduled.append(1 + nodes)
            blocks = manager.get_block_ids(req.request_id)[sliding]
            # The first step in flight reads this far back, and the second one no less.
            first = max(0, committed + 1 - window)
            held = blocks[first // BLOCK_SIZE : (req.num_computed_tokens - 1) // BLOCK_SIZE + 1]
            assert null not in held
        for count in scheduled:  # each accepted none of its nodes
            req.num_in_flight_tokens -= count * in_flight_counts
            req.num_computed_tokens -= nodes
            committed += 1
    # Freed as they leave the window, all the same.
    assert (
        manager.get_block_ids(req.request_id)[sliding][(committed - window) // BLOCK_SIZE - 6]
        == null
    )
