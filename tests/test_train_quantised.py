"""Quantised targets are trained for as transformers runs them, or refused in a sentence."""

import shutil
from pathlib import Path

import pytest
import torch
from quantised import FORMATS, quantise
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.sharding import empty_target
from vllm_longspec.train.target import load_target, run_target

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
RUN_HERE = [name for name in FORMATS if name not in ("gptq", "awq", "fp8")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


def quantised(plain: Path, folder: Path, name: str, head: bool = False) -> Path:
    shutil.copytree(plain, folder)
    quantise(folder, name, head)
    return folder


@pytest.mark.parametrize("name", RUN_HERE)
def test_read_by_a_draft(name: str, plain: Path, tmp_path: Path) -> None:
    """Near the plain target, and not equal: rounded."""
    folder = quantised(plain, tmp_path / "target", name)
    tokens, positions = torch.arange(40)[None], torch.arange(40)[None]
    expected, got = (
        run_target(load_target(path, CPU), tokens, positions) for path in (plain, folder)
    )
    for part in ("key", "value", "hidden"):
        theirs, ours = (getattr(state, part) for state in (expected, got))
        assert ours.dtype == torch.float32
        error = (ours - theirs).norm() / theirs.norm()
        assert 1e-4 < error < 0.2, (part, error)
    assert torch.equal(got.embeddings, expected.embeddings)


@pytest.mark.parametrize(
    ("name", "package"), [("gptq", "optimum"), ("awq", "gptqmodel")]
)  # fmt: skip
def test_packages_that_are_missing(
    name: str, package: str, plain: Path, tmp_path: Path, monkeypatch
) -> None:
    folder = quantised(plain, tmp_path / "target", name)
    for module in ("quantizer_gptq.is_optimum_available", "quantizer_awq.is_gptqmodel_available"):
        monkeypatch.setattr(f"transformers.quantizers.{module}", lambda *_: False)
    with pytest.raises(LongSpecError, match=f"transformers needs a package for .*{package}.*;"):
        load_target(folder, CPU)


def test_scales_that_transformers_does_not_know(plain: Path, tmp_path: Path) -> None:
    """It would leave them out and go on."""
    folder = quantised(plain, tmp_path / "target", "fp8")
    with pytest.raises(LongSpecError, match=r"\(fp8\), and transformers does not know its model"):
        load_target(folder, CPU)


def test_weights_that_are_missing(plain: Path, tmp_path: Path) -> None:
    """Transformers would draw them."""
    folder = shutil.copytree(plain, tmp_path / "target")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LongSpecError, match=r"has no model\.layers\.1\.mlp\.up_proj\.weight;"):
        load_target(folder, CPU)


def test_a_quantised_head(plain: Path, tmp_path: Path) -> None:
    folder = quantised(plain, tmp_path / "target", "compressed-tensors int8", head=True)
    with pytest.raises(LongSpecError, match=r"the head of .* is quantised, and a draft is trained"):
        load_target(folder, CPU)


def test_counted_as_if_it_were_not(plain: Path, tmp_path: Path) -> None:
    config = load_target(
        quantised(plain, tmp_path / "target", "compressed-tensors int4"), CPU
    ).config
    shapes = [
        {name: p.shape for name, p in empty_target(c, torch.float32).named_parameters()}
        for c in (config, CONFIG)
    ]
    assert shapes[0] == shapes[1] and hasattr(config, "quantization_config")
