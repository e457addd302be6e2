"""Equality with plain vLLM where vLLM works as on a GPU: asynchronous scheduling, profiling,
warm-up and full CUDA graphs, emulated on a CPU; and with nodes by batch size."""

from collections.abc import Iterator

import pytest
import torch
from gpu_like import generate_gpu_like
from helpers import assert_same, longspec, text_prompt
from processes import EngineProcess
from test_lossless import LONG_CONTEXT, Case, Plain, greedy
from vllm import SamplingParams

from vllm_longspec.runtime.menus import Menu, with_copies
from vllm_longspec.tree.budget import Plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)


@pytest.fixture(scope="module")
def plain() -> Iterator[Plain]:
    made = Plain()
    yield made
    made.engine.close()


def test_as_on_a_gpu(plain: Plain) -> None:
    """Asynchronous scheduling and full CUDA graphs, the latter replayed by hand."""
    prompts = [text_prompt(i, length) for i, length in enumerate((37, 300, 600, 120))]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=24 + 8 * i, ignore_eos=True)
        for i in range(4)
    ]
    got, replays = generate_gpu_like(longspec(), [(prompts, params), greedy(prompts[:1])])
    assert set(replays) == {
        f"{manager}, {count} requests"
        for manager in ("CudaGraphManager", "ModelCudaGraphManager")
        for count in (1, 4)
    }
    assert_same(plain.generate(prompts, params), got[0], prompts)
    assert_same(plain.generate(*greedy(prompts[:1])), got[1], prompts[:1])


BY_BATCH_SIZE = longspec(num_speculative_tokens_per_batch_size=[[1, 1, 31], [2, 3, 7], [4, 4, 0]])


def shrinking_batch() -> Case:
    """Requests that end one after the other, so that every budget is met on the way."""
    prompts = [text_prompt(i + 4, length) for i, length in enumerate((45, 310, 20, 130))]
    return prompts, [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12 + 12 * i, ignore_eos=True)
        for i in range(4)
    ]


@pytest.mark.full  # the next one has the same schedule, and a GPU's replays
def test_nodes_by_batch_size(plain: Plain) -> None:
    prompts, params = shrinking_batch()
    engine = EngineProcess(BY_BATCH_SIZE, **LONG_CONTEXT)
    try:
        got = [engine.generate(prompts, params), engine.generate(prompts[::-1], params)]
        accepted = engine.counters().get("accepted_tokens", 0)
    finally:
        engine.close()
    assert accepted > 12
    assert_same(plain.generate(prompts, params), got[0], prompts)
    assert_same(plain.generate(prompts[::-1], params), got[1], prompts)


@pytest.mark.full  # so does another plan at every step
def test_nodes_by_batch_size_as_on_a_gpu(plain: Plain) -> None:
    """Four at once have no tree: each row of the full graph is a root that sees itself, whatever
    vLLM's warm-up verified there before."""
    cases = [shrinking_batch(), greedy(shrinking_batch()[0])]
    got, replays = generate_gpu_like(BY_BATCH_SIZE, cases)
    assert {"CudaGraphManager, 1 requests", "ModelCudaGraphManager, 4 requests"} <= set(replays)
    for case, outputs in zip(cases, got, strict=True):
        assert_same(plain.generate(*case), outputs, case[0])


def test_another_plan_at_every_step(plain: Plain) -> None:
    """Outputs do not depend on the plan: none, a small tree, a wide one, a deep one, a copy, in
    turns that nobody could foresee, with requests that come and go."""
    small, wide, deep = Plan((2, 2), 3), Plan((8, 16), 20), Plan((2, 4, 4, 4, 4, 4), 12)
    menus = [
        with_copies(Menu(1, 2, (small, deep, wide), wide)),
        with_copies(Menu(3, 4, (small, deep), deep)),
    ]
    cases = [shrinking_batch(), greedy(shrinking_batch()[0])]
    got, counts = generate_gpu_like(longspec(), cases, menus, num_gpu_blocks_override=140)
    print(counts)
    assert min(counts[name] for name in ("none", "3 nodes", "12 nodes", "20 nodes")) > 2
    for case, outputs in zip(cases, got, strict=True):
        assert_same(plain.generate(*case), outputs, case[0])
