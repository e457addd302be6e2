"""The frozen target: which models can be one, and what the draft reads of it."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_accelerate_available

from vllm_longspec.config import FULL, SLIDING, attention_kinds, cross_attention_layer
from vllm_longspec.errors import LongSpecError, listed, reason
from vllm_longspec.train.attention import Lengths, shifted_attention, window_attention
from vllm_longspec.train.model import packed_heads

# Whose layers take `packed_attention`, whose head is a product and no more, and whose keys are
# rotated as `train/model.py` rotates.
MODEL_TYPES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "qwen2_moe", "qwen3_moe",
    "mixtral", "glm4_moe",
)  # fmt: skip
# Those of them whose layers have windows in transformers too, where `layer_types` says so.
WINDOWED = ("qwen2", "qwen3", "gemma3_text")
PACKED = "longspec-packed"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class TargetState:
    """What the frozen target gives the draft for a batch."""

    embeddings: torch.Tensor  # [batch, length, hidden_size]
    # Of the last layer with full attention, keys rotated.
    key: torch.Tensor  # [batch, num_kv_heads, length, head_dim]
    value: torch.Tensor  # [batch, num_kv_heads, length, head_dim]
    hidden: torch.Tensor  # [batch, length, hidden_size] ready for the head


def target_config(target: str) -> PreTrainedConfig:
    """Raises LongSpecError for what is no model, or one that a draft cannot be trained for."""
    try:
        config = AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise LongSpecError(
            f"target: {target} has no config.json that transformers can read; give the folder or "
            "the Hugging Face repository of a causal LM"
        ) from error
    check_target(config, target)
    return config


def check_target(config: PreTrainedConfig, name: str) -> None:
    if config.model_type not in MODEL_TYPES:
        raise LongSpecError(
            f"target: {name} is a {config.model_type!r} model; drafts are trained for causal LMs "
            f"of the types {', '.join(MODEL_TYPES)}"
        )
    kinds = attention_kinds(config)
    if SLIDING in kinds and FULL in kinds and config.model_type not in WINDOWED:
        raise LongSpecError(
            f"target: layer_types of {name} has sliding layers, which transformers' "
            f"{config.model_type} does not have; drafts for such targets are trained for the types "
            f"{', '.join(WINDOWED)}"
        )
    if FULL not in kinds:
        raise LongSpecError(
            f"target: no layer of {name} attends to the whole context, so there is none for a "
            "draft to read; use a model with at least one such layer"
        )
    if getattr(config, "final_logit_softcapping", None):
        raise LongSpecError(
            f"target: {name} caps its logits (final_logit_softcapping), which training does not "
            "know; use a model without"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise LongSpecError(
            f"target: {name} attends in both directions, so it writes no text; use a causal LM"
        )


def load_target(folder: Any, device: torch.device) -> PreTrainedModel:
    """Frozen, for inference; bf16 on a GPU, else float32. Quantised as transformers runs it."""
    return read_target(folder, device, default_dtype(device))


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def read_target(folder: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    method = quantisation(target_config(str(folder)))
    # Straight to the device: the host may not have room for it.
    place = {"device_map": {"": device}} if is_accelerate_available() else {}
    try:
        target, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **place
        )
        if method is not None:
            # Run whole once: what is unpacked before the first forward is not by that of a part.
            with torch.no_grad():
                target(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=target.device))
    except ImportError as error:
        raise LongSpecError(
            f"target: transformers needs a package for {folder} ({reason(error)}); install it, or "
            "give the model in another format"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise LongSpecError(
            f"target: the weights of {folder} cannot be loaded ({reason(error)}); fetch them again"
        ) from error
    except Exception as error:
        if method is None:
            raise
        raise LongSpecError(
            f"target: {folder} is quantised ({method}), and transformers cannot run it here "
            f"({reason(error)}); give the model in another format"
        ) from error
    check_found(found, method, str(folder))
    check_plain(target, str(folder))
    if not place:
        target = target.to(device)
    return target.eval().requires_grad_(False)


def check_found(found: dict[str, Any], method: str | None, name: str) -> None:
    """Raises LongSpecError for weights that transformers made up, and for parts of quantised ones
    that it did not know."""
    if missing := found["missing_keys"]:
        raise LongSpecError(
            f"target: {name} has no {listed(sorted(missing))}; fetch its weights again, or give a "
            "model whose weights are of its config"
        )
    if method is not None and (unknown := found["unexpected_keys"]):
        raise LongSpecError(
            f"target: {name} is quantised ({method}), and transformers does not know its "
            f"{listed(sorted(unknown))}; give the model in another format"
        )


def quantisation(config: PreTrainedConfig) -> str | None:
    """The method that a target is quantised by."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    return str(fields.get("quant_method") or "unknown")


def check_plain(target: PreTrainedModel, name: str) -> None:
    """Raises LongSpecError unless what a draft shares with its target is a product of floats."""
    shared = {
        "embeddings": target.get_input_embeddings(), "head": target.get_output_embeddings()
    }  # fmt: skip
    for what, module in shared.items():
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.pop("weight", None)
        if weight is None or weight.dtype not in FLOATS or parameters.keys() - {"bias"}:
            raise LongSpecError(
                f"target: the {what} of {name} is quantised, and a draft is trained on plain "
                f"numbers; give the model with its {what} not quantised"
            )


class Read:
    """Keys and values of the layer that the draft reads, put here by `packed_attention`. Not a
    list: a sharded model copies lists among its arguments."""

    key: torch.Tensor
    value: torch.Tensor


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,  # [batch, num_heads, length, head_dim]
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: Lengths,
    read: Read,
    read_layer: int,
    scaling: float | None = None,
    runs: Lengths | None = None,
    sliding_window: int | None = None,  # keys a query sees, its own among them
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal within each piece, over the layer's own window; leaves keys and values of the layer
    that the draft reads in `read`, so that no other layer's are kept."""
    if module.layer_idx == read_layer:
        read.key, read.value = key, value
    usual = query.shape[-1] ** -0.5
    if scaling is not None and scaling != usual:
        query = query * (scaling / usual)
    q, k, v = (packed_heads(x) for x in (query, key, value))
    if sliding_window is None:
        out = shifted_attention(q, k, v, 0, lengths)  # [num_tokens, num_heads, head_dim]
    else:
        out = window_attention(q, k, v, sliding_window - 1, runs or lengths)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register(PACKED, packed_attention)


@torch.no_grad()
def run_target(
    target: PreTrainedModel,
    tokens: torch.Tensor,  # [batch, length]
    positions: torch.Tensor,  # [batch, length]
    lengths: Lengths | None = None,
    runs: Lengths | None = None,
) -> TargetState:
    """`lengths`: pieces of documents as in `DraftLayer.forward`, each run as if it were alone.
    `runs`: what layers with a window see of them at most, where positions jump within a piece."""
    batch, length = tokens.shape
    if target.config._attn_implementation != PACKED:
        target.set_attn_implementation(PACKED)
    embeddings = target.get_input_embeddings()(tokens)
    read = Read()
    out = target.model(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False,
        lengths=lengths or (length,) * batch, runs=runs, read=read,
        read_layer=cross_attention_layer(target.config),
    )  # fmt: skip
    # Torch's FSDP2 keeps the order of layers for a backward pass, which never comes; before 2.13 it
    # cannot be told, and keeps a few kilobytes a batch.
    if hasattr(target.model, "reset_iter_state"):
        target.model.reset_iter_state()
    return TargetState(embeddings, read.key, read.value, out.last_hidden_state)
