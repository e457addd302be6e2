"""Tables, plots and where they were made, for all commands that measure."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_longspec import __version__
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import PLOT_METADATA
from vllm_longspec.writing import whole_file


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def environment() -> dict[str, str]:
    """What the numbers were measured with."""
    import torch
    import vllm

    on_gpu = torch.cuda.is_available()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "vllm": vllm.__version__,
        **versions,
        "vllm-longspec": __version__,
    }


def check_plotting(option: str = "output") -> None:
    """Raises LongSpecError where a plot could not be drawn in the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LongSpecError(f"{option}: a plot needs matplotlib; pip install 'vllm-longspec[eval]'")


@contextmanager
def plotted(path: Path, columns: int = 1, **options: Any) -> Iterator[tuple[Any, list[Any]]]:
    """A figure and its axes side by side, written to `path` at the end. `options`: matplotlib's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, squeeze=False, **{"figsize": (14, 5), "layout": "constrained"} | options
    )
    yield figure, list(axes[0])
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=150, metadata=PLOT_METADATA.get(path.suffix.lower()))
    pyplot.close(figure)
