"""The shapes that measurements are taken at: configs of models people serve, without weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from vllm_longspec.config import LongSpecConfig, draft_config_for
from vllm_longspec.errors import LongSpecError

# Beyond some models' own limit: measurements go to 100,000 tokens at every shape.
MAX_POSITIONS = 131072


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


# Of Qwen3-30B-A3B, but for its layers: 1.25 GB each in bf16, 1.24 GB embeddings and head.
QWEN3_30B_A3B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_parameters": _rope(1000000.0),
}

SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama3-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(500000.0),
        },
    ),
    "vicuna-7b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "vocab_size": 32000,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(10000.0),
        },
    ),
    "qwen2-32b": (
        Qwen2Config,
        {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 152064,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1000000.0),
        },
    ),
    "qwen3-32b": (
        Qwen3Config,
        {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _rope(1000000.0),
        },
    ),
    # 141 GB: to train for, on several GPUs.
    "llama3-70b": (
        LlamaConfig,
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(500000.0),
        },
    ),
    # 61 GB: alone on a GPU of 80 GB. Half of its layers, 31 GB, leave room for a second engine.
    "qwen3-30b-a3b": (Qwen3MoeConfig, QWEN3_30B_A3B | {"num_hidden_layers": 48}),
    "qwen3-30b-a3b-half": (Qwen3MoeConfig, QWEN3_30B_A3B | {"num_hidden_layers": 24}),
    # For tests: the nano pair fits in it with something to pad in every direction.
    "tiny": (
        LlamaConfig,
        {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 6000,
            "rms_norm_eps": 1e-5,
            "rope_parameters": _rope(1000000.0),
        },
    ),
}


def target_config(shape: str) -> PreTrainedConfig:
    if shape not in SHAPES:
        raise LongSpecError(f"shape: {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    config_class, fields = SHAPES[shape]
    architecture = config_class.__name__.replace("Config", "ForCausalLM")
    return config_class(
        architectures=[architecture],
        dtype="bfloat16",
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        **fields,
    )


def check_device(shape: str) -> None:
    """Raises LongSpecError for a shape that needs a GPU where there is none."""
    if shape != "tiny" and not torch.cuda.is_available():
        raise LongSpecError(f"shape: {shape} is measured on a CUDA GPU, and there is none here")


def draft_config(shape: str) -> LongSpecConfig:
    return draft_config_for(target_config(shape))


def write_config(shape: str, folder: Path) -> None:
    """A folder that vLLM serves with dummy weights and without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    target_config(shape).save_pretrained(folder)
