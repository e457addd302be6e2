"""What LongSpec refuses, each with one sentence, in the front end: before a worker starts.

What is refused whatever else is asked for stands in `switches.py`, here what has conditions.
`check_supported` asks what vLLM resolved so far, not only what was typed; what only a loaded target
shows is refused by `check_target_layers` in the worker.
"""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig
from vllm import envs
from vllm.config import AttentionConfig, ModelConfig, ParallelConfig
from vllm.config.quantization import resolve_quantization_config
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, resolve_kv_cache_dtype_string

from vllm_longspec.config import (
    CACHE_DTYPES,
    FULL,
    MAX_HEAD_SIZE,
    SLIDING,
    attention_kinds,
    context_length,
    cross_attention_layer,
)
from vllm_longspec.errors import LongSpecError, listed
from vllm_longspec.runtime.switches import ARGUMENTS, VARIABLES, unknown

logger = init_logger("vllm.longspec")

# vLLM's way to measure decoding without prompts; it moves no cache that a ring would miss.
MEASURING_CONNECTOR = "DecodeBenchConnector"
# Of a target, those that were run; a draft is read from its folder whatever the target's is.
LOAD_FORMATS = (
    "auto", "hf", "safetensors", "pt", "npcache", "mistral", "sharded_state", "dummy",
)  # fmt: skip
# Executors whose workers are vLLM's, started by it.
EXECUTORS = ("mp", "uni", "ray")
# Of vLLM's AttentionConfig, what LongSpec's attention goes by.
ATTENTION_FIELDS = ("backend", "flash_attn_version")
# The only cache layout in which a ring is a block of the target's pool.
CACHE_LAYOUT = "BLNHC"
# A config with none of these has no rotary embedding.
ROPE_FIELDS = (
    "rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "rotary_dim",
    "rope_ratio",
)  # fmt: skip
# By `model_type`: whose outputs were compared with plain vLLM's (`tests/architectures.py`).
TESTED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "glm4", "granite", "cohere", "stablelm",
    "ernie4_5", "exaone4", "apertus", "nemotron", "gptj", "qwen2_moe", "qwen3_moe", "mixtral",
    "glm4_moe", "olmoe", "granitemoe", "ernie4_5_moe", "gemma3_text", "gpt_oss", "cohere2",
    "ministral",
)  # fmt: skip
# The same of what quantises a target's weights, by vLLM's names (`tests/quantised.py`).
TESTED_QUANTIZATIONS = (
    "compressed-tensors", "gptq", "auto_gptq", "gptq_marlin", "awq", "auto_awq", "awq_marlin",
    "fp8_per_channel", "fp8", "fp8_per_tensor",
)  # fmt: skip
# As VLLM_LONGSPEC_ANY_VERSION does for a vLLM: who sets it compares outputs.
ANY_TARGET = "VLLM_LONGSPEC_ANY_TARGET"


def check_supported(args: EngineArgs, target: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises LongSpecError for the first thing that cannot work."""
    for refusals in (
        refused_arguments(args),
        refused_variables(),
        refused_parallelism(args, parallel),
        refused_targets(args, target),
        refused_caches(args, target),
        refused_features(args),
        refused_adapters(args, target, parallel),
        refused_environment(target),
    ):
        for applies, sentence in refusals:
            if applies:
                raise LongSpecError(sentence)


def check_tested(target: ModelConfig) -> None:
    """Raises LongSpecError for a target that nothing speaks against but that nobody tried, unless
    the user answers for it."""
    sentence = untested(target)
    if sentence is None:
        return
    if not any_target():
        raise LongSpecError(f"model: {sentence}; to serve it all the same, set {ANY_TARGET}=1")
    logger.warning_once("LongSpec: %s; allowed by %s=1", sentence, ANY_TARGET)


def untested(target: ModelConfig) -> str | None:
    """What to say of a target whose outputs were not compared with plain vLLM's."""
    model_type, method = target.hf_text_config.model_type, target.quantization
    if model_type not in TESTED:
        return (
            f"outputs of {model_type} targets were not compared with plain vLLM's, as those of "
            f"{', '.join(TESTED)} were"
        )
    if method is not None and method not in TESTED_QUANTIZATIONS:
        return (
            f"outputs of targets quantised by {method} were not compared with plain vLLM's, as "
            f"those by {', '.join(TESTED_QUANTIZATIONS)} were"
        )
    return None


def any_target() -> bool:
    return os.environ.get(ANY_TARGET) == "1"


Refusals = Iterable[tuple[Any, str]]


def refused_arguments(args: EngineArgs) -> Refusals:
    """By the table alone."""
    for field in dataclasses.fields(AsyncEngineArgs):
        name = field.name
        if name in ARGUMENTS.names and name not in ARGUMENTS.refused:
            continue
        sentence = ARGUMENTS.refused.get(name, f"{unknown('argument')}; leave it out")
        yield is_given(args, field), f"{name}: {sentence}"


def is_given(args: EngineArgs, field: dataclasses.Field) -> bool:
    """Whether it has another value than by default; nothing, off and none are one."""
    default = field.default
    if field.name == "additional_config":  # vLLM itself puts there what other arguments say
        given = {k: v for k, v in args.additional_config.items() if getattr(args, k, None) != v}
        return bool(given)
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    value = getattr(args, field.name, default)
    return bool(value != default and (value or default))


def refused_variables() -> Refusals:
    for name in envs.environment_variables:
        if name in VARIABLES.names and name not in VARIABLES.refused:
            continue
        if name in VARIABLES.refused or name.startswith("VLLM_"):
            sentence = VARIABLES.refused.get(name, f"{unknown('variable')}; unset it")
            yield is_set(name), f"{name}: {sentence}"


def is_set(name: str) -> bool:
    """Whether it says anything else than without it."""
    if name not in os.environ:
        return False
    read, said = envs.environment_variables[name], os.environ[name]
    try:
        value = read()
        del os.environ[name]
        return bool(value != read())
    except ValueError:  # which vLLM will say
        return False
    finally:
        os.environ[name] = said


def refused_parallelism(args: EngineArgs, parallel: ParallelConfig) -> Refusals:
    yield (
        parallel.enable_batch_sharded_sampling,
        f"enable_batch_sharded_sampling: {ARGUMENTS.refused['enable_batch_sharded_sampling']}",
    )
    executor = args.distributed_executor_backend
    yield (
        executor is not None and executor not in EXECUTORS,
        f"distributed_executor_backend: LongSpec was not tried with {executor}; use one of "
        f"{', '.join(EXECUTORS)}",
    )
    yield (
        args.scheduler_cls is not None and not is_scheduler(args.scheduler_cls),
        "scheduler_cls: LongSpec needs vLLM's scheduler, or a class that inherits from it",
    )


def is_scheduler(given: Any) -> bool:
    from vllm.v1.core.sched.scheduler import Scheduler

    found = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    return isinstance(found, type) and issubclass(found, Scheduler)


def refused_targets(args: EngineArgs, target: ModelConfig) -> Refusals:
    text = target.hf_text_config
    kinds = attention_kinds(text)
    others = sorted(set(kinds) - {FULL, SLIDING})
    yield target.runner_type != "generate", "runner: LongSpec needs a generative target"
    yield target.use_mla, "model: LongSpec does not support targets with MLA attention"
    yield target.is_encoder_decoder, "model: LongSpec does not support encoder-decoder targets"
    yield (
        target.is_hybrid or target.is_attention_free,
        "model: LongSpec does not support targets with linear or state-space layers",
    )
    yield target.uses_mrope, "model: LongSpec does not support targets with M-RoPE positions"
    yield (
        target.is_multimodal_model,
        "model: LongSpec does not support multimodal targets; it drafts text only",
    )
    yield (
        others,
        f"model: LongSpec does not support targets with layers of {listed(others)}; each has to be "
        f"{FULL} or {SLIDING}",
    )
    # Without `layer_types` vLLM gives every layer the window.
    windowed = target.get_sliding_window() is not None and not getattr(text, "layer_types", None)
    yield (
        windowed or FULL not in kinds,
        "model: LongSpec does not support targets with sliding-window attention in every layer; "
        "the draft reads one that attends to the whole context",
    )
    yield (
        getattr(text, "use_sliding_window", False) and SLIDING in kinds,
        "model: vLLM does not support targets with sliding-window attention from a layer on "
        "(max_window_layers), as Qwen's configs have it; set use_sliding_window to false",
    )
    yield (
        getattr(text, "attention_chunk_size", None),
        "model: LongSpec does not support targets with chunked attention",
    )
    for field, value in text.to_dict().items():
        yield (
            value and "softcap" in field and not field.startswith("final"),
            f"model: LongSpec does not support targets that cap attention logits ({field})",
        )
        yield (
            value and "sink" in field,
            f"model: LongSpec does not support targets with attention sinks ({field})",
        )
    yield (
        target.uses_alibi,
        "model: LongSpec does not support targets with ALiBi; it needs rotary embeddings",
    )
    yield (
        not has_rope(text),
        "model: LongSpec needs a target with rotary embeddings, in its last layer too",
    )
    yield (
        target.get_head_size() > MAX_HEAD_SIZE,
        f"model: LongSpec supports attention heads of at most {MAX_HEAD_SIZE} numbers, not "
        f"{target.get_head_size()}",
    )
    value_size = getattr(text, "v_head_dim", None) or target.get_head_size()
    yield (
        value_size != target.get_head_size(),
        f"model: LongSpec does not support targets whose values have heads of {value_size} "
        f"numbers and their keys of {target.get_head_size()}",
    )
    yield (
        args.model_impl == "transformers" or target.using_transformers_backend(),
        "model_impl: LongSpec needs vLLM's own implementation of the target, not transformers'; "
        "leave it out, or choose a model that vLLM implements",
    )
    yield (
        args.load_format not in LOAD_FORMATS,
        f"load_format: LongSpec was not tried with {args.load_format}; use one of "
        f"{', '.join(LOAD_FORMATS)}",
    )
    yield (
        current_platform.is_cuda() and target.dtype.itemsize != 2,
        f"dtype: LongSpec needs bfloat16 or float16 on a GPU, not {target.dtype}",
    )


def has_rope(text: PreTrainedConfig) -> bool:
    """Whether the layer that a draft reads, a target's last with full attention, rotates its keys,
    as far as its config tells."""
    layers = getattr(text, "no_rope_layers", None)  # 0: a layer without
    if layers and FULL in attention_kinds(text) and not layers[cross_attention_layer(text)]:
        return False
    return any(getattr(text, field, None) for field in ROPE_FIELDS)


def cache_dtype_of(args: EngineArgs, target: ModelConfig) -> str:
    """As the engine resolves it: first what was typed, then what the checkpoint asks for, which
    `Attention` reads of compressed-tensors."""
    resolved = resolve_kv_cache_dtype_string(args.kv_cache_dtype, target)
    quantization = getattr(target.hf_config, "quantization_config", None) or {}
    if resolved == "auto" and field_of(quantization, "kv_cache_scheme") is not None:
        return "fp8"
    return resolved


def refused_caches(args: EngineArgs, target: ModelConfig) -> Refusals:
    cache_dtype = cache_dtype_of(args, target)
    asked_by = "" if cache_dtype == args.kv_cache_dtype else " that the checkpoint asks for"
    stored = STR_DTYPE_TO_TORCH_DTYPE.get(cache_dtype, target.dtype)
    yield (
        cache_dtype not in CACHE_DTYPES,
        f"kv_cache_dtype: LongSpec does not support the quantised KV cache {cache_dtype}{asked_by};"
        f" use {'another checkpoint' if asked_by else 'auto'}",
    )
    yield (
        cache_dtype != "auto" and stored != target.dtype,
        f"kv_cache_dtype: LongSpec needs the KV cache in the model's dtype, {target.dtype}, not "
        f"{cache_dtype}; use auto",
    )
    yield (
        args.kv_transfer_config is not None
        and args.kv_transfer_config.kv_connector != MEASURING_CONNECTOR,
        "kv_transfer_config: LongSpec does not support KV connectors; leave it out",
    )


def field_of(config: Any, name: str) -> Any:
    """Of a config of vLLM's, or of the dict that stands for one in Python."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def refused_features(args: EngineArgs) -> Refusals:
    for backend in (args.attention_backend, field_of(args.attention_config, "backend")):
        name = str(getattr(backend, "name", backend)).upper()
        yield (
            backend is not None and name not in ("AUTO", "FLASH_ATTN", "CPU_ATTN", "CUSTOM"),
            "attention_backend: LongSpec brings its own attention over FlashAttention, not "
            f"{name}; leave it out",
        )
    defaults = AttentionConfig()
    for field in dataclasses.fields(AttentionConfig):
        value = field_of(args.attention_config, field.name)
        yield (
            field.name not in ATTENTION_FIELDS and value and value != getattr(defaults, field.name),
            f"attention_config: LongSpec brings its own attention; leave {field.name} out",
        )
    online = resolve_quantization_config(args.quantization, None)
    yield (
        args.quantization_config is not None and args.quantization_config != online,
        "quantization_config: LongSpec was not tried with it; leave it out, or give quantization",
    )


def refused_adapters(args: EngineArgs, target: ModelConfig, parallel: ParallelConfig) -> Refusals:
    several = parallel.world_size > 1 or parallel.data_parallel_size > 1
    for applies, where in (
        (current_platform.is_cuda(), "on a GPU"),
        (several, "on several devices or engines"),
        (target.quantization, "of quantised targets"),
        (target.is_moe, "of targets with experts"),
    ):
        yield (
            args.enable_lora and applies,
            f"enable_lora: outputs {where} were not compared with plain vLLM's yet; leave it out",
        )


def refused_environment(target: ModelConfig) -> Refusals:
    yield (
        target.max_model_len > context_length(target.hf_text_config)
        and is_set("VLLM_ALLOW_LONG_MAX_MODEL_LEN"),
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN: LongSpec's draft has no positions beyond the target's "
        "tables; unset it, or scale RoPE by hf_overrides",
    )
    yield (
        target.dtype == torch.float32 and is_set("VLLM_FLOAT32_MATMUL_PRECISION"),
        "VLLM_FLOAT32_MATMUL_PRECISION: LongSpec was not tried with it; unset it",
    )
    layout = envs.VLLM_KV_CACHE_LAYOUT
    yield (
        layout not in (None, CACHE_LAYOUT),
        f"VLLM_KV_CACHE_LAYOUT: LongSpec's ring needs the layout {CACHE_LAYOUT}, not {layout}; "
        "unset it",
    )
    yield (
        not (current_platform.is_cuda() or current_platform.is_cpu()),
        "LongSpec runs on CUDA and on CPUs only",
    )
    yield (
        os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0",
        "VLLM_USE_V2_MODEL_RUNNER: LongSpec needs vLLM's model runner V2; unset it",
    )
