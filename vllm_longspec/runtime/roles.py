"""A draft where the target belongs: one sentence in place of vLLM's list of architectures."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models import ModelRegistry

from vllm_longspec.config import (
    ARCHITECTURE,
    PUBLISHED_ARCHITECTURES,
    is_draft_config,
    recorded_target,
)
from vllm_longspec.draft.checkpoint import holds_draft, is_draft_folder, weight_files
from vllm_longspec.errors import LongSpecError


class DraftAsTarget(nn.Module):
    """Stands in vLLM's registry for a draft's class where none is served, so that vLLM gets as far
    as asking for the speculative config; `check_roles` then says what is wrong."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        raise LongSpecError("model: is a LongSpec draft; serve its target with it")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def register_stand_ins() -> None:
    for name in (ARCHITECTURE, *PUBLISHED_ARCHITECTURES):
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, DraftAsTarget)


def check_roles(args: Any, target: Any) -> None:
    """Raises LongSpecError if the ModelConfig `target` is a draft's, with or without a draft beside
    it in the EngineArgs, or if a draft that names its target stood there."""
    options = args.speculative_config or {}
    found: str = options.get("model") or ""
    both = bool(args.spec_model and found) and is_draft_folder(Path(found))
    if both and not is_draft_folder(Path(args.spec_model)):
        # A draft that names its target: vLLM has put the two in their places already.
        raise LongSpecError(swapped(found, args.spec_model))
    if not is_draft_config(target.hf_config) and not is_copy(Path(target.model)):
        return
    draft, named = target.model, args.spec_model or found
    if named and not is_draft_folder(Path(named)):
        raise LongSpecError(swapped(draft, named))
    raise LongSpecError(
        f"model: {draft} is a LongSpec draft, which is served with its target: "
        f"vllm serve {recorded_target(target.hf_config) or 'TARGET'} --speculative-model {draft}"
    )


def swapped(draft: str, target: str) -> str:
    return (
        f"model: {draft} is a LongSpec draft and stands in its target's place; swap the two: "
        f"vllm serve {target} --speculative-model {draft}"
    )


def is_copy(folder: Path) -> bool:
    """Whether a draft lies there under its target's config. A layer is a file: where there are
    more, or the folder is a repository's name, nothing is read."""
    try:
        return folder.is_dir() and len(weight_files(folder)) == 1 and holds_draft(folder)
    except (OSError, ValueError, LookupError):
        return False
