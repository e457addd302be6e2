"""The runtime's kernels against loops over Python lists."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longspec.draft.ring import write_ring
from vllm_longspec.runtime.compaction import compact, stack_layers
from vllm_longspec.runtime.model_state import place_trees
from vllm_longspec.runtime.sampler import walk
from vllm_longspec.runtime.tree_state import TreeState
from vllm_longspec.tree.accept import accept
from vllm_longspec.tree.shape import ancestor_masks, mask_words

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


REQUESTS = st.lists(st.integers(0, MAX_REQS - 1), min_size=1, max_size=4, unique=True)


@given(m=st.integers(1, 70), slots=REQUESTS, data=st.data(), seed=st.integers(0, 2**31))
def test_walk(device, m: int, slots: list[int], data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state, parents = random_state(device, m, generator)
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
        rows = order[starts[row] : starts[row] + count].tolist()
        assert rows == [starts[row] + node for node in [0, *path]]


@given(
    m=st.integers(1, 40),
    slots=REQUESTS,
    block_size=st.sampled_from([16, 32]),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_compact(device, m, slots, block_size, num_layers, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads, head_size = 2, 4
    state = TreeState.allocate(MAX_REQS, m, m, device)
    num_tokens = len(slots) * (m + 1)
    num_blocks = -(-num_tokens // block_size) + 1
    packed = torch.randn(
        num_blocks, num_layers, block_size, num_kv_heads, 2 * head_size, generator=generator
    )
    layers = [packed[:, layer].transpose(1, 2) for layer in range(num_layers)]
    token_slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    expected = packed.clone()
    for row, slot in enumerate(slots):
        length = int(torch.randint(0, m + 1, (), generator=generator))
        path = (torch.randperm(m, generator=generator)[:length] + 1).sort().values
        state.path[slot, :length] = path.int()
        state.path_len[slot] = length
        first = row * (m + 1)
        for i, node in enumerate(path.tolist()):
            source, target = int(token_slots[first + node]), int(token_slots[first + i + 1])
            expected[target // block_size, :, target % block_size] = packed[
                source // block_size, :, source % block_size
            ]
    moved = packed.to(device)
    layers = [moved[:, layer].transpose(1, 2) for layer in range(num_layers)]
    compact(
        stack_layers(layers),
        token_slots.to(device),
        torch.arange(len(slots) + 1, dtype=torch.int32, device=device) * (m + 1),
        torch.tensor(slots, device=device),
        state.path,
        state.path_len,
    )
    torch.testing.assert_close(moved.cpu(), expected, atol=0, rtol=0)


@given(m=st.integers(1, 70), slots=REQUESTS, data=st.data(), seed=st.integers(0, 2**31))
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
    head_size=st.sampled_from([48, 64]),
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
