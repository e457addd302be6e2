"""A run's folder: what has been done, so that it can go on where it stopped.

    recipe.yaml        what runs here
    stages/NAME/       the draft after each finished stage, float32
    checkpoint/        the running or the last stage: the draft, the optimiser, and how many steps
                       are done; with it a finished run goes on when its steps are raised
    config.json, model.safetensors, training_log.jsonl, loss.png, tensorboard/

Data, positions and shifts follow from the step (`train/packing.py`), so the step is all there is to
keep of them.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from vllm_longspec.config import MODEL_TYPE
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_folder
from vllm_longspec.train.dry_run import DRAFT_FILES, is_untrained, remove_untrained
from vllm_longspec.train.model import WEIGHTS_FILE, DraftLayer, save_draft
from vllm_longspec.train.progress import LOG_FILE, PLOT_FILE
from vllm_longspec.train.recipe import FILE as RECIPE
from vllm_longspec.train.recipe import TENSORBOARD, Recipe, difference, identity
from vllm_longspec.writing import alone, on_disk, set_modes, told, whole_folder, write_text

STAGES = "stages"
CHECKPOINT = "checkpoint"
OPTIMIZER = "optimizer.safetensors"
PROGRESS = "progress.json"
RUN_FILES = (
    RECIPE, STAGES, CHECKPOINT, f"{CHECKPOINT}.new", f"{CHECKPOINT}.old", "config.json",
    WEIGHTS_FILE, LOG_FILE, PLOT_FILE, TENSORBOARD,
)  # fmt: skip


@dataclass
class Done:
    """`finished` stages; the one that `running` goes on after so many `steps` from the draft in
    `folder`, which may also hold the optimiser's state."""

    finished: list[str]
    running: str | None = None
    steps: int = 0
    folder: Path | None = None


def check_folder(recipe: Recipe) -> None:
    """Raises LongSpecError unless the output folder is new or empty, or holds the draft of a dry
    run or this very run, maybe with fewer steps in its last stage."""
    path = recipe.output / RECIPE
    ours = path.is_file() and holds_no_other_model(recipe.output)
    untrained = DRAFT_FILES if is_untrained(recipe.output) else ()
    names = RUN_FILES if ours else untrained
    claim_folder(recipe.output, names, inputs=(recipe.target, recipe.init))
    if not ours:
        return
    there, here = stored_identity(path), identity(recipe)
    if there.get("draws") != here["draws"]:
        raise LongSpecError(
            f"output: {recipe.output} holds a run that another version of vllm-longspec began, of "
            "other pieces of text; go on with that version, or give another folder"
        )
    if different := difference(there, here):
        raise LongSpecError(
            f"output: {recipe.output} holds a run of another recipe: {different}; give another "
            "folder, or delete that one to start again"
        )


def stored_identity(path: Path) -> dict[str, Any]:
    try:
        stored = yaml.safe_load(path.read_text())
        if [stage["name"] for stage in stored["stages"]]:
            return stored
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        pass
    raise LongSpecError(f"output: {path} is not the record of a run; name a new or an empty folder")


def holds_no_other_model(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text())["model_type"] == MODEL_TYPE
    except FileNotFoundError:
        return not (folder / WEIGHTS_FILE).exists()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def start_run(recipe: Recipe, held: ExitStack) -> None:
    """Make the run's folder, or go on in it; until `held` ends no other run can."""
    check_folder(recipe)
    with told(recipe.output):
        recipe.output.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone(recipe.output))
        remove_untrained(recipe.output)
        for folder in (CHECKPOINT, *(f"{STAGES}/{stage.name}" for stage in recipe.stages)):
            recover(recipe.output / folder)
    write_text(recipe.output / RECIPE, yaml.safe_dump(identity(recipe), sort_keys=False))


def done(recipe: Recipe) -> Done:
    """What the run's folder holds of it."""
    result = Done([])
    for stage in recipe.stages:
        folder = recipe.output / STAGES / stage.name
        if not folder.is_dir():
            continue
        name, steps = read_progress(folder) or (stage.name, stage.steps)
        if name != stage.name:
            continue
        if steps >= stage.steps:
            result.finished.append(stage.name)
        else:  # of the last one, whose steps were raised
            result = Done(result.finished, stage.name, steps, folder)
    saved = load_progress(recipe.output)
    if saved is not None and saved[0] not in result.finished and saved[1] >= result.steps:
        result = Done(result.finished, *saved, recipe.output / CHECKPOINT)
    return result


def is_written(recipe: Recipe) -> bool:
    """Whether the draft of the last stage is in the run's folder, to be served."""
    served, last = (
        folder / WEIGHTS_FILE
        for folder in (recipe.output, recipe.output / STAGES / recipe.stages[-1].name)
    )
    return served.is_file() and served.stat().st_mtime_ns >= last.stat().st_mtime_ns


def check_numbers(layer: DraftLayer) -> None:
    """Raises LongSpecError for a layer that a diverged step left without numbers: what was saved
    before is worth more."""
    if not all(torch.isfinite(p).all() for p in layer.parameters()):
        raise LongSpecError(
            "learning_rate: the draft's weights are no numbers any more; lower it, or set "
            "gradient_clipping"
        )


def save_served(layer: DraftLayer, recipe: Recipe) -> None:
    with whole_folder(recipe.output, last=WEIGHTS_FILE) as unfinished:
        save_draft(layer, unfinished)


def save_stage(layer: DraftLayer, folder: Path, steps: int) -> None:
    check_numbers(layer)

    def write(unfinished: Path) -> None:
        save_draft(layer, unfinished, torch.float32)
        write_progress(unfinished, folder.name, steps)

    _replace(folder, write)


def save_checkpoint(
    layer: DraftLayer, optimizer: torch.optim.Optimizer, folder: Path, stage: str, steps: int
) -> None:
    check_numbers(layer)
    names: dict[torch.Tensor, str] = {p: name for name, p in layer.named_parameters()}
    moments = {
        f"{names[p]}/{key}": value.detach().cpu().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }

    def write(unfinished: Path) -> None:
        save_draft(layer, unfinished, torch.float32)
        save_file(moments, unfinished / OPTIMIZER)
        write_progress(unfinished, stage, steps)

    _replace(folder, write)


def write_progress(folder: Path, stage: str, steps: int) -> None:
    (folder / PROGRESS).write_text(json.dumps({"stage": stage, "steps": steps}))


def load_progress(folder: Path) -> tuple[str, int] | None:
    """Stage and finished steps of the checkpoint in a run's folder, None without one."""
    recover(folder / CHECKPOINT)
    return read_progress(folder / CHECKPOINT)


def read_progress(folder: Path) -> tuple[str, int] | None:
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        progress = json.loads(path.read_text())
        return str(progress["stage"]), int(progress["steps"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise LongSpecError(
            f"output: {path} is damaged; delete {folder} to go on from what was saved before it"
        ) from error


def load_optimizer(
    layer: DraftLayer, optimizer: torch.optim.Optimizer, folder: Path | None
) -> bool:
    """Whether the folder holds its state."""
    if folder is None or not (folder / OPTIMIZER).is_file():
        return False
    parameters = dict(layer.named_parameters())
    for name, tensor in load_file(folder / OPTIMIZER).items():
        parameter, key = name.rsplit("/", 1)
        p = parameters[parameter]
        # AdamW counts steps on the CPU.
        optimizer.state[p][key] = tensor if key == "step" else tensor.to(p.device)
    return True


def _replace(folder: Path, write: Callable[[Path], object]) -> None:
    """At every moment the old or the new folder is whole, there or as FOLDER.old. Raises
    LongSpecError where the disk is full; the old one is there then."""
    new, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("new", "old"))
    with told(folder):
        recover(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write(new)
        on_disk(new)
        set_modes(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """After a process was killed while it replaced the folder."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and folder.exists():
        shutil.rmtree(old)
    elif old.exists():
        old.rename(folder)
