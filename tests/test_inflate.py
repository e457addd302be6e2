"""A small model embedded in a large shape computes what the small one does."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRAFT, ROOT, TARGET, text_prompt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config
from typer.testing import CliRunner

from vllm_longspec.bench import inflate
from vllm_longspec.bench.inflate import embed_shape, inflate_draft, inflate_target
from vllm_longspec.bench.shapes import SHAPES, draft_config, target_config, write_config
from vllm_longspec.cli import app
from vllm_longspec.config import LongSpecConfig, draft_config_for
from vllm_longspec.draft.checkpoint import check_checkpoint
from vllm_longspec.draft.reference import draft_layer
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.model import DraftLayer, init_weights, load_draft, save_draft

TOLERANCE = 1e-4
FAR_BELOW = 30.0
SMALL = ROOT.parent / "shared/models/small"
LENGTH = 160


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def inputs(vocab: int) -> torch.Tensor:
    """Text, noise, one token over and over, and a walk through the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [
            torch.tensor(text_prompt(0, LENGTH)) % vocab,
            torch.randint(0, vocab, (LENGTH,), generator=generator),
            torch.full((LENGTH,), 7),
            torch.arange(LENGTH) * 911 % vocab,
        ]
    )


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in float32 and the last layer's keys and values, [batch, kv heads, length, dim]."""
    result = model(ids, use_cache=True)
    layer = result.past_key_values.layers[-1]
    return result.logits.float(), layer.keys, layer.values


def assert_same_logits(expected: torch.Tensor, got: torch.Tensor, tolerance: float) -> None:
    vocab = expected.shape[-1]
    assert got.isfinite().all()
    assert (got[..., :vocab] - expected).abs().max() <= tolerance * expected.abs().max()
    if got.shape[-1] > vocab:
        # Below every real token's, hence below what any temperature could sample.
        gap = got[..., :vocab].amin(-1) - got[..., vocab:].amax(-1)
        assert gap.min() >= FAR_BELOW


def draft_logits(
    draft: DraftLayer, model: Any, ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """What the draft proposes after every token, from the oracle; no norm before the head."""
    index = torch.arange(len(ids))
    distance = index[:, None] - index[None, :]
    with torch.no_grad():
        hidden = draft_layer(
            draft.state_dict(),
            draft.config,
            model.get_input_embeddings()(ids),
            index,
            (distance >= 0) & (distance <= draft.config.window),
            key.transpose(0, 1),
            value.transpose(0, 1),
            distance >= 1,
        )
        return model.lm_head(hidden)


def check_pair(
    target: Path, draft: Path, shape: Any, folder: Path, ids: torch.Tensor
) -> tuple[Any, torch.Tensor]:
    """Inflates both in float32 and compares all logits; returns the large model and its logits."""
    large_config = inflate_target(target, shape, folder / "target", "float32")
    large_draft_config = inflate_draft(draft, target, shape, folder / "draft", "float32")
    check_checkpoint(folder / "draft", large_draft_config)
    small, large = load(target), load(folder / "target")
    assert large.config.rms_norm_eps == large_config.rms_norm_eps
    expected, *small_cache = run(small, ids)
    got, *large_cache = run(large, ids)
    assert_same_logits(expected, got, TOLERANCE)
    assert torch.equal(expected.argmax(-1), got.argmax(-1))

    small_draft, large_draft = load_draft(draft), load_draft(folder / "draft")
    for row in range(len(ids)):
        assert_same_logits(
            draft_logits(small_draft, small, ids[row], *(x[row] for x in small_cache)),
            draft_logits(large_draft, large, ids[row], *(x[row] for x in large_cache)),
            TOLERANCE,
        )
    return large, got


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("inflated")


def test_nano_pair(folder: Path) -> None:
    """Wider, deeper, more and larger heads, more tokens; a tied head becomes untied."""
    large, _ = check_pair(TARGET, DRAFT, target_config("tiny"), folder / "nano", inputs(4096))
    assert large.config.num_hidden_layers == 6
    assert (folder / "nano/target/tokenizer.json").exists()
    for name, parameter in large.named_parameters():
        share = float((parameter != 0).float().mean())
        writes = any(part in name for part in ("o_proj", "down_proj", "embed_tokens"))
        assert share > 0.99 or "k_proj" in name or "norm" in name or writes, (name, share)
    matrices = [
        parameter
        for name, parameter in large.named_parameters()
        if parameter.dim() == 2 and "embed_tokens" not in name
    ]
    nonzero = sum(int((matrix != 0).sum()) for matrix in matrices)
    assert nonzero > 0.5 * sum(matrix.numel() for matrix in matrices)


def test_bfloat16(folder: Path) -> None:
    """As far from float32 as the small model's own bf16 is, in proportion."""
    inflate_target(TARGET, target_config("tiny"), folder / "bf16")
    ids = inputs(4096)
    exact, *_ = run(load(TARGET), ids)
    small, *_ = run(load(TARGET, torch.bfloat16), ids)
    large_model = load(folder / "bf16", torch.bfloat16)
    assert json.loads((folder / "bf16/config.json").read_text())["dtype"] == "bfloat16"
    large, *_ = run(large_model, ids)
    assert (large[..., 4096:].amax(-1) <= large[..., :4096].amin(-1) - FAR_BELOW).all()
    large = large[..., :4096]
    rounding = (small - exact).square().mean().sqrt()
    assert (large - exact).square().mean().sqrt() < 2 * rounding
    assert (large - small).abs().max() < 4 * (small - exact).abs().max()
    # Where they choose another token, the two were closer than the rounding of logits.
    best = exact.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * (small - exact).abs().max()
    assert clear.float().mean() > 0.25
    assert torch.equal(large.argmax(-1)[clear], exact.argmax(-1)[clear])


def random_pair(folder: Path, **fields: Any) -> tuple[Path, Path]:
    """A random target and draft in which everything matters, with massive activations."""
    config = LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "float32",
            **fields,
        }
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 + (1.0 if "norm" in name else 0.0))
        # One dimension in the hundreds from the second layer on.
        model.model.layers[1].mlp.down_proj.weight[5] *= 300
    model.save_pretrained(folder / "target")
    layer = DraftLayer(draft_config_for(config, window=40, tree_shape=[2, 3]))
    init_weights(layer, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_draft(layer, folder / "draft", torch.float32)
    return folder / "target", folder / "draft"


LARGE = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "shape",
    [
        LlamaConfig(num_attention_heads=16, num_key_value_heads=4, head_dim=16, **LARGE),
        LlamaConfig(num_attention_heads=8, num_key_value_heads=8, head_dim=64, **LARGE),
        Qwen2Config(num_attention_heads=8, num_key_value_heads=4, head_dim=32, **LARGE),
    ],
    ids=["same-head-dim", "no-groups-longer-heads", "qwen2-groups-split"],
)
@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_random_pair(shape: Any, rope_type: str, tmp_path: Path) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0}
    if rope_type == "llama3":
        rope |= {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    target, draft = random_pair(tmp_path, rope_parameters=rope)
    large, logits = check_pair(target, draft, shape, tmp_path / "large", inputs(300))
    assert logits.shape[-1] == 500
    assert large.config.rope_parameters["rope_type"] == rope_type
    config = LongSpecConfig.from_pretrained(tmp_path / "large/draft")
    assert (config.window, config.tree_shape) == (40, [2, 3])


def test_residual_stream(tmp_path: Path) -> None:
    """The residual stream holds zeros and the constant to the bit, in every layer, in bf16."""
    target, _ = random_pair(tmp_path)
    shape = LlamaConfig(num_attention_heads=16, num_key_value_heads=4, head_dim=16, **LARGE)
    inflate_target(target, shape, tmp_path / "large", "bfloat16")
    model = load(tmp_path / "large", torch.bfloat16)
    with torch.no_grad():
        states = model.model(inputs(300), output_hidden_states=True).hidden_states[:-1]
    constant = inflate.embed_shape(LlamaConfig.from_pretrained(target), shape).constant
    assert math.log2(constant).is_integer()
    for state in states:
        assert (state[..., 96:-1] == 0).all()
        assert (state[..., -1] == constant).all()


def test_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files with an index hold the same weights as one."""
    monkeypatch.setattr(inflate, "SHARD_BYTES", 10 << 20)
    inflate_target(TARGET, target_config("tiny"), folder / "shards")
    index = json.loads((folder / "shards/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (folder / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    monkeypatch.undo()
    inflate_target(TARGET, target_config("tiny"), folder / "one")
    sharded: dict[str, torch.Tensor] = {}
    for file in files:
        sharded |= load_file(folder / "shards" / file)
    whole = load_file(folder / "one/model.safetensors")
    assert sharded.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_trimmed_draft(tmp_path: Path) -> None:
    target, draft = random_pair(tmp_path)
    ids = torch.arange(0, 300, 3)
    weights = load_file(draft / "model.safetensors") | {"draft_token_ids": ids}
    save_file(weights, draft / "model.safetensors")
    config = LongSpecConfig.from_pretrained(draft)
    config.draft_vocab_size = len(ids)
    config.save_pretrained(draft)
    shape = LlamaConfig(num_attention_heads=16, num_key_value_heads=4, head_dim=16, **LARGE)
    large = inflate_draft(draft, target, shape, tmp_path / "large")
    assert large.draft_vocab_size == 100
    assert torch.equal(load_file(tmp_path / "large/model.safetensors")["draft_token_ids"], ids)
    check_checkpoint(tmp_path / "large", large)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path) -> None:
    write_config(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["max_position_embeddings"] == 131072
    assert config["hidden_size"] == draft_config(name).hidden_size
    assert draft_config(name).head_dim == 128
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(target_config(name))
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    sizes = {
        "llama3-8b": 8.03, "vicuna-7b": 6.74, "qwen2-32b": 32.76, "qwen3-30b-a3b": 30.53,
        "qwen3-30b-a3b-half": 15.58, "qwen3-32b": 32.76, "llama3-70b": 70.55,
    }  # fmt: skip
    assert name == "tiny" or abs(billions - sizes[name]) < 0.01


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("qwen3-30b-a3b", "experts cannot hold a dense model; "), ("qwen3-32b", "qwen3 has norms")],
)
def test_shapes_that_hold_no_llama(name: str, sentence: str) -> None:
    small, large = (target_config(name) for name in ("tiny", name))
    with pytest.raises(LongSpecError, match=f"^shape: {sentence}"):
        embed_shape(small, large)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("vocab_size", 200, "target: vocab_size 300 is more than the shape's 200"),
        ("intermediate_size", 100, "target: intermediate_size 160 is more"),
        ("num_hidden_layers", 2, "target: num_hidden_layers 3 is more"),
        ("hidden_size", 96, "target: hidden_size 96 must be below the shape's 96"),
        ("head_dim", 8, "target: head_dim 16 is more than the shape's 8"),
        ("head_dim", 24, "target: head_dim 16 does not divide the shape's 24"),
        ("num_key_value_heads", 16, "target: num_key_value_heads 2 with 3 query heads each take 6"),
    ],
)
def test_does_not_fit(field: str, value: int, sentence: str, tmp_path: Path) -> None:
    target, _ = random_pair(tmp_path)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 16}
    fields = {**LARGE, **heads, field: value}
    if field == "num_key_value_heads":
        fields |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    shape = LlamaConfig(**fields)
    with pytest.raises(LongSpecError) as error:
        inflate_target(target, shape, tmp_path / "large")
    assert str(error.value).startswith(sentence)
    assert "use a" in str(error.value)
    assert not (tmp_path / "large").exists()


def test_other_mistakes(tmp_path: Path) -> None:
    target, draft = random_pair(
        tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    shape = LlamaConfig(**heads, head_dim=16, **LARGE)
    with pytest.raises(LongSpecError, match=r"^target: .* holds no config.json"):
        inflate_target(tmp_path, shape, tmp_path / "large")
    with pytest.raises(LongSpecError, match=r"^target: .* is a LongSpec draft; give the model"):
        inflate_target(draft, shape, tmp_path / "large")
    with pytest.raises(LongSpecError, match=r"^dtype: 'float16' is not supported"):
        inflate_target(target, shape, tmp_path / "large", "float16")
    with pytest.raises(
        LongSpecError, match=r"^draft: hidden_size 256 differs from the target's 96"
    ):
        inflate_draft(DRAFT, target, shape, tmp_path / "large")
    with pytest.raises(LongSpecError, match=r"^output: .* is in a model's folder"):
        inflate_target(target, shape, target)

    weights = load_file(target / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, target / "model.safetensors")
    with pytest.raises(LongSpecError, match=r"lacks model.layers.1.mlp.up_proj.weight"):
        inflate_target(target, shape, tmp_path / "large")

    config = json.loads((target / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(LongSpecError, match=r"^target: rope_parameters of type 'yarn'"):
        inflate_target(target, LlamaConfig(**heads, head_dim=32, **LARGE), tmp_path / "large")


def test_command(tmp_path: Path) -> None:
    def command(*options: str) -> Any:
        return CliRunner().invoke(app, ["bench", "inflate", "--target", str(TARGET), *options])

    large, large_draft = tmp_path / "large", tmp_path / "draft"
    output = ["--output", str(large)]
    result = command("--shape", "gpt-5", *output)
    assert result.exit_code == 2
    assert "shape: 'gpt-5' is unknown; use one of llama3-8b" in result.output
    result = command("--shape", "tiny", *output, "--draft", str(DRAFT))
    assert result.exit_code == 2
    assert "--draft and --draft-output go together" in result.output
    result = command(
        "--shape", "tiny", *output, "--draft", str(DRAFT), "--draft-output", str(large_draft)
    )
    assert result.exit_code == 0, result.output
    assert (large / "model.safetensors").exists()
    assert (large_draft / "model.safetensors").exists()


@pytest.mark.skipif(not SMALL.exists(), reason="needs the trained model ../shared/models/small")
def test_small(folder: Path) -> None:
    shape = LlamaConfig(
        vocab_size=20000,
        hidden_size=1024,
        intermediate_size=2560,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
    )
    inflate_target(SMALL, shape, folder / "small", "float32")
    ids = inputs(16384)
    expected, *_ = run(load(SMALL), ids)
    got, *_ = run(load(folder / "small"), ids)
    assert_same_logits(expected, got, TOLERANCE)
    assert torch.equal(expected.argmax(-1), got.argmax(-1))
