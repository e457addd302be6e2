"""What a draft checkpoint holds, checked against its config before anything is started."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from vllm_longspec.config import LongSpecError, num_drafted_tokens

TOKEN_IDS = "draft_token_ids"

# In the published checkpoints and ours; nothing reads them.
OPTIONAL = tuple(
    f"cross_attn.{projection}.{kind}"
    for projection in ("k_proj", "v_proj")
    for kind in ("weight", "bias")
)


def expected_tensors(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a draft layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{norm}.weight": (hidden,)
        for norm in (
            "input_layernorm",
            "post_self_attention_layernorm",
            "post_cross_attention_layernorm",
        )
    }
    for attention in ("self_attn", "cross_attn"):
        for projection, size in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            shapes[f"{attention}.{projection}.weight"] = (size, hidden)
            shapes[f"{attention}.{projection}.bias"] = (size,)
        shapes[f"{attention}.o_proj.weight"] = (hidden, query)
    for projection in ("gate_proj", "up_proj"):
        shapes[f"mlp.{projection}.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if getattr(config, "draft_vocab_size", None) is not None:
        shapes[TOKEN_IDS] = (num_drafted_tokens(config),)
    return shapes


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files, else its torch files; only
    headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shapes[name] = tuple(tensors.get_slice(name).get_shape())
    if shapes:
        return shapes
    for path in sorted(folder.glob("*.bin")):
        tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return shapes


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a folder in which `stored_tensors` finds it."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor(name)
    for path in folder.glob("*.bin"):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if name in tensors:
            return tensors[name]
    raise KeyError(name)


def check_token_ids(ids: torch.Tensor | None, config: PreTrainedConfig) -> None:
    """Raises LongSpecError unless `ids`, None where the checkpoint holds none, are the tokens of a
    draft with this config."""
    size = getattr(config, "draft_vocab_size", None)
    if size is None:
        if ids is not None:
            raise LongSpecError(
                f"draft_vocab_size: config.json lacks it, but the checkpoint holds {TOKEN_IDS}; "
                f"set it to {ids.numel()}"
            )
        return
    num_drafted_tokens(config)
    redo = "make the draft again with `vllm-longspec trim-head`"
    if ids is None:
        raise LongSpecError(
            f"{TOKEN_IDS}: the checkpoint lacks this tensor, but config.json has "
            f"draft_vocab_size {size}; {redo}"
        )
    if tuple(ids.shape) != (size,) or ids.dtype != torch.int64:
        raise LongSpecError(
            f"{TOKEN_IDS}: is {list(ids.shape)} of {str(ids.dtype).removeprefix('torch.')}, but "
            f"draft_vocab_size makes it [{size}] of int64; {redo}"
        )
    if ids[0] < 0 or ids[-1] >= config.vocab_size or (ids.diff() <= 0).any():
        raise LongSpecError(
            f"{TOKEN_IDS}: are not strictly increasing token ids below the vocab_size "
            f"{config.vocab_size}; {redo}"
        )


def check_checkpoint(folder: Path, config: PreTrainedConfig) -> None:
    """Raises LongSpecError for missing, extra and misshapen tensors, naming them."""
    expected, stored = expected_tensors(config), stored_tensors(folder)
    if not stored:
        raise LongSpecError(f"model: {folder} holds no *.safetensors (or *.bin) file with weights")
    check_token_ids(read_tensor(folder, TOKEN_IDS) if TOKEN_IDS in stored else None, config)
    missing = sorted(set(expected) - set(stored) - set(OPTIONAL))
    extra = sorted(set(stored) - set(expected))
    if missing or extra:
        parts = [
            f"{kind} {', '.join(names)}"
            for kind, names in (("lacks", missing), ("has the unknown", extra))
            if names
        ]
        raise LongSpecError(
            f"model: {folder} {' and '.join(parts)}; a LongSpec draft holds exactly one layer"
        )
    for name, shape in stored.items():
        if shape != expected[name]:
            raise LongSpecError(
                f"model: tensor {name} in {folder} is {list(shape)}, but config.json "
                f"makes it {list(expected[name])}; use the config the draft was trained with"
            )
