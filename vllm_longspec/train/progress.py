"""A run's log, a line for each loss and each judgement, and its plot."""

import json
from pathlib import Path
from typing import Any

from vllm_longspec.errors import LongSpecError
from vllm_longspec.report import plotted
from vllm_longspec.writing import write_text

LOG_FILE = "training_log.jsonl"
PLOT_FILE = "loss.png"

# stage, step; loss (the mean since the row before), learning_rate, tokens_per_second, seconds_left;
# or agreement (at shift 1, 2, ...) and tokens_per_verification, of held-out text.
Row = dict[str, Any]


def load_log(folder: Path, finished: list[str], running: str | None, steps: int) -> list[Row]:
    """The rows that still hold: of finished stages, and of the running one before its step."""
    path = folder / LOG_FILE
    if not path.is_file():
        return []
    rows = [row for line in path.read_text(errors="replace").splitlines() if (row := parsed(line))]
    rows = [
        row
        for row in rows
        if row["stage"] in finished or (row["stage"] == running and row["step"] < steps)
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def parsed(line: str) -> Row | None:
    """None for a line that was cut off with its process."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"stage", "step"} <= row.keys() else None


def append_log(row: Row, folder: Path) -> None:
    with (folder / LOG_FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")


def plot_loss(rows: list[Row], stages: list[tuple[str, int]], path: Path) -> None:
    """`stages`: name and steps of each; they follow each other on the horizontal axis."""
    rows = [row for row in rows if "loss" in row]
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
