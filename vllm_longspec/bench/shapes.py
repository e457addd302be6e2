"""The shapes that measurements are taken at: configs of models people serve, without weights."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from vllm_longspec.config import LongSpecConfig, LongSpecError, draft_config_for

# Beyond some models' own limit: measurements go to 100,000 tokens at every shape.
MAX_POSITIONS = 131072


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


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


def draft_config(shape: str) -> LongSpecConfig:
    return draft_config_for(target_config(shape))


def write_config(shape: str, folder: Path) -> None:
    """A folder that vLLM serves with dummy weights and without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    target_config(shape).save_pretrained(folder)
