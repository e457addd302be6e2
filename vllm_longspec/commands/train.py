"""`vllm-longspec train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_longspec.commands import DATA, INTERRUPTED, fail, mistakes_in_a_sentence
from vllm_longspec.commands.values import check_local, not_negative, positive


class Tracker(StrEnum):
    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"
    trackio = "trackio"


# Options of the one stage that is trained without --config, with their defaults.
STAGE_DEFAULTS: dict[str, Any] = {
    "steps": 3000,
    "learning_rate": 5e-4,
    "sequence_length": 1024,
    "sequences_per_step": 64,
    "sequences_per_batch": 64,
    "max_sequences": None,
    "anchor_offset": True,
    "flash_noisy": True,
    "learn_from": "text",
    "train_on": "text",
    "seed": 0,
}


def train(
    config: Annotated[
        Path | None,
        typer.Option(help="Recipe of several stages: a YAML file, or one of those that "
                     "`vllm-longspec recipes` lists; the options target, data, output, init, "
                     "window, gradient-checkpointing, checkpoint-every-minutes and log-with "
                     "override its keys, the others belong to a run without recipe."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Target model, folder or Hugging Face repository: a Llama, Qwen2, Qwen3, "
                     "Mistral, Gemma, Qwen-MoE, Mixtral or GLM-4.5."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"{DATA} Repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write the draft to. A run of the same options that was "
                     "interrupted there goes on."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from this draft: a next stage, on longer text.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens the draft's self-attention looks back.",
                     show_default="512, or the one of --init"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps.", show_default="3000")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(callback=positive, help="Peak learning rate.", show_default="0.0005"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens per sequence; longer documents are cut, shorter ones share a "
                     "sequence without seeing each other.", show_default="1024"),
    ] = None,
    sequences_per_step: Annotated[
        int | None,
        typer.Option(help="Sequences per optimiser step, over all GPUs.", show_default="64"),
    ] = None,
    sequences_per_batch: Annotated[
        int | None,
        typer.Option(help="Sequences of a batch on a GPU; lower it to fit memory, results stay the "
                     "same.", show_default="64"),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Use only the first so many.", show_default=False)
    ] = None,
    anchor_offset: Annotated[
        bool | None,
        typer.Option("--anchor-offset/--no-anchor-offset",
                     help="Train large positions on short text (anchor-offset indices).",
                     show_default="anchor-offset"),
    ] = None,
    flash_noisy: Annotated[
        bool | None,
        typer.Option("--flash-noisy/--no-flash-noisy",
                     help="Train with the target's cache 1 to 4 tokens behind, as while drafting, "
                     "instead of always 1.", show_default="flash-noisy"),
    ] = None,
    learn_from: Annotated[
        str | None,
        typer.Option(help="What the draft predicts: the next token of the text, or the target's "
                     "own distribution of it.", show_default="text", metavar="text|target"),
    ] = None,
    train_on: Annotated[
        str | None,
        typer.Option(help="All text, or answers only: completions and the assistant's turns, by "
                     "the tokenizer's chat template.", show_default="text", metavar="text|answers"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Data order, positions, shifts, initial weights.", show_default="0"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing",
                     help="Recompute the layer in the backward pass: less memory, more time.",
                     show_default="no-gradient-checkpointing"),
    ] = None,
    checkpoint_every_minutes: Annotated[
        float | None,
        typer.Option(callback=not_negative,
                     help="Minutes between checkpoints to go on from; Ctrl-C and SIGTERM write "
                     "one, too.", show_default="10"),
    ] = None,
    log_with: Annotated[
        list[Tracker] | None,
        typer.Option(help="Trackers that the numbers go to, too; repeatable.",
                     show_default="tensorboard, if installed"),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the run in --output; an error if there is none. A run "
                           "of the same recipe goes on without it, too.", show_default=False)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would take (memory, steps, disk), "
                           "and write its draft untrained, to try out serving.", show_default=False)
    ] = False,
) -> None:  # fmt: skip
    """Train a draft layer for a target model; on a GPU where there is one, else on the CPU.

    Several GPUs: accelerate launch -m vllm_longspec.cli train ...
    """
    general = {
        "target": target, "data": data or None, "output": output, "init": init, "window": window,
        "gradient_checkpointing": gradient_checkpointing,
        "checkpoint_every_minutes": checkpoint_every_minutes,
        "log_with": [tracker.value for tracker in log_with] if log_with else None,
    }  # fmt: skip
    stage: dict[str, Any] = {
        "steps": steps, "learning_rate": learning_rate, "sequence_length": sequence_length,
        "sequences_per_step": sequences_per_step, "sequences_per_batch": sequences_per_batch,
        "max_sequences": max_sequences, "anchor_offset": anchor_offset,
        "flash_noisy": flash_noisy, "learn_from": learn_from, "train_on": train_on,
        "seed": seed,
    }  # fmt: skip
    given = [name for name, value in stage.items() if value is not None]
    if config is not None and given:
        option = given[0].replace("_", "-")
        fail(f"--{option}: belongs to a stage; set it in the stages of {config}")
    with mistakes_in_a_sentence():
        from vllm_longspec.train import recipe as recipes

        if target is not None:
            check_local(target, "target")
        if config is not None:
            recipe = recipes.load_recipe(config, **general)
        else:
            stage = STAGE_DEFAULTS | {name: stage[name] for name in given}
            anchored = stage.pop("anchor_offset")
            stage["positions"] = "anchor-offset" if anchored else "natural"
            recipe = recipes.one_stage(**general, **stage)
        if resume and not (recipe.output / recipes.FILE).is_file():
            fail(f"--resume: {recipe.output} holds no run; leave --resume out to start one")
        from vllm_longspec.train import loop

        if not loop.train(recipe, dry_run):
            raise typer.Exit(INTERRUPTED)
