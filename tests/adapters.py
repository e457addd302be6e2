"""LoRA adapters with random weights, for the shipped target."""

import json
from pathlib import Path

import torch
from helpers import TARGET
from safetensors.torch import save_file
from transformers import AutoConfig

RANK = 8
LAYERS = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
]  # fmt: skip


def write_adapter(folder: Path, seed: int, head: bool = False) -> str:
    """One that changes every layer of a Llama so much that its tokens are others; `head`: the
    head too."""
    config = AutoConfig.from_pretrained(TARGET)
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden), "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    names = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    }
    if head:
        names["lm_head"] = (config.vocab_size, hidden)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in names.items():
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) * 0.05
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = LAYERS if head else LAYERS[:-1]
    options = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(options | {"target_modules": targets}))
    return str(folder)
