"""Targets with quantised weights on a GPU, by the products that vLLM chooses there; weights that
were saved as each device held them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gpu_compare import OPTIONS, compare
from helpers import TARGET, Engine
from quantised import FORMATS, ONLINE, quantise

from vllm_longspec.runtime.supported import ANY_TARGET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def any_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes here may enter `TESTED_QUANTIZATIONS`."""
    monkeypatch.setenv(ANY_TARGET, "1")


@pytest.fixture(scope="module")
def plain_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights, of sizes that every product takes, and its random draft."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from vllm_longspec.config import draft_config_for
    from vllm_longspec.train.model import DraftLayer, init_weights, save_draft

    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.1, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "target")
    AutoTokenizer.from_pretrained(TARGET).save_pretrained(folder / "target")
    layer = DraftLayer(draft_config_for(config))
    init_weights(layer, torch.Generator().manual_seed(1))
    save_draft(layer.to(torch.bfloat16), folder / "draft")
    return folder


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_checkpoints(name: str, plain_target: Path, tmp_path: Path) -> None:
    target = copied(plain_target / "target", tmp_path / "target")
    quantise(target, name)
    compare(name, plain_target / "draft", model=str(target), **OPTIONS)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_quantised_heads(name: str, plain_target: Path, tmp_path: Path) -> None:
    """The draft reads the target's head, which is not copied to FP8 or trimmed."""
    target = copied(plain_target / "target", tmp_path / "target")
    quantise(target, name, head=True)
    draft = copied(plain_target / "draft", tmp_path / "draft")
    trim(draft, 3000)
    compare(f"{name} with its head", draft, model=str(target), **OPTIONS)


@pytest.mark.parametrize("name", ONLINE)
def test_online_quantisation(name: str, plain_target: Path) -> None:
    """`--quantization`: rounded by vLLM while it loads, from tensors on no device. The draft is
    loaded in the same way and not rounded by it."""
    compare(
        name, plain_target / "draft", model=str(plain_target / "target"), quantization=name,
        **OPTIONS,
    )  # fmt: skip


def test_a_sharded_state(plain_target: Path, tmp_path: Path) -> None:
    """As vLLM saves it. The draft's folder is an ordinary one."""
    target = copied(plain_target / "target", tmp_path / "target")
    engine = Engine(model=str(target), **OPTIONS)
    (target / "model.safetensors").unlink()
    engine.llm.llm_engine.engine_core.save_sharded_state(str(target))
    engine.close()
    assert list(target.glob("model-rank-0-part-*.safetensors"))
    compare(
        "sharded_state", plain_target / "draft", model=str(target), load_format="sharded_state",
        **OPTIONS,
    )  # fmt: skip


def test_sizes_that_fp8_products_do_not_take(plain_target: Path, tmp_path: Path) -> None:
    """A trimmed head of rows that are no multiple of 16 is padded; a layer of an inner size of
    1,000 stays in bf16."""
    from safetensors.torch import load_file, save_file

    draft = copied(plain_target / "draft", tmp_path / "trimmed")
    trim(draft, 3000)
    inner = 1000
    narrow = copied(plain_target / "draft", tmp_path / "narrow")
    tensors = load_file(narrow / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"mlp.{name}.weight"] = tensors[f"mlp.{name}.weight"][:inner].contiguous()
    down = tensors["mlp.down_proj.weight"][:, :inner].contiguous()
    save_file(tensors | {"mlp.down_proj.weight": down}, narrow / "model.safetensors")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"intermediate_size": inner}))
    compare("sizes", draft, narrow, model=str(plain_target / "target"), **OPTIONS)


def trim(draft: Path, size: int) -> None:
    """To the first tokens."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(draft / "model.safetensors")
    tensors["draft_token_ids"] = torch.arange(size)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"draft_vocab_size": size}))
