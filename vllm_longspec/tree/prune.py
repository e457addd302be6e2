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
    # [num_trees, 1 + m] int64 numbers before pruning; 0: the root, unused nodes
    numbers: torch.Tensor


def prune(
    tokens: torch.Tensor,  # [num_trees, num_nodes] int64; -1: no node
    scores: torch.Tensor,  # [num_trees, num_nodes] log-probability of each node's path
    parents: torch.Tensor,  # [num_trees, num_nodes] int64, node numbers
    depths: torch.Tensor,  # [1 + num_nodes] of the whole tree, the root first
    max_depth: int,
    m: int,
    num_words: int,
) -> Tree:
    """The `m` most probable nodes. A parent is never less probable than its child and precedes it,
    and the earlier node wins a tie, so these nodes are a tree; they keep their order."""
    scores = torch.where(scores.isnan(), float("-inf"), scores)
    node = torch.arange(tokens.shape[1], device=tokens.device)
    better = scores.unsqueeze(1) > scores.unsqueeze(2)
    equal_before = (scores.unsqueeze(1) == scores.unsqueeze(2)) & (node < node.unsqueeze(1))
    kept = (better | equal_before).sum(dim=-1) < m
    return keep(kept & (tokens >= 0), tokens, parents, depths, max_depth, m, num_words)


def best_path(
    tokens: torch.Tensor,  # [num_trees, num_nodes] int64
    scores: torch.Tensor,  # [num_trees, num_nodes]
    parents: torch.Tensor,  # [num_trees, num_nodes] int64, node numbers
    depths: torch.Tensor,  # [1 + num_nodes]
    leaf: int,  # number of the most probable node of the last level; 0: none was drafted
    copy_leaves: torch.Tensor,  # [num_trees] number of the copy's last node; 0: no copy
    max_depth: int,
    m: int,
    num_words: int,
) -> Tree:
    """As a chain of at most `m` nodes the path to the most probable leaf or, where more tokens of
    it are expected to be right, the copy."""
    kept = torch.zeros_like(tokens, dtype=torch.bool)
    for tree in range(len(tokens)):
        paths = []
        for last in (leaf, int(copy_leaves[tree])):
            path, node, total = [], last, torch.zeros((), dtype=torch.float32)
            while node > 0:
                score = scores[tree, node - 1].nan_to_num(nan=float("-inf"), neginf=float("-inf"))
                if depths[node] <= m:
                    path.append(node - 1)
                    total = total + score.exp()
                node = int(parents[tree, node - 1])
            paths.append((path, float(total)))
        drafted, copied = paths
        kept[tree, (copied if copied[1] > drafted[1] else drafted)[0]] = True
    return keep(kept, tokens, parents, depths, max_depth, m, num_words)


def keep(
    kept: torch.Tensor,  # [num_trees, num_nodes] bool: at most `m`, none without its parent
    tokens: torch.Tensor,  # [num_trees, num_nodes] int64
    parents: torch.Tensor,  # [num_trees, num_nodes] int64, node numbers
    depths: torch.Tensor,  # [1 + num_nodes]
    max_depth: int,
    m: int,
    num_words: int,
) -> Tree:
    """These nodes, renumbered in their order; the rest is unused: token -1, no parent, at the
    root's depth."""
    num_trees, num_nodes = tokens.shape
    number = torch.where(kept, kept.cumsum(dim=1), 0)  # of each node after pruning
    slot = torch.where(kept, number, m + 1)  # pruned nodes all go to a column that is dropped

    def gather_kept(values: torch.Tensor, unused: int) -> torch.Tensor:
        kept_values = values.new_full((num_trees, m + 2), unused).scatter(1, slot, values)
        return kept_values[:, : m + 1]

    with_root = torch.nn.functional.pad(number, (1, 0))
    kept_parents = gather_kept(with_root.gather(1, parents), -1)
    node = torch.arange(1, num_nodes + 1, device=tokens.device)
    return Tree(
        tokens=gather_kept(tokens, -1)[:, 1:],
        parents=kept_parents,
        depths=gather_kept(depths[1:].long().expand(num_trees, -1), 0),
        ancestors=ancestor_masks(kept_parents, max_depth, num_words),
        numbers=gather_kept(node.expand(num_trees, -1), 0),
    )
