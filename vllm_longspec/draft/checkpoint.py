"""What a draft checkpoint holds, checked against its config before anything is started."""

import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from vllm_longspec.config import (
    ARCHITECTURE,
    MODEL_TYPE,
    PUBLISHED_ARCHITECTURES,
    known_draft_config,
    num_drafted_tokens,
)
from vllm_longspec.errors import LongSpecError, listed, reason

logger = logging.getLogger("vllm.longspec")

TOKEN_IDS = "draft_token_ids"

DRAFT_FILES = ["*.safetensors", "*.bin", "*.json", "README.md"]
# Left beside a model's weights by transformers' trainer.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin")

# In the published checkpoints and ours; nothing reads them.
OPTIONAL = tuple(
    f"cross_attn.{projection}.{kind}"
    for projection in ("k_proj", "v_proj")
    for kind in ("weight", "bias")
)

# Of a LongSpec draft, by which it is told from any other model.
OWN = (
    "cross_attn.q_proj.weight",
    "post_self_attention_layernorm.weight",
    "post_cross_attention_layernorm.weight",
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


def fetch_draft(model: str, revision: str | None = None, cache: str | None = None) -> Path:
    """The folder of a draft: `model` itself, or where the Hugging Face hub's files of the
    repository `model` were fetched to. Raises LongSpecError if it cannot be had."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise LongSpecError(
            f"draft: {model} does not exist; "
            "give a draft's folder or a Hugging Face repository (owner/name)"
        )
    try:
        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache, allow_patterns=DRAFT_FILES)
        )
    except (OSError, ValueError) as error:
        raise LongSpecError(
            f"draft: {model} cannot be fetched ({reason(error)}); "
            "give a draft's folder or a Hugging Face repository that is reachable"
        ) from error


def served_folder(model: str, revision: str | None, cache: str | None, fetch: bool) -> Path | None:
    """The folder of the draft to serve; None for a repository that is not to be fetched. Raises
    LongSpecError for what is no draft, by its config or by its tensors."""
    folder = Path(model)
    is_path = folder.is_absolute() or model.startswith(".") or model.count("/") != 1
    if is_path and not folder.is_dir():
        raise LongSpecError(
            f"--speculative-model: {model} does not exist; "
            "give a draft's folder or a Hugging Face repository (owner/name)"
        )
    if not folder.is_dir():
        if not fetch:
            return None
        folder = fetch_draft(model, revision, cache)
    if not (folder / "config.json").is_file():
        raise LongSpecError(
            f"--speculative-model: {model} holds no config.json; give a LongSpec draft's folder, "
            "or make one of a torch file with `vllm-longspec convert`"
        )
    if not is_draft_folder(folder):
        raise LongSpecError(
            f"--speculative-model: {model} is not a LongSpec draft (by its config.json and the "
            "names of its tensors); train one with `vllm-longspec train`"
        )
    return folder


def is_draft_folder(folder: Path) -> bool:
    """Whether a draft lies there, as its config says or, of those who call it their target's, its
    tensors."""
    try:
        stored = json.loads((folder / "config.json").read_text())
        architectures = set(stored.get("architectures") or ())
        return (
            stored.get("model_type") == MODEL_TYPE
            or bool(architectures & {ARCHITECTURE, *PUBLISHED_ARCHITECTURES})
            or holds_draft(folder)
        )
    except (OSError, ValueError, LookupError, AttributeError):
        return False


def holds_draft(folder: Path) -> bool:
    """Only headers are read."""
    return not stored_tensors(folder).keys().isdisjoint(OWN)


def read_draft_config(folder: Path) -> PreTrainedConfig:
    """The config of the draft in a folder, ours or published. Raises LongSpecError for another
    folder."""
    if not (folder / "config.json").is_file():
        raise LongSpecError(f"draft: {folder} has no config.json; give a LongSpec draft's folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise LongSpecError(
            f"draft: the config.json of {folder} cannot be read ({reason(error)}); "
            "fetch the draft again"
        ) from error
    if not is_draft_folder(folder):
        raise LongSpecError(
            f"draft: {folder} is not a LongSpec draft; give a LongSpec draft's folder"
        )
    return known_draft_config(config)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, else its torch files: those that its index names, if it has
    one. Raises LongSpecError for a named file that is missing."""
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(path for path in folder.glob(pattern) if path.name not in NOT_WEIGHTS)
        if not files:
            continue
        named: set[str] = set()
        for index in folder.glob(f"{pattern}.index.json"):
            named |= set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {path.name for path in files})
        if missing:
            raise LongSpecError(
                f"model: {folder} lacks {listed(missing)}, which its index names; "
                "fetch the draft again"
            )
        return [path for path in files if not named or path.name in named]
    return []


def open_tensors(path: Path) -> Any:
    """A safetensors file to read tensors from. Raises LongSpecError for one cut short."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise LongSpecError(
            f"model: {path} is not a whole safetensors file ({reason(error)}); "
            "fetch the draft again"
        ) from error


def load_torch(path: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a torch file, read without running anything that may be pickled in it.
    Raises LongSpecError for a file with anything else in it."""
    refusal = LongSpecError(
        f"model: {path} holds more than named tensors and is not opened; "
        "take the draft's safetensors files, or a torch file of its state dict alone"
    )
    # Of torch's two formats only the present one, a zip file, can be mapped.
    zipped = zipfile.is_zipfile(path)
    try:
        if not zipped and path.open("rb").read(2) in (b"", b"PK"):
            raise EOFError("it ends early")
        tensors = torch.load(path, map_location=device, weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise refusal from error
    except (RuntimeError, EOFError) as error:
        raise LongSpecError(
            f"model: {path} is not a whole torch file ({reason(error)}); fetch the draft again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise refusal
    return tensors


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a folder's safetensors files, else its torch files; only
    headers are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with open_tensors(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        else:
            stored = load_torch(path, "meta")
            shapes.update({name: tuple(tensor.shape) for name, tensor in stored.items()})
    return shapes


def read_tensor(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a folder in which `stored_tensors` finds it."""
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with open_tensors(path) as tensors:
                if name in tensors.keys():  # noqa: SIM118
                    return tensors.get_tensor(name)
        else:
            stored = load_torch(path, "cpu")
            if name in stored:
                return stored[name]
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
    """Raises LongSpecError for missing and misshapen tensors, naming them; others are named in a
    warning."""
    stored = stored_tensors(folder)
    if not stored:
        raise LongSpecError(f"model: {folder} holds no *.safetensors (or *.bin) file with weights")
    check_token_ids(read_tensor(folder, TOKEN_IDS) if TOKEN_IDS in stored else None, config)
    check_shapes(folder, stored, config)


def check_shapes(
    source: Path,
    stored: Mapping[str, tuple[int, ...]],
    config: PreTrainedConfig,
    described_by: str = "config.json",
) -> None:
    expected = expected_tensors(config)
    missing = sorted(set(expected) - set(stored) - set(OPTIONAL))
    unknown = sorted(set(stored) - set(expected))
    if missing:
        instead = f" and has the unknown {listed(unknown, 1)}" if unknown else ""
        raise LongSpecError(
            f"model: {source} lacks {listed(missing, 2)}{instead}; a LongSpec draft holds one "
            "layer with all its tensors"
        )
    for name, shape in stored.items():
        if name in expected and shape != expected[name]:
            raise LongSpecError(
                f"model: tensor {name} in {source} is {list(shape)}, but {described_by} "
                f"makes it {list(expected[name])}; use the config the draft was trained with"
            )
    if unknown:
        logger.warning("LongSpec: %s also holds %s; a draft does not use them", source,
                       listed(unknown))  # fmt: skip


def whole_draft(
    stored: Mapping[str, torch.Tensor], config: PreTrainedConfig
) -> dict[str, torch.Tensor]:
    """All tensors that our format has and no others. Published drafts may lack what nothing reads;
    training from one loads it."""
    dtype = stored["self_attn.q_proj.weight"].dtype
    return {
        name: stored[name].clone(memory_format=torch.contiguous_format)
        if name in stored
        else torch.zeros(shape, dtype=dtype)
        for name, shape in expected_tensors(config).items()
    }


def read_draft(folder: Path, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """The tensors of a folder that `check_checkpoint` passed."""
    names = stored_tensors(folder).keys() & expected_tensors(config).keys()
    return whole_draft({name: read_tensor(folder, name) for name in names}, config)
