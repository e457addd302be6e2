"""Short runs of the trainer on a CPU, for several test modules. Fixtures have to be imported."""

import json
import lzma
import os
import socket
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TARGET, documents
from processes import context
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.train import held_out

MAX_HELD_OUT = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long and short documents."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl.xz"
    with lzma.open(path, "wt") as lines:
        for i, text in enumerate(documents()[:6]):
            lines.write(json.dumps(text[:20_000] if i % 2 else {"text": text[: 300 * i]}) + "\n")
    return path


@pytest.fixture(autouse=True)
def on_the_cpu_with_an_own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    monkeypatch.setenv("HF_HOME", str(base / "huggingface"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr(held_out, "MAX_HELD_OUT", MAX_HELD_OUT)


def write_recipe(folder: Path, data: Path, **changes) -> Path:
    """Two stages."""
    short = {
        "name": "short", "steps": 4, "learning_rate": 4e-3, "sequence_length": 64,
        "sequences_per_step": 4, "sequences_per_batch": 4, "positions": "anchor-offset",
    }  # fmt: skip
    long = short | {"name": "long", "sequence_length": 200, "positions": "natural", "steps": 3}
    content = {
        "target": str(TARGET), "output": str(folder / "draft"), "data": str(data),
        "stages": [short, long],
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def run(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=False)


def one_stage(data: Path, output: Path, *more: object):
    return run(
        "--target", TARGET, "--data", data, "--output", output, "--sequence-length", 128,
        "--sequences-per-step", 4, "--sequences-per-batch", 4, *more,
    )  # fmt: skip


def spawned(*calls: tuple) -> list[int]:
    """Exit codes of new processes, one a call: a function and its arguments, at the same time. They
    are forked from a server that has imported what they need, and has none of torch's threads."""
    environment, forked = dict(os.environ), context()
    processes = [forked.Process(target=in_environment, args=(environment, *call)) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]


def in_environment(environment: dict[str, str], function, *arguments) -> None:
    os.environ.clear()
    os.environ.update(environment)
    hold_out_little(function, *arguments)


def hold_out_little(function, *arguments) -> None:
    held_out.MAX_HELD_OUT = MAX_HELD_OUT
    function(*arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def as_process(rank: int, size: int, port: int) -> None:
    """As `accelerate launch` starts it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
