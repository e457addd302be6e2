"""Tables and the plot of measured cycles."""

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


def cycle_plot(cycles: Sequence[Any], path: Path) -> None:
    """Left: R over batch size, a line per proposer and context. Right: batch 1, the parts."""
    plain = {(c.context, c.batch): c.cycle for c in cycles if c.proposer == PLAIN}
    with plotted(path, 2) as (_, (left, right)):
        names = list(dict.fromkeys(c.proposer for c in cycles))
        contexts = sorted({c.context for c in cycles})
        for context in contexts:
            for name in names:
                own = [
                    c
                    for c in cycles
                    if c.proposer == name and c.context == context and (context, c.batch) in plain
                ]
                own.sort(key=lambda c: c.batch)
                if name == PLAIN or not own:
                    continue
                left.plot(
                    [c.batch for c in own],
                    [c.cycle / plain[context, c.batch] for c in own],
                    marker="o",
                    color=f"C{names.index(name)}",
                    linestyle=("-", "--", ":", "-.")[contexts.index(context) % 4],
                    label=f"{name}, {context:,} tokens",
                )
        left.set_xscale("log", base=2)
        batches = sorted({c.batch for c in cycles})
        left.set_xticks(batches, [str(batch) for batch in batches])
        left.set_xlabel("requests at once")
        left.set_ylabel("R: a cycle over a plain decoding step")
        left.axhline(1.0, color="grey", linewidth=0.8)
        if left.get_legend_handles_labels()[0]:
            left.legend(fontsize=7, handlelength=4)

        single = sorted((c for c in cycles if c.batch == 1), key=lambda c: c.context)
        parts = list(dict.fromkeys(part for c in single for part in c.parts))
        labels = [f"{c.proposer}\n{c.context:,}" for c in single]
        bottom = [0.0] * len(single)
        for i, part in enumerate(parts):
            heights = [c.parts.get(part, 0.0) for c in single]
            right.barh(labels, heights, left=bottom, label=part, color=f"C{i}")
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        right.set_xlabel("ms a cycle, one request")
        right.tick_params(axis="y", labelsize=7)
        right.invert_yaxis()
        right.legend(fontsize=7)
