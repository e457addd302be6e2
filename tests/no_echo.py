"""A custom logits processor that takes a request's rows for a chain, as vLLM's own do."""

from typing import Any

import torch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor


class NoEcho(LogitsProcessor):
    """Bans the last eight tokens."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.all_token_ids = req_states.all_token_ids.gpu
        self.total_lens = req_states.total_len.gpu

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        slots = ctx.expanded_idx_mapping
        for back in range(8):
            position = self.total_lens[slots] - 1 + ctx.expanded_local_pos - back
            committed = self.all_token_ids[slots, position.clamp(min=0)]
            drafted = ctx.input_ids[(rows - back).clamp(min=0)]
            token = torch.where(ctx.expanded_local_pos >= back, drafted, committed)
            logits[rows, token.long().clamp(min=0)] = float("-inf")
        return logits
