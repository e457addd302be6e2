"""Compares what `compile_ahead` has compiled with what proposals launch: `python ahead.py`.

As on a GPU but for the compiler and the launches, in a process of its own, since Triton either
compiles or interprets. Prints JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

SHAPES: tuple[tuple[int, ...], ...] = ((4, 16, 16), (64, 8), ())
BATCHES = (1, 2, 3, 5, 8, 12, 16, 24)
HEADS, HEAD_SIZE = (32, 8), 16


def in_subprocess() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"VLLM_PLUGINS": "", "TRITON_INTERPRET": "0",
                          "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


class Program:
    """In the place of a `CompiledKernel`."""

    function = packed_metadata = metadata = None

    def __init__(self, src: Any) -> None:
        self.src = src

    def launch_metadata(self, *args: Any) -> None:
        """None."""

    def run(self, *args: Any) -> None:
        names = self.src.fn.arg_names
        values = dict(zip(names, args[-len(names) :], strict=True))
        if self.src.fn.fn.__name__ == "_place_level_kernel":
            values["positions_ptr"].zero_()
            starts = values["query_starts_ptr"]
            starts.copy_(torch.arange(len(starts)) * values["width"])


def compile_program(src: Any, failing: tuple[str, ...] = (), **_: Any) -> Program:
    """In the place of `triton.compile`."""
    if src.fn.fn.__name__ in failing:
        raise RuntimeError(f"{src.fn.fn.__name__} does not compile")
    return Program(src)


class Driver:
    """An H200's."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, src: Any, metadata: Any) -> None:
        """Nothing to link."""


@contextmanager
def filled(value: int) -> Iterator[None]:
    """What `torch.empty` finds in memory."""
    empty = torch.empty

    def filled_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs).fill_(value)

    with patch("torch.empty", filled_empty):
        yield


def proposals() -> tuple[Any, list[Any]]:
    """A small draft with random weights, and plans."""
    from test_draft_layer import MAX_POSITION, VOCAB, load, random_layer, served_layer, small_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from vllm_longspec.draft.beam import TreePlan
    from vllm_longspec.draft.inputs import ProposalInputs
    from vllm_longspec.draft.longspec import LongSpecDraft
    from vllm_longspec.draft.lookup import Lookup
    from vllm_longspec.draft.model import TargetParts
    from vllm_longspec.tree.lookup import COPY_DEPTH
    from vllm_longspec.verify.tree_state import TreeState

    cpu = torch.device("cpu")
    plans = [TreePlan.build(shape, 3, cpu, COPY_DEPTH) for shape in SHAPES]
    most, depth = max(BATCHES), max(plan.max_depth for plan in plans)
    config = small_config(*HEADS, HEAD_SIZE)
    model = served_layer(config)
    load(model, random_layer(config))
    embedding, head = torch.randn(VOCAB, config.hidden_size), torch.randn(config.hidden_size, VOCAB)
    rope = get_rope(HEAD_SIZE, MAX_POSITION, rope_parameters=config.rope_parameters)
    model.target = TargetParts(lambda ids: embedding[ids], None, lambda hidden: hidden @ head, rope)
    cache = torch.zeros(most, HEADS[1], 512, 2 * HEAD_SIZE)
    model.ring = SimpleNamespace(kv_cache=cache)
    draft = LongSpecDraft.__new__(LongSpecDraft)
    rows = torch.arange(most)
    vars(draft).update(
        model=model,
        device=cpu,
        dtype=torch.float32,
        max_model_len=MAX_POSITION,
        inputs=ProposalInputs.allocate(most, depth, cpu),
        lookup=Lookup(most, MAX_POSITION, cpu),
        state=TreeState.allocate(most, 8, depth, cpu),
        draft_tokens=torch.zeros(most, 8, dtype=torch.int64),
        new_token_rows=rows[:, None].repeat(1, depth + 1),
        block_tables=SimpleNamespace(input_block_tables=[rows[:, None].int()] * 2),
        target_group=0, ring_group=1, blocks_per_ring=1,
        target_cache=lambda: cache,
    )  # fmt: skip
    return draft, plans


def main() -> dict[str, Any]:
    import triton.compiler
    from triton.runtime import driver, jit

    from vllm_longspec.runtime import compile_ahead

    driver.set_active(Driver())
    launch = jit.JITFunction.run
    launched: set[Any] = set()

    def noted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add(kernel)
        return launch(kernel, *args, **kwargs)

    def found() -> list[str]:
        return sorted(
            f"{kernel.fn.__name__}: {key}" for kernel in launched
            for key in kernel.device_caches[0][0]
        )  # fmt: skip

    def forget() -> None:
        for kernel in launched:
            kernel.device_caches.clear()

    def compiler(*failing: str) -> Any:
        forget()  # Each kernel keeps the compiler it found first.
        return patch.object(triton.compiler, "compile", partial(compile_program, failing=failing))

    draft, plans = proposals()
    every = [partial(draft.grow, size, plan) for plan in plans for size in BATCHES]
    some: list[Callable[[], None]] = []
    for plan in plans:
        first = {draft.specialisation(size, plan): size for size in reversed(BATCHES)}
        some += [partial(draft.grow, size, plan) for size in first.values()]
    with patch.object(jit.JITFunction, "run", noted):
        with compiler(), filled(10**9):
            assert compile_ahead.compile_in_threads(some) == []
            ahead = found()
        with compiler(), filled(0):
            for proposal in every:
                proposal()
            as_launched = found()
        with compiler("_expand_kernel"), filled(10**9):
            failed = compile_ahead.compile_in_threads(some)
            without = found()
            # As a start does: one line of the log.
            compile_ahead.compile_ahead(torch.device("cuda"), [lambda: 1 / 0, *some])
        assert jit.JITFunction.run is noted
    return {
        "calls": [len(some), len(every)],
        "ahead": ahead,
        "launched": as_launched,
        "failed": [str(error) for error in failed],
        "without": without,
    }


if __name__ == "__main__":
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        initialize_model_parallel(1)
        print(json.dumps(main()))
