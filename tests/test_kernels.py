"""The runtime's kernels against loops over Python lists, and against slower kernels."""

from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longspec.config import MAX_VERIFIED_NODES
from vllm_longspec.draft import ring_attention, rope
from vllm_longspec.draft.ring import write_ring
from vllm_longspec.tree.accept import accept
from vllm_longspec.tree.shape import ancestor_masks, mask_words
from vllm_longspec.verify.compaction import compact, stack_layers
from vllm_longspec.verify.placement import place_trees
from vllm_longspec.verify.sampler import walk
from vllm_longspec.verify.tree_attention import tree_attention
from vllm_longspec.verify.tree_state import BatchTrees, TreeState

MAX_REQS = 6


def random_state(
    device: torch.device, m: int, generator: torch.Generator
) -> tuple[TreeState, list[list[int]]]:
    """A state with a random tree in every slot, and the parents of each."""
    state = TreeState.allocate(MAX_REQS, m, m, device)
    rows = []
    for slot in range(MAX_REQS):
        parents = [-1] + [
            int(torch.randint(-1, i, (), generator=generator)) for i in range(1, m + 1)
        ]
        depths = [0] * (m + 1)
        for node in range(1, m + 1):
            depths[node] = depths[max(parents[node], 0)] + 1
        state.parents[slot] = torch.tensor(parents, dtype=torch.int32)
        state.depths[slot] = torch.tensor(depths, dtype=torch.int32)
        state.ancestors[slot] = ancestor_masks(torch.tensor([parents]), m, mask_words(m))[0].to(
            device
        )
        rows.append(parents)
    return state, rows


NODES = st.sampled_from([1, 2, 5, 16, 31, 63, 64, 70, MAX_VERIFIED_NODES])
REQUESTS = st.lists(st.integers(0, MAX_REQS - 1), min_size=1, max_size=4, unique=True)


@given(m=NODES, slots=REQUESTS, data=st.data(), seed=st.integers(0, 2**31))
def test_walk(device, m: int, slots: list[int], data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state, parents = random_state(device, m, generator)
    state.copies.copy_(torch.randint(0, 2, state.copies.shape, generator=generator))
    sizes = [1 + data.draw(st.integers(0, m)) for _ in slots]
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    tokens = torch.randint(-1, 2, (starts[-1],), generator=generator)
    target = torch.randint(0, 2, (starts[-1],), generator=generator)
    sampled, num_sampled, order = walk(
        target.to(device),
        tokens.to(device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(slots, device=device),
        state,
        m + 1,
    )
    for row, slot in enumerate(slots):
        part = slice(starts[row], starts[row + 1])
        emitted, path = accept(
            tokens[part].tolist(), parents[slot][: sizes[row]], target[part].tolist()
        )
        count = int(num_sampled[row])
        assert sampled[row, :count].tolist() == emitted
        assert state.path[slot, : len(path)].tolist() == path
        assert int(state.path_len[slot]) == len(path)
        assert int(state.num_copied[slot]) == int(state.copies[slot, path].sum())
        rows = order[starts[row] : starts[row] + count].tolist()
        assert rows == [starts[row] + node for node in [0, *path]]


@given(
    m=st.integers(1, 40),
    slots=REQUESTS,
    block_size=st.sampled_from([16, 32]),
    groups=st.sampled_from([[1], [3], [2, 2], [1, 3, 2]]),
    seed=st.integers(0, 2**31),
)
def test_compact(device, m, slots, block_size, groups, seed) -> None:
    """`groups`: layers of each group of layers that has blocks of its own, in one pool."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, head_size = 2, 4
    state = TreeState.allocate(MAX_REQS, m, m, device)
    num_tokens, num_layers = len(slots) * (m + 1), max(groups)
    num_blocks = -(-num_tokens * len(groups) // block_size) + len(groups)
    packed = torch.randn(
        num_blocks, num_layers, block_size, num_kv_heads, 2 * head_size, generator=generator
    )
    # Of each group in turn, from blocks that are its.
    order = torch.randperm(num_blocks // len(groups) * block_size, generator=generator)
    block, slot = order[:num_tokens] // block_size, order[:num_tokens] % block_size
    token_slots = torch.stack(
        [(block * len(groups) + i) * block_size + slot for i in range(len(groups))]
    )
    expected = packed.clone()
    for row, slot in enumerate(slots):
        length = int(torch.randint(0, m + 1, (), generator=generator))
        path = (torch.randperm(m, generator=generator)[:length] + 1).sort().values
        state.path[slot, :length] = path.int()
        state.path_len[slot] = length
        first = row * (m + 1)
        for group_slots in token_slots:
            for i, node in enumerate(path.tolist()):
                source, target = int(group_slots[first + node]), int(group_slots[first + i + 1])
                expected[target // block_size, :, target % block_size] = packed[
                    source // block_size, :, source % block_size
                ]
    moved = packed.to(device)
    layers = [moved[:, layer].transpose(1, 2) for layer in range(num_layers)]
    compact(
        stack_layers([layers[:size] for size in groups]),
        token_slots.to(device),
        torch.arange(len(slots) + 1, dtype=torch.int32, device=device) * (m + 1),
        torch.tensor(slots, device=device),
        state.path,
        state.path_len,
    )
    torch.testing.assert_close(moved.cpu(), expected, atol=0, rtol=0)


def test_rows_that_nobody_wrote(device) -> None:
    """A plain chain that is never accepted, as vLLM's warm-up verifies it, and as rows of a full
    graph are left that never have a tree."""
    state = TreeState.allocate(MAX_REQS, 5, 3, device)
    batch = BatchTrees.allocate(MAX_REQS, 64, state)
    chain = ancestor_masks(torch.tensor([[-1, 0, 1, 2, 3, 4]]), 5, mask_words(5))[0]
    for masks in (*state.ancestors, *batch.ancestors):
        assert torch.equal(masks.cpu(), chain)
    assert state.depths.cpu().tolist() == [[0, 1, 2, 3, 4, 5]] * (MAX_REQS + 1)
    assert (state.parents == -1).all()


@pytest.mark.parametrize("prefix", [0, 20])
def test_a_node_sees_itself_whatever_its_mask_says(device, prefix: int) -> None:
    generator = torch.Generator().manual_seed(prefix)
    query, key, value, over_prefix = (
        torch.randn(1, heads, 64, generator=generator).to(device) for heads in (4, 2, 2, 4)
    )
    lse = torch.randn(4, 1, generator=generator).to(device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    lens = torch.tensor([prefix], dtype=torch.int32, device=device)
    outs = []
    for mask in (0, 1):
        out = over_prefix.clone()
        masks = torch.full((1, 1, 1), mask, dtype=torch.int64, device=device)
        tree_attention(out, lse, query, key, value, masks, starts, lens, 0.125)
        outs.append(out)
    assert torch.equal(*outs)
    if not prefix:
        torch.testing.assert_close(outs[0], value.repeat_interleave(2, dim=1))


@given(m=NODES, slots=REQUESTS, data=st.data(), seed=st.integers(0, 2**31))
def test_place_trees(device, m: int, slots: list[int], data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state, _ = random_state(device, m, generator)
    sizes = sorted((1 + data.draw(st.integers(0, m)) for _ in slots), reverse=True)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    computed = torch.randint(1, 50, (MAX_REQS,), generator=generator, dtype=torch.int32)
    prefill = torch.randint(1, 50, (MAX_REQS,), generator=generator, dtype=torch.int32)
    sequential = torch.cat(
        [computed[slot] + torch.arange(size) for slot, size in zip(slots, sizes, strict=True)]
    ).long()
    ids = torch.randint(-1, 3, (starts[-1],), generator=generator, dtype=torch.int32)
    positions, input_ids = sequential.to(device).clone(), ids.to(device).clone()
    ancestors = torch.zeros(MAX_REQS, m + 1, mask_words(m), dtype=torch.int64, device=device)
    starts_on_device = torch.tensor(starts, dtype=torch.int32, device=device)
    place_trees(
        state,
        torch.tensor(slots, device=device),
        starts_on_device,
        starts_on_device,
        computed.to(device),
        prefill.to(device),
        input_ids,
        positions,
        ancestors,
    )
    for row, slot in enumerate(slots):
        part = slice(starts[row], starts[row + 1])
        has_tree = sizes[row] > 1 and computed[slot] >= prefill[slot]
        if has_tree:
            expected = computed[slot] + state.depths[slot, : sizes[row]].cpu()
            assert positions[part].tolist() == expected.tolist()
            assert input_ids[part].tolist() == ids[part].clamp(min=0).tolist()
            assert torch.equal(ancestors[row], state.ancestors[slot])
        else:
            assert positions[part].tolist() == sequential[part].tolist()
            assert input_ids[part].tolist() == ids[part].tolist()
            if sizes[row] > 1:
                assert torch.equal(ancestors[row], state.causal)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    slots_and_blocks=st.sampled_from([(16, 4), (64, 1), (48, 2)]),
    head_size=st.sampled_from([8, 64, 80, 96, 192, 256]),
    seed=st.integers(0, 2**31),
)
def test_write_ring(device, lengths, slots_and_blocks, head_size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots, blocks = slots_and_blocks
    capacity, num_kv_heads, num_reqs = slots * blocks, 2, len(lengths)
    table = torch.randperm(num_reqs * blocks, generator=generator).view(num_reqs, blocks).int()
    ring = torch.zeros(num_reqs * blocks, slots, num_kv_heads, 2 * head_size)
    expected = ring.clone()
    rows, positions = [], []
    for req, length in enumerate(lengths):
        for position in range(max(0, length - capacity), length):
            rows.append(req)
            positions.append(position if position % 7 else -1)
    key, value = (
        torch.randn(len(rows), num_kv_heads, head_size, generator=generator) for _ in range(2)
    )
    for i, (req, position) in enumerate(zip(rows, positions, strict=True)):
        if position >= 0:
            slot = position % capacity
            cell = torch.cat([key[i], value[i]], dim=-1)
            expected[table[req, slot // slots], slot % slots] = cell
    if not rows:
        return
    written = ring.to(device)
    write_ring(
        key.to(device),
        value.to(device),
        torch.tensor(rows, device=device),
        torch.tensor(positions, device=device),
        written.transpose(1, 2),
        table.to(device),
    )
    torch.testing.assert_close(written.cpu(), expected, atol=0, rtol=0)


@given(
    context_lens=st.lists(st.integers(0, 200), min_size=1, max_size=2),
    slots_and_blocks=st.sampled_from([(16, 4), (64, 1), (48, 2)]),
    heads=st.sampled_from([(3, 1), (8, 2)]),
    head_size=st.sampled_from([8, 64, 80, 96, 192, 256]),
    width=st.integers(1, 5),
    first=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_split_ring_attention(
    device, context_lens, slots_and_blocks, heads, head_size, width, first, seed
) -> None:
    """The ring in pieces of 32 keys gives what it gives in one."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), (slots, blocks) = heads, slots_and_blocks
    num_reqs, num_nodes, depth = len(context_lens), first + width, min(first, 3)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parents = [
        [-1] + [int(torch.randint(0, i, (), generator=generator)) for i in range(1, num_nodes)]
        for _ in range(num_reqs)
    ]
    tensors = (
        rand(num_reqs, width, num_heads, head_size),
        rand(num_reqs * blocks, slots, num_kv_heads, 2 * head_size).transpose(1, 2),
        torch.randperm(num_reqs * blocks, generator=generator).view(num_reqs, blocks).int(),
        rand(num_reqs, num_nodes, num_kv_heads, head_size),
        rand(num_reqs, num_nodes, num_kv_heads, head_size),
        ancestor_masks(torch.tensor(parents), num_nodes, mask_words(num_nodes - 1)),
        torch.tensor(context_lens, dtype=torch.int32),
    )
    on_device = [x.to(device) for x in tensors]
    outs = []
    for split in (False, True):
        with (
            patch.object(ring_attention, "splits_help", lambda _, split=split: split),
            patch.object(ring_attention, "KEYS_PER_SPLIT", 32),
        ):
            outs.append(
                ring_attention.ring_attention(*on_device, first, depth, 64, head_size**-0.5)
            )
    torch.testing.assert_close(outs[1], outs[0], atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def vllm_config() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


ROTARIES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(
    ("name", "head_size"),
    [("default", 256), ("partial", 80), ("llama3", 48), ("linear", 96), ("yarn", 192)],
)
def test_rotation(
    device, vllm_config, name: str, head_size: int, neox: bool, dtype: torch.dtype
) -> None:
    """Against vLLM's own, into buffers with gaps and into a ring of two blocks."""
    from vllm.model_executor.layers.rotary_embedding import get_rope

    num_reqs, width, num_heads, num_kv_heads = 3, 5, 6, 2
    generator = torch.Generator().manual_seed(5)
    rotary = get_rope(head_size, 256, neox, ROTARIES[name], dtype).to(device)
    assert rope.is_plain(rotary, head_size)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    num_tokens = num_reqs * width
    qkv = rand(num_tokens, (num_heads + 2 * num_kv_heads) * head_size)
    positions = torch.randperm(256, generator=generator)[:num_tokens].to(device)
    sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    q, k, value = (x.contiguous() for x in qkv.split(sizes, dim=-1))
    query, key = rotary.forward_native(positions, q, k)
    error = 1e-5 if dtype == torch.float32 else 3e-2
    tolerance = {"atol": error, "rtol": error}

    tree = torch.zeros(2, num_reqs, 9, num_kv_heads, head_size, device=device, dtype=dtype)
    with patch.object(rope, "use_kernel", rope.is_plain):
        got = rope.split_and_rotate(qkv, positions, rotary, num_heads, *tree[:, :, 2 : 2 + width])
        rotated = rope.rotate_query(q.clone(), positions, rotary, head_size)
    torch.testing.assert_close(got.flatten(1), query, **tolerance)
    torch.testing.assert_close(tree[0, :, 2:7].flatten(0, 1).flatten(1), key, **tolerance)
    assert torch.equal(tree[1, :, 2:7].flatten(0, 1).flatten(1), value)
    assert not tree[:, :, :2].any() and not tree[:, :, 7:].any()
    torch.testing.assert_close(rotated.flatten(1), query, **tolerance)

    slots, blocks = 8, 2
    rows = torch.arange(num_reqs).repeat_interleave(width).to(device)
    positions = torch.arange(num_tokens).to(device) * 3 % 256
    positions[4] = -1
    table = torch.randperm(num_reqs * blocks, generator=generator).view(num_reqs, -1).int()
    rings = torch.zeros(
        2, num_reqs * blocks, slots, num_kv_heads, 2 * head_size, device=device, dtype=dtype
    ).transpose(2, 3)
    args = (positions, rotary, num_heads, rows)
    for ring, kernel in zip(rings, (True, False), strict=True):
        with patch.object(rope, "use_kernel", lambda *_, kernel=kernel: kernel):
            rope.rotate_into_ring(qkv, *args, ring, table.to(device))
    torch.testing.assert_close(rings[0], rings[1], **tolerance)
    assert rings[0].any()


def test_long_rope(vllm_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3's has a forward of its own, which wants a key with every query."""
    from vllm.model_executor.layers.rotary_embedding import (
        get_rope,
        phi3_long_rope_scaled_rope,
    )

    asked = SimpleNamespace(model_config=SimpleNamespace(max_model_len=256))
    monkeypatch.setattr(phi3_long_rope_scaled_rope, "get_current_vllm_config", lambda: asked)
    num_heads, num_kv_heads, head_size = 6, 2, 48
    factors = [1.0 + i / 8 for i in range(head_size // 2)]
    rotary = get_rope(
        head_size, 256, True,
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors,
         "long_factor": factors[::-1], "original_max_position_embeddings": 64},
        torch.float32,
    )  # fmt: skip
    assert not rope.is_plain(rotary, head_size)
    qkv = torch.randn(15, (num_heads + 2 * num_kv_heads) * head_size)
    positions = torch.arange(15) * 11
    q, k, v = (x.contiguous() for x in qkv.split([num_heads * head_size, 96, 96], dim=-1))
    query, key = rotary(positions, q.clone(), k.clone())
    tree = torch.zeros(2, 3, 5, num_kv_heads, head_size)
    got = rope.split_and_rotate(qkv, positions, rotary, num_heads, *tree)
    assert torch.equal(got.flatten(1), query)
    assert torch.equal(tree[0].flatten(0, 1).flatten(1), key)
    assert torch.equal(tree[1].flatten(0, 1).flatten(1), v)
    rotated = rope.rotate_query(q, positions, rotary, head_size)
    assert torch.equal(rotated.flatten(1), query)


def test_other_rotations_are_called() -> None:
    class Doubled:
        def __call__(self, positions, query, key):
            return query * 2, None if key is None else key * 2

    assert not rope.is_plain(Doubled(), 4)
    qkv = torch.randn(6, 16)
    positions = torch.arange(6)
    key, value = torch.zeros(2, 2, 5, 1, 4)
    query = rope.split_and_rotate(qkv, positions, Doubled(), 2, key[:, 1:4], value[:, 1:4])
    assert torch.equal(query.flatten(1), qkv[:, :8] * 2)
    assert torch.equal(key[:, 1:4].reshape(6, 4), qkv[:, 8:12] * 2)
    assert torch.equal(value[:, 1:4].reshape(6, 4), qkv[:, 12:])
    assert torch.equal(
        rope.rotate_query(qkv[:, :8], positions, Doubled(), 4).flatten(1), qkv[:, :8] * 2
    )
