"""The trees that requests wait to have verified, on the device, one row per request slot."""

from dataclasses import dataclass

import torch

from vllm_longspec.tree.shape import ancestor_masks, mask_words


@dataclass
class TreeState:
    """Persistent buffers. The last row takes the writes of rows that belong to no request.

    The nodes' tokens are not here: vLLM keeps them as the request's draft tokens. A row that nobody
    has written is a plain chain that is never accepted: vLLM's warm-up verifies such rows.
    """

    parents: torch.Tensor  # [max_num_reqs + 1, 1 + m] int32; -1: the root, unused nodes
    depths: torch.Tensor  # [max_num_reqs + 1, 1 + m] int32
    copies: torch.Tensor  # [max_num_reqs + 1, 1 + m] int32; 1: proposed by a copy of the text only
    ancestors: torch.Tensor  # [max_num_reqs + 1, 1 + m, num_words] int64 bit masks
    # What the last verification accepted: node numbers, then zeros.
    path: torch.Tensor  # [max_num_reqs + 1, depth] int32
    path_len: torch.Tensor  # [max_num_reqs + 1] int32
    num_copied: torch.Tensor  # [max_num_reqs + 1] int32 nodes of the path that only a copy proposed
    # The masks of a plain chain, for rows whose request has no tree yet.
    causal: torch.Tensor  # [1 + m, num_words] int64

    @classmethod
    def allocate(cls, max_num_reqs: int, m: int, depth: int, device: torch.device) -> "TreeState":
        rows, words = max_num_reqs + 1, mask_words(m)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        chain = torch.arange(-1, m, device=device)[None]
        causal = ancestor_masks(chain, m, words)[0]
        return cls(
            parents=zeros(rows, 1 + m) - 1,
            depths=zeros(rows, 1 + m) + torch.arange(1 + m, dtype=torch.int32, device=device),
            copies=zeros(rows, 1 + m),
            ancestors=causal.repeat(rows, 1, 1),
            path=zeros(rows, depth),
            path_len=zeros(rows),
            num_copied=zeros(rows),
            causal=causal,
        )


@dataclass
class BatchTrees:
    """What the target's forward reads of the trees, in batch order. Persistent, since full CUDA
    graphs read them; allocated with the proposer, since what is allocated with the model is lost in
    a `sleep(level=2)`."""

    positions: torch.Tensor  # [max_num_tokens] int64
    ancestors: torch.Tensor  # [max_num_reqs, 1 + m, num_words] int64 bit masks

    @classmethod
    def allocate(cls, max_num_reqs: int, max_num_tokens: int, state: TreeState) -> "BatchTrees":
        device = state.causal.device
        return cls(
            positions=torch.zeros(max_num_tokens, dtype=torch.int64, device=device),
            ancestors=state.causal.repeat(max_num_reqs, 1, 1),
        )
