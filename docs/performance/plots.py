"""Draws this folder's plots from its JSON files and from e2e.md, for light and for dark pages.

python docs/performance/plots.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from vllm_longspec.bench.cycle import Cycle
from vllm_longspec.bench.report import parts_plot, ratio_plot
from vllm_longspec.report import plotted

FOLDER = Path(__file__).resolve().parent
TEXT = "#77808d"
PLAIN, NGRAM, LONGSPEC = "#8a919c", "#c0560e", "#3a6cc8"
GREEDY, SAMPLED = "-", (0, (4, 2))
STYLE = {
    "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "vllm-longspec",
    "font.family": "sans-serif", "font.size": 11, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
         "ytick.color", "grid.color"), TEXT),
    "axes.prop_cycle": matplotlib.cycler(
        color=[PLAIN, NGRAM, LONGSPEC, "#1c8351", "#7a52c7", "#b8860b"]),
}  # fmt: skip

Row = dict[str, str]


def e2e_rows(date: str) -> list[Row]:
    """The table of tokens/s under a date's heading of e2e.md."""
    section = (FOLDER / "e2e.md").read_text().split(f"## {date}")[1].split("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines() if line.startswith("|")
    ]  # fmt: skip
    header, _, *rows = table
    wide = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    return [row for row in wide if "x" in row["over plain"]]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def one_request(rows: list[Row], name: str, temperature: str) -> tuple[list[float], list[float]]:
    """Contexts and tokens/s of a proposer, by the start of its name."""
    found = [
        row for row in rows
        if row["proposer"].startswith(name) and (row["at once"], row["T"]) == ("1", temperature)
        and number(row["context"]) >= 8192
    ]  # fmt: skip
    found.sort(key=lambda row: number(row["context"]))
    return [number(r["context"]) for r in found], [number(r["tokens/s"]) for r in found]


def draw_tokens(path: Path) -> None:
    """Tokens/s over context, one request: a panel for each run, since cards and targets differ."""
    runs = (
        ("2026-11-27", "newest run, 2026-11-27\none H100, nano in an 8B shape", "0.7"),
        ("2026-11-22", "last run with n-gram, 2026-11-22\none H200, small in an 8B shape", "0.6"),
    )
    proposers = (
        ("plain", "plain vLLM", PLAIN), ("n-gram", "vLLM's n-gram", NGRAM),
        ("LongSpec, default", "LongSpec", LONGSPEC),
    )  # fmt: skip
    with plotted(path, 2, figsize=(9, 4.8), sharey=True) as (figure, panels):
        for axes, (date, title, sampled) in zip(panels, runs, strict=True):
            rows, contexts, missing = e2e_rows(date), set[float](), []
            for name, label, colour in proposers:
                for temperature, style in (("0", GREEDY), (sampled, SAMPLED)):
                    at, speed = one_request(rows, name, temperature)
                    contexts |= set(at)
                    missing += [label] if not at and style == GREEDY else []
                    axes.plot(at, speed, marker="o", markersize=4, color=colour, linestyle=style)
            said = [
                f"solid T=0, dashed T={sampled}",
                *(f"{name}: not measured" for name in missing),
            ]
            axes.text(0.97, 0.97, "\n".join(said), transform=axes.transAxes, ha="right", va="top")
            axes.set_xscale("log", base=2)
            ticks = sorted(contexts)
            axes.set_xticks(ticks, [f"{int(tick):,}" for tick in ticks])
            axes.minorticks_off()
            axes.set_xlim(ticks[0] / 1.1, ticks[-1] * 1.1)
            axes.set(xlabel="tokens of context", ylim=(0, 1450))
            axes.set_title(title, fontsize=11)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("tokens/s, one request")
        handles = [matplotlib.lines.Line2D([], [], color=colour) for *_, colour in proposers]
        labels = [label for _, label, _ in proposers]
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def draw_load(path: Path) -> None:
    """Speed-up over concurrent requests, dummy weights: a panel for each shape."""
    texts = (
        ("t0", "as nano's at T=0", LONGSPEC), ("t0.8", "as nano's at T=0.8", "#1c8351"),
        ("none", "never right", NGRAM),
    )  # fmt: skip
    files = (
        ("throughput-8b.json", "8B Llama"),
        ("throughput-moe.json", "24 layers of Qwen3-30B-A3B"),
    )
    with plotted(path, 2, figsize=(9, 4.6), sharey=True) as (figure, panels):
        for axes, (file, shape) in zip(panels, files, strict=True):
            record = json.loads((FOLDER / file).read_text())
            results = [r for r in record["results"] if r["proposer"] == "LongSpec"]
            contexts = sorted({r["context"] for r in results})
            for text, _, colour in texts:
                for context, style in zip(contexts, (GREEDY, SAMPLED), strict=True):
                    line = [r for r in results if (r["text"], r["context"]) == (text, context)]
                    line.sort(key=lambda r: r["batch"])
                    axes.plot(
                        [r["batch"] for r in line], [r["over_plain"] for r in line], marker="o",
                        markersize=4, color=colour, linestyle=style,
                    )  # fmt: skip
            batches = sorted({r["batch"] for r in results})
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.minorticks_off()
            axes.axhline(1.0, color=TEXT, linewidth=1)
            lengths = " and ".join(f"{context:,}" for context in contexts)
            axes.set_title(f"{shape}\n{lengths} (dashed) tokens", fontsize=11)
            axes.set(xlabel="concurrent requests", ylim=(0, None))
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("tokens/s over plain vLLM's")
        handles = [matplotlib.lines.Line2D([], [], color=colour) for _, _, colour in texts]
        labels = [f"draft {label}" for _, label, _ in texts]
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def draw_cycles(file: str, plots: dict[str, Callable[..., None]]) -> None:
    record: dict[str, Any] = json.loads((FOLDER / file).read_text())
    cycles = [Cycle(**cycle) for cycle in record["cycles"]]
    for name, plot in plots.items():
        plot(cycles, FOLDER / name)


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        draw_tokens(FOLDER / "tokens.svg")
        draw_load(FOLDER / "load.svg")
        draw_cycles("cycle.json", {"cycle.svg": ratio_plot, "cycle-parts.svg": parts_plot})
