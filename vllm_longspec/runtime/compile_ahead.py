"""Compiles the package's kernels on all cores, before a CUDA graph records the first proposal.

Triton compiles a kernel when it is launched for the first time, one after another on one core. Here
proposals run in which the package's kernels are not launched but handed to threads that compile
them: MLIR and LLVM work without Python's lock, `ptxas` is a process. The launches after that find
all of them in Triton's cache; what is missing there is compiled when it is launched, as ever.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime._async_compile import FutureKernel
from triton.runtime.jit import JITFunction
from vllm.logger import init_logger

logger = init_logger("vllm.longspec")

MAX_THREADS = 16
# What kernels write that torch's and vLLM's index by has to be right: small ones are launched
# nevertheless, of others the outputs are zeros.
LAUNCHED = ("_place_level_kernel",)
ZEROED = {"_expand_kernel": "level_tokens_ptr"}


def compile_ahead(device: torch.device, proposals: Iterable[Callable[[], Any]]) -> None:
    """Calls each of `proposals`, which have to be harmless where nothing is launched. Does nothing
    where kernels are not compiled for a GPU; whatever fails is left to the launches."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return
    started = time.monotonic()
    try:
        # Triton 3.6 leaves its mode on after some failures: only in this context.
        failures = copy_context().run(compile_in_threads, proposals)
    except Exception as error:
        failures = [error]
    if failures:
        logger.warning_once(
            "LongSpec: kernels are compiled one after another when they are first launched, which "
            "makes a first start longer: %s", repr(failures[0])[:500],
        )  # fmt: skip
    logger.info_once(
        "LongSpec: kernels were compiled, or loaded, in %.1f s",
        time.monotonic() - started,
    )


def compile_in_threads(proposals: Iterable[Callable[[], Any]]) -> list[BaseException]:
    """What went wrong in the threads."""
    launch = JITFunction.run
    compiled: set[JITFunction[Any]] = set()
    here = threading.get_ident()  # another engine of the process may serve meanwhile

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        name = kernel.fn.__name__
        ours = kernel.fn.__module__.startswith("vllm_longspec.")
        if ours and threading.get_ident() == here:
            compiled.add(kernel)
            warmup = warmup or name not in LAUNCHED
            if name in ZEROED:
                args[kernel.arg_names.index(ZEROED[name])].zero_()
        return launch(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with ThreadPoolExecutor(num_threads(), "longspec-compile") as pool:
        mode = CompileAndLink(pool, ignore_errors=True)
        JITFunction.run = run
        try:
            with mode, torch.inference_mode():
                for proposal in proposals:
                    proposal()
        finally:
            JITFunction.run = launch
            forget_unfinished(compiled)
    errors = (future.exception() for future in mode.raw_futures)
    return [error for error in errors if error is not None]


class CompileAndLink(triton.AsyncCompileMode):
    """Triton 3.6 makes a C program for each signature that a kernel is launched with, too, and runs
    a C compiler; once it is in the cache of the disk the launch finds it there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.locks: dict[str, threading.Lock] = {}
        self.linked: set[str] = set()

    def submit(self, key: Any, compile_fn: Callable[[], Any], finalize_fn: Any) -> Any:
        def compile_and_link() -> Any:
            program = compile_fn()
            signature = str(program.src.signature)
            with self.locks.setdefault(signature, threading.Lock()):
                if signature not in self.linked:
                    driver.active.launcher_cls(program.src, program.metadata)
                    self.linked.add(signature)
            return program

        return super().submit(key, compile_and_link, finalize_fn)


def forget_unfinished(kernels: Iterable[Any]) -> None:
    """Triton 3.7 and later keep a failed compilation in the cache, to raise it at every launch."""
    for kernel in kernels:
        for kernel_cache, *_ in kernel.device_caches.values():
            for key, program in list(kernel_cache.items()):
                if isinstance(program, FutureKernel):
                    del kernel_cache[key]


def num_threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))
