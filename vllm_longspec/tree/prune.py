"""Choosing the nodes that the target verifies."""

from dataclasses import dataclass

import torch

from vllm_longspec.tree.shape import ancestor_masks


@dataclass
class Tree:
    """Trees to verify, one a row; `m` nodes each besides the root."""

    tokens: torch.Tensor  # [num_trees, m] int64; -1: unused node
    parents: torch.Tensor  # [num_trees, 1 + m] int64; -1: the root, unused nodes
    depths: torch.Tensor  # [num_trees, 1 + m] int64
    ancestors: torch.Tensor  # [num_trees, 1 + m, num_words] int64 bit masks


def prune(
    tokens: torch.Tensor,  # [num_trees, num_nodes] int64
    scores: torch.Tensor,  # [num_trees, num_nodes] log-probability of each node's path
    parents: torch.Tensor,  # [num_trees, num_nodes] int64, node numbers
    depths: torch.Tensor,  # [1 + num_nodes] of the whole tree, the root first
    max_depth: int,
    m: int,
    num_words: int,
) -> Tree:
    """The `m` most probable nodes. A parent is never less probable than its child, and the earlier
    node wins a tie, so these nodes are a tree; they keep their order."""
    num_trees, num_nodes = tokens.shape
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    node = torch.arange(num_nodes, device=tokens.device)
    better = scores.unsqueeze(1) > scores.unsqueeze(2)
    equal_before = (scores.unsqueeze(1) == scores.unsqueeze(2)) & (node < node.unsqueeze(1))
    kept = (better | equal_before).sum(dim=-1) < m

    number = torch.where(kept, kept.cumsum(dim=1), 0)  # of each node after pruning
    slot = torch.where(kept, number, m + 1)  # pruned nodes all go to a column that is dropped

    def gather_kept(values: torch.Tensor) -> torch.Tensor:
        kept_values = values.new_zeros(num_trees, m + 2).scatter(1, slot, values)
        return kept_values[:, : m + 1]

    with_root = torch.nn.functional.pad(number, (1, 0))
    kept_parents = gather_kept(with_root.gather(1, parents))
    kept_parents[:, 0] = -1
    return Tree(
        tokens=gather_kept(tokens)[:, 1:],
        parents=kept_parents,
        depths=gather_kept(depths[1:].long().expand(num_trees, -1)),
        ancestors=ancestor_masks(kept_parents, max_depth, num_words),
    )


def best_path(
    tokens: torch.Tensor,  # [num_trees, num_nodes] int64
    parents: torch.Tensor,  # [num_trees, num_nodes] int64, node numbers
    leaf: int,  # number of the most probable node of the last level
    depth: int,
    m: int,
    num_words: int,
) -> Tree:
    """The path to the most probable leaf as a chain of at most `m` nodes; the other nodes are
    unused: token -1, no parent, at the root's depth."""
    num_trees = tokens.shape[0]
    node = torch.full((num_trees, 1), leaf, dtype=torch.int64, device=tokens.device)
    path = []
    for _ in range(depth):
        path.append(tokens.gather(1, node - 1))
        node = parents.gather(1, (node - 1).clamp(min=0))
    length = min(depth, m)
    chain = torch.cat(path[::-1], dim=1)[:, :length]

    def padded(values: torch.Tensor, size: int, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, size - values.shape[1]), value=fill)

    order = torch.arange(length + 1, device=tokens.device).expand(num_trees, -1)
    chain_parents = padded(order - 1, m + 1, -1)
    return Tree(
        tokens=padded(chain, m, -1),
        parents=chain_parents,
        depths=padded(order, m + 1, 0),
        ancestors=ancestor_masks(chain_parents, length, num_words),
    )
