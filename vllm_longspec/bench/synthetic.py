"""Acceptance as a text would have it, where dummy weights agree on nothing. For benchmarks only.

A draft's guesses are given the log-probabilities that a text's guesses have, so that its trees have
the form that they have on such text; and at each node one rank of guess is drawn to be right, with
those same probabilities. What is accepted then follows from the nodes that are really there:
whatever plan they are of, on average `tree/budget.py`'s `accepted_tokens`.
"""

import torch

from vllm_longspec.config import MAX_LEVEL_NODES
from vllm_longspec.tree.budget import HARD, MAX_GUESSES, TEXTS, Text

NO_TEXT = "none"  # nothing is ever accepted, as with a draft of random weights
NAMED_TEXTS: dict[str, Text | None] = dict(zip(("t1", "t0.8", "t0"), TEXTS, strict=True))
NAMED_TEXTS |= {NO_TEXT: None}
UNLIKELY = -20.0  # the log-probability of guesses beyond those that a text knows


class SyntheticText:
    """On the device, where CUDA graphs read it: a text may be exchanged at any time."""

    @torch.inference_mode(mode=False)  # in which these could not be written outside of it
    def __init__(self, device: torch.device, name: str = NO_TEXT, seed: int = 0) -> None:
        self.logprobs = torch.empty(MAX_LEVEL_NODES, dtype=torch.float32, device=device)
        self.cumulative = torch.empty(MAX_GUESSES, dtype=torch.float32, device=device)
        self.generator = torch.Generator(device)
        self.choose(name, seed)

    def choose(self, name: str, seed: int) -> None:
        text = NAMED_TEXTS[name]
        # Ranks beyond a text's last: falling, for a beam that has room for them.
        logprobs = UNLIKELY - torch.arange(MAX_LEVEL_NODES, dtype=torch.float32)
        logprobs[:MAX_GUESSES] = torch.tensor((text or HARD).guesses()).log()
        self.logprobs.copy_(logprobs)
        guesses = torch.tensor(text.guesses() if text else [0.0] * MAX_GUESSES)
        self.cumulative.copy_(guesses.cumsum(0))
        self.generator.manual_seed(seed)

    def draw_ranks(self, num_reqs: int, num_nodes: int) -> torch.Tensor:
        """[num_reqs, num_nodes] int64: which guess after each node is right, from 0; MAX_GUESSES:
        none."""
        drawn = torch.rand(
            num_reqs, num_nodes, generator=self.generator, device=self.cumulative.device
        )
        return torch.searchsorted(self.cumulative, drawn, right=True)


def agree(
    target_tokens: torch.Tensor,  # [num_logits] int64 the target's token after each node
    node_tokens: torch.Tensor,  # [num_logits] each node's own token; -1: never accepted
    cu_num_logits: torch.Tensor,  # [num_reqs + 1] int32
    parents: torch.Tensor,  # [num_reqs, at least max_nodes] of each node; -1: the root, unused
    ranks: torch.Tensor,  # [num_reqs, max_nodes] int64 the child of each node that is right
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and node tokens of which a walk accepts the children that `ranks` names, counted among
    the children of one parent, as far as they are there, and no other."""
    num_logits, max_nodes = len(target_tokens), ranks.shape[1]
    first = cu_num_logits[:-1, None].long()
    node = torch.arange(max_nodes, device=ranks.device)
    exists = node < cu_num_logits[1:, None] - first
    row = torch.where(exists, first + node, num_logits)  # what does not exist shares one row more
    tokens = torch.nn.functional.pad(node_tokens, (0, 1), value=-1)[row]
    parent = parents[:, :max_nodes].long()
    is_child = (tokens >= 0) & (node > 0) & (parent >= 0)
    siblings = (parent.unsqueeze(1) == parent.unsqueeze(2)) & is_child.unsqueeze(1)
    rank = siblings.tril(-1).sum(dim=-1)
    parent = parent.clamp(min=0)
    right = is_child & (rank == ranks.gather(1, parent))
    chosen = torch.where(right, tokens, -1)
    forced = torch.full_like(chosen, -1).scatter_reduce(1, parent, chosen, "amax")
    padded = torch.nn.functional.pad(target_tokens, (0, 1))
    forced = torch.where(forced >= 0, forced, padded[row])
    targets = padded.scatter(0, row.flatten(), forced.flatten().to(padded.dtype))[:-1]
    nodes = torch.nn.functional.pad(node_tokens, (0, 1))
    kept = torch.where(right | (node == 0), tokens, -1).to(nodes.dtype)
    return targets, nodes.scatter(0, row.flatten(), kept.flatten())[:-1]
