"""Tables and plots of measured cycles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_longspec.report import markdown, plotted

PLAIN = "plain"
# CUDA graphs, as `bench/probe.py` tells them apart.
GRAPHS = ("target", "proposal", "outside graphs")


def cycle_table(cycles: Sequence[Any]) -> str:
    """Markdown, a row per proposer and point. R is the cycle over plain decoding's step."""
    plain = {(c.context, c.batch): c.cycle for c in cycles if c.proposer == PLAIN}
    parts = list(dict.fromkeys(part for c in cycles for part in c.parts))
    header = ["context", "batch", "proposer", "rows", "ms a cycle", "two runs", "R", *parts]
    rows = [header, ["---"] * len(header)]
    for c in sorted(cycles, key=lambda c: (c.context, c.batch)):
        reference = plain.get((c.context, c.batch))
        rows.append(
            [
                f"{c.context:,}",
                str(c.batch),
                c.proposer,
                str(c.tokens_per_step),
                f"{c.cycle:.3f}",
                " ".join(f"{run:.3f}" for run in c.runs),
                "" if reference is None else f"{c.cycle / reference:.2f}",
                *(f"{c.parts[part]:.3f}" if part in c.parts else "" for part in parts),
            ]
        )
    return markdown(rows)


def kernel_table(cycles: Sequence[Any]) -> str:
    """Markdown, a row per proposer and context with one request: milliseconds of GPU time a step by
    graph and kind of kernel, then from start to end of each draft level; empty where no kernels
    were recorded."""
    measured = [c for c in cycles if c.kernels]
    kinds = list(
        dict.fromkeys(
            (graph, kind)
            for c in measured
            for graph, times in c.kernels["microseconds"].items()
            for kind in times
        )
    )
    kinds.sort(key=lambda pair: (GRAPHS.index(pair[0]), pair[1]))
    num_levels = max((len(c.kernels["levels"]) for c in measured), default=0)
    header = ["context", "proposer", *(f"{graph}: {kind}" for graph, kind in kinds)]
    header += [f"draft level {level + 1}" for level in range(num_levels)]
    rows = [header, ["---"] * len(header)]
    for c in sorted(measured, key=lambda c: c.context):
        spent = c.kernels["microseconds"]
        times = [spent.get(graph, {}).get(kind) for graph, kind in kinds]
        times += [*c.kernels["levels"], *[None] * num_levels][:num_levels]
        cells = ["" if time is None else f"{time / 1000:.3f}" for time in times]
        rows.append([f"{c.context:,}", c.proposer, *cells])
    return markdown(rows) if measured else ""


def ratio_plot(cycles: Sequence[Any], path: Path) -> None:
    """R over batch size, a line for each proposer and context."""
    plain = {(c.context, c.batch): c.cycle for c in cycles if c.proposer == PLAIN}
    compared = [c for c in cycles if c.proposer != PLAIN and (c.context, c.batch) in plain]
    names = list(dict.fromkeys(c.proposer for c in cycles))
    contexts = sorted({c.context for c in cycles})
    with plotted(path, figsize=(8, 4.8)) as (figure, (axes,)):
        for name in dict.fromkeys(c.proposer for c in compared):
            for context in contexts:
                line = [c for c in compared if (c.proposer, c.context) == (name, context)]
                line.sort(key=lambda c: c.batch)
                if line:
                    axes.plot(
                        [c.batch for c in line],
                        [c.cycle / plain[context, c.batch] for c in line],
                        marker="os^D"[contexts.index(context) % 4],
                        color=f"C{names.index(name)}",
                        linestyle=("-", "--", ":", "-.")[contexts.index(context) % 4],
                        label=f"{name}: {context:,} tokens",
                    )
        axes.set_xscale("log", base=2)
        batches = sorted({c.batch for c in cycles})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        axes.set(xlabel="concurrent requests", ylabel="R: a cycle over a plain decoding step")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        if compared:
            figure.legend(loc="outside upper left", ncols=2, fontsize=9, handlelength=3)


def parts_plot(cycles: Sequence[Any], path: Path) -> None:
    """The parts of each proposer's cycle with one request, in milliseconds, a bar each."""
    single = sorted((c for c in cycles if c.batch == 1), key=lambda c: c.context)
    parts = list(dict.fromkeys(part for c in single for part in c.parts))
    labels = [f"{c.proposer}\n{c.context:,} tokens" for c in single]
    with plotted(path, figsize=(8, 1.2 + 0.55 * len(single))) as (figure, (axes,)):
        begins = [0.0] * len(single)
        for i, part in enumerate(parts):
            widths = [c.parts.get(part, 0.0) for c in single]
            axes.barh(labels, widths, left=begins, label=part, color=f"C{i}", height=0.7)
            begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
        for row, total in enumerate(begins):
            axes.annotate(f"{total:.2f}", (total, row), (4, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
        axes.margins(x=0.1)
        axes.set_xlabel("milliseconds a cycle, one request")
        axes.tick_params(axis="y", labelsize=9)
        axes.invert_yaxis()
        if parts:
            figure.legend(loc="outside upper left", ncols=3, fontsize=9)
