"""Growing the tree by one level: a beam over paths (LongSpec, "drafting a tree")."""

import torch


def expand_level(
    scores: torch.Tensor,  # [num_trees, width] log-probability of each node's path
    logprobs: torch.Tensor,  # [num_trees, width, k] of each node's k most probable next tokens
    tokens: torch.Tensor,  # [num_trees, width, k] int64, those tokens
    next_width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `next_width` most probable (node, token) pairs, most probable first.

    `k` has to be at least min(next_width, vocabulary): no node gives more of the next level.

    Returns (tokens, scores, parents), each [num_trees, next_width]; a parent is its index within
    the level that was expanded.
    """
    k = tokens.shape[2]
    paths = (scores.unsqueeze(-1) + logprobs).flatten(1)
    next_scores, chosen = paths.topk(next_width, dim=1)
    return tokens.flatten(1).gather(1, chosen), next_scores, chosen // k
