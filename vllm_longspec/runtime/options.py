"""From what the user typed to a SpeculativeConfig that vLLM carries to every process.

Everything that can be wrong is checked here, in the front-end process, before a worker starts.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from transformers import PreTrainedConfig
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

from vllm_longspec.config import (
    ARCHITECTURE,
    DEFAULT_TREE_SHAPE,
    FP8,
    LongSpecError,
    TreeConfig,
    as_draft_config,
    check_shape,
    is_draft_config,
    known_draft_config,
    levels,
    listed,
    num_drafted_tokens,
    reason,
    resolve_tree,
    shape_field,
)
from vllm_longspec.draft.checkpoint import check_checkpoint, is_draft_folder, served_folder
from vllm_longspec.tree.budget import FP8_WEIGHT_BYTES, gpu_named, node_budgets
from vllm_longspec.tree.budget import Shape as CostShape

logger = init_logger("vllm.longspec")

METHOD = "longspec"
MAX_BATCH = 1024  # vLLM caps it at max_num_seqs
SCHEDULE = "num_speculative_tokens_per_batch_size"
UNQUANTISED = "none"  # as a `quantization`; left out, it follows the GPU
OPTIONS = (
    "method", "model", "num_speculative_tokens", "revision", "quantization", "tree_shape", SCHEDULE,
)  # fmt: skip
FLAGS = (
    ("--spec-method", "method", "spec_method"),
    ("--spec-model", "model", "spec_model"),
    ("--spec-tokens", "num_speculative_tokens", "spec_tokens"),
)
# vLLM's way to measure decoding without prompts; it moves no cache that a ring would miss.
MEASURING_CONNECTOR = "DecodeBenchConnector"


class DraftPath(str):
    """The value of `--speculative-model`: a LongSpec draft, whatever it turns out to be."""


@config(config=ConfigDict(arbitrary_types_allowed=True))
class LongSpecSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config for `method="longspec"`; made by `create_longspec_config`."""

    method: Literal["longspec"] = METHOD  # type: ignore[assignment]
    tree_shape: tuple[int, ...] = DEFAULT_TREE_SHAPE
    """Nodes per level of the drafted tree. `num_speculative_tokens` of them are verified."""
    tree_shapes: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """The tree to draft for each number of verified nodes that a batch size may have."""

    def __post_init__(self) -> None:
        """Nothing to infer: every field was resolved before."""


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
    model = options.get("model")
    if not model:
        raise LongSpecError(
            "--speculative-model: name the LongSpec draft, a folder or a Hugging Face repository"
        )
    register_draft_model()
    fetched = args.load_format != "dummy" and not envs.VLLM_USE_MODELSCOPE
    folder = served_folder(str(model), options.get("revision"), args.download_dir, fetched)
    draft = load_draft_config(str(model), options.get("revision"), target, folder)
    tree = resolve_tree(
        options.get("tree_shape"), options.get("num_speculative_tokens"), draft.hf_config
    )
    check_shape(draft.hf_config, target.hf_text_config)
    quantization = resolve_quantization(options.get("quantization"))
    schedule, tree_shapes = resolve_budgets(
        options, tree, draft.hf_config, target, parallel, quantization
    )
    if fetched and folder is not None:
        check_checkpoint(folder, draft.hf_config)
    return LongSpecSpeculativeConfig(
        model=str(model),
        revision=options.get("revision"),
        quantization=quantization,
        num_speculative_tokens=max(tree_shapes),
        tree_shape=tree_shapes[max(tree_shapes)],
        tree_shapes=tree_shapes,
        num_speculative_tokens_per_batch_size=schedule,
        prompt_lookup_min=None,
        prompt_lookup_max=None,
        target_model_config=target,
        target_parallel_config=parallel,
        draft_model_config=draft,
        draft_parallel_config=SpeculativeConfig.create_draft_parallel_config(
            parallel, parallel.tensor_parallel_size, draft
        ),
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


def resolve_budgets(
    options: dict[str, Any],
    tree: TreeConfig,
    draft: PreTrainedConfig,
    target: ModelConfig,
    parallel: ParallelConfig,
    quantization: str | None,
) -> tuple[list[tuple[int, int, int]] | None, dict[int, tuple[int, ...]]]:
    """vLLM's schedule of verified nodes by batch size, or None for always as many, and the tree
    for each number of nodes in it.

    The user's schedule; else none where the user or the draft's config.json chose a tree; else the
    cost model's (`tree/budget.py`). A CPU has none: nothing is free there.
    """
    chosen = options.get(SCHEDULE)
    static = {tree.num_speculative_tokens: tree.tree_shape}
    if chosen is not None:
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
        nodes = {m for _, _, m in schedule if m > 0}
        too_many = max(nodes, default=0) > tree.num_nodes
        if too_many or not nodes:
            raise LongSpecError(
                f"{SCHEDULE}: {max(nodes, default=0)} nodes do not fit tree_shape "
                f"{levels(tree.tree_shape)}; use 1 to {tree.num_nodes} at some batch "
                "size, or widen tree_shape"
            )
        return schedule, dict.fromkeys(nodes, tree.tree_shape)
    chose_tree = any(
        options.get(name) is not None or getattr(draft, name, None) is not None
        for name in ("tree_shape", "num_speculative_tokens")
    )
    if chose_tree or not current_platform.is_cuda():
        return None, static
    budgets = node_budgets(
        gpu_named(current_platform.get_device_name()),
        cost_shape(draft, target.hf_text_config, parallel.tensor_parallel_size, quantization),
        MAX_BATCH,
    )
    shapes = {budget.m: budget.tree_shape for budget in budgets if budget.m > 0}
    if not shapes:
        logger.warning_once(
            "LongSpec: by the cost model no tree pays for this target on this GPU; %d nodes are "
            "verified all the same. `vllm-longspec bench e2e` measures whether they pay.",
            tree.num_speculative_tokens,
        )
        return None, static
    return [(b.first_batch, b.last_batch, b.m) for b in budgets], shapes


def cost_shape(
    draft: PreTrainedConfig, target: PreTrainedConfig, tp_size: int, quantization: str | None
) -> CostShape:
    hidden = target.hidden_size
    inner = getattr(target, "intermediate_size", None) or 4 * hidden
    kv_heads, head_dim = (shape_field(target, f) for f in ("num_key_value_heads", "head_dim"))
    query = target.num_attention_heads * head_dim
    layer = hidden * (2 * query + 2 * kv_heads * head_dim) + 3 * hidden * inner
    return CostShape(
        num_layers=target.num_hidden_layers,
        layer_weights=layer // tp_size,
        head_weights=hidden * target.vocab_size // tp_size,
        draft_layer_weights=(layer + 2 * hidden * query) // tp_size,
        draft_head_weights=hidden * num_drafted_tokens(draft) // tp_size,
        draft_weight_bytes=FP8_WEIGHT_BYTES if quantization == FP8 else 2.0,
        kv_bytes=2 * 2 * max(1, kv_heads // tp_size) * head_dim,
    )


def register_draft_model() -> None:
    from vllm_longspec.draft.model import LongSpecDraftModel

    ModelRegistry.register_model(ARCHITECTURE, LongSpecDraftModel)  # in the stand-in's place


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


def check_supported(args: EngineArgs, target: ModelConfig, parallel: ParallelConfig) -> None:
    """The configurations that LongSpec refuses, the first that applies as one sentence."""
    text = target.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    unquantised = ("auto", "bfloat16", "float16", "float32")
    backend = args.attention_backend
    refusals: tuple[tuple[Any, str], ...] = (
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline_parallel_size: LongSpec does not support pipeline parallelism; set it to 1",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            "decode_context_parallel_size: LongSpec does not support context parallelism; "
            "set it to 1",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill_context_parallel_size: LongSpec does not support context parallelism; "
            "set it to 1",
        ),
        (
            parallel.enable_dbo,
            "enable_dbo: LongSpec does not support dual batch overlap; leave it out",
        ),
        (target.runner_type != "generate", "runner: LongSpec needs a generative target"),
        (target.use_mla, "model: LongSpec does not support targets with MLA attention"),
        (target.is_encoder_decoder, "model: LongSpec does not support encoder-decoder targets"),
        (
            target.is_hybrid or target.is_attention_free,
            "model: LongSpec does not support targets with linear or state-space layers",
        ),
        (target.uses_mrope, "model: LongSpec does not support targets with M-RoPE positions"),
        (
            target.is_multimodal_model,
            "model: LongSpec does not support multimodal targets; it drafts text only",
        ),
        (
            layer_types or target.get_sliding_window() is not None,
            "model: LongSpec does not support targets with sliding-window attention; "
            "every layer has to attend to the whole context",
        ),
        (
            getattr(text, "attn_logit_softcapping", None),
            "model: LongSpec does not support targets that cap attention logits",
        ),
        (
            args.kv_cache_dtype not in unquantised,
            f"kv_cache_dtype: LongSpec does not support the quantised KV cache "
            f"{args.kv_cache_dtype}; use auto",
        ),
        (
            args.disable_hybrid_kv_cache_manager,
            "disable_hybrid_kv_cache_manager: LongSpec's ring needs the hybrid KV cache manager; "
            "leave the flag out",
        ),
        (args.enable_lora, "enable_lora: LongSpec does not support LoRA; leave it out"),
        (
            args.kv_transfer_config is not None
            and args.kv_transfer_config.kv_connector != MEASURING_CONNECTOR,
            "kv_transfer_config: LongSpec does not support KV connectors; leave it out",
        ),
        (
            target.enable_prompt_embeds,
            "enable_prompt_embeds: LongSpec drafts from token ids; leave it out",
        ),
        (
            target.return_sampling_mask,
            "return_sampling_mask: LongSpec does not support it; leave it out",
        ),
        (
            target.enable_trace_replay,
            "enable_trace_replay: LongSpec does not support it; leave it out",
        ),
        (
            args.watermark_config is not None,
            "watermark_config: LongSpec does not support watermarks; leave it out",
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            "VLLM_BATCH_INVARIANT: LongSpec is not batch-invariant, a verification sums in another "
            "order than plain decoding; unset it",
        ),
        (
            backend is not None and getattr(backend, "name", backend) not in (
                "FLASH_ATTN", "CPU_ATTN", "CUSTOM",
            ),
            f"attention_backend: LongSpec brings its own attention over FlashAttention, "
            f"not {getattr(backend, 'name', backend)}; leave it out",
        ),
        (
            current_platform.is_cuda() and target.dtype.itemsize != 2,
            f"dtype: LongSpec needs bfloat16 or float16 on a GPU, not {target.dtype}",
        ),
        (
            not (current_platform.is_cuda() or current_platform.is_cpu()),
            "LongSpec runs on CUDA and on CPUs only",
        ),
        (
            os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0",
            "VLLM_USE_V2_MODEL_RUNNER: LongSpec needs vLLM's model runner V2; unset it",
        ),
    )  # fmt: skip
    for applies, sentence in refusals:
        if applies:
            raise LongSpecError(sentence)
