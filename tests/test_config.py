"""The tree options: what the user gives over the draft's config over the defaults."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import TARGET
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
)

from vllm_longspec.config import (
    FULL,
    SLIDING,
    LongSpecConfig,
    attention_kinds,
    check_shape,
    context_length,
    cross_attention_layer,
    draft_config_for,
    is_draft_config,
    resolve_tree,
)
from vllm_longspec.errors import LongSpecError, listed


def test_defaults() -> None:
    tree = resolve_tree()
    assert (tree.tree_shape, tree.num_speculative_tokens) == ((4, 16, 16, 16, 16), 31)
    assert (tree.depth, tree.num_nodes) == (5, 68)


@pytest.mark.parametrize("shape", [[2, 2, 2], "2 2 2", "2,2,2", ["2", "2", "2"]])
def test_shapes_as_lists_and_text(shape: object) -> None:
    tree = resolve_tree(shape)
    assert (tree.tree_shape, tree.num_speculative_tokens) == ((2, 2, 2), 6)


def test_drafts_config_stands_between() -> None:
    draft = LongSpecConfig(tree_shape=[8, 8], num_speculative_tokens=10)
    tree = resolve_tree(draft_config=draft)
    assert (tree.tree_shape, tree.num_speculative_tokens) == ((8, 8), 10)
    assert resolve_tree(num_speculative_tokens=12, draft_config=draft).num_speculative_tokens == 12
    assert resolve_tree("1 1", draft_config=draft).num_speculative_tokens == 2
    assert resolve_tree("4 16 16", draft_config=draft).num_speculative_tokens == 10


@pytest.mark.parametrize(
    ("shape", "nodes", "names"),
    [
        ([], None, ["tree_shape", "empty"]),
        ("", None, ["tree_shape", "empty"]),
        ([4, 0, 2], None, ["tree_shape", "level 2", "0"]),
        ([4, -3], None, ["tree_shape", "level 2", "-3"]),
        (["4", "x"], None, ["tree_shape", "level 2", "'x'"]),
        ([2.5], None, ["tree_shape", "level 1", "2.5"]),
        (7, None, ["tree_shape", "7"]),
        ([2, 2], 5, ["num_speculative_tokens", "5", "4 nodes", "at most 4"]),
        (None, 69, ["num_speculative_tokens", "69", "68"]),
        (None, 0, ["num_speculative_tokens", "0"]),
        (None, -1, ["num_speculative_tokens", "-1"]),
        (None, "many", ["num_speculative_tokens", "'many'"]),
        ([1] * 65, None, ["tree_shape", "65 levels", "at most 64"]),
        ([16, 129], None, ["tree_shape", "129 nodes", "at most 128"]),
        ([64] * 16, None, ["tree_shape", "1024 nodes", "at most 1023"]),
        ([64] * 8, 256, ["num_speculative_tokens", "256", "at most 255"]),
    ],
)
def test_mistakes_are_named(shape: object, nodes: object, names: list[str]) -> None:
    with pytest.raises(LongSpecError) as error:
        resolve_tree(shape, nodes)
    assert all(name in str(error.value) for name in names), str(error.value)
    assert "\n" not in str(error.value)


def test_levels_a_small_vocabulary_cannot_fill() -> None:
    draft = LongSpecConfig(vocab_size=16)
    with pytest.raises(LongSpecError, match="level 1 has 17 nodes"):
        resolve_tree([17], draft_config=draft)
    assert resolve_tree([16, 128], 31, draft).num_nodes == 144


def test_paths_that_a_small_window_cannot_hold() -> None:
    draft = LongSpecConfig(window=5)
    with pytest.raises(LongSpecError, match="use at most 4 levels"):
        resolve_tree([2] * 5, draft_config=draft)
    assert resolve_tree([2] * 4, draft_config=draft).depth == 4


def test_largest_trees() -> None:
    assert resolve_tree([1] * 64, 64).depth == 64
    assert resolve_tree([*[128] * 7, 127], 255).num_nodes == 1023


def test_draft_config_has_its_targets_shape(tmp_path) -> None:
    target = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    draft_config_for(target, window=128).save_pretrained(tmp_path)
    draft = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(draft, LongSpecConfig) and is_draft_config(draft)
    assert not is_draft_config(target)
    assert (draft.hidden_size, draft.num_key_value_heads, draft.head_dim) == (64, 2, 16)
    assert (draft.window, draft.num_hidden_layers) == (128, 1)


def test_long_lists_and_values_are_cut() -> None:
    assert listed(["a", "b", "c"]) == "a, b, c" and listed("abcdef") == "a, b, c and 3 more"
    for options in (
        {"tree_shape": [1] * 500, "num_speculative_tokens": 501}, {"tree_shape": {"x": "y" * 500}},
        {"tree_shape": ["z" * 500]}, {"num_speculative_tokens": "n" * 500},
    ):  # fmt: skip
        with pytest.raises(LongSpecError) as error:
            resolve_tree(**options)
        assert len(str(error.value)) < 300


ORIGINAL = {"original_max_position_embeddings": 2048}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
# What a config says of its length, and what comes of it.
LENGTHS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 4096),
    "vicuna-16k": ({"rope_scaling": {"type": "linear", "factor": 4.0},
                    "max_sequence_length": 16384}, 16384),
    "longchat-32k": ({"rope_scaling": {"type": "linear", "factor": 8.0},
                      "max_position_embeddings": 2048}, 16384),
    "linear, in the present form": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}, 10240
    ),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}, 4096),
    "llama3": ({"rope_scaling": {"factor": 8.0, **LLAMA3}}, 4096),
    "longrope": ({"rope_scaling": {"factor": 2.0, **LONGROPE, **ORIGINAL}}, 4096),
    "longrope, as Phi-3 has it": ({"rope_scaling": LONGROPE | {"factor": 2.0}, **ORIGINAL}, 2048),
    "shorter elsewhere": ({"max_seq_len": 1024}, 1024),
    "said by hand": ({"model_max_length": 8192}, 8192),
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_the_length_of_a_target_is_what_vllm_serves(name: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    said, expected = LENGTHS[name]
    stored = json.loads((TARGET / "config.json").read_text())
    for field in ("rope_parameters", "rope_scaling"):
        stored.pop(field, None)
    stored |= {"max_position_embeddings": 4096, "rope_theta": 1e4} | said
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = AutoConfig.from_pretrained(tmp_path)
    assert context_length(config) == expected
    served = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    assert served.max_model_len == expected
    assert context_length(served.hf_config) == expected


def test_the_draft_reads_the_last_layer_that_sees_the_whole_context() -> None:
    kinds = [SLIDING] * 5 + [FULL] + [SLIDING] * 2
    gemma = Gemma3TextConfig(num_hidden_layers=8, layer_types=kinds)
    assert cross_attention_layer(gemma) == 5
    rope = draft_config_for(gemma).rope_parameters
    assert rope["rope_theta"] == gemma.rope_parameters[FULL]["rope_theta"] != 10_000
    assert cross_attention_layer(LlamaConfig(num_hidden_layers=3)) == 2
    assert attention_kinds(MistralConfig(num_hidden_layers=2, sliding_window=None)) == [FULL] * 2
    with pytest.raises(LongSpecError, match="no layer of the target attends to the whole context"):
        cross_attention_layer(MistralConfig(sliding_window=4096))


def test_heads_that_do_not_share_the_hidden_size(tmp_path: Path) -> None:
    """GLM-4.5-Air's numbers."""
    heads = {"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128}
    glm = Glm4MoeConfig(hidden_size=4096, num_hidden_layers=2, **heads)
    draft = draft_config_for(glm)
    check_shape(draft, glm)
    draft.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).head_dim == 128
