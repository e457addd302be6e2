"""What each of the paper's ideas does: train a draft without it, measure both at every length.

One command trains every variant for every target on short text, several at once on one GPU, and
replays them against the same continuations of held-out code. What its output folder holds already
is not done again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from vllm_longspec.commands import fail
from vllm_longspec.config import resolve_tree
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.replay import (
    Replay,
    markdown_table,
    measure_drafts,
    plot_acceptance,
    read_results,
    write_results,
)
from vllm_longspec.output import claim_folder
from vllm_longspec.train.checkpoint import check_folder, start_run
from vllm_longspec.train.held_out import MAX_HELD_OUT
from vllm_longspec.train.loop import prepare_rows
from vllm_longspec.train.model import WEIGHTS_FILE
from vllm_longspec.train.recipe import Recipe, Stage

VARIANTS: dict[str, dict[str, Any]] = {  # what differs from the base
    "base": {},
    "no-anchor-offset": {"positions": "natural"},
    "no-flash-noisy": {"flash_noisy": False},
    "learn-from-target": {"learn_from": "target"},
    "window-128": {"window": 128},
    "window-256": {"window": 256},
    "window-1024": {"window": 1024},
}
IDEAS = ("base", "no-anchor-offset", "no-flash-noisy", "learn-from-target")
WINDOWS = ("window-128", "window-256", "base", "window-1024")
RESULTS = "results.json"
TABLE = "table.md"
OWN_SUFFIXES = (".yaml", ".log")  # of a variant's recipe and of what its training printed

console = Console()


def train_variant(recipe: Recipe) -> None:
    """In a process of its own; it goes on where an earlier one stopped."""
    name = f"{recipe.output.parent.name}/{recipe.output.name}"
    start_run(recipe)
    if (recipe.output / WEIGHTS_FILE).is_file():
        console.print(f"{name}: trained before")
        return
    config, log = (recipe.output.with_name(recipe.output.name + end) for end in OWN_SUFFIXES)
    config.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    started = time.perf_counter()
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "vllm_longspec.cli", "train", "--config", str(config)],
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise LongSpecError(f"variant: training {name} failed ({last.strip()}); see {log}")
    console.print(f"{name}: trained in {time.perf_counter() - started:.0f} s")


def measure(
    target: Path, drafts: dict[str, Path], results_file: Path, shape: Sequence[int], **options: Any
) -> list[Replay]:
    """The results of every draft; those in the file, measured the same way, are kept."""
    combinations = len(options["contexts"]) * len(options["temperatures"]) * len(options["nodes"])
    kept: list[Replay] = []
    for result in read_results(results_file) if results_file.is_file() else []:
        wanted = (
            result.draft in drafts
            and result.context in options["contexts"]
            and result.temperature in options["temperatures"]
            and result.nodes in options["nodes"]
            and result.tree_shape == list(shape)
            and result.prompts == options["num_prompts"]
            and result.tokens == options["num_prompts"] * options["max_tokens"]
        )
        kept += [result] if wanted else []
    done = {name for name in drafts if sum(result.draft == name for result in kept) == combinations}
    results = [result for result in kept if result.draft in done]
    missing = {name: folder for name, folder in drafts.items() if name not in done}
    if missing:
        started = time.perf_counter()
        results += measure_drafts(str(target), missing, tree_shape=shape, **options)
        seconds = time.perf_counter() - started
        console.print(f"{target.name}: {len(missing)} drafts measured in {seconds:.0f} s")
    order = list(drafts)
    results.sort(key=lambda r: (r.nodes, r.temperature, order.index(r.draft), r.context))
    write_results(results, results_file)
    return results


def plot(results: Sequence[Replay], folder: Path, target: str) -> None:
    for name, title, shown in (
        ("ideas", "trained with and without the paper's ideas", IDEAS),
        ("windows", "by the window of the draft's self-attention", WINDOWS),
    ):
        lines = [r for variant in shown for r in results if r.draft == variant]
        if name == "windows":
            lines = [replace(r, draft="window-512") if r.draft == "base" else r for r in lines]
        if len({line.draft for line in lines}) > 1:
            plot_acceptance(lines, folder / f"{target}-{name}.png", f"{target}: {title}")


def main(
    target: Annotated[list[Path], typer.Option(help="Folder of a target model; repeatable.")],
    data: Annotated[Path, typer.Option(help='Training text, JSON lines with "text"; .xz too.')],
    held_out: Annotated[Path, typer.Option(help='Other text, with "text" and "kind"; .xz too.')],
    output: Annotated[Path, typer.Option(help="Folder for drafts, results, table and plots.")],
    variant: Annotated[
        list[str],
        typer.Option(help="Only these; repeatable. Without it: all of " + ", ".join(VARIANTS)),
    ] = [],  # noqa: B006
    steps: Annotated[
        list[int], typer.Option(help="Optimiser steps, for all targets or each in turn.")
    ] = [600],  # noqa: B006
    learning_rate: Annotated[
        list[float], typer.Option(help="Peak learning rate, for all targets or each in turn.")
    ] = [2e-3],  # noqa: B006
    sequence_length: Annotated[int, typer.Option(help="Tokens per training sequence.")] = 1024,
    sequences_per_step: Annotated[int, typer.Option(help="Sequences per optimiser step.")] = 64,
    sequences_per_batch: Annotated[int, typer.Option(help="Sequences at once; memory only.")] = 64,
    max_sequences: Annotated[int, typer.Option(help="Train on the first so many.")] = 50_000,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at once on the one GPU.")] = 3,
    context: Annotated[list[int], typer.Option(help="Prompt tokens; repeatable.")] = [  # noqa: B006
        1024,
        8192,
        16384,
        30000,
    ],
    temperature: Annotated[list[float], typer.Option(help="Repeatable.")] = [0.0, 0.8],  # noqa: B006
    nodes: Annotated[list[int], typer.Option(help="Nodes verified; repeatable.")] = [68],  # noqa: B006
    tree_shape: Annotated[str, typer.Option(help="Nodes per level.")] = "4 16 16 16 16",
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out code prompts.")] = 20,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt.")] = 128,
    seed: Annotated[int, typer.Option(help="Of training.")] = 0,
) -> None:
    """Drafts with and without anchor-offset indices, with and without flash noisy training, with
    windows of 128 to 1,024: mean acceptance length against context length.

    Writes results.json, table.md and plots; for each target NAME the drafts under NAME/.
    """
    try:
        variants = variant or list(VARIANTS)
        check_names(target, variants)
        recipes: dict[Path, list[Recipe]] = {}
        for folder, own_steps, own_rate in zip(
            target,
            for_each("steps", steps, target),
            for_each("learning_rate", learning_rate, target),
            strict=True,
        ):
            common = {
                "name": "short",
                "steps": own_steps,
                "learning_rate": own_rate,
                "sequence_length": sequence_length,
                "sequences_per_step": sequences_per_step,
                "sequences_per_batch": sequences_per_batch,
                # Each once; more would only take time to tokenise.
                "max_sequences": min(max_sequences, own_steps * sequences_per_step + MAX_HELD_OUT),
                "positions": "anchor-offset",
                "seed": seed,
            }
            recipes[folder] = [
                Recipe(
                    target=str(folder),
                    data=(str(data),),
                    output=output / folder.name / name,
                    stages=(Stage(**(common | VARIANTS[name])),),
                )
                for name in variants
            ]
        run(recipes, output, jobs, resolve_tree(tree_shape).tree_shape, data=held_out,
            contexts=context, temperatures=temperature, nodes=nodes, num_prompts=num_prompts,
            max_tokens=max_tokens)  # fmt: skip
    except LongSpecError as error:
        fail(str(error))


def run(
    recipes: dict[Path, list[Recipe]],  # of each target
    output: Path,
    jobs: int,
    shape: Sequence[int],
    **options: Any,
) -> None:
    claim_folders(output, recipes)
    results: dict[str, list[Replay]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        trainings: dict[Path, list[Future[None]]] = {}
        for target, variants in recipes.items():
            # Once, before the trainings that all read them; the last target's train meanwhile.
            prepare_rows(variants[0], variants[0].stages[0], AutoTokenizer.from_pretrained(target))
            trainings[target] = [pool.submit(train_variant, recipe) for recipe in variants]
        for target, variants in recipes.items():
            for training in trainings[target]:
                training.result()
            drafts = {recipe.output.name: recipe.output for recipe in variants}
            file = output / target.name / RESULTS
            results[target.name] = measure(target, drafts, file, shape, **options)
    tables = [f"{name}:\n\n{markdown_table(of_one)}" for name, of_one in results.items()]
    for name, of_one in results.items():
        plot(of_one, output, name)
    (output / TABLE).write_text("\n".join(tables))
    everything = {name: [asdict(result) for result in of_one] for name, of_one in results.items()}
    (output / RESULTS).write_text(json.dumps(everything, indent=1) + "\n")
    print("\n".join(tables), end="")


def claim_folders(output: Path, recipes: dict[Path, list[Recipe]]) -> None:
    """Raises LongSpecError where one of this program's folders holds anything else."""
    names = [f"{folder.name}{end}" for folder in recipes for end in ("", "-ideas.png",
             "-windows.png")]  # fmt: skip
    claim_folder(output, [RESULTS, TABLE, *names], inputs=recipes)
    own = [f"{variant}{end}" for variant in VARIANTS for end in ("", *OWN_SUFFIXES)]
    for target, variants in recipes.items():
        claim_folder(output / target.name, [RESULTS, *own], inputs=recipes)
        for recipe in variants:
            check_folder(recipe)


def check_names(targets: Sequence[Path], variants: Sequence[str]) -> None:
    for name in variants:
        if name not in VARIANTS:
            raise LongSpecError(f"variant: {name!r} is unknown; choose among {', '.join(VARIANTS)}")
    names = [folder.name for folder in targets]
    for folder in targets:
        if not (folder / "config.json").is_file():
            raise LongSpecError(f"target: {folder} has no config.json; give a model's folder")
        if names.count(folder.name) > 1:
            raise LongSpecError(f"target: two are called {folder.name}; rename one's folder")


def for_each(option: str, values: Sequence[Any], targets: Sequence[Path]) -> Sequence[Any]:
    if len(values) not in (1, len(targets)):
        raise LongSpecError(
            f"{option}: {len(values)} values for {len(targets)} targets; give one, or one for each"
        )
    return [values[0]] * len(targets) if len(values) == 1 else values


if __name__ == "__main__":
    typer.run(main)
