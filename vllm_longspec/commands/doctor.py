"""`vllm-longspec doctor`."""

import os
import warnings
from typing import Annotated

import typer

from vllm_longspec.commands import mistakes_in_a_sentence


def doctor(
    target: Annotated[
        str | None,
        typer.Option(help="Target, folder or repository; default: the one the draft names."),
    ] = None,
    draft: Annotated[str | None, typer.Option(help="LongSpec draft, folder or repository.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU to expect costs of, such as H100; default: the one that is here."),
    ] = None,
) -> None:
    """What keeps LongSpec from working here, each problem with its fix: GPU, versions, plugin, and
    with a draft whether it fits its target, its tree, memory and expected cost. For a target a
    table of what each plan costs by the model. No engine is started. Exit status 1 if there is a
    problem."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    with mistakes_in_a_sentence():
        from rich.console import Console

        from vllm_longspec.doctor import cost_table, diagnose, report

        console = Console()
        checks = diagnose(target, draft)
        fine = report(checks, console)
        table = cost_table(target, draft, gpu, checks)
        if table is not None:
            console.print(table)
    if not fine:
        raise typer.Exit(1)
