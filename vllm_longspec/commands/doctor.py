"""`vllm-longspec doctor`."""

import os
import warnings
from typing import Annotated

import typer


def doctor(
    target: Annotated[
        str | None,
        typer.Option(help="Target, folder or repository; default: the one the draft names."),
    ] = None,
    draft: Annotated[str | None, typer.Option(help="LongSpec draft, folder or repository.")] = None,
) -> None:
    """What keeps LongSpec from working here, each problem with its fix: GPU, versions, plugin, and
    with a draft whether it fits its target, its tree, memory and expected cost. No engine is
    started. Exit status 1 if there is a problem."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    from rich.console import Console

    from vllm_longspec.doctor import diagnose, report

    if not report(diagnose(target, draft), Console()):
        raise typer.Exit(1)
