"""The six published drafts, made here with their names, shapes and configs: no hub is at hand."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DRAFT,
    TARGET,
    assert_same,
    longspec,
    synthetic_prompt,
    text_prompt,
    write_sparse,
)
from huggingface_hub import ModelCard, constants
from processes import EngineProcess
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from vllm_longspec import plugin
from vllm_longspec.config import LongSpecConfig, context_length
from vllm_longspec.draft.checkpoint import (
    OPTIONAL,
    check_checkpoint,
    expected_tensors,
    is_draft_folder,
    read_draft_config,
    read_tensor,
    stored_tensors,
)
from vllm_longspec.draft.convert import convert
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.model import load_draft
from vllm_longspec.tree.budget import Plan

plugin.register()

from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from vllm_longspec.runtime.options import LongSpecSpeculativeConfig  # noqa: E402

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "initializer_range": 0.02, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000, "max_position_embeddings": 4096,
    "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
}  # fmt: skip
SIZE_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
SIZE_13B = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 40,
}  # fmt: skip
LINEAR_4 = {"rope_scaling": {"factor": 4.0, "type": "linear"}, "max_sequence_length": 16384}
LINEAR_8 = {"rope_scaling": {"factor": 8.0, "type": "linear"}}
# In the form of their time: no head_dim, rope_scaling with "type", torch_dtype.
TARGETS: dict[str, dict[str, Any]] = {
    "vicuna-7b-v1.5-16k": LLAMA | SIZE_7B | LINEAR_4,
    "vicuna-13b-v1.5-16k": LLAMA | SIZE_13B | LINEAR_4,
    "longchat-7b-v1.5-32k": LLAMA | SIZE_7B | LINEAR_8,
    # Older than grouped heads: no num_key_value_heads.
    "longchat-13b-16k": {k: v for k, v in (LLAMA | SIZE_13B).items() if "key_value" not in k}
    | {"max_position_embeddings": 16384, "rope_condense_ratio": 8, "rms_norm_eps": 1e-6},
    "Llama-3-8B-Instruct-262k": LLAMA | SIZE_7B | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 262144, "rope_theta": 283461213.0, "rope_scaling": None,
        "attention_bias": False, "torch_dtype": "bfloat16",
    },
    "QwQ-32B-Preview": LLAMA | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 5120,
        "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "sliding_window": 32768, "max_window_layers": 64,
        "use_sliding_window": False, "attention_dropout": 0.0, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
MAX_MODEL_LEN = {
    "vicuna-7b-v1.5-16k": 16384, "vicuna-13b-v1.5-16k": 16384, "longchat-7b-v1.5-32k": 32768,
    "longchat-13b-16k": 16384, "Llama-3-8B-Instruct-262k": 262144, "QwQ-32B-Preview": 32768,
}  # fmt: skip
# Named as users name them, in the hub client's cache; the others by folder.
BY_NAME = ("vicuna-7b-v1.5-16k", "QwQ-32B-Preview")
GLIDE = {"llama": "LlamaGlideDecoderLayer", "qwen2": "Qwen2GlideDecoderLayer"}


def glide(target: dict[str, Any]) -> dict[str, Any]:
    """A published draft's config.json: its target's, with the layer's class name."""
    return target | {"architectures": [GLIDE[target["model_type"]]]}


def nameless(target: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in target.items() if key != "architectures"}


# What stands in the six published config.json is not known: the layer's class, the target's, none.
CALLED = {"layer": glide, "target": dict, "nothing": nameless}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def layer_of_target(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a draft from transformers' own layer of the target."""
    layers = {"llama": LlamaDecoderLayer, "qwen2": Qwen2DecoderLayer}
    config._attn_implementation = "eager"
    with torch.device("meta"):
        layer = layers[config.model_type](config, 0)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = nn.Parameter(torch.empty(projection.out_features))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    norm = shapes.pop("post_attention_layernorm.weight")
    cross = {name.replace("self_attn", "cross_attn"): shape for name, shape in shapes.items()}
    norms = {f"post_{a}_attention_layernorm.weight": norm for a in ("self", "cross")}
    return shapes | cross | norms


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("name", TARGETS)
def test_full_size_drafts(
    name: str, called: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole resolution that a server does before it starts workers."""
    folder = write_config(tmp_path / name, TARGETS[name])
    repository = tmp_path / f"hub/models--sail--longspec-{name}"
    draft = write_config(repository / "snapshots" / ("a" * 40), CALLED[called](TARGETS[name]))
    shapes = layer_of_target(AutoConfig.from_pretrained(folder))
    extra = {"rotary_emb.inv_freq": (64,)}
    write_sparse(draft / "model.safetensors", shapes | extra, "F16")
    model = str(draft)
    if name in BY_NAME:  # vLLM takes 2 s more by name
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("a" * 40)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        model = f"sail/longspec-{name}"

    args = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16",
        speculative_config={"model": model},
    )  # fmt: skip
    spec = args.create_engine_config().speculative_config
    assert isinstance(spec, LongSpecSpeculativeConfig)
    assert spec.target_model_config.max_model_len == MAX_MODEL_LEN[name]
    assert context_length(spec.target_model_config.hf_config) == MAX_MODEL_LEN[name]
    config = spec.draft_model_config.hf_config
    assert isinstance(config, LongSpecConfig)
    assert (config.window, config.head_dim, config.num_hidden_layers) == (512, 128, 1)
    assert expected_tensors(config) == shapes


TINY_QWEN2 = TARGETS["QwQ-32B-Preview"] | {
    "hidden_size": 256, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 2048,
    "sliding_window": 2048, "max_window_layers": 3, "torch_dtype": "float32",
    "transformers_version": "4.46.1",
}  # fmt: skip
# As a configuration of that time wrote the nano target's.
NANO_LLAMA = LLAMA | {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
FORMS = ("safetensors", "safetensors shards", "bin", "bin shards", "old bin", "no cross K/V")


def save_form(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    if form == "no cross K/V":
        tensors = {name: x for name, x in tensors.items() if name not in OPTIONAL}
    kind = "bin" if "bin" in form else "safetensors"
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    parts, names = {f"{stem}.{kind}": tensors}, sorted(tensors)
    if "shards" in form:
        parts = {
            f"{stem}-{i + 1:05}-of-00002.{kind}": {name: tensors[name] for name in names[i::2]}
            for i in range(2)
        }
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        if kind == "bin":
            torch.save(part, folder / file, _use_new_zipfile_serialization=form != "old bin")
        else:
            save_file(part, folder / file, metadata={"format": "pt"})


def random_layer(config: dict[str, Any], scale: float = 0.05) -> dict[str, torch.Tensor]:
    shapes = layer_of_target(AutoConfig.for_model(**glide(config)))
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * scale + ("norm" in name)
        for name, shape in sorted(shapes.items())
    }


def published_nano(folder: Path, form: str = "bin") -> Path:
    write_config(folder, glide(NANO_LLAMA))
    save_form(folder, load_file(DRAFT / "model.safetensors"), form)
    return folder


def published_qwen2(folder: Path, form: str = "safetensors") -> Path:
    write_config(folder, glide(TINY_QWEN2))
    save_form(folder, random_layer(TINY_QWEN2), form)
    return folder


def assert_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        stored = read_tensor(folder, name)
        assert stored.dtype == tensor.dtype and torch.equal(stored, tensor), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [published_nano, published_qwen2], ids=["llama", "qwen2"])
def test_forms_and_round_trip(make: Any, form: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "published", form)
    (folder / "training_args.bin").write_bytes(b"what a trainer leaves behind")
    config = read_draft_config(folder)
    check_checkpoint(folder, config)
    tensors = {name: read_tensor(folder, name) for name in stored_tensors(folder)}
    reference = tmp_path / "whole"
    assert_tensors(make(reference, "safetensors"), tensors)

    target = config_folder(tmp_path, make)
    output = tmp_path / "converted"
    convert(str(folder), str(target), output)
    check_checkpoint(output, read_draft_config(output))
    assert_tensors(output, tensors)
    layer = load_draft(output)  # `train --init` goes on from it
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, read_tensor(output, name).float())
    convert(str(output), str(target), tmp_path / "again")
    names = {path.name for path in output.iterdir()}
    assert is_draft_folder(folder) and is_draft_folder(output)
    assert names == {"config.json", "model.safetensors", "README.md"}
    for name in names - {"README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()


def config_folder(tmp_path: Path, make: Any) -> Path:
    config = NANO_LLAMA if make is published_nano else TINY_QWEN2
    return write_config(tmp_path / "target", config)


def test_config_and_card_of_a_converted_draft(tmp_path: Path) -> None:
    folder = published_nano(tmp_path / "published")
    config_file = folder / "config.json"
    stored = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(stored | {"window": 128, "tree_shape": [3, 3]}))
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n# Draft\n")
    convert(str(folder), str(TARGET), tmp_path / "my-draft")
    config = json.loads((tmp_path / "my-draft/config.json").read_text())
    assert (config["model_type"], config["window"], config["tree_shape"]) == (
        "longspec", 128, [3, 3],
    )  # fmt: skip
    recorded = config["speculators_config"]
    assert recorded["verifier"] == {
        "name_or_path": str(TARGET), "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    assert recorded["proposal_methods"][0]["speculative_tokens"] == 6
    card = ModelCard.load(tmp_path / "my-draft/README.md")
    assert (card.data.license, card.data.base_model) == ("llama2", "nano-target")
    for said in ("--speculative-model my-draft", "| 128 tokens |", "3 3 nodes a level, 6 verified",
                 f"`{folder}` (LlamaGlideDecoderLayer)"):  # fmt: skip
        assert said in card.text, said


def test_serving_a_converted_draft_alone(tmp_path: Path) -> None:
    """vLLM's speculators support finds the target in the draft's config and the method in ours."""
    draft = str(tmp_path / "my-draft")
    convert(str(published_nano(tmp_path / "published")), str(TARGET), Path(draft))
    resolved = EngineArgs(model=draft, dtype="float32").create_engine_config()
    spec = resolved.speculative_config
    assert isinstance(spec, LongSpecSpeculativeConfig)
    assert (resolved.model_config.model, resolved.model_config.tokenizer) == (str(TARGET),) * 2
    assert spec.model == draft and spec.menus[0].default == Plan((4, 16, 16, 16, 16), 31)
    chosen = EngineArgs(model=draft, dtype="float32", speculative_config={"tree_shape": [31]})
    menu = chosen.create_engine_config().speculative_config.menus[0]
    assert menu.default == Plan((31,), 31)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_torch_files_with_more_than_tensors(tmp_path: Path) -> None:
    folder, proof = published_nano(tmp_path / "published"), tmp_path / "was run"
    config = read_draft_config(folder)
    tensors = torch.load(folder / "pytorch_model.bin")
    for zipped in (True, False):
        for content in (
            tensors | {"x": Malicious(proof)}, {"state_dict": tensors}, [*tensors.values()],
        ):  # fmt: skip
            torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
            for read in (check_checkpoint, lambda f, _: read_tensor(f, "mlp.up_proj.weight")):
                with pytest.raises(LongSpecError, match="holds more than named"):
                    read(folder, config)
    assert not proof.exists()


def test_broken_downloads(tmp_path: Path) -> None:
    def sentence(form: str, file: str, size: int | None) -> str:
        folder = published_nano(tmp_path / f"{form} {size}", form)
        path = folder / file
        if size is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(LongSpecError) as error:
            check_checkpoint(folder, read_draft_config(folder))
        return str(error.value)

    for kind, stem in (("bin", "pytorch_model"), ("safetensors", "model")):
        shard = f"{stem}-00002-of-00002.{kind}"
        said = sentence(f"{kind} shards", shard, None)
        assert f"lacks {shard}, which its index names" in said
        for size in (0, 100, 5000):
            said = sentence(kind, f"{stem}.{kind}", size)
            assert f"{stem}.{kind} is not a whole" in said, said
            assert said.count("\n") == 0


@pytest.mark.parametrize(
    "change, named",
    [
        ({"hidden_size": 128}, "hidden_size: the draft has 256, the target 128"),
        ({"vocab_size": 4000}, "vocab_size: the draft has 4096, the target 4000"),
    ],
)
def test_convert_for_another_target(change: dict, named: str, tmp_path: Path) -> None:
    folder = published_nano(tmp_path / "published")
    target = write_config(tmp_path / "target", NANO_LLAMA | change)
    with pytest.raises(LongSpecError, match=named):
        convert(str(folder), str(target), tmp_path / "out")
    convert(str(folder), str(TARGET), tmp_path / "mine")
    with pytest.raises(LongSpecError, match=f"{named}; use its own target, {TARGET}, or"):
        convert(str(tmp_path / "mine"), str(target), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_names_what_is_wrong(tmp_path: Path) -> None:
    folder = published_nano(tmp_path / "published")
    cases = [
        ("/no/such/draft", str(TARGET), "out", "draft: /no/such/draft does not exist; "),
        (str(tmp_path), str(TARGET), "out", "has no config.json"),
        (str(TARGET), str(TARGET), "out", "is not a LongSpec draft"),
        (str(folder), str(DRAFT), "out", f"target: {DRAFT} is a LongSpec draft; give the model"),
        (str(folder), "/no/such/target", "out", "target: the config of /no/such/target"),
        (str(folder), str(TARGET), "published/out", "is in a model's folder"),
    ]
    for draft, target, output, said in cases:
        with pytest.raises(LongSpecError) as error:
            convert(draft, target, tmp_path / output)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


PROMPTS = [text_prompt(i, length) for i, length in enumerate((40, 300, 700))]


NANO_QWEN2 = NANO_LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def nano_target_as_qwen2(folder: Path) -> Path:
    shutil.copytree(TARGET, folder)
    write_config(folder, NANO_QWEN2)
    tensors = load_file(TARGET / "model.safetensors")
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if module.endswith(("q_proj", "k_proj", "v_proj")) and kind == "weight":
            tensors[f"{module}.bias"] = torch.zeros_like(tensors[name][:, 0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nano_draft_as_qwen2(folder: Path) -> Path:
    published_nano(folder, "no cross K/V")
    return write_config(folder, glide(NANO_QWEN2))


def greedy(num_tokens: int) -> list[Any]:
    from vllm import SamplingParams

    return [SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)] * len(PROMPTS)


def serve(
    prompts: list[list[int]], speculative_config: dict[str, Any] | None, **options: Any
) -> tuple[list[Any], dict[str, int]]:
    engine = EngineProcess(speculative_config, **options)
    try:
        return engine.one_by_one(prompts, greedy(64)), engine.counters()
    finally:
        engine.close()


@pytest.mark.full
def test_served_nano_in_published_form(tmp_path: Path) -> None:
    """Outputs and acceptance as with the draft in our format; the converted draft alone too."""
    plain, _ = serve(PROMPTS, None)
    expected, counted = serve(PROMPTS, longspec())
    folder = published_nano(tmp_path / "published", "bin shards")
    write_config(folder, NANO_LLAMA)  # known by its tensors
    torch.save({"rotary_emb.inv_freq": torch.ones(32)}, folder / "extra.bin")
    index = folder / "pytorch_model.bin.index.json"
    stored = json.loads(index.read_text())
    stored["weight_map"]["rotary_emb.inv_freq"] = "extra.bin"
    index.write_text(json.dumps(stored))
    got, counters = serve(PROMPTS, longspec(model=str(folder)))
    assert_same(plain, expected, PROMPTS)
    assert_same(plain, got, PROMPTS)
    assert counters == counted and counters["accepted_tokens"] > 0
    # Qwen2 is Llama with biases: with zeros for them, the same model.
    got, counters = serve(PROMPTS, longspec(model=str(nano_draft_as_qwen2(tmp_path / "draft"))),
                          model=str(nano_target_as_qwen2(tmp_path / "qwen2")))  # fmt: skip
    assert_same(plain, got, PROMPTS)
    assert counters == counted
    convert(str(folder), str(TARGET), tmp_path / "alone")
    alone, counters = serve(PROMPTS, None, model=str(tmp_path / "alone"))
    assert_same(plain, alone, PROMPTS)
    assert counters == counted
    print(f"published form, our format, as Qwen2 and served alone: {counted}")


@pytest.mark.full
def test_served_qwen2_in_published_form(tmp_path: Path) -> None:
    target = tmp_path / "target"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**TINY_QWEN2))
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from ties
    model.save_pretrained(target)
    write_config(target, TINY_QWEN2)
    draft = published_qwen2(tmp_path / "draft", "old bin")
    prompts = [[t % 400 for t in synthetic_prompt(i, n)] for i, n in enumerate((30, 200, 600))]
    options = {"model": str(target), "skip_tokenizer_init": True}
    plain, _ = serve(prompts, None, **options)
    got, counters = serve(prompts, longspec(model=str(draft)), **options)
    assert_same(plain, got, prompts)
    assert counters["draft_tokens"] > 0
    print(f"Qwen2: {counters}")


def test_a_draft_with_more_than_its_layer(tmp_path: Path) -> None:
    folder = published_nano(tmp_path / "published", "safetensors")
    tensors = load_file(folder / "model.safetensors")
    wrapped = {f"model.layers.0.{name}": tensor for name, tensor in tensors.items()}
    shutil.rmtree(folder)
    write_config(folder, glide(NANO_LLAMA))
    save_form(folder, wrapped, "safetensors")
    with pytest.raises(LongSpecError, match=r"has the unknown model\.layers\.0\.") as error:
        check_checkpoint(folder, read_draft_config(folder))
    assert "and 14 more and has" in str(error.value) and len(str(error.value)) < 300


def test_tensors_that_nobody_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning names them; what is written, trained from and served is the layer alone."""
    # caplog listens at the root, and another test may have asked for errors only.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="vllm")
    folder = write_config(tmp_path / "published", NANO_LLAMA)
    layer = load_file(DRAFT / "model.safetensors")
    extra = {f"rotary_emb.{name}": torch.ones(4) for name in ("inv_freq", "a", "b", "c")}
    save_form(folder, layer | extra, "bin")
    convert(str(folder), str(TARGET), tmp_path / "converted")
    (said,) = {r.getMessage() for r in caplog.records if "also holds" in r.getMessage()}
    assert said == (
        f"LongSpec: {folder} also holds rotary_emb.a, rotary_emb.b, rotary_emb.c and 1 more; "
        "a draft does not use them"
    )
    assert set(stored_tensors(tmp_path / "converted")) == set(expected_tensors(
        read_draft_config(tmp_path / "converted")
    ))  # fmt: skip
    assert torch.equal(load_draft(folder).mlp.up_proj.weight, layer["mlp.up_proj.weight"].float())
    for wrong, match in (
        ({"mlp.up_proj.weight": torch.ones(3)}, "tensor mlp.up_proj.weight"),
        ({}, "lacks mlp.up_proj.weight"),
    ):
        rest = {name: x for name, x in layer.items() if name != "mlp.up_proj.weight"}
        save_form(folder, rest | extra | wrong, "bin")
        with pytest.raises(LongSpecError, match=match):
            convert(str(folder), str(TARGET), tmp_path / "again")


def test_a_target_is_no_draft_by_its_tensors(tmp_path: Path) -> None:
    for folder in (TARGET, write_config(tmp_path / "no weights", NANO_LLAMA)):
        assert not is_draft_folder(folder)
        with pytest.raises(LongSpecError, match="is not a LongSpec draft"):
            read_draft_config(folder)


def test_convert_what_the_authors_trainer_writes(tmp_path: Path) -> None:
    """A torch file of tensors; the target gives the config. As a file, and as its folder."""
    tensors, proof = load_file(DRAFT / "model.safetensors"), tmp_path / "was run"
    (tmp_path / "trained").mkdir()
    file = tmp_path / "trained/draft_model_weights.pth"
    torch.save(tensors, file)
    for i, source in enumerate((file, file.parent)):
        output = tmp_path / f"converted {i}"
        convert(str(source), str(TARGET), output)
        assert_tensors(output, tensors)
        config = read_draft_config(output)
        check_checkpoint(output, config)
        assert (config.window, config.hidden_size) == (512, 256)
        assert f"`{source}` (without a class name)" in (output / "README.md").read_text()
    larger = write_config(tmp_path / "target", NANO_LLAMA | {"intermediate_size": 800})
    other = tmp_path / "config.json"
    other.write_text("{}")
    torch.save(tensors, tmp_path / "trained/other.pth")
    cases = [
        (file, larger, r"is \[256, 704\], but the target makes it \[256, 800\]"),
        (other, TARGET, "is a file; give a draft's folder, or a torch file"),
        (file.parent, TARGET, r"holds draft_model_weights\.pth, other\.pth; give one"),
    ]
    for source, target, said in cases:
        with pytest.raises(LongSpecError, match=said):
            convert(str(source), str(target), tmp_path / "out")
    for content, said in (
        (tensors | {"x": Malicious(proof)}, "holds more than named tensors"),
        ({"optimizer.step": torch.ones(2)}, "lacks cross_attn.o_proj.weight, .* and 14 more and"),
    ):
        torch.save(content, file)
        with pytest.raises(LongSpecError, match=said):
            convert(str(file), str(TARGET), tmp_path / "out")
    assert not proof.exists() and not (tmp_path / "out").exists()
