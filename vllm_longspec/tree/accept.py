"""The acceptance walk of a verified tree: the plain version of `verify/sampler.py`'s kernel."""

from collections.abc import Sequence


def accept(
    tokens: Sequence[int],  # [1 + k] of the root and the verified nodes; -1: never accepted
    parents: Sequence[int],  # [1 + k]
    target_tokens: Sequence[int],  # [1 + k] the target's own next token after each node
) -> tuple[list[int], list[int]]:
    """Go from the root to the child that carries the target's token while there is one.

    Returns (emitted tokens, accepted nodes): the accepted nodes' tokens and the target's token
    after the last of them, the bonus token. The tokens are exactly those that decoding the target
    token by token yields, for any tree: the tree decides only how many of them come at once.
    """
    node = 0
    emitted: list[int] = []
    path: list[int] = []
    while True:
        emitted.append(target_tokens[node])
        children = (
            child
            for child in range(1, len(tokens))
            if parents[child] == node and tokens[child] == target_tokens[node] >= 0
        )
        node = next(children, 0)
        if node == 0:
            return emitted, path
        path.append(node)
