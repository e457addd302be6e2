"""Hybrid tree attention and the draft's ring attention against dense masked attention."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_longspec.config import MAX_VERIFIED_NODES
from vllm_longspec.draft.ring_attention import ring_attention
from vllm_longspec.tree.shape import ancestor_masks, mask_words
from vllm_longspec.verify import window_attention as window_kernel
from vllm_longspec.verify.prefix import torch_prefix_attention
from vllm_longspec.verify.reference import masked_attention, path_mask
from vllm_longspec.verify.tree_attention import tree_attention
from vllm_longspec.verify.window_attention import window_attention

HEADS = st.sampled_from([(4, 4), (3, 1), (8, 2), (8, 1)])  # GQA ratios 1, 3, 4, 8
# Compiled in float32, which no GPU is served in, the larger ones take a minute each.
LARGER = [] if torch.cuda.is_available() else [192, 256]
HEAD_SIZE = st.sampled_from([64, 80, 96, 128, *LARGER])
TOLERANCE = 2e-5


def random_parents(generator: torch.Generator, num_nodes: int) -> list[int]:
    return [-1] + [
        int(torch.randint(0, i, (), generator=generator)) for i in range(1, num_nodes + 1)
    ]


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


@dataclass
class Case:
    """Random trees over random prefixes, [num_tokens, heads, head_size] each, and in pages."""

    keys: list[torch.Tensor]  # of each request's prefix
    values: list[torch.Tensor]
    cache: torch.Tensor
    table: torch.Tensor
    prefix_lens: torch.Tensor
    parents: list[list[int]]  # of each tree
    ancestors: torch.Tensor
    starts: torch.Tensor
    query: torch.Tensor  # of all trees
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None
    scale: float

    def assert_right(self, got: torch.Tensor, window: int | None = None) -> None:
        """Each tree against dense masked attention."""
        for req, parents in enumerate(self.parents):
            rows = slice(int(self.starts[req]), int(self.starts[req + 1]))
            expected = masked_attention(
                self.query[rows],
                torch.cat([self.keys[req], self.key[rows]]),
                torch.cat([self.values[req], self.value[rows]]),
                path_mask(parents, int(self.prefix_lens[req]), window),
                self.scale,
                self.sinks,
            )
            tolerance = TOLERANCE if self.query.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(got[rows].float(), expected, atol=tolerance, rtol=tolerance)


def random_case(
    heads: tuple[int, int],
    head_size: int,
    page: int,
    prefix_lens: list[int],
    trees: list[int],
    seed: int,
    dtype: torch.dtype,
    with_sinks: bool,
) -> Case:
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
    starts = torch.tensor([0, *torch.tensor([n + 1 for n in trees]).cumsum(0).tolist()]).int()
    total = int(starts[-1])
    query, key, value = (rand(total, n, head_size) for n in (num_heads, num_kv_heads, num_kv_heads))
    return Case(
        keys, values, cache, table, torch.tensor(prefix_lens, dtype=torch.int32), parents,
        ancestors, starts, query, key, value, rand(num_heads) if with_sinks else None,
        head_size**-0.5,
    )  # fmt: skip


def check_hybrid(
    device: torch.device,
    heads: tuple[int, int],
    head_size: int,
    page: int,
    prefix_lens: list[int],
    trees: list[int],
    seed: int,
    dtype: torch.dtype = torch.float32,
    with_sinks: bool = False,
) -> None:
    c = random_case(heads, head_size, page, prefix_lens, trees, seed, dtype, with_sinks)
    out = torch.full_like(c.query, float("nan"))
    lse = torch_prefix_attention(c.query, c.cache, c.table, c.prefix_lens, c.starts, c.scale, out)
    tensors = (out, lse, c.query, c.key, c.value, c.ancestors, c.starts, c.prefix_lens)
    on_device = [x.to(device) for x in tensors]
    sinks = None if c.sinks is None else c.sinks.to(device)
    tree_attention(*on_device, scale=c.scale, sinks=sinks)
    c.assert_right(on_device[0].cpu())


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


def check_window(
    device: torch.device,
    heads: tuple[int, int],
    head_size: int,
    page: int,
    window: int,
    prefix_lens: list[int],
    trees: list[int],
    seed: int,
    with_sinks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Blocks that lie before every row's window are another request's by now: they hold NaN."""
    c = random_case(heads, head_size, page, prefix_lens, trees, seed, dtype, with_sinks)
    positions: list[int] = []
    for req, n in enumerate(prefix_lens):
        c.cache[c.table[req, : max(0, n - window + 1) // page].long()] = float("nan")
        depths = [0]
        for parent in c.parents[req][1:]:
            depths.append(depths[parent] + 1)
        positions += [n + depth for depth in depths]
    tensors = (
        torch.full_like(c.query, float("nan")), c.query, c.cache, c.table, c.key, c.value,
        c.ancestors, torch.tensor(positions), c.starts, c.prefix_lens,
    )  # fmt: skip
    on_device = [x.to(device) for x in tensors]
    sinks = None if c.sinks is None else c.sinks.to(device)
    window_attention(*on_device, window, c.scale, sinks)
    c.assert_right(on_device[0].cpu(), window)


WINDOWS = st.one_of(st.integers(1, 12), st.sampled_from([16, 31, 32, 33, 64, 100, 700]))


@given(
    heads=HEADS,
    head_size=HEAD_SIZE,
    page=st.sampled_from([16, 32]),
    window=WINDOWS,
    reqs=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 40)), min_size=1, max_size=3),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_window_attention(device, heads, head_size, page, window, reqs, with_sinks, seed) -> None:
    """Windows from one token, over which trees reach, to more than there is."""
    lens, trees = [n for n, _ in reqs], [m for _, m in reqs]
    check_window(device, heads, head_size, page, window, lens, trees, seed, with_sinks)


@given(
    window=st.sampled_from([1, 2, 16, 17, 40, 200]),
    reqs=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 9)), min_size=1, max_size=2),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_window_attention_in_parts(device, window, reqs, with_sinks, seed) -> None:
    with (
        patch.object(window_kernel, "splits_help", lambda _: True),
        patch.object(window_kernel, "KEYS_PER_SPLIT", 16),
        patch.object(window_kernel, "MOST_SPLITS", 3),
    ):
        lens, trees = [n for n, _ in reqs], [m for _, m in reqs]
        check_window(device, (3, 1), 64, 16, window, lens, trees, seed, with_sinks)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_size"),
    [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256)],
)
def test_window_attention_in_half_precision(device, dtype, head_size, with_sinks) -> None:
    lens, trees = [0, 100, 700], [31, 5, 68]
    check_window(device, (8, 2), head_size, 16, 512, lens, trees, 1, with_sinks, dtype)


@given(
    heads=HEADS,
    reqs=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15)
def test_sinks_count_once(device, heads, reqs, seed) -> None:
    """In a layer with full attention they enter where prefix and tree are merged."""
    lens, trees = [n for n, _ in reqs], [m for _, m in reqs]
    check_hybrid(device, heads, 64, 16, lens, trees, seed, with_sinks=True)


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
        mask = torch.cat([seen.expand(width, -1), path_mask(parents[req], 0)[first:]], dim=1)
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
