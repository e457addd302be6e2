"""The trees that requests wait to have verified, on the device, one row per request slot."""

from dataclasses import dataclass

import torch

from vllm_longspec.tree.shape import ancestor_masks, mask_words


@dataclass
class TreeState:
    """Persistent buffers. The last row takes the writes of rows that belong to no request.

    The nodes' tokens are not here: vLLM keeps them as the request's draft tokens.
    """

    parents: torch.Tensor  # [max_num_reqs + 1, 1 + m] int32; -1: the root, unused nodes
    depths: torch.Tensor  # [max_num_reqs + 1, 1 + m] int32
    ancestors: torch.Tensor  # [max_num_reqs + 1, 1 + m, num_words] int64 bit masks
    # What the last verification accepted: node numbers, then zeros.
    path: torch.Tensor  # [max_num_reqs + 1, depth] int32
    path_len: torch.Tensor  # [max_num_reqs + 1] int32
    # The masks of a plain chain, for rows whose request has no tree yet.
    causal: torch.Tensor  # [1 + m, num_words] int64

    @classmethod
    def allocate(cls, max_num_reqs: int, m: int, depth: int, device: torch.device) -> "TreeState":
        rows, words = max_num_reqs + 1, mask_words(m)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        chain = torch.arange(-1, m, device=device)[None]
        return cls(
            parents=zeros(rows, 1 + m) - 1,
            depths=zeros(rows, 1 + m),
            ancestors=zeros(rows, 1 + m, words, dtype=torch.int64),
            path=zeros(rows, depth),
            path_len=zeros(rows),
            causal=ancestor_masks(chain, m, words)[0],
        )
