"""A small trained Llama, and its draft, embedded in a large shape: the large model computes the
small one's logits at the large one's cost, so real acceptance can be measured at real cost.

In exact arithmetic the two models are the same function; what is left is rounding.

- Width. The residual stream is the small one's, then zeros, then one constant. Whatever writes to
  it (embeddings, o_proj, down_proj) has zero rows beyond the small width; whatever reads it has
  random columns there, which meet zeros.
- RMSNorm over the large width D of a vector whose squares sum to those of the small width d plus
  c^2: weights times sqrt(d / D) and epsilon (d eps - c^2) / D give exactly the small norm.
- Heads. Random query, key and value rows for heads and MLP units the small model lacks; o_proj and
  down_proj have zero columns for them. Small KV head j is large KV head j, its query heads are the
  first of that head's group; where they do not fit in it, copies of the KV head take the rest.
- A smaller head_dim. Dimension i of a small head is dimension i * m of a large one, where m is the
  ratio: RoPE turns both by the same angle and pairs the same two. Keys are zero in between, queries
  are scaled by sqrt(m), because attention divides by the large head_dim's root.
- Depth. Layers the small model lacks come first and have zero o_proj and down_proj, so that the
  last layer, whose cache the draft reads, is the small model's last.
- Vocabulary. The small ids keep their numbers. The head of every other id is the mean of the real
  heads, so its logit is the mean of the real logits, less a gap read from the constant: about
  GAP for the draft, which the head reads without a norm, and at least GAP for the target up to a
  final residual of root mean square MAX_RMS (trained models have 1 to 100). The mean never exceeds
  the maximum and e^-GAP times a vocabulary is nothing, so no such id is ever seen or sampled.

Rounding: norm weights are rounded once more (sqrt(d / D)), and queries where head_dim grows by an
odd power of two. Everything else keeps its bits.

Work: all projections that read are dense. o_proj and down_proj are mostly zeros, which a GPU reads
and multiplies like anything else, if at slightly less power; 68% of llama3-8b's weights, embeddings
aside, are not zero.
"""

import copy
import json
import math
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from vllm_longspec.config import LongSpecConfig, draft_config_for, read_target_config
from vllm_longspec.draft.checkpoint import TOKEN_IDS, check_checkpoint, read_draft_config
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_folder
from vllm_longspec.writing import whole_folder

Tensors = Mapping[str, torch.Tensor]

GAP = 64.0
MAX_RMS = 1024.0
NOISE_STD = 0.02
# A prime: with no row length in common, no two rows of a matrix are equal.
NOISE_SIZE = 8388593
SHARD_BYTES = 2 << 30
# RoPE variants whose angles depend on a dimension's share of the head_dim alone.
SCALABLE_ROPE = ("default", "linear", "llama3")


class Noise:
    """Random values cut from one buffer: to draw eight billion of them would take minutes."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.buffer = (torch.randn(NOISE_SIZE, generator=generator) * NOISE_STD).to(dtype)
        self.offsets = random.Random(seed)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(rows * columns, dtype=self.buffer.dtype)
        start, done = self.offsets.randrange(NOISE_SIZE), 0
        while done < len(out):
            piece = self.buffer[start : start + len(out) - done]
            out[done : done + len(piece)] = piece
            start, done = 0, done + len(piece)
        return out.view(rows, columns)


@dataclass(frozen=True)
class Embedding:
    """Where a small model's parts lie in a large one's."""

    width: int
    large_width: int
    constant: float  # what the residual stream's last dimension holds, at every token and layer
    epsilon: float
    query_rows: torch.Tensor  # row of the small q_proj -> row of the large one
    query_scale: float
    key_rows: torch.Tensor  # row of the large k_proj and v_proj ...
    key_sources: torch.Tensor  # ... and which row of the small one it holds
    key_gaps: torch.Tensor  # rows of large KV heads between those of small ones
    large_query: int
    large_key: int
    inner: int
    large_inner: int

    @property
    def norm_scale(self) -> float:
        return math.sqrt(self.width / self.large_width)


def embed_shape(small: PreTrainedConfig, large: PreTrainedConfig) -> Embedding:
    """Raises LongSpecError where the small model does not fit."""
    if getattr(large, "num_experts", None):
        raise LongSpecError("shape: experts cannot hold a dense model; use a shape without them")
    if large.model_type == "qwen3":
        raise LongSpecError(
            "shape: qwen3 has norms of queries and keys, which a Llama has not; use another shape"
        )
    for field in ("vocab_size", "intermediate_size", "num_hidden_layers", "head_dim"):
        if getattr(small, field) > getattr(large, field):
            raise LongSpecError(
                f"target: {field} {getattr(small, field)} is more than the shape's "
                f"{getattr(large, field)}; use a smaller target or a larger shape"
            )
    if small.hidden_size >= large.hidden_size:
        raise LongSpecError(
            f"target: hidden_size {small.hidden_size} must be below the shape's "
            f"{large.hidden_size}, one dimension of which holds a constant; use a larger shape"
        )
    group = small.num_attention_heads // small.num_key_value_heads
    large_group = large.num_attention_heads // large.num_key_value_heads
    copies = math.ceil(group / large_group)
    kv_heads = small.num_key_value_heads * copies
    if kv_heads > large.num_key_value_heads:
        raise LongSpecError(
            f"target: num_key_value_heads {small.num_key_value_heads} with {group} query heads "
            f"each take {kv_heads} KV heads of {large_group}, but the shape has "
            f"{large.num_key_value_heads}; use a target with fewer heads or a larger shape"
        )
    head_dim, large_head_dim = small.head_dim, large.head_dim
    stride = large_head_dim // head_dim
    if large_head_dim % head_dim:
        raise LongSpecError(
            f"target: head_dim {head_dim} does not divide the shape's {large_head_dim}, "
            "so RoPE's frequencies differ; use a target whose head_dim does"
        )
    rope_type = small.rope_parameters["rope_type"]
    if stride > 1 and rope_type not in SCALABLE_ROPE:
        raise LongSpecError(
            f"target: rope_parameters of type {rope_type!r} do not carry over from head_dim "
            f"{head_dim} to {large_head_dim}; use a target with head_dim {large_head_dim}"
        )

    def rows(heads: Iterable[int], size: int, step: int) -> torch.Tensor:
        return torch.tensor([head * size + i * step for head in heads for i in range(head_dim)])

    query_heads = [
        (j * copies + i // large_group) * large_group + i % large_group
        for j in range(small.num_key_value_heads)
        for i in range(group)
    ]
    # A power of two is exact in every dtype; its square stays below what epsilon makes up for.
    energy = small.rms_norm_eps * small.hidden_size
    constant = 2.0 ** math.floor(math.log2(energy / 2) / 2)
    return Embedding(
        width=small.hidden_size,
        large_width=large.hidden_size,
        constant=constant,
        epsilon=(energy - constant**2) / large.hidden_size,
        query_rows=rows(query_heads, large_head_dim, stride),
        query_scale=math.sqrt(stride),
        key_rows=rows(range(kv_heads), large_head_dim, stride),
        key_sources=rows((head // copies for head in range(kv_heads)), head_dim, 1),
        key_gaps=torch.tensor(
            [row for row in range(kv_heads * large_head_dim) if row % stride], dtype=torch.int64
        ),
        large_query=large.num_attention_heads * large_head_dim,
        large_key=large.num_key_value_heads * large_head_dim,
        inner=small.intermediate_size,
        large_inner=large.intermediate_size,
    )


def inflate_target(
    target: Path, shape: PreTrainedConfig, output: Path, dtype: str | None = None
) -> PreTrainedConfig:
    """Writes the model in `target` at the dimensions of `shape` to `output` and returns its config.

    `dtype`: "bfloat16" or "float32", by default the small model's.
    """
    claim_folder(output, inputs=(target,))
    small, large, embedding = _configs(target, shape)
    large.dtype = _dtype(small.dtype or torch.float32 if dtype is None else dtype)
    weights = _load(target)
    _check_layers(weights, small)
    tensors = _target_tensors(weights, small, large, embedding, Noise(large.dtype))
    with whole_folder(output) as unfinished:
        large.save_pretrained(unfinished)
        for path in target.iterdir():
            weights_or_config = path.name == "config.json" or path.name.endswith(".index.json")
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not weights_or_config:
                shutil.copyfile(path, unfinished / path.name)
        _save_shards(tensors, unfinished)
    return large


def inflate_draft(
    draft: Path, target: Path, shape: PreTrainedConfig, output: Path, dtype: str | None = None
) -> LongSpecConfig:
    """Writes the draft of the small model in `target` as the draft of the inflated one."""
    claim_folder(output, inputs=(draft, target), option="draft_output")
    small_target, large_target, embedding = _configs(target, shape)
    small = read_draft_config(draft)
    for field in (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "rms_norm_eps",
    ):  # fmt: skip
        if getattr(small, field) != getattr(small_target, field):
            raise LongSpecError(
                f"draft: {field} {getattr(small, field)} differs from the target's "
                f"{getattr(small_target, field)}; use the draft of this target"
            )
    check_checkpoint(draft, small)
    own = ("window", "tree_shape", "num_speculative_tokens", "draft_vocab_size")
    large = draft_config_for(large_target, **{field: getattr(small, field) for field in own})
    weights = _load(draft)
    large.dtype = _dtype(weights["input_layernorm.weight"].dtype if dtype is None else dtype)
    with whole_folder(output, "draft_output") as unfinished:
        large.save_pretrained(unfinished)
        _save_shards(_draft_tensors(weights, embedding, Noise(large.dtype)), unfinished)
    return large


def _configs(
    target: Path, shape: PreTrainedConfig
) -> tuple[PreTrainedConfig, PreTrainedConfig, Embedding]:
    """The small config, the large one, and how the first lies in the second."""
    if not (target / "config.json").is_file():
        raise LongSpecError(f"target: {target} holds no config.json; give a model's folder")
    small = read_target_config(str(target))
    if small.model_type != "llama" or small.attention_bias or small.mlp_bias:
        raise LongSpecError(
            f"target: model_type {small.model_type!r} cannot be inflated; "
            "use a Llama without biases"
        )
    embedding = embed_shape(small, shape)
    large = copy.deepcopy(shape)
    for field in (
        "rope_parameters", "max_position_embeddings", "hidden_act",
        "bos_token_id", "eos_token_id", "pad_token_id",
    ):  # fmt: skip
        setattr(large, field, copy.deepcopy(getattr(small, field)))
    large.rms_norm_eps = embedding.epsilon
    large.tie_word_embeddings = False
    return small, large, embedding


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    name = str(dtype).removeprefix("torch.")
    if name not in dtypes:
        raise LongSpecError(f"dtype: {name!r} is not supported; use {' or '.join(dtypes)}")
    return dtypes[name]


def _load(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    if not weights:
        raise LongSpecError(f"model: {folder} holds no *.safetensors file; convert its weights")
    return weights


def _check_layers(weights: Tensors, small: PreTrainedConfig) -> None:
    """What a layer lacks would be taken for an extra layer's and become noise."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for layer in range(small.num_hidden_layers):
        for part in [*attention, *mlp, "input_layernorm", "post_attention_layernorm"]:
            name = f"model.layers.{layer}.{part}.weight"
            if name not in weights:
                raise LongSpecError(f"target: the checkpoint lacks {name}; give a whole Llama")


def _target_tensors(
    weights: Tensors,
    small: PreTrainedConfig,
    large: PreTrainedConfig,
    embedding: Embedding,
    noise: Noise,
) -> Iterator[tuple[str, torch.Tensor]]:
    embed = weights["model.embed_tokens.weight"]
    vocab, width = embed.shape
    table = torch.zeros(large.vocab_size, large.hidden_size, dtype=noise.buffer.dtype)
    table[:vocab, :width] = embed
    # Never fed; filled so that made-up prompts over the whole vocabulary run as real ones do.
    table[vocab:, :width] = noise.matrix(large.vocab_size - vocab, width)
    table[:, -1] = embedding.constant
    yield "model.embed_tokens.weight", table
    del table

    biased = large.model_type == "qwen2"
    extra = large.num_hidden_layers - small.num_hidden_layers
    for index in range(large.num_hidden_layers):
        old, new = f"model.layers.{index - extra}.", f"model.layers.{index}."
        layer = {
            name.removeprefix(old): weight
            for name, weight in weights.items()
            if name.startswith(old)
        }
        for part in (
            _attention("self_attn.", layer, embedding, noise, biased),
            _mlp("mlp.", layer, embedding, noise),
            _norms(("input_layernorm", "post_attention_layernorm"), layer, embedding, noise),
        ):
            for name, tensor in part:
                yield new + name, tensor

    ((_, norm),) = _norms(
        ("norm",), {"norm.weight": weights["model.norm.weight"]}, embedding, noise
    )
    norm[-1] = MAX_RMS * embedding.norm_scale
    yield "model.norm.weight", norm
    yield "lm_head.weight", _head(weights.get("lm_head.weight", embed), large, embedding, noise)


def _draft_tensors(
    weights: Tensors, embedding: Embedding, noise: Noise
) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _attention("self_attn.", weights, embedding, noise, biased=True)
    yield from _attention("cross_attn.", weights, embedding, noise, biased=True)
    yield from _mlp("mlp.", weights, embedding, noise)
    norms = ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm")
    yield from _norms(norms, weights, embedding, noise)
    if TOKEN_IDS in weights:  # of a trimmed head; ids keep their numbers
        yield TOKEN_IDS, weights[TOKEN_IDS]


def _attention(
    prefix: str, weights: Tensors, embedding: Embedding, noise: Noise, biased: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """An attention of the small model, or, where there are no weights for it, of an extra layer."""
    every = torch.arange(len(embedding.query_rows))
    key = (embedding.key_rows, embedding.key_sources, embedding.large_key, 1.0)
    for projection, (rows, sources, size, scale) in (
        ("q_proj", (embedding.query_rows, every, embedding.large_query, embedding.query_scale)),
        ("k_proj", key),
        ("v_proj", key),
    ):
        name = f"{prefix}{projection}"
        matrix = noise.matrix(size, embedding.large_width)
        if f"{name}.weight" in weights:
            weight = weights[f"{name}.weight"][sources].float() * scale
            matrix[rows, : embedding.width] = weight.to(matrix.dtype)
            if projection == "k_proj":
                matrix[embedding.key_gaps] = 0
        yield f"{name}.weight", matrix
        if biased:
            bias = torch.zeros(size, dtype=matrix.dtype)
            if f"{name}.bias" in weights:
                bias[rows] = (weights[f"{name}.bias"][sources].float() * scale).to(bias.dtype)
            yield f"{name}.bias", bias
    rows, size = embedding.query_rows, embedding.large_query
    yield _writer(f"{prefix}o_proj.weight", weights, rows, size, embedding, noise)


def _mlp(
    prefix: str, weights: Tensors, embedding: Embedding, noise: Noise
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in (f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"):
        matrix = noise.matrix(embedding.large_inner, embedding.large_width)
        if name in weights:
            matrix[: embedding.inner, : embedding.width] = weights[name]
        yield name, matrix
    columns, size = torch.arange(embedding.inner), embedding.large_inner
    yield _writer(f"{prefix}down_proj.weight", weights, columns, size, embedding, noise)


def _writer(
    name: str,
    weights: Tensors,
    columns: torch.Tensor,
    size: int,
    embedding: Embedding,
    noise: Noise,
) -> tuple[str, torch.Tensor]:
    matrix = torch.zeros(embedding.large_width, size, dtype=noise.buffer.dtype)
    if name in weights:
        matrix[: embedding.width, columns] = weights[name].to(matrix.dtype)
    return name, matrix


def _norms(
    names: Iterable[str], weights: Tensors, embedding: Embedding, noise: Noise
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        norm = torch.ones(embedding.large_width, dtype=noise.buffer.dtype)
        if f"{name}.weight" in weights:
            norm[: embedding.width] = weights[f"{name}.weight"].float() * embedding.norm_scale
        norm[-1] = 0  # what comes after may then read the constant with any weight
        yield f"{name}.weight", norm


def _head(
    head: torch.Tensor, large: PreTrainedConfig, embedding: Embedding, noise: Noise
) -> torch.Tensor:
    vocab, width = head.shape
    matrix = noise.matrix(large.vocab_size, large.hidden_size)
    matrix[:vocab, :width] = head
    matrix[vocab:, :width] = head.float().mean(0)
    # The draft's constant is read as it is; the target's after division by a root mean square that
    # its norm weight, MAX_RMS, outweighs.
    matrix[:vocab, -1] = 0
    matrix[vocab:, -1] = -GAP / embedding.constant
    return matrix


def _save_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Holds one shard in memory at a time."""
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = size = 0

    def flush() -> None:
        nonlocal size
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    files = set(weight_map.values())
    if len(files) == 1:
        (folder / files.pop()).rename(folder / "model.safetensors")
        return
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
