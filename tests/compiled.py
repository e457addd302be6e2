"""Compiles the package's kernels for GPUs that are not here: `python compiled.py CHIPS CASES ONLY`.

Launchers run with tensors of a CPU and what they launch is compiled with the parameters they chose,
in a process of its own, since Triton either compiles or interprets. Prints JSON.
"""

import ast
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # at most, for one program
FP8_SINCE = 89
PACKAGE = Path(__file__).resolve().parents[1] / "vllm_longspec"


@dataclass(frozen=True)
class Case:
    """A cycle of requests that grow and verify trees."""

    head_size: int = 128
    heads: tuple[int, int] = (32, 8)
    tree_shape: tuple[int, ...] = (4, 16, 16, 16, 16)
    m: int = 31
    num_reqs: tuple[int, ...] = (1, 16, 128)
    dtype: str = "bfloat16"
    vocab_size: int = 128_256
    hidden_size: int = 4096
    inner_size: int = 14_336
    # Ring blocks of so many slots.
    slots: int = 512
    window: int = 512
    trimmed: bool = False


@dataclass(frozen=True)
class Program:
    kernel: str
    chip: int
    num_warps: int
    num_stages: int
    constants: dict[str, Any]
    shared: int  # bytes
    tensor_memory: int  # columns, sm_100's
    spilled: int | None  # bytes a thread, from ptxas; None: not asked


def in_subprocess(
    chips: Iterable[int],
    cases: Iterable[Case],
    assemble: bool = False,
    only: Iterable[str] = (),
) -> tuple[list[str], list[Program]]:
    """The names of the package's kernels, and what the cases launched of them, or of `only`
    these."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(list(chips)), json.dumps([asdict(c) for c in cases]),
         json.dumps(list(only)), *["--assemble"] * assemble],
        # Without the plugin's backend for CPUs, Triton is as on a GPU.
        env=os.environ | {"VLLM_PLUGINS": "", "TRITON_INTERPRET": "0",
                          "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    out = json.loads(done.stdout.splitlines()[-1])
    return out["kernels"], [Program(**program) for program in out["programs"]]


def modules_with_kernels() -> list[str]:
    return [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if "@triton.jit" in path.read_text()
    ]


def kernel_names(functions: dict[str, Any]) -> list[str]:
    """Of the functions under `triton.jit`, those that no other one calls."""
    called = {
        node.func.id
        for function in functions.values()
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return sorted(set(functions) - called)


class Compiler:
    """In the place of `JITFunction.run`."""

    def __init__(self, assemble: bool, only: list[str]) -> None:
        self.assemble = assemble
        self.only = only  # empty: all
        self.chip = 0
        self.programs: dict[tuple[str, ...], Program] = {}

    def run(self, kernel: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        """What `JITFunction.run` and `triton.compile` do, up to the binary."""
        from triton._C.libtriton import ir
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        if self.only and kernel.fn.__name__ not in self.only:
            return
        # CUDA's limits.
        assert grid[0] < 2**31 and all(size <= 65535 for size in grid[1:]), grid
        kwargs = {k: v for k, v in kwargs.items() if k != "warmup"}
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        target = GPUTarget("cuda", self.chip, 32)
        backend = make_backend(target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        key = (kernel.fn.__name__, str(self.chip), str(specialization), str(options))
        if key in self.programs:
            return
        options, signature, constants, attributes = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        source = ASTSource(kernel, signature, constants, attributes)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = source.make_ir(
            target, options, backend.get_codegen_implementation(options),
            backend.get_module_map(), context,
        )  # fmt: skip
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options, source.language)
        metadata: dict[str, Any] = {}
        for name in ("ttir", "ttgir", "llir", "ptx")[: 4 if self.assemble else 3]:
            module = stages[name](module, metadata)
        self.programs[key] = Program(
            kernel.fn.__name__, self.chip, options.num_warps, options.num_stages,
            {p.name: bound[p.name] for p in kernel.params if p.is_constexpr},
            metadata["shared"], metadata["tmem_size"],
            spilled_bytes(module, self.chip) if self.assemble else None,
        )  # fmt: skip


def spilled_bytes(ptx: str, chip: int) -> int:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        done = subprocess.run(
            [get_ptxas(chip).path, "-v", f"--gpu-name={sm_arch_from_capability(chip)}", source,
             "-o", source.with_suffix(".o")],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert found is not None, done.stderr
    return int(found[1])


def launch(case: Case, num_reqs: int, chip: int) -> None:
    """Every kernel of a cycle, by its launcher."""
    import torch
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    from vllm_longspec.draft import fp8
    from vllm_longspec.draft.beam import Nodes, TreePlan, expand, top_tokens
    from vllm_longspec.draft.choose import choose_nodes
    from vllm_longspec.draft.graft import graft
    from vllm_longspec.draft.inputs import ProposalInputs, place_level, read_inputs
    from vllm_longspec.draft.lookup import Lookup
    from vllm_longspec.draft.ring import write_ring
    from vllm_longspec.draft.ring_attention import ring_attention
    from vllm_longspec.draft.rope import rotate_into_ring, rotate_query, split_and_rotate
    from vllm_longspec.tree.lookup import COPY_DEPTH
    from vllm_longspec.verify.compaction import compact
    from vllm_longspec.verify.histories import node_texts, penalise_paths
    from vllm_longspec.verify.placement import place_trees
    from vllm_longspec.verify.sampler import walk
    from vllm_longspec.verify.tree_attention import tree_attention
    from vllm_longspec.verify.tree_state import TreeState
    from vllm_longspec.verify.window_attention import window_attention

    dtype = getattr(torch, case.dtype)
    (num_heads, num_kv_heads), head_size = case.heads, case.head_size
    scale = head_size**-0.5

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def int32(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def int64(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    # The proposal.
    plan = TreePlan.build(case.tree_shape, case.m, torch.device("cpu"), COPY_DEPTH)
    state = TreeState.allocate(num_reqs, case.m, plan.max_depth, torch.device("cpu"))
    inputs = ProposalInputs.allocate(num_reqs, plan.max_depth, torch.device("cpu"))
    lookup = Lookup(num_reqs, 131_072, torch.device("cpu"))
    slots, num_computed = int64(num_reqs), int32(num_reqs)
    read_inputs(
        inputs, slots, num_computed, int64(num_reqs, 1), num_computed, int32(num_reqs, 4096),
        num_computed, num_reqs,
    )  # fmt: skip
    lookup.find(inputs, int32(num_reqs, 4096), num_computed, num_reqs)
    rotary = RotaryEmbedding(head_size, head_size, 4096, 10000.0, True, dtype)
    layer_norm = RMSNorm(case.hidden_size, dtype=dtype)
    blocks = -(-case.window // case.slots)
    ring = empty(num_reqs * blocks, case.slots, num_kv_heads, 2 * head_size).transpose(1, 2)
    table = int32(num_reqs, blocks)
    nodes = Nodes.allocate(num_reqs, plan)
    key, value = empty(2, num_reqs, plan.starts[-2], num_kv_heads, head_size)
    qkv_size = (num_heads + 2 * num_kv_heads) * head_size
    new_positions = inputs.new_positions.flatten()
    new_rows = int64(len(new_positions))
    new_qkv = empty(len(new_positions), qkv_size)
    rotate_into_ring(new_qkv, new_positions, rotary, num_heads, new_rows, ring, table)
    write_ring(
        *empty(2, len(new_positions), num_kv_heads, head_size), new_rows, new_positions, ring, table
    )
    for depth, (first, next_width) in enumerate(
        zip((0, *plan.starts), case.tree_shape, strict=False)
    ):
        width = plan.starts[depth] - first
        num_tokens, level = num_reqs * width, slice(first, first + width)
        positions, _ = place_level(inputs.context_lens, width, depth, 4095)
        query = split_and_rotate(
            empty(num_tokens, qkv_size), positions, rotary, num_heads, key[:, level],
            value[:, level],
        )  # fmt: skip
        ring_attention(
            query.view(num_reqs, width, num_heads, head_size), ring, table, key, value,
            nodes.ancestors, inputs.context_lens, first, depth, case.window, scale,
        )  # fmt: skip
        rotate_query(empty(num_tokens, num_heads * head_size), positions, rotary, head_size)
        if chip >= FP8_SINCE:
            hidden = empty(num_tokens, case.hidden_size)
            # `tokens_to_fp8` asks where its input is.
            fp8._round(hidden, case.hidden_size)
            fp8.norm_to_fp8(layer_norm, hidden)
            fp8.norm_to_fp8(layer_norm, hidden, hidden)
            fp8.embed_to_fp8(layer_norm, empty(8, case.hidden_size), int32(num_tokens))
            fp8.gated_to_fp8(empty(num_tokens, 2 * case.inner_size))
        ids = int64(case.vocab_size) if case.trimmed else None
        logits = empty(1, case.vocab_size).expand(num_tokens, -1)
        top = top_tokens(logits, min(next_width, case.vocab_size), ids)
        expand(nodes, *top, first, next_width)
    graft(nodes, plan, lookup.tokens, lookup.scores)
    choose_nodes(nodes, plan, inputs.modes, slots, state, int64(num_reqs, case.m))

    # The verification.
    num_tokens = num_reqs * (1 + case.m)
    starts = int32(num_reqs + 1)
    place_trees(
        state, slots, starts, starts, num_computed, num_computed, int32(num_tokens),
        int64(num_tokens), state.ancestors,
    )  # fmt: skip
    query = empty(num_tokens, num_heads, head_size)
    qkv = empty(num_tokens, num_heads + 2 * num_kv_heads, head_size)
    key, value = qkv[:, num_heads:].chunk(2, dim=1)
    tree_attention(
        torch.empty_like(query), torch.empty(num_heads, num_tokens), query, key, value,
        state.ancestors[:num_reqs], starts, num_computed, scale,
    )  # fmt: skip
    sinks = empty(num_heads)  # beside them all is as without
    if num_reqs == 1:
        tree_attention(
            torch.empty_like(query), torch.empty(num_heads, num_tokens), query, key, value,
            state.ancestors[:num_reqs], starts, num_computed, scale, sinks,
        )  # fmt: skip
    cache = empty(4, 16, num_kv_heads, 2 * head_size).transpose(1, 2)
    window_attention(
        torch.empty_like(query), query, cache, int32(num_reqs, 8), key, value,
        state.ancestors[:num_reqs], int64(num_tokens), starts, num_computed, case.window, scale,
        sinks,
    )  # fmt: skip
    rows, committed = int64(num_tokens), int32(num_reqs, 4096)
    for tail in (0, 5):
        paths, _ = node_texts(rows.int(), rows, rows.int(), state, committed, num_computed, tail)
    logits, penalty = torch.empty(num_tokens, case.vocab_size), torch.ones(num_reqs)
    before = torch.empty(paths.shape)
    counts = int32(1, case.vocab_size)
    penalise_paths(logits, before, paths, rows, penalty, penalty, penalty, counts)
    walk(int64(num_tokens), int64(num_tokens), starts, slots, state, 1 + case.m)
    caches = empty(2, 4, num_kv_heads, 16, 2 * head_size)
    compact(caches, int64(1, num_tokens), starts, slots, state.path, state.path_len)


def main(chips: list[int], cases: list[dict[str, Any]], only: list[str], assemble: bool) -> None:
    import triton
    from triton.runtime import jit
    from vllm.config import VllmConfig, set_current_vllm_config

    assert not triton.knobs.runtime.interpret
    functions = {}
    for name in modules_with_kernels():
        module = __import__(name, fromlist=["_"])
        functions |= {
            f.fn.__name__: f.fn
            for f in vars(module).values()
            if isinstance(f, jit.JITFunction) and f.fn.__module__ == name
        }
    compiler = Compiler(assemble, only)
    jit.JITFunction.run = lambda kernel, *args, **kwargs: compiler.run(kernel, *args, **kwargs)
    with set_current_vllm_config(VllmConfig()):
        for chip, fields in itertools.product(chips, cases):
            case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
            compiler.chip = chip
            for num_reqs in case.num_reqs:
                launch(case, num_reqs, chip)
    programs = [asdict(program) for program in compiler.programs.values()]
    print(json.dumps({"kernels": kernel_names(functions), "programs": programs}))


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:4]), "--assemble" in sys.argv)
