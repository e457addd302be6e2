"""A run's folder: what has been done, so that it can go on where it stopped.

    recipe.yaml        what runs here
    stages/NAME/       the draft after each finished stage, float32
    checkpoint/        the running stage: the draft, the optimiser, and how many steps are done
    config.json, model.safetensors, training_log.jsonl, loss.png, tensorboard/

Data, positions and shifts follow from the step (`train/packing.py`), so the step is all there is to
keep of them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from vllm_longspec.config import MODEL_TYPE, LongSpecError
from vllm_longspec.output import claim_folder
from vllm_longspec.train.model import WEIGHTS_FILE, DraftLayer, save_draft
from vllm_longspec.train.progress import LOG_FILE, PLOT_FILE, TENSORBOARD
from vllm_longspec.train.recipe import Recipe, identity

RECIPE = "recipe.yaml"
STAGES = "stages"
CHECKPOINT = "checkpoint"
OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
RUN_FILES = (
    RECIPE, STAGES, CHECKPOINT, f"{CHECKPOINT}.new", f"{CHECKPOINT}.old", "config.json",
    WEIGHTS_FILE, LOG_FILE, PLOT_FILE, TENSORBOARD,
)  # fmt: skip


def check_folder(recipe: Recipe) -> None:
    """Raises LongSpecError unless the output folder is new or empty, or holds this very run."""
    path = recipe.output / RECIPE
    ours = path.is_file() and holds_no_other_model(recipe.output)
    fields = identity(recipe)
    claim_folder(recipe.output, RUN_FILES if ours else (), inputs=(recipe.target, recipe.init))
    if ours:
        there = yaml.safe_load(path.read_text())
        different = [name for name in fields if (there or {}).get(name) != fields[name]]
        if different:
            raise LongSpecError(
                f"output: {recipe.output} holds a run of another recipe (its {different[0]} "
                "differs); give another folder, or delete that one to start again"
            )


def holds_no_other_model(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text())["model_type"] == MODEL_TYPE
    except FileNotFoundError:
        return not (folder / WEIGHTS_FILE).exists()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def start_run(recipe: Recipe) -> None:
    """Make the run's folder, or go on in it."""
    check_folder(recipe)
    path = recipe.output / RECIPE
    if path.is_file():
        return
    recipe.output.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(identity(recipe), sort_keys=False))


def save_stage(layer: DraftLayer, folder: Path) -> None:
    _replace(folder, lambda unfinished: save_draft(layer, unfinished, torch.float32))


def save_checkpoint(
    layer: DraftLayer, optimizer: torch.optim.Optimizer, folder: Path, stage: str, steps: int
) -> None:
    names: dict[torch.Tensor, str] = {p: name for name, p in layer.named_parameters()}
    moments = {
        f"{names[p]}/{key}": value.detach().cpu().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }

    def write(unfinished: Path) -> None:
        save_draft(layer, unfinished, torch.float32)
        save_file(moments, unfinished / OPTIMIZER)
        (unfinished / PROGRESS).write_text(json.dumps({"stage": stage, "steps": steps}))

    _replace(folder, write)


def load_progress(folder: Path) -> tuple[str, int] | None:
    """Stage and finished steps of the checkpoint in a run's folder, None without one."""
    recover(folder / CHECKPOINT)
    path = folder / CHECKPOINT / PROGRESS
    if not path.is_file():
        return None
    progress = json.loads(path.read_text())
    return progress["stage"], progress["steps"]


def load_optimizer(layer: DraftLayer, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    parameters = dict(layer.named_parameters())
    for name, tensor in load_file(folder / OPTIMIZER).items():
        parameter, key = name.rsplit("/", 1)
        p = parameters[parameter]
        # AdamW counts steps on the CPU.
        optimizer.state[p][key] = tensor if key == "step" else tensor.to(p.device)


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """At every moment the old or the new folder is whole, there or as FOLDER.old."""
    new, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("new", "old"))
    recover(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    for kind in ("", ".new", ".old"):
        shutil.rmtree(folder.with_name(folder.name + kind), ignore_errors=True)


def recover(folder: Path) -> None:
    """After a process was killed while it replaced the folder."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and folder.exists():
        shutil.rmtree(old)
    elif old.exists():
        old.rename(folder)
