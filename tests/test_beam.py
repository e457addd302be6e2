"""The proposal's kernels against the plain versions in `tree/`."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_longspec.config import (
    MAX_LEVEL_NODES,
    MAX_LEVELS,
    MAX_TREE_NODES,
    MAX_VERIFIED_NODES,
)
from vllm_longspec.draft.beam import (
    Nodes,
    TreePlan,
    torch_expand,
    torch_top_tokens,
    triton_expand,
    triton_top_tokens,
)
from vllm_longspec.draft.choose import choose_nodes
from vllm_longspec.draft.graft import graft, triton_graft
from vllm_longspec.draft.inputs import (
    CHAIN,
    OFF,
    TREE,
    ProposalInputs,
    place_level,
    read_inputs,
)
from vllm_longspec.tree.graft import UNDRAFTED
from vllm_longspec.tree.graft import graft as graft_one
from vllm_longspec.tree.lookup import COPY_DEPTH
from vllm_longspec.tree.prune import best_path, keep, prune
from vllm_longspec.tree.shape import ancestor_masks
from vllm_longspec.verify.tree_state import TreeState

SEEDS = st.integers(0, 2**31)
MAX_REQS = 5


def noise(
    kind: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator) * 5
    if kind == "ties":
        values = values.round().clamp(-1, 1) * torch.randn(shape, generator=generator).sign()
    if kind == "infinite":
        values[torch.rand(shape, generator=generator) < 0.7] = -math.inf
    if kind == "nan":
        values[torch.rand(shape, generator=generator) < 0.5] = math.nan
    return values.to(dtype)


@example(
    num_rows=2, vocab_size=20_000, k=MAX_LEVEL_NODES, kind="plain", dtype=torch.bfloat16,
    padding=0, named=True, seed=0,
)  # fmt: skip
@given(
    num_rows=st.integers(1, 3),
    vocab_size=st.sampled_from([1, 16, 127, 128, 1000, 2049, 5003]),
    k=st.integers(1, 64),
    kind=st.sampled_from(["plain", "ties", "infinite", "nan"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    padding=st.sampled_from([0, 5]),
    named=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=40)
def test_top_tokens(device, num_rows, vocab_size, k, kind, dtype, padding, named, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(k, vocab_size)
    padded = noise(kind, (num_rows, vocab_size + padding), generator, dtype)
    padded[:, vocab_size:] = 1000  # beyond the vocabulary
    logits = padded[:, :vocab_size]
    on_device = padded.to(device)[:, :vocab_size]
    ids = torch.randperm(2 * vocab_size, generator=generator)[:vocab_size] if named else None
    columns = torch.arange(vocab_size) if ids is None else ids
    logprobs, tokens = (
        out.cpu()
        for out in triton_top_tokens(on_device, k, None if ids is None else ids.to(device))
    )

    clean = torch.where(logits.isnan(), -math.inf, logits.double())
    # The most probable first, and of equals the left one: nothing is left open.
    order = clean.sort(dim=-1, descending=True, stable=True)
    top = order.indices[:, :k]
    assert torch.equal(tokens, columns[top])
    expected = (clean - clean.logsumexp(dim=-1, keepdim=True)).gather(1, top)
    expected = torch.where(expected.isnan(), -math.inf, expected)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)

    by_torch, torch_tokens = torch_top_tokens(logits, k, ids)
    torch.testing.assert_close(by_torch.double(), expected, atol=1e-5, rtol=1e-5)
    column_of = torch.zeros(2 * vocab_size, dtype=torch.int64)
    column_of[columns] = torch.arange(vocab_size)
    assert torch.equal(clean.gather(1, column_of[torch_tokens]), order.values[:, :k])


@pytest.mark.parametrize("fill", [math.nan, -math.inf, math.inf])
def test_top_tokens_of_rows_without_a_distribution(device, fill: float) -> None:
    logits = torch.full((2, 300), fill, device=device)
    logits[1, 7] = 1.0
    logprobs, tokens = triton_top_tokens(logits, 5)
    by_torch, _ = torch_top_tokens(logits, 5)
    assert torch.equal(logprobs, by_torch)
    assert not logprobs.isnan().any()
    first = [0, 1, 2, 3, 4] if fill == math.inf else [7, 0, 1, 2, 3]
    assert tokens.tolist() == [[0, 1, 2, 3, 4], first]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_top_tokens_of_a_large_vocabulary(device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = noise("plain", (1, 151_936), generator, dtype)
    logprobs, tokens = (out.cpu() for out in triton_top_tokens(logits.to(device), 16))
    top = logits.topk(16)
    assert torch.equal(logits.gather(1, tokens), top.values)
    expected = logits.double().log_softmax(dim=-1).gather(1, tokens)
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=1e-5)


def grow(
    expand,
    plan: TreePlan,
    num_reqs: int,
    vocab_size: int,
    kind: str,
    generator: torch.Generator,
    device: torch.device,
) -> Nodes:
    """Trees from a draft of random logits."""
    nodes = Nodes.allocate(num_reqs, plan)
    width = 1
    for first, next_width in zip((0, *plan.starts), plan.shape, strict=False):
        logits = noise(kind, (num_reqs * width, vocab_size), generator, torch.float32)
        order = torch_top_tokens(logits, min(next_width, vocab_size))
        logprobs, tokens = (out.to(device) for out in order)
        level = expand(nodes, logprobs, tokens, first, next_width)
        columns = slice(first + width, first + width + next_width)
        assert torch.equal(level, nodes.tokens[:, columns])
        width = next_width
    return nodes


def copies_of(
    nodes: Nodes, plan: TreePlan, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies (tokens, scores) that go along drafted nodes for a while, some of them none."""
    num_reqs, device = len(nodes.tokens), nodes.tokens.device
    tokens = torch.randint(0, 5, (num_reqs, plan.copies), generator=generator)
    for req in range(num_reqs):
        node, path = plan.leaf, []
        while node > 0:
            path.append(int(nodes.tokens[req, node]))
            node = int(nodes.parents[req, node])
        shared = int(torch.randint(0, min(len(path), plan.copies) + 1, (), generator=generator))
        tokens[req, :shared] = torch.tensor(path[::-1][:shared])
        end = int(torch.randint(-3, plan.copies + 3, (), generator=generator))
        tokens[req, max(end, 0) :] = -1
    scores = (-3 * torch.rand(num_reqs, plan.copies, generator=generator)).cumsum(1)
    scores = torch.where(tokens >= 0, scores, -math.inf)
    return tokens.to(device), scores.to(device)


SHAPES = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 12).map(lambda depth: [1] * depth),
    st.sampled_from([[4, 16, 16, 16, 16], [8, 70, 5]]),
)
LARGEST = ([MAX_LEVEL_NODES] * 7 + [MAX_TREE_NODES - 7 * MAX_LEVEL_NODES], MAX_VERIFIED_NODES)


@example(num_reqs=1, shape=LARGEST[0], vocab_size=MAX_LEVEL_NODES, seed=0)
@example(num_reqs=1, shape=[1] * MAX_LEVELS, vocab_size=9, seed=0)
@given(num_reqs=st.integers(1, 3), shape=SHAPES, vocab_size=st.integers(9, 80), seed=SEEDS)
@settings(max_examples=20)
def test_expand(device, num_reqs: int, shape: list[int], vocab_size: int, seed: int) -> None:
    plan = TreePlan.build(shape, 1, device)
    if shape[0] > vocab_size:
        vocab_size = shape[0]
    by_triton, by_torch = (
        grow(
            expand, plan, num_reqs, vocab_size, "plain", torch.Generator().manual_seed(seed), device
        )
        for expand in (triton_expand, torch_expand)
    )
    assert torch.equal(by_triton.tokens[:, 1:], by_torch.tokens[:, 1:])
    assert torch.equal(by_triton.scores, by_torch.scores)
    assert torch.equal(by_triton.parents, by_torch.parents)
    assert torch.equal(by_triton.ancestors, by_torch.ancestors)
    parents = by_triton.parents.clone()
    parents[:, 0] = -1
    masks = ancestor_masks(parents, plan.depth, by_triton.ancestors.shape[2] + 4)
    num_words, num_expanded = by_triton.ancestors.shape[2], plan.starts[-2]
    assert torch.equal(by_triton.ancestors, masks[:, :num_expanded, :num_words])


@pytest.mark.parametrize("kind", ["ties", "infinite", "nan"])
def test_expand_takes_the_first_of_equals(device, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shape, num_reqs, k = [5, 8], 2, 8
    nodes = Nodes.allocate(num_reqs, TreePlan.build(shape, 1, device))
    for first, width, next_width in ((0, 1, 5), (1, 5, 8)):
        logprobs = noise(kind, (num_reqs * width, k), generator, torch.float32)
        tokens = torch.randint(0, 100, (num_reqs * width, k), generator=generator)
        scores = nodes.scores[:, first : first + width, None].cpu()
        triton_expand(nodes, logprobs.to(device), tokens.to(device), first, next_width)
        paths = (scores + logprobs.view(num_reqs, width, k)).flatten(1)
        paths = torch.where(paths.isnan(), -math.inf, paths)
        best, chosen = paths.sort(dim=1, descending=True, stable=True)
        level = slice(first + width, first + width + next_width)
        chosen = chosen[:, :next_width]
        assert torch.equal(nodes.scores[:, level].cpu(), best[:, :next_width])
        assert torch.equal(nodes.parents[:, level].cpu(), first + chosen // k)
        expected = tokens.view(num_reqs, -1).gather(1, chosen)
        assert torch.equal(nodes.tokens[:, level].cpu(), expected)


@given(
    num_reqs=st.integers(1, 3),
    shape=st.one_of(SHAPES, st.just([])),
    kind=st.sampled_from(["plain", "infinite"]),
    broken=st.booleans(),
    seed=SEEDS,
)
@settings(max_examples=40)
def test_graft(device, num_reqs: int, shape: list[int], kind: str, broken: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = TreePlan.build(shape, 1, device, COPY_DEPTH)
    vocab_size = max([20, *shape])
    nodes = grow(torch_expand, plan, num_reqs, vocab_size, kind, generator, device)
    if broken and shape:
        nodes.scores[0, plan.leaf] = math.nan
    tokens, scores = copies_of(nodes, plan, generator)
    for buffer, fill in ((nodes.tokens, 77), (nodes.scores, 0.5), (nodes.parents, 1)):
        buffer[:, plan.num_drafted :] = fill  # whatever stood there
    rows = [[x[req].tolist() for x in (nodes.tokens, nodes.scores, nodes.parents)]
            for req in range(num_reqs)]  # fmt: skip
    triton_graft(nodes, plan, tokens, scores)
    for req, (row_tokens, row_scores, row_parents) in enumerate(rows):
        row_tokens[0] = -2  # the root's own is not there
        leaf = graft_one(
            row_tokens, row_scores, row_parents, plan.num_drafted, tokens[req].tolist(),
            scores[req].tolist(),
        )  # fmt: skip
        assert int(nodes.copy_leaves[req]) == leaf
        assert nodes.tokens[req, 1:].tolist() == row_tokens[1:]
        assert nodes.parents[req].tolist() == row_parents
        assert nodes.scores[req].tolist() == pytest.approx(row_scores, abs=1e-3, nan_ok=True)
        for node in range(1, plan.num_nodes):
            # What choosing nodes rests on.
            parent = int(nodes.parents[req, node])
            assert parent < node and not nodes.scores[req, node] > nodes.scores[req, parent]
        # The copy can be walked to its end.
        depth, node = 0, leaf
        while node > 0:
            depth, node = depth + 1, int(nodes.parents[req, node])
        assert depth == int((tokens[req] >= 0).sum()) == int(plan.depths[leaf])


@given(
    num_reqs=st.integers(1, 3),
    shape=st.one_of(SHAPES, st.just([])),
    kind=st.sampled_from(["plain", "ties", "infinite"]),
    data=st.data(),
    seed=SEEDS,
)
@settings(max_examples=40)
def test_choose_nodes(device, num_reqs, shape, kind, data, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    copies = data.draw(st.sampled_from([0, COPY_DEPTH])) if shape else COPY_DEPTH
    m = data.draw(st.integers(1, sum(shape) + copies))
    columns = m + data.draw(st.sampled_from([0, 1, 70]))
    plan = TreePlan.build(shape, m, device, copies)
    nodes = grow(torch_expand, plan, num_reqs, max([20, *shape]), kind, generator, device)
    if copies:
        graft(nodes, plan, *copies_of(nodes, plan, generator))  # writes `copy_leaves`, too
    if kind != "plain" and shape:
        # What no draft gives but a broken one; the last level, so that parents stay ahead.
        nodes.scores[0, plan.num_drafted - 1] = math.nan
    modes = torch.randint(0, 3, (num_reqs,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(MAX_REQS, generator=generator)[:num_reqs]
    slots[data.draw(st.integers(0, num_reqs - 1))] = -1
    state = TreeState.allocate(MAX_REQS, columns, plan.max_depth, device)
    for buffer in (state.parents, state.depths, state.copies, state.ancestors):
        buffer.fill_(77)
    draft_tokens = torch.full((MAX_REQS, columns), 77, device=device)
    choose_nodes(nodes, plan, modes.to(device), slots.to(device), state, draft_tokens)

    num_words = state.ancestors.shape[2]
    depths, leaves = plan.depths.cpu(), nodes.copy_leaves.cpu()
    tokens, scores, parents = (x.cpu()[:, 1:] for x in (nodes.tokens, nodes.scores, nodes.parents))
    pruned = prune(tokens, scores, parents, depths, plan.max_depth, m, num_words)
    path = best_path(
        tokens, scores, parents, depths, plan.leaf, leaves, plan.max_depth, m, num_words
    )
    nothing = torch.zeros_like(tokens, dtype=torch.bool)
    none = keep(nothing, tokens, parents, depths, plan.max_depth, m, num_words)
    unused = columns - m
    for req in range(num_reqs):
        tree = {TREE: pruned, CHAIN: path, OFF: none}[int(modes[req])]
        row = int(slots[req]) if slots[req] >= 0 else MAX_REQS
        assert draft_tokens[req].tolist() == tree.tokens[req].tolist() + [-1] * unused
        all_parents = tree.parents[req].tolist() + [-1] * unused
        assert state.parents[row].tolist() == all_parents
        assert state.depths[row].tolist() == tree.depths[req].tolist() + [0] * unused
        copied = (tree.numbers[req] >= plan.num_drafted).int().tolist()
        assert state.copies[row].tolist() == copied + [0] * unused
        masks = ancestor_masks(torch.tensor([all_parents]), plan.max_depth, num_words)[0]
        assert torch.equal(state.ancestors[row].cpu(), masks)
    written = {int(slot) % (MAX_REQS + 1) for slot in slots}
    for row in set(range(MAX_REQS + 1)) - written:
        assert (state.parents[row] == 77).all() and (state.ancestors[row] == 77).all()
    assert (draft_tokens[num_reqs:] == 77).all()


@pytest.mark.parametrize(
    ("shape", "m"),
    [([200, 300], 129), ([1] * 130, 129), ([1] * MAX_LEVELS, MAX_LEVELS), LARGEST],
    ids=["wide", "long", "deepest", "largest"],
)
def test_choose_nodes_of_a_large_tree(device, shape: list[int], m: int) -> None:
    generator = torch.Generator().manual_seed(2)
    plan = TreePlan.build(shape, m, device)
    nodes = grow(torch_expand, plan, 1, 300, "plain", generator, device)
    state = TreeState.allocate(1, m, plan.depth, device)
    draft_tokens = torch.zeros(1, m, dtype=torch.int64, device=device)
    modes, slots = (torch.zeros(1, dtype=d, device=device) for d in (torch.int32, torch.int64))
    choose_nodes(nodes, plan, modes, slots, state, draft_tokens)
    tree = prune(
        nodes.tokens[:, 1:], nodes.scores[:, 1:], nodes.parents[:, 1:], plan.depths, plan.depth,
        m, state.ancestors.shape[2],
    )  # fmt: skip
    assert torch.equal(draft_tokens, tree.tokens)
    assert torch.equal(state.parents[:1], tree.parents.int())
    assert torch.equal(state.depths[:1], tree.depths.int())
    assert torch.equal(state.ancestors[:1], tree.ancestors)


@given(num_reqs=st.integers(0, 3), padding=st.integers(0, 2), depth=st.integers(1, 6), seed=SEEDS)
@settings(max_examples=20)
def test_read_inputs(device, num_reqs: int, padding: int, depth: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int, dtype=torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype).to(device)

    slots = torch.randperm(MAX_REQS, generator=generator)[:num_reqs].to(device)
    num_sampled = integers(0, depth + 2, num_reqs)
    last_sampled = integers(0, 1000, MAX_REQS, 1, dtype=torch.int64)
    computed = integers(1, 20, MAX_REQS)
    all_tokens = integers(0, 1000, MAX_REQS, 20)
    modes = integers(0, 3, MAX_REQS)
    inputs = ProposalInputs.allocate(MAX_REQS, depth, device)
    for buffer in vars(inputs).values():
        buffer.fill_(1)
    num_rows = num_reqs + padding
    if num_rows == 0:
        return
    read_inputs(inputs, slots, num_sampled, last_sampled, computed, all_tokens, modes, num_rows)
    for row, slot in enumerate(slots.tolist()):
        context_len = int(computed[slot])
        assert int(inputs.slots[row]) == slot
        assert int(inputs.root_tokens[row]) == int(last_sampled[slot])
        assert int(inputs.context_lens[row]) == context_len
        assert int(inputs.modes[row]) == int(modes[slot])
        for back in range(depth + 1):
            position = context_len - 1 - back
            if back < num_sampled[row] and position >= 0:
                assert int(inputs.new_positions[row, back]) == position
                assert int(inputs.new_tokens[row, back]) == int(all_tokens[slot, position])
            else:
                assert int(inputs.new_positions[row, back]) == -1
    for row in range(num_reqs, num_rows):
        assert (int(inputs.slots[row]), int(inputs.context_lens[row])) == (-1, 0)
        assert (inputs.new_positions[row] == -1).all()
    for row in range(num_rows, MAX_REQS):
        assert (inputs.slots[row], inputs.context_lens[row]) == (1, 1)


@pytest.mark.parametrize("num_reqs, width", [(1, 1), (3, 16), (40, 16), (300, 1)])
def test_place_level(device, num_reqs: int, width: int) -> None:
    context_lens = torch.arange(num_reqs, dtype=torch.int32, device=device) * 3
    positions, query_starts = place_level(context_lens, width, 4, 100)
    expected = (context_lens.long() + 4).clamp(max=100).repeat_interleave(width)
    assert torch.equal(positions, expected)
    assert query_starts.tolist() == [row * width for row in range(num_reqs + 1)]


def test_where_a_copy_leaves_the_draft(device) -> None:
    """Beside drafted tokens it is improbable, below a node that has none it is not."""
    plan = TreePlan.build([2, 1], 3, device, COPY_DEPTH)
    scores = torch.full((1, COPY_DEPTH), -math.inf, device=device)
    scores[0, :3] = torch.tensor([0.8, 0.64, 0.512]).log()
    expected = {  # by the copy's tokens: scores of drafted and copied nodes
        (5, 7, 9): ([0.8, 0.3, 0.64], [0, 0, 0.512]),
        (5, 9, 9): ([0.8, 0.3, 0.3], [0, 0.64 * UNDRAFTED * 0.4, 0.512 * UNDRAFTED * 0.4]),
        (6, 9, 9): ([0.5, 0.8, 0.3], [0, 0.64, 0.512]),
        (9, 9, 9): ([0.5, 0.3, 0.3], [x * UNDRAFTED * 0.2 for x in (0.8, 0.64, 0.512)]),
    }
    for copied, (drafted, appended) in expected.items():
        tokens = torch.full((1, COPY_DEPTH), -1, device=device)
        tokens[0, :3] = torch.tensor(copied)
        nodes = Nodes.allocate(1, plan)
        nodes.tokens[0, 1:4] = torch.tensor([5, 6, 7])
        nodes.scores[0, 1:4] = torch.tensor([0.5, 0.3, 0.3]).log()
        nodes.parents[0, 1:4] = torch.tensor([0, 0, 1])
        triton_graft(nodes, plan, tokens, scores)
        got = nodes.scores[0, 1:7].exp().tolist()
        assert got == pytest.approx([*drafted, *appended], abs=1e-6)
