"""Where else a run's numbers go: TensorBoard, Weights & Biases, MLflow, trackio, by accelerate."""

import importlib.util
from typing import Any

from accelerate import Accelerator

from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.recipe import TENSORBOARD, Recipe, identity

PROJECT = "vllm-longspec"


def chosen_trackers(recipe: Recipe) -> list[str]:
    """Those that `log_with` names; TensorBoard where it is installed and none is named. Raises
    LongSpecError for one that is not installed."""
    if recipe.log_with is None:
        return [TENSORBOARD] if is_installed(TENSORBOARD) else []
    for name in recipe.log_with:
        if not is_installed(name):
            raise LongSpecError(f"log_with: {name} is not installed; pip install {name}")
    return list(recipe.log_with)


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def start_trackers(accelerator: Accelerator, recipe: Recipe, first_step: int) -> None:
    """`first_step`: of all stages; what an earlier start wrote beyond it no longer holds."""
    name = recipe.output.resolve().name
    accelerator.init_trackers(
        PROJECT,
        # TensorBoard would make a second run of its settings.
        config=settings(recipe) if recipe.log_with not in (None, (TENSORBOARD,)) else None,
        init_kwargs={
            TENSORBOARD: {"purge_step": first_step},
            "wandb": {"name": name},
            "mlflow": {"run_name": name},
            "trackio": {"name": name},
        },
    )


def settings(recipe: Recipe) -> dict[str, str]:
    return {key: str(value) for key, value in identity(recipe).items()}


def end_trackers(accelerator: Accelerator) -> None:
    """accelerate's own end of a training also ends the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Of a row of the log what trackers draw, the agreement by shift."""
    drawn = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    rates = enumerate(row.get("agreement", ()), start=1)
    return drawn | {f"agreement/shift {shift}": rate for shift, rate in rates}
