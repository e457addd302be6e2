"""Letting a copy into a grown tree: the plain version of `draft/graft.py`'s kernel."""

from collections.abc import Sequence
from math import exp, inf, isnan, log

# Of copies whose next token is none of those drafted there: how often they are right over what the
# two say on their own, the copy's probability times what the draft leaves to other tokens. Where
# nano was replayed after 2,000 tokens, of code at T=0 26 of 106 such tokens were right, the product
# says 24; at T=0.8 14 of 258 for 42; of books at T=1 5 of 91 for 25.
UNDRAFTED = 0.5
LEAST_LEFT = 1e-3  # what the draft leaves at least


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

    Given its parent, a copied token is as probable as the copy says, a shared one at least so, one
    beside other drafted tokens less (`UNDRAFTED`). A parent is never less probable than its child.
    Returns the number of the copy's last node.
    """
    current, score, above = 0, 0.0, 0.0
    drafted = 0.0  # score of the current node before
    for i, (token, copied_score) in enumerate(zip(copied, copied_scores, strict=True)):
        own = num_drafted + i
        tokens[own], scores[own], parents[own] = -1, -inf, 0
        if token < 0:
            continue
        score += min(copied_score - above, 0.0)
        above = copied_score
        children = [node for node in range(1, num_drafted) if parents[node] == current]
        child = next((node for node in children if tokens[node] == token), 0)
        if child > 0:
            drafted = -inf if isnan(scores[child]) else scores[child]
            score = max(score, drafted)
            scores[child] = score
            current = child
        else:
            if children:
                left = 1.0
                if drafted > -inf:
                    left -= sum(exp(scores[node] - drafted) for node in children)
                left = LEAST_LEFT if isnan(left) else max(left, LEAST_LEFT)
                score += log(UNDRAFTED * left)
            tokens[own], scores[own], parents[own] = token, score, current
            current = own
    return current
