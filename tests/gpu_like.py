"""What vLLM does on a GPU only, done on a CPU: asynchronous scheduling, full CUDA graphs, and what
runs before the first request: profiling, a capture over a throwaway cache, the warm-up of kernels.

A CUDA graph replays the kernels of one call on the memory they had then. Here a "graph" is that
call itself, kept with the metadata it was captured with and made again: whatever a backend or the
proposer does not keep in persistent buffers, or gets wrong for padded requests, shows as other
tokens.
"""

import random
from collections import Counter
from typing import Any

from helpers import Engine, Output
from processes import own_process

from vllm_longspec.runtime.menus import Menu

CAPTURE_SIZES = [1, 4, 32, 128]  # so that two or three requests are padded to four


def generate_gpu_like(
    speculative_config: dict[str, Any],
    batches: list[tuple[list[list[int]], list[Any]]],  # prompts and sampling parameters
    menus: list[Menu] | None = None,  # from which each step draws a plan at random, or none
    **options: Any,
) -> tuple[list[list[Output]], Counter[str]]:
    """The outputs of each batch, and how often a graph of each kind was replayed and, with `menus`,
    each plan was taken and requests were preempted."""
    with own_process() as pool:
        return pool.submit(_generate, speculative_config, batches, menus, options).result()


def _generate(speculative_config: Any, batches: Any, menus: Any, options: dict[str, Any]) -> Any:
    allow_async_scheduling()
    replays: Counter[str] = Counter()
    replay_graphs(replays)
    start_as_a_gpu_worker()
    if menus is not None:
        choose_at_random(menus, replays)
    engine = Engine(speculative_config, async_scheduling=True, **options)
    outputs = [engine.generate(*batch) for batch in batches]
    if menus is not None:
        replays["preemptions"] = engine.counter("vllm:num_preemptions")
    return outputs, replays


def allow_async_scheduling() -> None:
    """vLLM turns it off on CPUs as "not required"."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore


def replay_graphs(replays: Counter[str]) -> None:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    init = CudaGraphManager.__init__
    type(current_platform).get_global_graph_pool = lambda self: None

    def init_with_graphs(
        self: Any, vllm_config: Any, device: Any, mode: Any, decode_query_len: int, **kwargs: Any
    ) -> None:
        vllm_config.compilation_config.cudagraph_capture_sizes = CAPTURE_SIZES
        vllm_config.compilation_config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        init(self, vllm_config, device, mode, decode_query_len, **kwargs)

    def capture(self: Any, create_forward_fn: Any, progress_bar_desc: str) -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL][: self._max_full_descs_to_capture]:
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            self.graphs[desc] = create_forward_fn(desc, warmup=False)
            self.graphs[desc](CUDAGraphMode.NONE)
        self._graphs_captured = True

    def run_fullgraph(self: Any, desc: Any) -> None:
        replays[f"{type(self).__name__}, {desc.num_reqs} requests"] += 1
        self.graphs[desc](CUDAGraphMode.NONE)

    CudaGraphManager.__init__ = init_with_graphs
    CudaGraphManager.capture = capture
    CudaGraphManager.run_fullgraph = run_fullgraph


def choose_at_random(menus: list[Menu], taken: Counter[str]) -> None:
    """The worst controller: another plan at every step, whatever it costs."""
    from vllm_longspec.runtime import options
    from vllm_longspec.runtime.controller import NONE
    from vllm_longspec.runtime.proposer import LongSpecProposer

    rng = random.Random(0)

    def choose(self: Any, input_batch: Any, most: int) -> int:
        plan = any_plan(rng, self, input_batch, most)
        taken["none" if plan == NONE else f"{self.plans[plan].m} nodes"] += 1
        return plan

    options.resolve_menus = lambda *args, **kwargs: menus
    LongSpecProposer.choose = choose


def any_plan(rng: random.Random, proposer: Any, input_batch: Any, most: int) -> int:
    """In the place of `LongSpecProposer.choose`."""
    from vllm_longspec.runtime.controller import NONE

    menu = proposer.menus[input_batch.num_reqs]
    return rng.choice([NONE, *(plan for plan in menu if proposer.plans[plan].m <= most)])


def start_as_a_gpu_worker() -> None:
    """What vLLM's `Worker` does between loading a model and serving it, in its order."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.cudagraph_utils import (
        _FULL_GRAPH_PROFILING_SAMPLES,
        _init_minimal_kv_cache_for_profiling,
        _teardown_profiling_state,
    )
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    from vllm_longspec.runtime import proposer

    # There they are compiled only.
    proposer.compile_ahead = lambda device, programs: [program() for program in programs]
    determine, warm_up = CPUWorker.determine_available_memory, CPUWorker.compile_or_warm_up_model

    def determine_available_memory(self: Any) -> int:
        runner = self.model_runner
        runner.compilation_config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
        runner.profile_run()
        _init_minimal_kv_cache_for_profiling(runner)
        runner.cudagraph_manager._max_full_descs_to_capture = _FULL_GRAPH_PROFILING_SAMPLES
        capture_graphs(runner)
        _teardown_profiling_state(runner)
        return determine(self)

    def compile_or_warm_up_model(self: Any) -> Any:
        times = warm_up(self)
        warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens)
        capture_graphs(self.model_runner)
        return times

    CPUWorker.determine_available_memory = determine_available_memory
    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model


def capture_graphs(runner: Any) -> None:
    runner.cudagraph_manager.capture(
        runner.model, runner.model_state, runner.input_buffers, runner.intermediate_tensors,
        runner.block_tables, runner.attn_groups, runner.kv_cache_config,
    )  # fmt: skip
    runner.speculator.capture()
