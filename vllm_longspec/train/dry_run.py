"""`train --dry-run`: what a run would take, and its draft as training starts from it, to be served.

The draft is marked within its weights: a run may take the place of this one, and of no other.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_longspec.train.model import WEIGHTS_FILE, DraftLayer, save_draft
from vllm_longspec.train.recipe import FILE, Recipe
from vllm_longspec.writing import told, whole_folder

MARK = {"vllm_longspec": "untrained"}
DRAFT_FILES = ("config.json", WEIGHTS_FILE)


def is_untrained(folder: Path) -> bool:
    """Whether `folder` has the draft of a dry run."""
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
            return MARK.items() <= (weights.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def write_untrained(layer: DraftLayer, recipe: Recipe) -> str:
    """What was done. `recipe.output` is claimed: new, empty, a dry run's or this very run's."""
    if (recipe.output / FILE).exists():
        return f"{recipe.output} holds this run already; no draft is written"
    size = recipe.draft_vocab_size
    if size is not None and layer.draft_token_ids is None:
        layer.keep_tokens(torch.arange(size))
    with whole_folder(recipe.output) as unfinished:
        save_draft(layer, unfinished, metadata=MARK)
    return (
        f"wrote {recipe.output}: the draft as training starts from it, to try out serving; the "
        "same command without --dry-run takes its place"
    )


def remove_untrained(folder: Path) -> None:
    """The mark goes last, as it came first: at any moment the rest is known by it."""
    if is_untrained(folder):
        with told(folder):
            for name in DRAFT_FILES:
                (folder / name).unlink(missing_ok=True)
