"""From what the user typed to a SpeculativeConfig that vLLM carries to every process.

Everything that can be wrong is checked here, in the front-end process, before a worker starts.
"""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from transformers import PreTrainedConfig
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_longspec.config import (
    FP8,
    MAX_VERIFIED_NODES,
    SLIDING,
    TreeConfig,
    as_draft_config,
    attention_kinds,
    check_shape,
    is_draft_config,
    known_draft_config,
    levels,
    num_drafted_tokens,
    resolve_tree,
    shape_field,
)
from vllm_longspec.draft.checkpoint import check_checkpoint, is_draft_folder, served_folder
from vllm_longspec.errors import LongSpecError, listed, reason
from vllm_longspec.runtime.menus import (
    Menu,
    name_of,
    only,
    plans_of,
    schedule_of,
    with_copies,
    within,
)
from vllm_longspec.runtime.supported import check_supported, check_tested
from vllm_longspec.tree.budget import FP8_WEIGHT_BYTES, Plan, gpu_named, node_budgets
from vllm_longspec.tree.budget import Shape as CostShape
from vllm_longspec.tree.lookup import COPY_DEPTH

logger = init_logger("vllm.longspec")

METHOD = "longspec"
DRAFT = "draft.*"  # of `ModelConfig.sleep_preserve_parameter_names`
ASSUMED_MAX_NUM_SEQS = 256  # where vLLM chooses it later
MAX_BATCH = 1024  # vLLM caps it at max_num_seqs
SCHEDULE = "num_speculative_tokens_per_batch_size"
ADAPTIVE = "enable_adaptive_verification"  # vLLM's name, for DSpark
UNQUANTISED = "none"  # as a `quantization`; left out, it follows the GPU
# How a target's config names its experts, the bits of a weight; what methods have without these.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
BITS = ("bits", "w_bit", "num_bits")
METHOD_BITS = (("fp4", 4), ("awq", 4), ("gptq", 4), ("int4", 4), ("fp8", 8), ("int8", 8))
FOUR_BIT_BYTES = 0.56
TRAINED, LOOKUP = DRAFTS = ("longspec", "lookup")  # values of `draft`
OPTIONS = (
    "method", "draft", "model", "num_speculative_tokens", "revision", "quantization", "tree_shape",
    SCHEDULE, ADAPTIVE,
)  # fmt: skip
# What else goes with copies of the text alone.
LOOKUP_OPTIONS = ("method", "draft", "num_speculative_tokens", ADAPTIVE)
FLAGS = (
    ("--spec-method", "method", "spec_method"),
    ("--spec-model", "model", "spec_model"),
    ("--spec-tokens", "num_speculative_tokens", "spec_tokens"),
)


class DraftPath(str):
    """The value of `--speculative-model`: a LongSpec draft, whatever it turns out to be."""


@config(config=ConfigDict(arbitrary_types_allowed=True))
class LongSpecSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config for `method="longspec"`; made by `create_longspec_config`."""

    method: Literal["longspec"] = METHOD  # type: ignore[assignment]
    draft: str = TRAINED
    """What proposes: a trained draft, with copies of the text; or these alone."""
    menus: tuple[Menu, ...] = ()
    """The trees to choose from at each batch size. `num_speculative_tokens` is the most nodes that
    one of them verifies."""
    adaptive: bool = True
    """Choose by what is accepted and what it costs; else the default tree of each batch size. Not
    vLLM's `enable_adaptive_verification`, which makes vLLM trim chains."""
    counters_folder: str = ""
    """Where workers share their counters with the front end; empty: they do not."""

    def __post_init__(self) -> None:
        """Nothing to infer: every field was resolved before."""

    def __repr__(self) -> str:
        """One line of vLLM's log; `dataclass` would write out the configs of both models."""
        trees = [name_of(plan) for plan in plans_of(self.menus)]
        schedule = self.num_speculative_tokens_per_batch_size
        return (
            f"SpeculativeConfig(method={self.method!r}, model={self.model!r}, "
            f"num_spec_tokens={self.num_speculative_tokens}, {trees=}, {schedule=}, "
            f"adaptive={self.adaptive}, quantization={self.quantization!r})"
        )

    def draft_shares_target_positions(self) -> bool:
        """vLLM 0.33 asks, and else may lower the engine's length to the draft config's. The draft
        rotates by the target's own tables (`TargetParts.rotary`)."""
        return True


def longspec_options(args: EngineArgs) -> dict[str, Any] | None:
    """The options of `--speculative-config` and of the flags merged by key, if they ask for
    LongSpec; None if they ask for anything else or nothing."""
    options = {k.replace("-", "_"): v for k, v in (args.speculative_config or {}).items()}
    model = options.get("model", args.spec_model)
    method = options.get("method", args.spec_method)
    if method is None and model is not None:
        named = "longspec" in model.lower().split("/")[-1] or isinstance(args.spec_model, DraftPath)
        method = METHOD if named or is_draft_folder(Path(model)) else None
    if method != METHOD:
        return None
    for flag, key, field in FLAGS:
        value = getattr(args, field)
        if value is None:
            continue
        if key in options:
            flag = "--speculative-model" if isinstance(value, DraftPath) else flag
            raise LongSpecError(
                f"{flag}: --speculative-config['{key}'] sets the same; give one of the two"
            )
        options[key] = value
    return options | {"method": METHOD}


def create_longspec_config(
    options: dict[str, Any],
    args: EngineArgs,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> LongSpecSpeculativeConfig:
    """Raises LongSpecError, one sentence, for everything that cannot work."""
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise LongSpecError(
            f"speculative_config: {listed(unknown)} is not an option of LongSpec; "
            f"its options are {', '.join(OPTIONS)}"
        )
    check_supported(args, target, parallel)
    check_tested(target)
    if target.enable_sleep_mode:
        # A sleep of level 2 discards weights, and nothing loads the draft's again.
        target.sleep_preserve_parameter_names = [*target.sleep_preserve_parameter_names, DRAFT]
    if resolve_draft(options) == LOOKUP:
        return create_lookup_config(options, args, target, parallel)
    model = options.get("model")
    if not model:
        raise LongSpecError(
            "--speculative-model: name the LongSpec draft, a folder or a Hugging Face repository"
        )
    from vllm_longspec.draft.model import register_draft_model

    register_draft_model()
    fetched = args.load_format != "dummy" and not envs.VLLM_USE_MODELSCOPE
    folder = served_folder(str(model), options.get("revision"), args.download_dir, fetched)
    draft = load_draft_config(str(model), options.get("revision"), target, folder)
    check_shape(draft.hf_config, target.hf_text_config)
    tree = resolve_tree(
        options.get("tree_shape"), options.get("num_speculative_tokens"), draft.hf_config
    )
    quantization = resolve_quantization(options.get("quantization"))
    menus = resolve_menus(
        options, tree, draft.hf_config, target, parallel, quantization, args.max_num_seqs
    )
    adaptive = resolve_adaptive(options.get(ADAPTIVE), target, parallel)
    if not adaptive:
        menus = [only(menu.first_batch, menu.last_batch, menu.default) for menu in menus]
    most = max(menu.m for menu in menus)
    check_steps(args, most)
    # vLLM drops a schedule of engines in parallel on data: room is made for the most nodes, of
    # which workers verify what they grew (`hooks.trim`).
    scheduled = len(menus) > 1 and parallel.data_parallel_size == 1
    if fetched and folder is not None:
        check_checkpoint(folder, draft.hf_config)
    return LongSpecSpeculativeConfig(
        model=str(model),
        revision=options.get("revision"),
        quantization=quantization,
        num_speculative_tokens=most,
        menus=tuple(menus),
        adaptive=adaptive,
        num_speculative_tokens_per_batch_size=schedule_of(menus) if scheduled else None,
        prompt_lookup_min=None,
        prompt_lookup_max=None,
        target_model_config=target,
        target_parallel_config=parallel,
        draft_model_config=draft,
        draft_parallel_config=SpeculativeConfig.create_draft_parallel_config(
            parallel, parallel.tensor_parallel_size, draft
        ),
    )


def resolve_draft(options: dict[str, Any]) -> str:
    draft = options.get("draft")
    if draft is None:
        return TRAINED
    if draft not in DRAFTS:
        raise LongSpecError(
            f"draft: {draft!r} is none of {', '.join(DRAFTS)}; a draft's folder is named by `model`"
        )
    if draft == LOOKUP:
        others = {key for key in options if options[key] is not None} - set(LOOKUP_OPTIONS)
        if others:
            raise LongSpecError(
                f"draft: {LOOKUP!r} copies from the text and has no checkpoint and no tree; leave "
                f"out {listed(sorted(others))}, or `draft`"
            )
    return str(draft)


def create_lookup_config(
    options: dict[str, Any], args: EngineArgs, target: ModelConfig, parallel: ParallelConfig
) -> LongSpecSpeculativeConfig:
    """As vLLM's own n-gram proposers have it, the target stands where a draft's config would."""
    nodes = options.get("num_speculative_tokens")
    nodes = COPY_DEPTH if nodes is None else nodes
    if type(nodes) is not int or not 1 <= nodes <= COPY_DEPTH:
        raise LongSpecError(
            f"num_speculative_tokens: {nodes!r} is not a number of tokens that are copied; use 1 "
            f"to {COPY_DEPTH}"
        )
    check_steps(args, nodes)
    return LongSpecSpeculativeConfig(
        draft=LOOKUP,
        num_speculative_tokens=nodes,
        menus=(only(1, MAX_BATCH, Plan((), nodes)),),
        adaptive=resolve_adaptive(options.get(ADAPTIVE), target, parallel),
        prompt_lookup_min=None,
        prompt_lookup_max=None,
        target_model_config=target,
        target_parallel_config=parallel,
        draft_model_config=target,
        draft_parallel_config=parallel,
    )


def check_steps(args: EngineArgs, num_nodes: int) -> None:
    for field in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        check_token_budget(num_nodes, getattr(args, field), field)
    # vLLM admits a request of one token with its drafts, cuts it to this and asserts it did not.
    check_token_budget(
        num_nodes, args.long_prefill_token_threshold or None, "long_prefill_token_threshold"
    )


def resolve_quantization(chosen: str | None) -> str | None:
    """How the draft's weights are rounded when they are loaded: FP8 where the GPU has it, since
    that costs no token of the output and less time; None: not at all."""
    has_fp8 = current_platform.is_cuda() and current_platform.supports_fp8()
    if chosen is None:
        return FP8 if has_fp8 else None
    if chosen not in (FP8, UNQUANTISED):
        raise LongSpecError(
            f"quantization: {chosen!r} is not known for a draft; use {FP8} or {UNQUANTISED}"
        )
    if chosen == FP8 and current_platform.is_cuda() and not has_fp8:
        raise LongSpecError(
            f"quantization: this GPU has no {FP8} (it came with compute capability 8.9); "
            "leave it out"
        )
    return FP8 if chosen == FP8 else None


def resolve_adaptive(chosen: Any, target: ModelConfig, parallel: ParallelConfig) -> bool:
    """Engines that share experts compute their steps together, of as many tokens each."""
    if chosen is not None and not isinstance(chosen, bool):
        raise LongSpecError(f"{ADAPTIVE}: {chosen!r} is neither true nor false")
    together = parallel.data_parallel_size > 1 and target.is_moe
    if chosen and together:
        raise LongSpecError(
            f"{ADAPTIVE}: engines that share experts (data_parallel_size "
            f"{parallel.data_parallel_size}) all have to verify one tree; leave it out"
        )
    return not together if chosen is None else chosen


def resolve_menus(
    options: dict[str, Any],
    tree: TreeConfig,
    draft: PreTrainedConfig,
    target: ModelConfig,
    parallel: ParallelConfig,
    quantization: str | None,
    max_num_seqs: int | None = None,
) -> list[Menu]:
    """The trees to choose from at each batch size.

    The user's schedule; else none where the user or the draft's config.json chose a tree; else the
    cost model's (`tree/budget.py`). A CPU has none: nothing is free there. Engines in parallel on
    data have plans of at most the nodes of a mean batch: vLLM's scheduler makes room for as many at
    every batch size (`VllmConfig._maybe_disable_dynamic_sd_for_data_parallel`). Those that share
    experts have one plan.
    """
    chosen = options.get(SCHEDULE)
    in_parallel = parallel.data_parallel_size > 1
    together = in_parallel and target.is_moe
    if chosen is not None and together:
        raise LongSpecError(
            f"{SCHEDULE}: engines that share experts (data_parallel_size "
            f"{parallel.data_parallel_size}) all have to verify one tree; choose it by "
            "num_speculative_tokens"
        )
    static = [only(1, MAX_BATCH, Plan(tree.tree_shape, tree.num_speculative_tokens))]
    if chosen is not None:
        return menus_of_a_schedule(chosen, options, tree, max_num_seqs)
    chose_tree = any(
        options.get(name) is not None or getattr(draft, name, None) is not None
        for name in ("tree_shape", "num_speculative_tokens")
    )
    if chose_tree or not current_platform.is_cuda():
        return static
    budgets = node_budgets(
        gpu_named(current_platform.get_device_name()),
        cost_shape(
            draft,
            target.hf_text_config,
            parallel.tensor_parallel_size,
            quantization,
            target.quantization,
        ),
        MAX_BATCH,
    )
    menus = [with_copies(Menu(b.first_batch, b.last_batch, b.plans, b.default)) for b in budgets]
    if not any(menu.plans for menu in menus):
        logger.warning_once(
            "LongSpec: by the cost model no tree pays for this target on this GPU; %d nodes are "
            "verified all the same. `vllm-longspec bench e2e` measures whether they pay.",
            tree.num_speculative_tokens,
        )
        return static
    if in_parallel:
        batch = round(sqrt(max_num_seqs or ASSUMED_MAX_NUM_SEQS))
        trees = [menu for menu in menus if menu.plans]
        one = next((menu for menu in trees if menu.last_batch >= batch), trees[-1])
        plan = one.default or one.plans[0]
        if not together:
            return [within(menu, plan) for menu in menus]
        logger.info_once(
            "LongSpec: engines that share experts verify one tree, that for %d requests "
            "an engine: %s, %d nodes verified",
            batch, levels(plan.tree_shape), plan.m,
        )  # fmt: skip
        return [only(1, MAX_BATCH, plan)]
    return menus


def menus_of_a_schedule(
    chosen: Any, options: dict[str, Any], tree: TreeConfig, max_num_seqs: int | None
) -> list[Menu]:
    """The user's `num_speculative_tokens_per_batch_size`, of one tree shape."""
    try:
        schedule = validate_and_normalize_dynamic_sd_schedule(chosen)
    except (TypeError, ValueError, OverflowError) as error:
        said = reason(error).removeprefix(SCHEDULE).strip()
        raise LongSpecError(
            f"{SCHEDULE}: {said}; give [first batch size, last, nodes] for each range, "
            "such as [[1, 4, 31], [5, 32, 7]]"
        ) from None
    if options.get("num_speculative_tokens") is not None:  # vLLM's meaning: the most
        most = tree.num_speculative_tokens
        schedule = [(first, last, min(m, most)) for first, last, m in schedule]
    if max_num_seqs is not None:  # what is beyond it never occurs
        schedule = [entry for entry in schedule if entry[0] <= max_num_seqs]
    nodes = {m for _, _, m in schedule if m > 0}
    most = min(tree.num_nodes, MAX_VERIFIED_NODES)
    if max(nodes, default=0) > most or not nodes:
        raise LongSpecError(
            f"{SCHEDULE}: {max(nodes, default=0)} nodes do not fit tree_shape "
            f"{levels(tree.tree_shape)}; use 1 to {most} at some batch "
            f"size, or widen tree_shape (at most {MAX_VERIFIED_NODES} can be verified)"
        )
    return [
        only(first, last, Plan(tree.tree_shape, m) if m else None) for first, last, m in schedule
    ]


def check_token_budget(num_nodes: int, most: int | None, field: str) -> None:
    """Raises LongSpecError where a step cannot hold one verification: vLLM's scheduler would wait
    for room for ever, or stop."""
    if most is not None and most < 1 + num_nodes:
        raise LongSpecError(
            f"{field}: {most} tokens cannot hold the 1 + {num_nodes} of one verification; raise "
            "it, or lower num_speculative_tokens"
        )


def cost_shape(
    draft: PreTrainedConfig,
    target: PreTrainedConfig,
    tp_size: int,
    quantization: str | None,
    target_quantization: str | None = None,
) -> CostShape:
    """What the cost model reads of two configs. `quantization`: of the draft; the target's is its
    config's or the one that vLLM was asked for."""
    hidden, layers = target.hidden_size, target.num_hidden_layers
    inner = getattr(target, "intermediate_size", None) or 4 * hidden
    kv_heads, head_dim = (shape_field(target, f) for f in ("num_key_value_heads", "head_dim"))
    query = target.num_attention_heads * head_dim
    attention = hidden * (2 * query + 2 * kv_heads * head_dim)
    experts = experts_of(target)
    dense_mlps = (layers - experts.num_layers) * inner + experts.num_layers * experts.shared_inner
    drafted = num_drafted_tokens(draft)
    # Every rank holds all of a reduced vocabulary's head.
    head_shares = tp_size if drafted == target.vocab_size else 1
    draft_inner = getattr(draft, "intermediate_size", None) or inner
    draft_layer = attention + 2 * hidden * query + 3 * hidden * draft_inner
    return CostShape(
        num_layers=layers,
        layer_weights=(attention + 3 * hidden * dense_mlps // layers) // tp_size,
        head_weights=hidden * target.vocab_size // tp_size,
        draft_layer_weights=draft_layer // tp_size,
        draft_head_weights=hidden * drafted // head_shares,
        draft_weight_bytes=FP8_WEIGHT_BYTES if quantization == FP8 else 2.0,
        kv_bytes=2 * 2 * max(1, kv_heads // tp_size) * head_dim,
        weight_bytes=weight_bytes(target, target_quantization),
        num_expert_layers=experts.num_layers,
        num_experts=experts.num_experts,
        experts_per_token=experts.per_token,
        expert_weights=3 * hidden * experts.inner // tp_size,
        num_devices=tp_size,
        hidden_size=hidden,
        num_sliding_layers=attention_kinds(target).count(SLIDING),
        window=getattr(target, "sliding_window", None) or 0,
    )


@dataclass(frozen=True)
class Experts:
    """Of a target; all zero where it has none."""

    num_layers: int = 0  # with experts
    num_experts: int = 0  # of each
    per_token: int = 0
    inner: int = 0  # of one expert
    shared_inner: int = 0  # of those that every token takes, together


def experts_of(target: PreTrainedConfig) -> Experts:
    """By the names that Qwen-MoE's, Mixtral's, gpt-oss's, GLM's and DeepSeek's configs have."""
    number = next(
        (n for f in EXPERT_COUNTS if isinstance(n := getattr(target, f, None), int) and n > 0), 0
    )
    per_token = getattr(target, "num_experts_per_tok", None) or 0
    if not number or not per_token:
        return Experts()
    inner = getattr(target, "moe_intermediate_size", None) or target.intermediate_size
    shared = getattr(target, "shared_expert_intermediate_size", None)
    if shared is None:
        shared = inner * (getattr(target, "n_shared_experts", None) or 0)
    every = getattr(target, "decoder_sparse_step", None) or 1
    dense = set(getattr(target, "mlp_only_layers", None) or ())
    dense |= set(range(getattr(target, "first_k_dense_replace", None) or 0))
    layers = [i for i in range(target.num_hidden_layers) if i not in dense and (i + 1) % every == 0]
    return Experts(len(layers), number, min(per_token, number), inner, shared)


def weight_bytes(target: PreTrainedConfig, quantization: str | None = None) -> float:
    """Of one weight of a target's layers, scales included; of an unknown method as unquantised."""
    written = getattr(target, "quantization_config", None) or {}
    written = written if isinstance(written, dict) else written.to_dict()
    method = str(quantization or written.get("quant_method") or "").lower()
    if not method:
        return 2.0
    groups = [written, *(written.get("config_groups") or {}).values()]
    groups += [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    bits = next((b for g in groups for f in BITS if isinstance(b := g.get(f), int)), None)
    if bits is None:
        bits = next((bits for part, bits in METHOD_BITS if part in method), 16)
    return FOUR_BIT_BYTES if bits <= 4 else bits / 8


def load_draft_config(
    model: str, revision: str | None, target: ModelConfig, folder: Path | None
) -> ModelConfig:
    """`folder`: where the draft lies, as far as its tensors could be looked at; else its config
    has to say that it is one."""
    try:
        draft = ModelConfig(
            model=model,
            runner="draft",
            revision=revision,
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            dtype=target.dtype,
            seed=target.seed,
            tokenizer_revision=target.tokenizer_revision,
            max_model_len=None,
            spec_target_max_model_len=target.max_model_len,
            enforce_eager=target.enforce_eager,
            max_logprobs=target.max_logprobs,
            hf_overrides=as_draft_config if folder is None else known_draft_config,
        )
    except LongSpecError:
        raise
    except Exception as error:
        raise LongSpecError(
            f"--speculative-model: the config of {model} cannot be read ({reason(error)}); "
            "give a draft's folder or a Hugging Face repository that is reachable"
        ) from error
    if not is_draft_config(draft.hf_config):
        raise LongSpecError(
            f"--speculative-model: {model} is not a LongSpec draft "
            f"(architectures {draft.hf_config.architectures}); train one with "
            "`vllm-longspec train`"
        )
    return draft
