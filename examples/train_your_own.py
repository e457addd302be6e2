"""From a folder of text to a served draft: collect, train, measure, serve.

python examples/train_your_own.py MY_TEXTS --target TARGET --output my-draft [--serve]
"""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from served import TARGET

from vllm_longspec.commands import fail
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_folder

FILES = ("train.jsonl", "held-out.jsonl", "draft", "acceptance.json")
HELD_OUT = 0.05  # of the text, for measuring


def read_texts(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The files of a folder with these suffixes, each once, undecodable and blank ones left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    texts = [path.read_bytes().decode(errors="ignore") for path in paths]
    found = list(dict.fromkeys(text for text in texts if text.strip()))
    if len(found) < 2:
        raise LongSpecError(
            f"folder: {folder} holds {len(found)} texts that end in {' or '.join(suffixes)}; "
            "training and measuring need at least 2, name other endings with --suffix"
        )
    return found


def split(texts: Sequence[str], held_out: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Whole texts, chosen at random, for training and for measuring: some of each."""
    shuffled = random.Random(seed).sample(list(texts), len(texts))
    characters = held_out * sum(map(len, texts))
    measured: list[str] = []
    while len(shuffled) > 1 and (not measured or sum(map(len, measured)) < characters):
        measured.append(shuffled.pop())
    return shuffled, measured


def write_lines(texts: Sequence[str], path: Path) -> None:
    """Raises LongSpecError where the file holds anything else: many data sets have its name."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines)
    elif path.read_text() != lines:
        raise LongSpecError(f"output: {path} holds other text; name a new or an empty folder")


def run(console: Console, *command: str) -> None:
    console.print(f"\n$ vllm-longspec {' '.join(command)}", style="bold", markup=False)
    done = subprocess.run([sys.executable, "-m", "vllm_longspec.cli", *command])
    if done.returncode:
        raise typer.Exit(done.returncode)


def main(
    folder: Annotated[Path, typer.Argument(help="Your text.", exists=True, file_okay=False)],
    target: Annotated[str, typer.Option(help="The model to draft for.")] = TARGET,
    output: Annotated[Path, typer.Option(help="Folder for data, draft and results.")] = Path(
        "my-draft"
    ),
    suffix: Annotated[list[str], typer.Option(help="Files to read; repeatable.")] = [  # noqa: B006
        ".txt",
        ".md",
        ".py",
    ],
    config: Annotated[
        Path | None,
        typer.Option(help="Recipe of several stages; `vllm-longspec recipes` lists some."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps, without a recipe.")] = 3000,
    sequences_per_step: Annotated[int, typer.Option(help="The same.")] = 64,
    measure_context: Annotated[int, typer.Option(help="Tokens of a prompt to measure on.")] = 1024,
    measure_prompts: Annotated[int, typer.Option(help="How many of these.")] = 20,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the draft at the end.")] = False,
) -> None:
    """Train a draft for your own text: collect it, train, measure on text held out, serve."""
    console = Console(highlight=False)
    try:
        train_file, held_out_file, draft, results = (output / name for name in FILES)
        claim_folder(output, FILES, inputs=(target,))
        train_texts, held_out = split(read_texts(folder, suffix), HELD_OUT)
        write_lines(train_texts, train_file)
        write_lines(held_out, held_out_file)
    except LongSpecError as error:
        fail(str(error))
    console.print(f"{len(train_texts)} texts to train on, {len(held_out)} held out, in {output}")

    stages = ("--config", str(config)) if config else (
        "--steps", str(steps), "--sequences-per-step", str(sequences_per_step),
        "--sequences-per-batch", str(min(8, sequences_per_step)),
    )  # fmt: skip
    run(console, "train", "--target", target, "--data", str(train_file), "--output", str(draft),
        *stages)  # fmt: skip
    run(console, "eval", "replay", "--target", target, "--draft", str(draft), "--data",
        str(held_out_file), "--context", str(measure_context), "--num-prompts",
        str(measure_prompts), "--output", str(results))  # fmt: skip
    command = f"vllm serve {target} --speculative-model {draft}"
    console.print(f"\n$ {command}", style="bold", markup=False)
    if serve:
        subprocess.run([sys.executable, "-m", "vllm.entrypoints.cli.main", *command.split()[1:]])


if __name__ == "__main__":
    typer.run(main)
