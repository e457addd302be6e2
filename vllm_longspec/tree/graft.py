"""Letting a copy into a grown tree: the plain version of `draft/graft.py`'s kernel."""

from collections.abc import Sequence
from math import inf, isnan


def graft(
    tokens: list[int],  # [num_drafted + depth] of the drafted nodes, the root first; written
    scores: list[float],  # likewise, log-probability of each node's path; written
    parents: list[int],  # likewise, node numbers; written
    num_drafted: int,  # nodes of the grown tree, the root included
    copied: Sequence[int],  # [depth] tokens after the root; -1: none from there on
    copied_scores: Sequence[float],  # [depth] cumulative log-probabilities
) -> int:
    """The last `depth` nodes become the copy's own: node i has depth i + 1. While the copy goes
    along drafted nodes these are shared, and its place stays empty: token -1, score -inf.

    Given its parent, a copied token is as probable as the copy says, a shared one at least so: so a
    parent is never less probable than its child. Returns the number of the copy's last node.
    """
    current, score, above = 0, 0.0, 0.0
    for i, (token, copied_score) in enumerate(zip(copied, copied_scores, strict=True)):
        own = num_drafted + i
        tokens[own], scores[own], parents[own] = -1, -inf, 0
        if token < 0:
            continue
        score += min(copied_score - above, 0.0)
        above = copied_score
        children = (
            node
            for node in range(1, num_drafted)
            if parents[node] == current and tokens[node] == token
        )
        child = next(children, 0)
        if child > 0:
            drafted = scores[child]
            score = max(score, -inf if isnan(drafted) else drafted)
            scores[child] = score
            current = child
        else:
            tokens[own], scores[own], parents[own] = token, score, current
            current = own
    return current
