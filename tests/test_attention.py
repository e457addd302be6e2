"""Hybrid tree attention and the draft's ring attention against dense masked attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_longspec.config import MAX_VERIFIED_NODES
from vllm_longspec.draft.ring_attention import ring_attention
from vllm_longspec.tree.shape import ancestor_masks, mask_words
from vllm_longspec.verify.prefix import torch_prefix_attention
from vllm_longspec.verify.reference import masked_attention
from vllm_longspec.verify.tree_attention import tree_attention

HEADS = st.sampled_from([(4, 4), (3, 1), (8, 2), (8, 1)])  # GQA ratios 1, 3, 4, 8
# Compiled in float32, which no GPU is served in, the larger ones take a minute each.
LARGER = [] if torch.cuda.is_available() else [192, 256]
HEAD_SIZE = st.sampled_from([64, 80, 96, 128, *LARGER])
TOLERANCE = 2e-5


def random_parents(generator: torch.Generator, num_nodes: int) -> list[int]:
    return [-1] + [
        int(torch.randint(0, i, (), generator=generator)) for i in range(1, num_nodes + 1)
    ]


def dense_tree_mask(parents: list[int]) -> torch.Tensor:
    size = len(parents)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for node in range(size):
        ancestor = node
        while ancestor >= 0:
            mask[node, ancestor] = True
            ancestor = parents[ancestor]
    return mask


def paged(
    keys: list[torch.Tensor], values: list[torch.Tensor], page: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block-outermost cache holding every request's tokens in shuffled pages, and its table."""
    num_kv_heads, head_size = keys[0].shape[1:]
    counts = [-(-len(key) // page) for key in keys]
    order = torch.randperm(sum(counts) + 1, generator=generator)
    cache = torch.full((len(order), page, num_kv_heads, 2 * head_size), float("nan"))
    table = torch.zeros(len(keys), max(*counts, 1), dtype=torch.int32)
    used = 0
    for req, (key, value) in enumerate(zip(keys, values, strict=True)):
        blocks = order[used : used + counts[req]]
        used += counts[req]
        table[req, : counts[req]] = blocks
        tokens = torch.cat([key, value], dim=-1)
        for i in range(len(tokens)):
            cache[blocks[i // page], i % page] = tokens[i]
    return cache.transpose(1, 2), table


def check_hybrid(
    device: torch.device,
    heads: tuple[int, int],
    head_size: int,
    page: int,
    prefix_lens: list[int],
    trees: list[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    keys = [rand(n, num_kv_heads, head_size) for n in prefix_lens]
    values = [rand(n, num_kv_heads, head_size) for n in prefix_lens]
    cache, table = paged(keys, values, page, generator)
    parents = [random_parents(generator, n) for n in trees]
    max_nodes = max(trees) + 1
    words = mask_words(max_nodes - 1)
    ancestors = torch.zeros(len(trees), max_nodes, words, dtype=torch.int64)
    for req, row in enumerate(parents):
        ancestors[req, : len(row)] = ancestor_masks(torch.tensor([row]), len(row), words)[0]
    starts = torch.tensor([0, *torch.tensor([n + 1 for n in trees]).cumsum(0).tolist()])
    total = int(starts[-1])
    query, key, value = (
        rand(total, num_heads, head_size),
        rand(total, num_kv_heads, head_size),
        rand(total, num_kv_heads, head_size),
    )
    scale = head_size**-0.5
    out = torch.full_like(query, float("nan"))
    starts, lens = starts.int(), torch.tensor(prefix_lens, dtype=torch.int32)
    lse = torch_prefix_attention(query, cache, table, lens, starts, scale, out)
    on_device = [x.to(device) for x in (out, lse, query, key, value, ancestors, starts, lens)]
    tree_attention(*on_device, scale=scale)
    got = on_device[0].cpu()

    for req in range(len(trees)):
        rows = slice(int(starts[req]), int(starts[req + 1]))
        mask = torch.cat(
            [
                torch.ones(trees[req] + 1, prefix_lens[req], dtype=torch.bool),
                dense_tree_mask(parents[req]),
            ],
            dim=1,
        )
        expected = masked_attention(
            query[rows],
            torch.cat([keys[req], key[rows]]),
            torch.cat([values[req], value[rows]]),
            mask,
            scale,
        )
        tolerance = TOLERANCE if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[rows].float(), expected, atol=tolerance, rtol=tolerance)


@given(
    heads=HEADS,
    head_size=HEAD_SIZE,
    page=st.sampled_from([16, 32]),
    reqs=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 40)), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_hybrid_attention(device, heads, head_size, page, reqs, seed) -> None:
    check_hybrid(device, heads, head_size, page, [n for n, _ in reqs], [m for _, m in reqs], seed)


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("prefix_len", [0, 1, 31, 5000])
def test_hybrid_attention_of_the_papers_tree(device, page: int, prefix_len: int) -> None:
    check_hybrid(device, (8, 2), 64, page, [prefix_len], [68], seed=prefix_len + page)


@pytest.mark.parametrize(
    ("dtype", "head_size"),
    [(torch.bfloat16, 64), (torch.float16, 64), (torch.bfloat16, 80), (torch.bfloat16, 256)],
)
def test_hybrid_attention_in_half_precision(device, dtype: torch.dtype, head_size: int) -> None:
    """Interpreted too: a CPU serves bf16 models in bf16 unless told otherwise."""
    check_hybrid(device, (8, 2), head_size, 16, [0, 100, 700], [31, 5, 68], seed=1, dtype=dtype)


def test_hybrid_attention_of_the_largest_tree(device) -> None:
    trees = [MAX_VERIFIED_NODES]
    check_hybrid(device, (3, 1), 64, 16, [40], trees, seed=3, dtype=torch.bfloat16)


@pytest.mark.full
@given(
    heads=HEADS,
    head_size=HEAD_SIZE,
    page=st.sampled_from([16, 32]),
    reqs=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 127)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_hybrid_attention_full(device, heads, head_size, page, reqs, seed) -> None:
    check_hybrid(device, heads, head_size, page, [n for n, _ in reqs], [m for _, m in reqs], seed)


@given(
    heads=HEADS,
    head_size=HEAD_SIZE,
    context_lens=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    slots_and_blocks=st.sampled_from([(16, 4), (64, 1), (48, 2), (80, 1)]),
    levels=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_ring_attention(
    device, heads, head_size, context_lens, slots_and_blocks, levels, seed
) -> None:
    check_ring(device, heads, head_size, context_lens, slots_and_blocks, levels, seed)


@pytest.mark.parametrize("head_size", [64, 80, 128, 192, 256])
@pytest.mark.parametrize("num_reqs", [2, 40] if torch.cuda.is_available() else [2])
def test_ring_attention_in_half_precision(device, num_reqs: int, head_size: int) -> None:
    """As GPUs are served: few requests, whose rings are split there, and many rows a program."""
    lens = [1 + 37 * req % 200 for req in range(num_reqs)]
    check_ring(device, (16, 4), head_size, lens, (48, 2), [4, 16], seed=1, dtype=torch.bfloat16)


def check_ring(
    device: torch.device,
    heads: tuple[int, int],
    head_size: int,
    context_lens: list[int],
    slots_and_blocks: tuple[int, int],
    levels: list[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Window 64: rings of 64 slots, of more, in one block and in several."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    slots, blocks = slots_and_blocks
    capacity, window, num_reqs = slots * blocks, 64, len(context_lens)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    ring = rand(num_reqs * blocks, slots, num_kv_heads, 2 * head_size).transpose(1, 2)
    table = torch.randperm(num_reqs * blocks, generator=generator).view(num_reqs, blocks).int()
    history = [rand(n, num_kv_heads, 2 * head_size) for n in context_lens]
    for req, tokens in enumerate(history):
        for position, token in enumerate(tokens):
            slot = position % capacity
            ring[table[req, slot // slots], :, slot % slots] = token

    num_nodes = 1 + sum(levels)
    key, value = (rand(num_reqs, num_nodes, num_kv_heads, head_size) for _ in range(2))
    width, depth = levels[-1], len(levels)
    first = num_nodes - width
    parents = [random_parents(generator, num_nodes - 1) for _ in range(num_reqs)]
    ancestors = ancestor_masks(torch.tensor(parents), num_nodes, mask_words(num_nodes - 1))
    query = rand(num_reqs, width, num_heads, head_size)
    scale = head_size**-0.5
    lens = torch.tensor(context_lens, dtype=torch.int32)
    tensors = [x.to(device) for x in (query, ring, table, key, value, ancestors, lens)]
    got = ring_attention(*tensors, first, depth, window, scale).cpu()

    for req, context_len in enumerate(context_lens):
        seen = torch.arange(context_len) >= context_len + depth - window
        mask = torch.cat([seen.expand(width, -1), dense_tree_mask(parents[req])[first:]], dim=1)
        past_key, past_value = history[req].chunk(2, dim=-1)
        expected = masked_attention(
            query[req],
            torch.cat([past_key, key[req]]),
            torch.cat([past_value, value[req]]),
            mask,
            scale,
        )
        tolerance = TOLERANCE if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[req].float(), expected, atol=tolerance, rtol=tolerance)
