"""A draft without a model: copies of the text alone, for targets that have no trained draft."""

from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_longspec.draft.beam import Nodes, TreePlan
from vllm_longspec.draft.choose import choose_nodes
from vllm_longspec.draft.graft import graft
from vllm_longspec.draft.inputs import ProposalInputs
from vllm_longspec.draft.lookup import Lookup
from vllm_longspec.verify.tree_state import TreeState


class LookupDraft:
    """A `Draft` (`draft/protocol.py`); its plans have no shape."""

    def __init__(
        self,
        inputs: ProposalInputs,  # read
        lookup: Lookup,  # read
        state: TreeState,  # written, as are the draft tokens
        draft_tokens: torch.Tensor,  # [max_num_reqs, m] int64; -1: unused node
    ) -> None:
        self.inputs = inputs
        self.lookup = lookup
        self.state = state
        self.draft_tokens = draft_tokens

    def load(self, target_model: Any, target_layers: list[str]) -> nn.Module:
        return nn.Module()

    def bind(self, kv_cache_config: Any, block_tables: Any) -> None:
        """It has no cache."""

    def catch_up(self, rows: np.ndarray) -> None:
        """vLLM keeps the tokens."""

    def grow(self, num_reqs: int, plan: TreePlan) -> None:
        nodes = Nodes.allocate(num_reqs, plan)
        graft(nodes, plan, self.lookup.tokens[:num_reqs], self.lookup.scores[:num_reqs])
        choose_nodes(
            nodes,
            plan,
            self.inputs.modes[:num_reqs],
            self.inputs.slots[:num_reqs],
            self.state,
            self.draft_tokens,
        )

    def specialisation(self, num_reqs: int, plan: TreePlan) -> None:
        """Nothing does."""

    def profile(self, num_rows: int, num_children: int) -> None:
        """It has no forward."""

    def refresh(self) -> None:
        """It copies nothing of the target's weights."""
