"""The server that the examples talk to: a running one, or one started for as long as needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from vllm_longspec.endpoint import base_url
from vllm_longspec.eval.server import start_server, stop_server, wait_until_ready

MODELS = Path(__file__).resolve().parent / "models"
TARGET, DRAFT = str(MODELS / "nano-target"), str(MODELS / "nano-draft")
# vLLM on a CPU, for the pair in examples/models; a GPU gets vLLM's defaults.
ON_A_CPU = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 8192,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 2**28,
}


def engine_options() -> dict[str, str | int | bool]:
    return {} if torch.cuda.is_available() else ON_A_CPU


def flags(options: dict[str, str | int | bool]) -> list[str]:
    """As `vllm serve` takes them."""
    named = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    return [part for flag, value in named for part in (flag, str(value))[: 1 + (value is not True)]]


@contextmanager
def served(url: str | None, target: str, draft: str, console: Console) -> Iterator[str]:
    """The URL of a server, without /v1: the given one, or of `vllm serve` with LongSpec."""
    if url is not None:
        yield base_url(url)
        return
    arguments = ["--speculative-model", draft, *flags(engine_options())]
    server = start_server(target, arguments)
    try:
        with console.status(f"vllm serve {target} {' '.join(arguments)}"):
            wait_until_ready(server)
        yield server.url
    finally:
        stop_server(server)
