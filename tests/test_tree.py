"""The tree's tensor code against loops over Python lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_longspec.tree.accept import accept
from vllm_longspec.tree.expand import expand_level
from vllm_longspec.tree.prune import best_path, prune
from vllm_longspec.tree.shape import ancestor_masks, level_starts, mask_words, node_depths

SHAPES = st.lists(st.integers(1, 16), min_size=1, max_size=6)


def seen(masks: torch.Tensor, node: int) -> set[int]:
    """Nodes set in a mask [num_words]."""
    return {
        64 * word + bit
        for word in range(masks.shape[1])
        for bit in range(64)
        if (int(masks[node, word]) >> bit) & 1
    }


def path_to_root(parents: list[int], node: int) -> set[int]:
    path = {node, 0}
    while node > 0:
        node = max(parents[node], 0)
        path.add(node)
    return path


@st.composite
def grown_trees(draw: st.DrawFn) -> dict:
    """A tree of a random shape with random parents and path log-probabilities."""
    shape = draw(SHAPES)
    starts = level_starts(shape)
    parents, scores = [], []
    for level in range(len(shape)):
        low, high = (0, 0) if level == 0 else (starts[level - 1], starts[level] - 1)
        for _ in range(shape[level]):
            parent = draw(st.integers(low, high))
            above = 0.0 if parent == 0 else scores[parent - 1]
            parents.append(parent)
            scores.append(above + draw(st.sampled_from([0.0, -0.5, -1.0, -2.5])))
    return {
        "shape": shape,
        "parents": parents,
        "scores": scores,
        "tokens": [100 + i for i in range(len(parents))],
    }


@given(SHAPES)
def test_shape(shape: list[int]) -> None:
    starts, depths = level_starts(shape), node_depths(shape).tolist()
    assert starts[-1] == 1 + sum(shape) == len(depths)
    for depth, (start, width) in enumerate(zip(starts[:-1], shape, strict=True), start=1):
        assert depths[start : start + width] == [depth] * width


@given(st.integers(1, 150), st.data())
def test_ancestor_masks(num_nodes: int, data: st.DataObject) -> None:
    parents = [-1] + [data.draw(st.integers(-1, i - 1)) for i in range(1, num_nodes + 1)]
    masks = ancestor_masks(torch.tensor([parents]), num_nodes, mask_words(num_nodes))[0]
    for node in range(num_nodes + 1):
        assert seen(masks, node) == path_to_root(parents, node)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.data())
def test_expand_level(num_trees: int, width: int, k: int, data: st.DataObject) -> None:
    next_width = data.draw(st.integers(1, width * k))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = -torch.rand(num_trees, width, generator=generator)
    logprobs = -torch.rand(num_trees, width, k, generator=generator)
    tokens = torch.randint(0, 1000, (num_trees, width, k), generator=generator)
    got_tokens, got_scores, got_parents = expand_level(scores, logprobs, tokens, next_width)
    for tree in range(num_trees):
        pairs = sorted(
            (
                (float(scores[tree, i] + logprobs[tree, i, j]), i, int(tokens[tree, i, j]))
                for i in range(width)
                for j in range(k)
            ),
            key=lambda pair: -pair[0],
        )[:next_width]
        assert got_scores[tree].tolist() == pytest.approx([pair[0] for pair in pairs])
        for node in range(next_width):
            parent = int(got_parents[tree, node])
            children = tokens[tree, parent] == got_tokens[tree, node]
            assert torch.isclose(
                scores[tree, parent] + logprobs[tree, parent][children], got_scores[tree, node]
            ).any()


@given(grown_trees(), st.data())
@settings(max_examples=200)
def test_prune_keeps_the_most_probable_tree(tree: dict, data: st.DataObject) -> None:
    num_nodes, depth = len(tree["parents"]), len(tree["shape"])
    m = data.draw(st.integers(1, num_nodes))
    pruned = prune(
        torch.tensor([tree["tokens"]]),
        torch.tensor([tree["scores"]]),
        torch.tensor([tree["parents"]]),
        node_depths(tree["shape"]),
        depth,
        m,
        mask_words(m),
    )
    order = sorted(range(1, num_nodes + 1), key=lambda i: (-tree["scores"][i - 1], i))
    kept = sorted(order[:m])
    number = {0: 0} | {node: i for i, node in enumerate(kept, start=1)}
    parents = [-1] + [number[tree["parents"][node - 1]] for node in kept]
    depths = node_depths(tree["shape"]).tolist()
    assert pruned.tokens[0].tolist() == [tree["tokens"][node - 1] for node in kept]
    assert pruned.parents[0].tolist() == parents
    assert pruned.depths[0].tolist() == [0] + [depths[node] for node in kept]
    for node in range(m + 1):
        assert seen(pruned.ancestors[0], node) == path_to_root(parents, node)


def test_prune_ignores_nan_scores() -> None:
    pruned = prune(
        torch.tensor([[7, 8, 9]]),
        torch.tensor([[-1.0, math.nan, -2.0]]),
        torch.tensor([[0, 0, 0]]),
        node_depths([3]),
        1,
        2,
        1,
    )
    assert pruned.tokens.tolist() == [[7, 9]]


@given(grown_trees(), st.data())
def test_best_path(tree: dict, data: st.DataObject) -> None:
    num_nodes, depth = len(tree["parents"]), len(tree["shape"])
    m = data.draw(st.integers(1, num_nodes))
    leaf = level_starts(tree["shape"])[depth - 1]
    chain = best_path(
        torch.tensor([tree["tokens"]]),
        torch.tensor([tree["scores"]]),
        torch.tensor([tree["parents"]]),
        node_depths(tree["shape"]),
        leaf,
        torch.tensor([0]),
        depth,
        m,
        mask_words(m),
    )
    path = []
    while leaf > 0:
        path.append(tree["tokens"][leaf - 1])
        leaf = tree["parents"][leaf - 1]
    used = min(depth, m)
    assert chain.tokens[0].tolist() == path[::-1][:used] + [-1] * (m - used)
    assert chain.parents[0].tolist() == list(range(-1, used)) + [-1] * (m - used)
    assert chain.depths[0].tolist() == list(range(used + 1)) + [0] * (m - used)
    for node in range(m + 1):
        expected = set(range(node + 1)) if node <= used else {0, node}
        assert seen(chain.ancestors[0], node) == expected


@given(grown_trees(), st.integers(0, 2**32))
def test_accept_emits_what_decoding_would(tree: dict, seed: int) -> None:
    """The walk's tokens are a prefix of what the target says node by node."""
    generator = torch.Generator().manual_seed(seed)
    size = len(tree["parents"]) + 1
    tokens = [0, *torch.randint(0, 3, (size - 1,), generator=generator).tolist()]
    target = torch.randint(0, 3, (size,), generator=generator).tolist()
    parents = [-1, *tree["parents"]]
    emitted, path = accept(tokens, parents, target)
    assert len(emitted) == len(path) + 1
    for i, node in enumerate(path):
        assert tokens[node] == emitted[i]
        assert parents[node] == ([0, *path])[i]
    for i, node in enumerate([0, *path]):
        assert emitted[i] == target[node]
    last = ([0, *path])[-1]
    assert not any(parents[c] == last and tokens[c] == target[last] for c in range(1, size))
