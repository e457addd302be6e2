"""What follows from a tree's shape alone: depths, level boundaries, ancestor masks."""

from collections.abc import Sequence
from itertools import accumulate

import torch

WORD_BITS = 64


def level_starts(tree_shape: Sequence[int]) -> list[int]:
    """First node of each level, the root's included; one past the last node closes the list."""
    return list(accumulate(tree_shape, initial=1))


def node_depths(tree_shape: Sequence[int]) -> torch.Tensor:
    """[1 + num_nodes] int32: 0 for the root, 1 for its children, ..."""
    widths = torch.tensor([1, *tree_shape])
    return torch.repeat_interleave(torch.arange(len(widths), dtype=torch.int32), widths)


def mask_words(num_nodes: int) -> int:
    """int64 words of a bit mask over the root and `num_nodes` nodes."""
    return num_nodes // WORD_BITS + 1


def node_bits(
    nodes: torch.Tensor,  # [...] int64
    num_words: int,
) -> torch.Tensor:  # [..., num_words] int64
    """A mask with the bit of each node set: node j is bit j % 64 of word j // 64."""
    words = torch.arange(num_words, device=nodes.device)
    bit = torch.ones_like(nodes) << (nodes % WORD_BITS)
    return torch.where(words == (nodes // WORD_BITS).unsqueeze(-1), bit.unsqueeze(-1), 0)


def ancestor_masks(
    parents: torch.Tensor,  # [num_trees, 1 + num_nodes] int64, -1 for the root and unused nodes
    depth: int,
    num_words: int,
) -> torch.Tensor:  # [num_trees, 1 + num_nodes, num_words] int64
    """The nodes each node sees in its own tree: itself, its ancestors and the root."""
    parents = parents.clamp(min=0)
    ancestor = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    masks = node_bits(ancestor, num_words)
    for _ in range(depth):
        ancestor = parents.gather(1, ancestor)
        masks = masks | node_bits(ancestor, num_words)
    return masks
