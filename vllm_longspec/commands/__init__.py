"""The commands, a file for each group; `vllm_longspec/cli.py` puts them together."""

import sys
from typing import Any

import typer


def fail(message: str) -> None:
    print(f"vllm-longspec: {message}", file=sys.stderr)
    raise typer.Exit(2)


def kv_cache(gib: float | None) -> dict[str, Any]:
    """vLLM's engine arguments for a KV cache of this size; None: all memory that is free."""
    return {} if gib is None else {"kv_cache_memory_bytes": int(gib * 2**30)}
