"""What a run shows: a bar with tokens/s and time left, a log, TensorBoard, a plot."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_longspec.config import LongSpecError
from vllm_longspec.report import plotted

LOG_FILE = "training_log.jsonl"
PLOT_FILE = "loss.png"
TENSORBOARD = "tensorboard"
PRINT_EVERY = 200  # steps, where the output is no terminal

Row = dict[str, Any]  # stage, step, loss, learning_rate, tokens_per_second


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def tensorboard_writer(folder: Path, console: Console, first_step: int) -> Any:
    """None where the package tensorboard is missing, with a word about it."""
    if importlib.util.find_spec("tensorboard") is None:
        console.print("no TensorBoard log: the package tensorboard is not installed")
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step)


def load_log(folder: Path, finished: list[str], running: str | None, steps: int) -> list[Row]:
    """The rows that still hold: of finished stages, and of the running one before its step."""
    path = folder / LOG_FILE
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        row
        for row in rows
        if row["stage"] in finished or (row["stage"] == running and row["step"] < steps)
    ]
    save_log(rows, folder)
    return rows


def save_log(rows: list[Row], folder: Path) -> None:
    (folder / LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def append_log(row: Row, folder: Path) -> None:
    with (folder / LOG_FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")


def plot_loss(rows: list[Row], stages: list[tuple[str, int]], path: Path) -> None:
    """`stages`: name and steps of each; they follow each other on the horizontal axis."""
    if not rows:
        raise LongSpecError(f"{LOG_FILE}: is empty, there is no loss to plot; train again")
    first, total = {}, 0
    for name, steps in stages:
        first[name] = total
        total += steps
    at = [first[row["stage"]] + row["step"] for row in rows]
    with plotted(path, figsize=(7, 4)) as (_, (axes,)):
        axes.plot(at, [row["loss"] for row in rows], linewidth=0.9)
        if len(stages) > 1:
            for name, start in first.items():
                axes.axvline(start, color="0.7", linewidth=0.8)
                axes.annotate(
                    f" {name}",
                    (start, 0.97),
                    xycoords=("data", "axes fraction"),
                    fontsize=8,
                    va="top",
                )
        axes.set(xlabel="step", ylabel="next-token cross entropy", title="Draft layer training")
        axes.grid(alpha=0.3)
