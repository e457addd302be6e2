"""Processes for tests, and an engine in one: vLLM is imported in a server that they are forked
from, so that one starts at once, where an engine of vLLM's own processes imports it twice more."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import torch
from helpers import Engine, Output

PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader.default_loader",
    "transformers.models.llama.modeling_llama",
    "vllm_longspec.runtime.proposer",
    "vllm_longspec.train.loop",
    "vllm_longspec.bench.train_step",
]


def context() -> BaseContext:
    """Processes with this one have vLLM, and what trains drafts, imported, and no threads."""
    # CUDA cannot be used in a process that was forked after it was.
    chosen = get_context("spawn" if torch.cuda.is_available() else "forkserver")
    chosen.set_forkserver_preload(PRELOADED)  # one server for all: the first one to ask decides
    return chosen


def own_process() -> ProcessPoolExecutor:
    """Of one worker, with this process's environment."""
    return ProcessPoolExecutor(1, context(), _start, (dict(os.environ),))


def _start(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    gc.freeze()  # vLLM collects garbage ten times before it serves


_engine: list[Engine] = []  # of this process


class EngineProcess:
    """An `Engine` in a process of its own; others may run beside it."""

    def __init__(self, speculative_config: dict[str, Any] | None = None, **options: Any) -> None:
        self.process = own_process()
        try:
            self.process.submit(_make, speculative_config, options).result()
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(engine, *arguments)` there."""
        return self.process.submit(_call, function, arguments).result()

    def generate(self, prompts: list[list[int]], params: list[Any]) -> list[Output]:
        outputs: list[Output] = self.call(Engine.generate, prompts, params)
        return outputs

    def one_by_one(self, prompts: list[list[int]], params: list[Any]) -> list[Output]:
        outputs: list[Output] = self.call(Engine.one_by_one, prompts, params)
        return outputs

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self.call(Engine.counters)
        return counters

    def counter(self, name: str) -> int:
        return int(self.call(Engine.counter, name))

    def close(self) -> None:
        self.process.shutdown()


def _make(speculative_config: dict[str, Any] | None, options: dict[str, Any]) -> None:
    _engine.append(Engine(speculative_config, **options))


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(_engine[0], *arguments)
