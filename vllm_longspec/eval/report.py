"""Table and plot of LongSpec against plain decoding, beside the paper's numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_longspec.eval.paper import FRAMES, PAPER, reported, reported_for
from vllm_longspec.report import markdown, plotted

NOTES = (
    "tokens/s: decoding only, one request at a time; what each request's first token took is left "
    "out. Speed-up: over plain vLLM on the same prompts in the same run. The paper's numbers are "
    "for T=0, 68 nodes verified, on an A100; its speed-ups are over a loop on Hugging Face "
    "transformers, not over vLLM."
)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def sameness(first_differences: Sequence[int | None] | None) -> str:
    """How many outputs are plain decoding's, and where the first of the others parts from it."""
    if first_differences is None:
        return ""
    parted = [(i, at) for i, at in enumerate(first_differences) if at is not None]
    text = f"{len(first_differences) - len(parted)} of {len(first_differences)}"
    if parted:
        text += f" (prompt {parted[0][0]} from token {parted[0][1]} on)"
    return text


def from_paper(target: str, task: str) -> str:
    """Of this target if the paper has it, else the range over its targets."""
    own = reported_for(target, task)
    if own is not None:
        return f"{own.tau:.2f}, {own.speed_up:.2f}x"
    taus = [numbers.tau for numbers in reported(task).values()]
    if not taus:
        return ""
    return f"{min(taus):.2f} to {max(taus):.2f}" if len(taus) > 1 else f"{taus[0]:.2f}"


def papers_numbers(frame: str) -> str:
    return f"paper, T=0, {'same' if frame == PAPER else 'another'} frame"


def comparison_table(comparisons: Sequence[Any], target: str, frame: str) -> str:
    """Markdown, a row per task and temperature, with the notes that its columns need. `frame`: of
    the prompts, by its name in FRAMES."""
    header = ["task", "T", "prompts", "prompt tokens", "new tokens", "acceptance length"]
    header += ["accepted to depth 1, 2, ...", "tokens/s", "plain tokens/s", "speed-up"]
    header += ["same tokens as plain", "repeated 8-grams", papers_numbers(frame)]
    rows = [header, ["---"] * len(header)]
    for c in comparisons:
        rows.append(
            [
                c.task,
                f"{c.temperature:g}",
                str(c.prompts),
                f"{c.mean_prompt_tokens:,.0f}",
                f"{c.new_tokens:,}",
                f"{c.mean_acceptance_length:.2f}",
                " ".join(f"{share:.2f}" for share in c.per_depth),
                f"{c.tokens_per_second:.1f}",
                number(c.plain_tokens_per_second, ".1f"),
                number(c.speed_up, ".2f") + ("x" if c.speed_up else ""),
                sameness(c.first_differences),
                f"{c.repeated_8grams:.0%}",
                from_paper(target, c.task) if c.temperature == 0 else "",
            ]
        )
    return f"{markdown(rows)}\nPrompts: {FRAMES[frame]}. {NOTES}\n"


def comparison_plot(comparisons: Sequence[Any], target: str, frame: str, path: Path) -> None:
    """Left: mean acceptance length, right: speed-up; a group of bars per task, a bar per
    temperature, the paper's numbers marked."""
    with plotted(path, 2) as (figure, (left, right)):
        tasks = list(dict.fromkeys(c.task for c in comparisons))
        temperatures = list(dict.fromkeys(c.temperature for c in comparisons))
        width = 0.8 / len(temperatures)

        def place(task: str, bar: float) -> float:
            return tasks.index(task) + (bar + 0.5) * width - 0.4

        greedy = temperatures.index(0.0) if 0.0 in temperatures else (len(temperatures) - 1) / 2
        for i, temperature in enumerate(temperatures):
            own = [c for c in comparisons if c.temperature == temperature]
            for axes, values in (
                (left, [c.mean_acceptance_length for c in own]),
                (right, [c.speed_up or 0.0 for c in own]),
            ):
                places = [place(c.task, i) for c in own]
                bars = axes.bar(places, values, width, label=f"T={temperature:g}", color=f"C{i}")
                axes.bar_label(bars, [f"{v:.2f}" if v else "" for v in values], fontsize=7)
        same_target = {task: numbers for task in tasks if (numbers := reported_for(target, task))}
        taus = {
            task: [same_target[task].tau]
            if task in same_target
            else [n.tau for n in reported(task).values()]
            for task in tasks
        }
        marked = [
            (place(task, greedy), min(found), max(found)) for task, found in taus.items() if found
        ]
        if marked:
            left.errorbar(
                [x for x, _, _ in marked],
                [low for _, low, _ in marked],
                yerr=[[0.0] * len(marked), [high - low for _, low, high in marked]],
                fmt="kD" if same_target else "none",
                ecolor="black",
                capsize=6,
                label=papers_numbers(frame)
                if same_target
                else f"{papers_numbers(frame)}: lowest to highest of its targets",
            )
        if same_target:
            right.plot(
                [place(task, greedy) for task in same_target],
                [numbers.speed_up for numbers in same_target.values()],
                "kD",
                label="paper, T=0, over a Hugging Face loop",
            )
        right.axhline(1.0, color="grey", linewidth=0.8)
        left.set_ylabel("mean acceptance length")
        right.set_ylabel("tokens/s over plain vLLM's")
        for axes in (left, right):
            axes.set_xticks(range(len(tasks)), tasks)
            axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)
        figure.suptitle(Path(target).name)
        figure.supxlabel(
            "The paper's: one A100, 68 nodes; its speed-ups are over a Hugging Face loop, not over "
            "vLLM, and say nothing about other targets.",
            fontsize=8,
        )
