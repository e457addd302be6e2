"""Which CUDA graphs are captured, on vLLM's own lists of candidates and its own dispatch."""

import weakref
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

from vllm_longspec.runtime import profiling
from vllm_longspec.runtime.graphs import batches_to_capture, choose_graphs, coarse, graph_sizes
from vllm_longspec.runtime.menus import Menu, menu_of_each_batch, only
from vllm_longspec.tree.budget import Plan

DEFAULT_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
H200 = [(1, 2, 31), (3, 4, 23), (5, 8, 11), (9, 16, 5), (17, 64, 3), (65, 256, 2)]


def manager(
    schedule: list[tuple[int, int, int]],
    max_num_reqs: int,
    sizes: list[int],
    mode: CUDAGraphMode,
    decode_query_len: int | None = None,
    lora_cases: list[int] | None = None,
) -> CudaGraphManager:
    """One with all that vLLM would capture; without the GPU that its constructor asks for."""
    most = max(m for _, _, m in schedule)
    graphs = object.__new__(CudaGraphManager)
    graphs.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens_per_batch_size=schedule,
            uses_dynamic_speculative_decoding=lambda: True,
        ),
        num_speculative_tokens=most,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    graphs.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes)
    )
    graphs.cudagraph_mode = mode
    graphs.decode_query_len = decode_query_len or most + 1
    graphs.max_num_reqs = max_num_reqs
    graphs.varlen_decode = False
    graphs.ubatch_runner = None
    graphs.lora_capture_cases = lora_cases or [0]
    graphs._lora_dispatch_map, graphs._max_lora_case = graphs._build_lora_dispatch_map()
    graphs._candidates, graphs._capture_descs, graphs.graphs = {}, {}, {}
    graphs._graphs_captured = True
    graphs._init_candidates()
    return graphs


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    ranges, first = [], 1
    for _ in range(draw(st.integers(1, 4))):
        last = first + draw(st.integers(0, 9))
        ranges.append((first, last, draw(st.integers(1, 31))))
        first = last + 1
    return ranges


@given(
    schedules(),
    st.integers(1, 40),
    st.lists(st.integers(1, 300), min_size=1, max_size=12, unique=True),
    st.sampled_from([CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY]),
    st.booleans(),
    st.sampled_from([[0], [0, 3], [0, 1, 2, 4]]),
)
def test_only_what_the_menus_can_produce(
    schedule: list[tuple[int, int, int]],
    max_num_reqs: int,
    sizes: list[int],
    mode: CUDAGraphMode,
    with_plain: bool,
    lora_cases: list[int],
) -> None:
    everything = manager(schedule, max_num_reqs, sizes, mode, lora_cases=lora_cases)
    graphs = manager(schedule, max_num_reqs, sizes, mode, lora_cases=lora_cases)
    menus = [only(first, last, Plan((m,), m)) for first, last, m in schedule]
    batches = batches_to_capture(menus, max_num_reqs, with_plain)
    choose_graphs(graphs, batches)

    captured = {desc for descs in graphs._capture_descs.values() for desc in descs}
    used = set()
    for rows, counts in batches.items():
        # Where vLLM captures this number of tokens a request, its batch sizes.
        vllms = {
            desc.num_reqs
            for desc in everything._capture_descs.get(CUDAGraphMode.FULL, [])
            if desc.uniform_token_count == rows
        }
        assert not vllms or vllms == set(graph_sizes(graphs, rows))
        for count, num_loras in product(counts, lora_cases):
            got = graphs.dispatch(count, count * rows, rows, num_loras)
            holding = [size for size in graph_sizes(graphs, rows) if size >= count]
            assert (got.cg_mode == CUDAGraphMode.FULL) == bool(holding)
            if holding:
                assert got.num_reqs == min(holding) and got.num_tokens == rows * min(holding)
                assert got.num_active_loras == num_loras
                used.add(got)
    assert used == {desc for desc in captured if desc.uniform_token_count is not None}
    for count in range(1, max_num_reqs + 1):
        for rows in batches:
            got = graphs.dispatch(count, count * rows, rows, lora_cases[-1])
            assert got.cg_mode == CUDAGraphMode.NONE or got in captured
        assert graphs.dispatch(1, count, None, 0) == everything.dispatch(1, count, None, 0)


def test_the_default_schedule_needs_few_graphs() -> None:
    graphs = manager(H200, 256, DEFAULT_SIZES, CUDAGraphMode.FULL_AND_PIECEWISE)
    before = len(graphs._capture_descs[CUDAGraphMode.FULL])
    choose_graphs(graphs, {m + 1: list(range(a, b + 1)) for a, b, m in H200})
    after = len(graphs._capture_descs[CUDAGraphMode.FULL])
    print(f"{before} graphs, {after} kept")
    assert after < before / 2


@given(st.integers(1, 600), st.integers(0, 600))
def test_coarse_batches_hold_every_batch(first: int, more: int) -> None:
    batches = list(range(first, first + more + 1))
    sizes = coarse(batches)
    for batch in batches:
        holding = min(size for size in sizes if size >= batch)
        assert holding == batch or holding < 1.25 * batch
    doublings = batches[-1].bit_length() - batches[0].bit_length() + 1
    assert len(sizes) <= 8 * doublings and sizes[-1] == batches[-1]


def test_proposals_of_the_default_schedule_need_few_graphs() -> None:
    kept = 0
    for first, last, _ in H200:
        graphs = manager(H200, 256, DEFAULT_SIZES, CUDAGraphMode.FULL_DECODE_ONLY, 1)
        choose_graphs(graphs, {1: coarse(list(range(first, last + 1)))})
        kept += len(graphs._capture_descs[CUDAGraphMode.FULL])
    print(f"{kept} graphs of {len(DEFAULT_SIZES)} sizes")
    assert kept <= 20


def test_plans_beside_the_default_have_coarse_graphs() -> None:
    small, default, deep = Plan((1, 1), 2), Plan((4, 4), 7), Plan((2,) * 8, 11)
    menus = [Menu(1, 8, (small, default, deep), default), Menu(9, 40, (small,), None)]
    batches = batches_to_capture(menus, 64, adaptive=True)
    assert batches[1] == list(range(1, 65)) and batches[8] == list(range(1, 9))
    assert batches[12] == list(range(1, 9)) and batches[3] == coarse(range(1, 65))
    assert batches_to_capture(menus, 64, adaptive=False) == {
        1: list(range(9, 65)), 8: list(range(1, 9)),
    }  # fmt: skip
    assert [menu.default for menu in menu_of_each_batch(menus, 10)[8:]] == [default, None, None]


def test_graphs_left_out_of_the_profile_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much memory is taken from what is free, whatever torch has unused, until vLLM drops the
    target's graphs."""
    mib, unused, held = 2**20, 3 * 2**20, []

    def empty(size: int, **_: Any) -> torch.Tensor:
        held.append((size, weakref.ref(made := torch.zeros(1))))
        return made

    def memory_info() -> tuple[int, int]:
        taken = sum(size for size, tensor in held if tensor() is not None)
        return 2**30 - max(0, taken - unused), 2**30

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", memory_info)
    plans = [
        manager([(1, 8, 1)], 8, [1, 2, 4, 8], CUDAGraphMode.FULL_DECODE_ONLY, 1) for _ in range(2)
    ]
    target = manager([(1, 8, 1)], 8, [1, 2, 4, 8], CUDAGraphMode.FULL_DECODE_ONLY)
    target.device, target._max_full_descs_to_capture = torch.device("cpu"), None
    monkeypatch.setattr(profiling, "target_graphs", weakref.ref(target))
    for graphs in plans:
        graphs._max_full_descs_to_capture = graphs._capture_mem_samples = None
    profiling.sample_graphs(plans)
    profiling.hold_other_graphs(plans)
    assert plans[0]._max_full_descs_to_capture is None and not held

    target._max_full_descs_to_capture = 2
    profiling.sample_graphs(plans)
    assert [graphs._max_full_descs_to_capture for graphs in plans] == [2, 2]
    plans[0]._capture_mem_samples += [40 * mib, 2 * mib]
    plans[1]._capture_mem_samples += [0, 0]
    profiling.hold_other_graphs(plans)
    # Of four each two are left out, at 2 MiB and at no less than 1.
    assert memory_info()[0] == 2**30 - 6 * mib
    del target
    assert memory_info()[0] == 2**30
