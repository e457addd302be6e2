"""The commands, a file for each group; `vllm_longspec/cli.py` puts them together."""

import sys

import typer


def fail(message: str) -> None:
    print(f"vllm-longspec: {message}", file=sys.stderr)
    raise typer.Exit(2)
