"""What the proposer asks of a draft. The LongSpec layer is one (`draft/longspec.py`), copies of the
text alone are another (`draft/lookup_draft.py`)."""

from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
from torch import nn

from vllm_longspec.draft.beam import TreePlan


class Draft(Protocol):
    """Proposes trees for the requests of a batch. Everything stays on the device.

    Made in the worker before the target is loaded, with the buffers it shares with the proposer:
    `ProposalInputs` and `Lookup`, which it reads, `TreeState` and the draft tokens, which it
    writes. What it allocates there outlives a sleep; what it allocates in `load` does not, unless
    it is a parameter or buffer of the module that `load` returns.
    """

    def load(self, target_model: Any, target_layers: list[str]) -> nn.Module:
        """Loads its weights and takes what it shares with the target; `target_layers` names the
        target's attention layers, first to last. A cache of its own it claims by entering a layer
        with a KV-cache spec into vLLM's `static_forward_context`; every layer entered here is its.
        Returns the module that holds its weights. Raises LongSpecError for a target it cannot
        draft for."""

    def bind(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Where vLLM put the caches: called once to profile memory, once to serve."""

    def catch_up(self, rows: np.ndarray) -> None:
        """Brings in what these batch rows [num_rows] int64 committed up to `ProposalInputs`,
        whatever the draft saw of it: after a prompt, a prefix-cache hit, a resume, steps for which
        no tree was grown. Not in CUDA graphs."""

    def grow(self, num_reqs: int, plan: TreePlan) -> None:
        """Brings in the tokens that the last step committed and grows a tree of `plan` for each of
        the batch's first `num_reqs` rows, with the copy that was looked up in it where the plan has
        room for one. Recorded in CUDA graphs: fixed shapes, no synchronisation."""

    def specialisation(self, num_reqs: int, plan: TreePlan) -> Hashable:
        """What of the programs that `grow` launches depends on the number of requests: where it is
        equal they are the same."""

    def profile(self, num_rows: int, num_children: int) -> None:
        """Allocates what `grow` does for a level of `num_rows` nodes in all, of which each gets up
        to `num_children`, so that memory profiling sees it. No cache exists yet."""

    def refresh(self) -> None:
        """Before each step: where the target's weights were loaded again, after a sleep or by a
        trainer, what is copied from them is copied again. Costs nothing where they were not."""
