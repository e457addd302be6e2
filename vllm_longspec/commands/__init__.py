"""The commands, a file for each group; `vllm_longspec/cli.py` puts them together. They know what
options are called and whom to call, not how anything is done."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from vllm_longspec.config import LongSpecError

# What every command that reads text says of --data; `vllm_longspec/records.py` reads it.
DATA = (
    "JSON lines (.xz, .gz, .bz2, .zst too), .parquet, hf:DATASET or hf:DATASET:SPLIT; a record is "
    "a text, or has text, prompt and completion, or messages."
)


def fail(message: str) -> None:
    print(f"vllm-longspec: {message}", file=sys.stderr)
    raise typer.Exit(2)


@contextmanager
def mistakes_in_a_sentence() -> Iterator[None]:
    try:
        yield
    except LongSpecError as error:
        fail(str(error))


def kv_cache(gib: float | None) -> dict[str, Any]:
    """vLLM's engine arguments for a KV cache of this size; None: all memory that is free.

    With a size given, other programs may hold the rest of the memory: vLLM wants its usual share of
    the whole to be free when an engine starts, and asks for a twentieth then.
    """
    if gib is None:
        return {}
    return {"kv_cache_memory_bytes": int(gib * 2**30), "gpu_memory_utilization": 0.05}
