"""What a user sets: the draft checkpoint's `config.json` and the tree options, validated."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub.dataclasses import strict
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from vllm_longspec.errors import LongSpecError, reason, short

MODEL_TYPE = "longspec"
ARCHITECTURE = "LongSpecDraftModel"
# Class names in the config of the authors' six published checkpoints (sail/longspec-*).
PUBLISHED_ARCHITECTURES = ("LlamaGlideDecoderLayer", "Qwen2GlideDecoderLayer")

FP8 = "fp8"  # the draft's weights, as vLLM calls it
CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32")  # of a KV cache that is not quantised
DEFAULT_WINDOW = 512
DEFAULT_TREE_SHAPE = (4, 16, 16, 16, 16)
DEFAULT_NUM_SPECULATIVE_TOKENS = 31
# Where vLLM looks for a model's length, what it takes where there is none, and the kinds of RoPE
# whose configs have the length already scaled.
LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
    "max_target_positions", "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
VLLM_DEFAULT_LENGTH = 2048
SCALED_ALREADY = ("llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
# What the kernels hold without spilling registers (`tests/test_compile.py`), far beyond what pays.
MAX_HEAD_SIZE = 256
MAX_LEVEL_NODES = 128
MAX_TREE_NODES = 1023  # with the root a power of two
MAX_VERIFIED_NODES = 255
MAX_LEVELS = 64  # each is a forward of the draft, in every CUDA graph
# Kinds of attention layers, as transformers names them.
FULL, SLIDING = "full_attention", "sliding_attention"
# Of the draft's config; what it shares with its target.
SHARED_SHAPE = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip


def levels(tree_shape: Collection[int]) -> str:
    return short(" ".join(map(str, tree_shape)), 60)


@strict
class LongSpecConfig(LlamaConfig):
    """The draft layer has the shape of one layer of its target, so it has a Llama's fields.

    `window`: a query at position p sees its own layer's keys at p - window ... p.
    `draft_vocab_size`: the draft proposes only the tokens of the checkpoint's `draft_token_ids`, so
    many; None: any token.
    """

    model_type = MODEL_TYPE

    window: int = DEFAULT_WINDOW
    tree_shape: list[int] | None = None
    num_speculative_tokens: int | None = None
    draft_vocab_size: int | None = None

    def validate_architecture(self) -> None:
        """Without LlamaConfig's check that heads share the hidden size: GLM-4.5-Air has 96 heads of
        128 over 4,096."""


AutoConfig.register(MODEL_TYPE, LongSpecConfig, exist_ok=True)


def draft_config_for(target: PreTrainedConfig, **overrides: Any) -> LongSpecConfig:
    """The config of a draft layer for `target` (any causal LM's config). Its MLP is a Llama's
    whatever the target's is."""
    fields = (
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    shape = {name: getattr(target, name) for name in fields if getattr(target, name, None)}
    # Where kinds of layers have RoPE of their own, the draft has that of the layer it reads.
    rope = shape.get("rope_parameters") or {}
    if FULL in rope:
        shape["rope_parameters"] = rope[FULL]
    inner = mlp_size(target)
    if inner is not None:
        shape["intermediate_size"] = inner
    return LongSpecConfig(
        **{"architectures": [ARCHITECTURE], "num_hidden_layers": 1, **shape, **overrides}
    )


def attention_kinds(target: PreTrainedConfig) -> list[str]:
    """Of each layer, "full_attention", "sliding_attention" or another of transformers'
    `layer_types`."""
    kinds = getattr(target, "layer_types", None)
    if kinds:
        return list(kinds)
    # Mistral and Mixtral have no layer_types: with a window, every layer slides.
    slides = target.model_type in ("mistral", "mixtral") and getattr(target, "sliding_window", None)
    return [SLIDING if slides else FULL] * target.num_hidden_layers


def cross_attention_layer(target: PreTrainedConfig) -> int:
    """Whose keys and values the draft reads: the last layer that attends to the whole context.
    Raises LongSpecError where none does."""
    kinds = attention_kinds(target)
    if FULL not in kinds:
        raise LongSpecError(
            "model: no layer of the target attends to the whole context, so there is none for the "
            "draft to read"
        )
    return len(kinds) - 1 - kinds[::-1].index(FULL)


def mlp_size(target: PreTrainedConfig) -> int | None:
    """The inner size of a draft's MLP: that of a dense layer of the target.

    A config with experts that has a `moe_intermediate_size` still says it (Qwen, GLM); else its
    `intermediate_size` is that of one expert (Mixtral, OLMoE, gpt-oss), and a dense layer's is
    taken to be what a token passes through, up to a dense model's usual four hidden sizes: a draft
    reads all of it at each level of the tree.
    """
    inner: int | None = getattr(target, "intermediate_size", None)
    per_token = getattr(target, "num_experts_per_tok", None)
    if not inner or not per_token or getattr(target, "moe_intermediate_size", None):
        return inner
    return max(inner, min(per_token * inner, 4 * target.hidden_size))


def is_draft_config(config: PreTrainedConfig) -> bool:
    names = set(config.architectures or ())
    return config.model_type == MODEL_TYPE or bool(names & {ARCHITECTURE, *PUBLISHED_ARCHITECTURES})


def known_draft_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of what is known to be a draft, by its tensors: a published draft's config is its
    target's, whose class name it may have."""
    if config.model_type == MODEL_TYPE:
        return config
    names = (
        "window", "tree_shape", "num_speculative_tokens", "draft_vocab_size", "hidden_act",
        "intermediate_size",
    )  # fmt: skip
    own = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return draft_config_for(config, **own)


def as_draft_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same of a config that says so itself; any other config as it is."""
    return known_draft_config(config) if is_draft_config(config) else config


def read_target_config(target: str) -> PreTrainedConfig:
    """The config of a causal LM, a folder or a repository. Raises LongSpecError if it cannot be
    read."""
    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        raise LongSpecError(
            f"target: the config of {target} cannot be read ({reason(error)}); "
            "give the target's folder or a Hugging Face repository that is reachable"
        ) from error
    if is_draft_config(config):
        raise LongSpecError(f"target: {target} is a LongSpec draft; give the model it drafts for")
    return config


def read_tokenizer(target: str) -> PreTrainedTokenizerBase:
    """Of a folder or a repository. Raises LongSpecError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(target)
    except Exception as error:  # of a broken tokenizer.json the library raises its own kinds
        raise LongSpecError(
            f"target: the tokenizer of {target} cannot be read ({reason(error)}); give the "
            "target's folder or Hugging Face repository"
        ) from error


def context_length(config: PreTrainedConfig) -> int:
    """The tokens that a model is made for, as vLLM derives them (`_get_and_verify_max_len` of
    `vllm/config/model.py`, on which a test holds this): scaled RoPE of most kinds multiplies what
    the config says."""
    said = [getattr(config, name, None) for name in LENGTHS]
    length = getattr(config, "model_max_length", None) or min(
        (x for x in said if x is not None), default=VLLM_DEFAULT_LENGTH
    )
    ropes = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in ropes:
        ropes = {"all": ropes}
    factor: float | None = 1.0
    for rope in ropes.values():
        kind = rope.get("rope_type") if isinstance(rope, dict) else None
        if kind in ("longrope", "su"):
            return int(getattr(config, "original_max_position_embeddings", None) or length)
        if kind not in SCALED_ALREADY and kind is not None:
            factor = rope.get("factor", factor)
    return int(length * (1.0 if factor is None else factor))


def record_target(config: LongSpecConfig, target: PreTrainedConfig, name: str) -> None:
    """Write which target a draft is for into its config, the way the speculators format does:
    `vllm serve` of the draft alone then serves the target with it.

    vLLM wants a number of tokens there, so a draft served this way has one tree for all batch
    sizes.
    """
    folder = Path(name)
    config.speculators_model_type = MODEL_TYPE
    config.speculators_config = {
        "algorithm": MODEL_TYPE,
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "proposal_type": "greedy",
                "speculative_tokens": resolve_tree(draft_config=config).num_speculative_tokens,
            }
        ],
        "verifier": {
            "name_or_path": str(folder.resolve()) if folder.is_dir() else name,
            "architectures": list(target.architectures or ()),
        },
    }
    config.transformer_layer_config = {"model_type": target.model_type} | {
        field: shape_field(target, field) for field in (*SHARED_SHAPE, "intermediate_size")
    }


def recorded_verifier(config: PreTrainedConfig) -> dict[str, Any]:
    """What `record_target` wrote of the target: `name_or_path` and `architectures`; empty without
    it."""
    recorded = getattr(config, "speculators_config", None) or {}
    return recorded.get("verifier") or {}


def recorded_target(config: PreTrainedConfig) -> str | None:
    """The folder or repository that `record_target` wrote."""
    return recorded_verifier(config).get("name_or_path")


def check_layer(config: PreTrainedConfig) -> None:
    """Raises LongSpecError for a draft layer that cannot be run."""
    window = getattr(config, "window", DEFAULT_WINDOW)
    if not isinstance(window, int) or window < 1:
        raise LongSpecError(f"window: {window!r} is not a whole number of at least 1")
    if config.hidden_act != "silu":
        raise LongSpecError(
            f"hidden_act: LongSpec's layer has silu, not {config.hidden_act}; "
            "use a target and a draft with silu"
        )


def check_shape(draft: PreTrainedConfig, target: PreTrainedConfig) -> None:
    """Raises LongSpecError for a draft of another target, or of a layer that cannot be run."""
    check_layer(draft)
    for field in SHARED_SHAPE:
        ours, theirs = shape_field(draft, field), shape_field(target, field)
        if ours != theirs:
            name = recorded_target(draft)
            fix = f"use its own target, {name}, or" if name else "use"
            raise LongSpecError(
                f"{field}: the draft has {ours}, the target {theirs}; "
                f"{fix} a draft trained for this target"
            )


def shape_field(model: PreTrainedConfig, field: str) -> int:
    heads = model.num_attention_heads
    derived = {"num_key_value_heads": heads, "head_dim": model.hidden_size // heads}
    return getattr(model, field, None) or derived[field]


def num_drafted_tokens(config: PreTrainedConfig) -> int:
    """How many tokens a draft chooses among. Raises LongSpecError for an impossible number."""
    size = getattr(config, "draft_vocab_size", None)
    if size is None:
        return config.vocab_size
    if not isinstance(size, int) or not 1 <= size <= config.vocab_size:
        raise LongSpecError(
            f"draft_vocab_size: {size!r} is not between 1 and the vocab_size "
            f"{config.vocab_size}; choose one of these"
        )
    return size


def _split_words(value: Any) -> Any:
    return value.replace(",", " ").split() if isinstance(value, str) else value


class TreeConfig(BaseModel):
    """The tree the draft grows and how much of it the target verifies.

    `tree_shape`: nodes per level, as a list or as text ("4 16 16 16 16").
    `num_speculative_tokens`: the nodes sent to verification, the most probable ones of the tree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tree_shape: Annotated[tuple[PositiveInt, ...], BeforeValidator(_split_words)] = (
        DEFAULT_TREE_SHAPE
    )
    num_speculative_tokens: PositiveInt = DEFAULT_NUM_SPECULATIVE_TOKENS

    @property
    def depth(self) -> int:
        return len(self.tree_shape)

    @property
    def num_nodes(self) -> int:
        return sum(self.tree_shape)


def resolve_tree(
    tree_shape: Any = None,
    num_speculative_tokens: Any = None,
    draft_config: PreTrainedConfig | None = None,
) -> TreeConfig:
    """The user's options over those of the draft's `config.json` over the defaults.

    Raises LongSpecError for an empty tree, a level below one, a level that its parents cannot
    fill, for more nodes to verify than the tree has, and for more than kernels and ring hold.
    """
    draft_shape = getattr(draft_config, "tree_shape", None)
    draft_nodes = getattr(draft_config, "num_speculative_tokens", None)
    shape = next(s for s in (tree_shape, draft_shape, DEFAULT_TREE_SHAPE) if s is not None)
    try:
        tree = TreeConfig(tree_shape=shape)
    except ValidationError as error:
        raise LongSpecError(_tree_sentence(error, shape)) from None
    if not tree.tree_shape:
        raise LongSpecError("tree_shape: is empty; give at least one level, such as 4 16 16 16 16")
    _check_size(tree, getattr(draft_config, "window", DEFAULT_WINDOW))
    vocab_size = num_drafted_tokens(draft_config) if draft_config is not None else None
    parents = 1
    for level, width in enumerate(tree.tree_shape, start=1):
        if vocab_size is not None and width > parents * vocab_size:
            raise LongSpecError(
                f"tree_shape: level {level} has {width} nodes, but {parents} parents and a "
                f"vocabulary of {vocab_size} give at most {parents * vocab_size}; lower it"
            )
        parents = width

    nodes = num_speculative_tokens
    if nodes is None and draft_nodes is not None:
        # A tree the user made smaller than the one the draft was published with.
        nodes = draft_nodes if tree_shape is None else min(draft_nodes, tree.num_nodes)
    if nodes is None:
        nodes = min(DEFAULT_NUM_SPECULATIVE_TOKENS, tree.num_nodes)
    try:
        tree = TreeConfig(tree_shape=tree.tree_shape, num_speculative_tokens=nodes)
    except ValidationError as error:
        raise LongSpecError(_tree_sentence(error, nodes)) from None
    if tree.num_speculative_tokens > tree.num_nodes:
        raise LongSpecError(
            f"num_speculative_tokens: {tree.num_speculative_tokens} is more than the "
            f"{tree.num_nodes} nodes of tree_shape {levels(tree.tree_shape)}; "
            f"use at most {tree.num_nodes} or widen tree_shape"
        )
    if tree.num_speculative_tokens > MAX_VERIFIED_NODES:
        raise LongSpecError(
            f"num_speculative_tokens: {tree.num_speculative_tokens} nodes to verify do not fit the "
            f"kernels' registers; use at most {MAX_VERIFIED_NODES}"
        )
    return tree


def _check_size(tree: TreeConfig, window: int) -> None:
    if tree.depth > MAX_LEVELS:
        raise LongSpecError(
            f"tree_shape: {tree.depth} levels are as many forwards of the draft in each cycle; "
            f"use at most {MAX_LEVELS}"
        )
    if tree.depth >= window:
        # Else two of the tokens committed at once would get one slot of the ring.
        raise LongSpecError(
            f"tree_shape: a path of {tree.depth} nodes and its root do not fit the draft's window "
            f"of {window} tokens; use at most {window - 1} levels"
        )
    widest = max(tree.tree_shape)
    if widest > MAX_LEVEL_NODES:
        raise LongSpecError(
            f"tree_shape: a level of {widest} nodes does not fit the kernels' registers; "
            f"use at most {MAX_LEVEL_NODES}"
        )
    if tree.num_nodes > MAX_TREE_NODES:
        raise LongSpecError(
            f"tree_shape: {tree.num_nodes} nodes do not fit the kernels' registers; "
            f"use at most {MAX_TREE_NODES} in all levels"
        )


def _tree_sentence(error: ValidationError, value: Any) -> str:
    first = error.errors()[0]
    field, *index = first["loc"]
    if index:
        return (
            f"{field}: level {int(index[0]) + 1} is {short(repr(first['input']))}; "
            "every level needs a whole number of at least 1 node"
        )
    if field == "tree_shape":
        given = short(repr(value))
        return f"tree_shape: {given} is not a list of whole numbers, such as 4 16 16 16 16"
    return f"{field}: {short(repr(value))} is not a whole number of at least 1"
