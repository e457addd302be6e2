"""Targets: each supported type runs packed as transformers runs it alone; others are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4MoeConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.config import (
    FULL,
    SLIDING,
    attention_kinds,
    cross_attention_layer,
    draft_config_for,
)
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.model import DraftLayer, init_weights, load_draft, save_draft
from vllm_longspec.train.objective import draft_loss
from vllm_longspec.train.packing import Batch, make_batch, pack
from vllm_longspec.train.target import check_target, load_target, run_target

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 512,
    },
    "yarn": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
}  # fmt: skip
# Windows that end within both pieces of the tests, the layer that is read first, last and between.
WINDOWS = {
    "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING],
    "rope_parameters": ROPES["default"],
}  # fmt: skip
GEMMA3 = {
    "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 40,
    "layer_types": [SLIDING, SLIDING, FULL],
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TARGETS = {
    "llama": (LlamaConfig, {"rope_parameters": ROPES["llama3"]}),
    "llama-linear": (LlamaConfig, {"rope_parameters": ROPES["linear"], "attention_bias": True}),
    "qwen2": (Qwen2Config, {"rope_parameters": ROPES["yarn"]}),
    "qwen3": (Qwen3Config, {"rope_parameters": ROPES["default"], "head_dim": 16}),
    "mistral": (MistralConfig, {"rope_parameters": ROPES["default"], "sliding_window": None}),
    "gemma": (GemmaConfig, {"rope_parameters": ROPES["default"], "head_dim": 16}),
    "gemma3": (Gemma3TextConfig, GEMMA3),
    "gemma3-full-first": (Gemma3TextConfig, GEMMA3 | {"layer_types": [FULL, SLIDING, SLIDING]}),
    "qwen2-windows": (Qwen2Config, WINDOWS | {"use_sliding_window": True}),
    "qwen3-windows": (Qwen3Config, WINDOWS | {"use_sliding_window": True, "head_dim": 16}),
    "qwen2_moe": (Qwen2MoeConfig, EXPERTS | {"rope_parameters": ROPES["default"]}),
    "qwen3_moe": (
        Qwen3MoeConfig, EXPERTS | {"rope_parameters": ROPES["yarn"], "head_dim": 16}
    ),
    "mixtral": (
        MixtralConfig,
        {"num_local_experts": 4, "rope_parameters": ROPES["default"], "sliding_window": None},
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        EXPERTS | {
            "n_routed_experts": 6, "num_experts": 6, "n_shared_experts": 1, "head_dim": 16,
            "rope_parameters": ROPES["default"] | {"partial_rotary_factor": 0.5},
        },
    ),
}  # fmt: skip


def config_of(name: str, **changes: object) -> PreTrainedConfig:
    config_class, fields = TARGETS[name]
    return config_class(**SHAPE | fields | changes)


@pytest.mark.parametrize("name", TARGETS)
def test_packed_target(name: str) -> None:
    """Two pieces at once, one far from position 0: keys, values and hidden states of each alone;
    the draft layer rotates by the target's angles and has its shape."""
    torch.manual_seed(0)
    config = config_of(name)
    target = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(97, (1, 40))
    positions = torch.cat([torch.arange(13), torch.arange(3000, 3027)])[None]
    with torch.no_grad():
        alone = [
            target.model(input_ids=tokens[:, rows], position_ids=positions[:, rows], use_cache=True)
            for rows in (slice(13), slice(13, 40))
        ]
    state = run_target(target, tokens, positions, (13, 27))
    assert (SLIDING in attention_kinds(config)) == ("windows" in name or "gemma3" in name)
    last = [out.past_key_values.layers[cross_attention_layer(config)] for out in alone]
    close = {"atol": 2e-4, "rtol": 1e-3}
    torch.testing.assert_close(state.key, torch.cat([x.keys for x in last], 2), **close)
    torch.testing.assert_close(state.value, torch.cat([x.values for x in last], 2), **close)
    hidden = torch.cat([out.last_hidden_state for out in alone], 1)
    torch.testing.assert_close(state.hidden, hidden, **close)

    layer = DraftLayer(draft_config_for(config))
    by_kind = (FULL,) if "gemma3" in name else ()
    expected = target.model.rotary_emb(state.embeddings, positions, *by_kind)
    for ours, theirs in zip(layer.rotary(state.embeddings, positions), expected, strict=True):
        assert torch.equal(ours, theirs)
    out = layer(state.embeddings, positions, state.key, state.value, 2, (13, 27))
    out.sum().backward()
    assert out.shape == state.embeddings.shape and bool(out.isfinite().all())
    own, target_layer = layer.self_attn, target.model.layers[0].self_attn
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = getattr(target_layer, projection).weight
        assert getattr(own, projection).weight.shape == weight.shape


def test_a_window_does_not_see_across_a_jump_of_positions() -> None:
    """As in a long text: layers with full attention see the sinks, others do not."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config_of("gemma3"), attn_implementation="eager")
    for parameter in target.eval().parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch(
        torch.randint(97, (30,)).numpy(), [pack(np.asarray([12, 18]), 30)],
        np.asarray([3, 0]), np.asarray([2000, 500]), first_token=2,
    )  # fmt: skip
    assert batch.runs == (3, 9, 18) and batch.tokens[0, [0, 12]].tolist() == [2, 2]
    state = run_target(target, batch.tokens, batch.positions, batch.lengths, batch.runs)
    target.set_attn_implementation("eager")
    for piece in (slice(12), slice(12, 30)):
        positions = batch.positions[:, piece]
        distance = positions[0, :, None] - positions[0]
        masks = {FULL: distance >= 0, SLIDING: (distance >= 0) & (distance < 7)}
        with torch.no_grad():
            expected = target.model(
                input_ids=batch.tokens[:, piece], position_ids=positions, use_cache=False,
                attention_mask={
                    kind: torch.where(seen, 0.0, -torch.inf)[None, None]
                    for kind, seen in masks.items()
                },
            ).last_hidden_state  # fmt: skip
        torch.testing.assert_close(state.hidden[:, piece], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", TARGETS)
def test_a_saved_draft_keeps_its_targets_rope(name: str, tmp_path: Path) -> None:
    layer = DraftLayer(draft_config_for(config_of(name)))
    save_draft(layer, tmp_path)
    x, positions = torch.zeros(1, 50, 48), torch.arange(2000, 2050)[None]
    before, after = (each.rotary(x, positions) for each in (layer, load_draft(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (GPT2Config(), "is a 'gpt2' model; drafts are trained for causal LMs of the types llama"),
        (config_of("mistral", sliding_window=64), "no layer of this one attends to the whole"),
        (config_of("mixtral", sliding_window=64), "no layer of this one attends to the whole"),
        (
            config_of("qwen2-windows", layer_types=[SLIDING] * 3),
            "no layer of this one attends to the whole",
        ),
        (
            config_of("llama", layer_types=[SLIDING, FULL, FULL], sliding_window=64),
            "layer_types of this one has sliding layers, which transformers' llama does not have",
        ),
        (GptOssConfig(), "is a 'gpt_oss' model"),
        (config_of("gemma3", final_logit_softcapping=30.0), "caps its logits"),
        (config_of("gemma3", use_bidirectional_attention=True), "attends in both directions"),
    ],
    ids=["gpt2", "mistral", "mixtral", "qwen2", "llama", "gpt-oss", "softcap", "embedding"],
)
def test_refused(config: PreTrainedConfig, sentence: str) -> None:
    with pytest.raises(LongSpecError, match=sentence):
        check_target(config, "this one")


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_a_step_with_a_target_with_experts(name: str, tmp_path: Path) -> None:
    """Loaded from a folder as training loads it; a few steps on one batch lower the loss."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(name)).save_pretrained(tmp_path)
    target = load_target(tmp_path, torch.device("cpu"))
    layer = DraftLayer(draft_config_for(target.config))
    init_weights(layer, torch.Generator().manual_seed(0))
    tokens = torch.randint(97, (1, 40))
    batch = Batch(tokens, torch.arange(40)[None], tokens.roll(-1, 1).flatten(), (40,), (2,))
    state = run_target(target, tokens, batch.positions, batch.lengths)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = draft_loss(layer, target.get_output_embeddings().weight, state, batch, 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    assert all(p.grad is None for p in target.parameters())


QWEN3_30B = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336}
OLMOE = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts_per_tok": 8}
GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4}


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (Qwen3MoeConfig(**QWEN3_30B), 6144),  # a dense layer's, as the config says
        (MixtralConfig(**MIXTRAL), 16384),  # two experts', up to four hidden sizes
        (OlmoeConfig(**OLMOE), 8192),  # eight small experts'
        (GptOssConfig(**GPT_OSS), 11520),
        (LlamaConfig(hidden_size=4096, intermediate_size=14336), 14336),
    ],
    ids=["qwen3-moe", "mixtral", "olmoe", "gpt-oss", "llama"],
)
def test_the_mlp_of_a_draft(config: PreTrainedConfig, size: int) -> None:
    draft = draft_config_for(config)
    assert (draft.intermediate_size, draft.hidden_act) == (size, "silu")


def test_the_cost_of_a_step(tmp_path: Path) -> None:
    def bench(*arguments: object):
        return CliRunner().invoke(app, ["bench", "train-step", *map(str, arguments)])

    path = tmp_path / "step.json"
    done = bench("--shape", "tiny", "--sequence-length", 40, "--sequences", 2, "--output", path)
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    assert result["tokens_per_second"] == pytest.approx(80 / result["seconds_per_step"])
    assert result["peak_memory_gib"] > 0.1 and 8 < result["loss"] < 10  # ln 6000 is 8.7
    for arguments, sentence in (
        (("--shape", "huge"), "shape: 'huge' is unknown"),
        (("--shape", "tiny", "--sequence-length", 4), "sequence_length: 4 is not between"),
        (("--shape", "tiny", "--sequences", 0), "--sequences"),
        (("--shape", "tiny", "--sequence-length", 40, "--shard-target"), "there is one process"),
    ):
        done = bench(*arguments)
        assert done.exit_code == 2 and sentence in done.stderr, done.stderr
