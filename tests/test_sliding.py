"""Equality with plain vLLM where layers slide: windows of a few blocks that roll over, a draft that
is nearly always wrong, blocks that are freed, cached, hit and preempted while trees are in flight.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import close, inspect_here, write_draft, write_target
from gpu_like import generate_gpu_like
from helpers import Engine, Output, assert_same, text_prompt
from processes import own_process
from vllm import SamplingParams

from vllm_longspec.runtime.menus import Menu, with_copies
from vllm_longspec.tree.budget import Plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

NAME = "mistral with layer_types"
WINDOW, BLOCK = 40, 16
Case = tuple[list[list[int]], list[Any]]


def case(prompts: list[list[int]], max_tokens: int) -> Case:
    return prompts, [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=max_tokens, ignore_eos=True)
        for i in range(len(prompts))
    ]


LONG = text_prompt(3, 300)
CASES = [
    # Around the edges of the window and of blocks; then what begins as they do, up to those edges.
    case([text_prompt(1, 1), text_prompt(2, WINDOW - 1), LONG[:161], text_prompt(4, 47)], 12),
    case([LONG[:WINDOW + 1], LONG[:161], [*LONG[:112], 7, 8, 9], [*LONG[:160], *LONG[:60]]], 8),
    case([LONG[:145], [*LONG[: 4 * BLOCK], 9, 9], LONG, text_prompt(5, WINDOW)], 8),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sliding")
    config = write_target(folder, NAME)
    write_draft(folder / "draft", config)
    return folder


OPTIONS: dict[str, Any] = {"block_size": BLOCK, "max_num_batched_tokens": 64, "max_model_len": 384}


def generate_plain(folder: Path) -> list[list[Output]]:

    inspect_here("MistralForCausalLM")
    engine = Engine(model=str(folder), **OPTIONS)
    outputs = [engine.generate(*each) for each in CASES]
    close(engine)
    return outputs


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[list[list[Output]]]:
    with own_process() as pool:
        yield pool.submit(generate_plain, folder).result()


def test_sliding_layers_as_on_a_gpu(folder: Path, plain: list[list[Output]]) -> None:
    """Asynchronous scheduling, replayed graphs, another plan at every step, more nodes than a block
    has tokens, and a pool that does not hold all four requests."""
    small, large = Plan((2, 2), 3), Plan((4, 8, 8, 8), 20)
    menus = [with_copies(Menu(1, 4, (small, large), large))]
    speculative = {"method": "longspec", "model": str(folder / "draft")}
    got, counts = generate_gpu_like(
        speculative, CASES, menus, model=str(folder), num_gpu_blocks_override=54, **OPTIONS
    )
    print(counts)
    assert min(counts[name] for name in ("none", "3 nodes", "20 nodes")) > 2
    assert counts["preemptions"] > 0
    for (prompts, _), expected, outputs in zip(CASES, plain, got, strict=True):
        assert_same(expected, outputs, prompts)
