"""From the command line and `speculative_config` to what the workers get; and every refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET
from safetensors.torch import load_file, save_file

from vllm_longspec import plugin
from vllm_longspec.config import LongSpecError

plugin.register()

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

from vllm_longspec.runtime.options import LongSpecSpeculativeConfig  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the options are the same; dtype float32 is for CPUs"
)


def resolve(**options: Any) -> LongSpecSpeculativeConfig:
    args = EngineArgs(**{"model": str(TARGET), "dtype": "float32", **options})
    return args.create_engine_config().speculative_config


def command_line(*flags: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(
        parser.parse_args(["--model", str(TARGET), "--dtype", "float32", *flags])
    )


def test_three_ways_to_ask_give_the_same() -> None:
    as_dict = {"method": "longspec", "model": str(DRAFT)}
    by_dict = EngineArgs(model=str(TARGET), dtype="float32", speculative_config=as_dict)
    asked = [
        command_line("--speculative-model", str(DRAFT)),
        command_line("--speculative-config", json.dumps(as_dict)),
        command_line("--speculative-config", json.dumps({"model": str(DRAFT)})),
        command_line("--spec-method", "longspec", "--spec-model", str(DRAFT)),
        by_dict,
    ]
    for args in asked:
        config = args.create_engine_config()
        spec = config.speculative_config
        assert isinstance(spec, LongSpecSpeculativeConfig)
        assert (spec.method, spec.model) == ("longspec", str(DRAFT))
        assert (spec.tree_shape, spec.num_speculative_tokens) == ((4, 16, 16, 16, 16), 31)


def test_flags_and_json_merge_by_key() -> None:
    args = command_line(
        "--speculative-model", str(DRAFT),
        "--speculative-config", '{"tree_shape": [2, 2, 2], "num_speculative_tokens": 5}',
    )  # fmt: skip
    spec = args.create_engine_config().speculative_config
    assert (spec.tree_shape, spec.num_speculative_tokens) == ((2, 2, 2), 5)
    args = command_line(
        "--speculative-model", str(DRAFT), "--spec-tokens", "7",
        "--speculative-config.tree_shape", "4 4",
    )  # fmt: skip
    spec = args.create_engine_config().speculative_config
    assert (spec.tree_shape, spec.num_speculative_tokens) == ((4, 4), 7)
    args = command_line(
        "--speculative-model", str(DRAFT), "--speculative-config", '{"model": "elsewhere"}'
    )
    with pytest.raises(LongSpecError, match=r"--speculative-model: .*\['model'\] sets the same"):
        args.create_engine_config()


def test_the_config_survives_pickling() -> None:
    import pickle

    spec = resolve(speculative_config={"method": "longspec", "model": str(DRAFT)})
    copy = pickle.loads(pickle.dumps(spec))
    assert (copy.tree_shape, copy.method) == (spec.tree_shape, "longspec")


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DRAFT, tmp_path / "draft"))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 512),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 32),
        ("vocab_size", 4097),
    ],
)
def test_a_draft_of_another_shape(draft: Path, field: str, value: int) -> None:
    edit_config(draft, **{field: value})
    with pytest.raises(LongSpecError, match=rf"^{field}: the draft has {value}, the target "):
        resolve(spec_model=str(draft))


def test_missing_extra_and_misshapen_tensors(draft: Path) -> None:
    edit_tensors(draft, lambda t: t.pop("mlp.up_proj.weight"))
    with pytest.raises(LongSpecError, match=r"lacks mlp\.up_proj\.weight"):
        resolve(spec_model=str(draft))
    edit_tensors(draft, lambda t: t.update({"mlp.up_proj.weight": torch.zeros(704, 255)}))
    with pytest.raises(LongSpecError, match=r"tensor mlp\.up_proj\.weight .* \[704, 255\]"):
        resolve(spec_model=str(draft))
    edit_tensors(
        draft,
        lambda t: t.update({"mlp.up_proj.weight": torch.zeros(704, 256), "fc.weight": t.pop(
            "input_layernorm.weight")}),
    )  # fmt: skip
    with pytest.raises(LongSpecError, match=r"lacks input_layernorm.* unknown fc\.weight"):
        resolve(spec_model=str(draft))
    (draft / "model.safetensors").unlink()
    with pytest.raises(LongSpecError, match="holds no "):
        resolve(spec_model=str(draft))


def test_drafts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LongSpecError, match=r"--speculative-model: /no/such/draft does not exist"):
        resolve(speculative_config={"method": "longspec", "model": "/no/such/draft"})
    with pytest.raises(LongSpecError, match=r"holds no config\.json"):
        resolve(speculative_config={"method": "longspec", "model": str(tmp_path)})
    with pytest.raises(LongSpecError, match="is not a LongSpec draft"):
        resolve(speculative_config={"method": "longspec", "model": str(TARGET)})
    with pytest.raises(LongSpecError, match="--speculative-model: name the LongSpec draft"):
        resolve(speculative_config={"method": "longspec"})


def test_unknown_options_are_named() -> None:
    with pytest.raises(LongSpecError, match="prompt_lookup_max is not an option of LongSpec"):
        resolve(
            speculative_config={
                "method": "longspec", "model": str(DRAFT), "prompt_lookup_max": 3,
            }
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
         "decode_context_parallel_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"enable_lora": True}, "enable_lora"),
        ({"disable_hybrid_kv_cache_manager": True}, "disable_hybrid_kv_cache_manager"),
        ({"attention_backend": "TRITON_ATTN"}, "attention_backend"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
    ],
)  # fmt: skip
def test_refused_configurations(options: dict[str, Any], field: str) -> None:
    with pytest.raises(LongSpecError, match=f"^{field}: "):
        resolve(spec_model=str(DRAFT), **options)


def write_target(folder: Path, **changes: Any) -> str:
    shutil.copytree(TARGET, folder)
    edit_config(folder, **changes)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
          "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2},
         "sliding-window"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"],
          "sliding_window": 128}, "sliding-window"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, None),
        ({"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
          "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 32,
          "qk_nope_head_dim": 32, "v_head_dim": 64}, "MLA"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 16,
          "n_groups": 1, "expand": 2}, "linear or state-space"),
    ],
    ids=["qwen2-window", "mistral-window", "t5", "mla", "mamba"],
)  # fmt: skip
def test_unsupported_targets(tmp_path: Path, changes: dict[str, Any], sentence: str | None) -> None:
    target = write_target(tmp_path / "target", **changes)
    if sentence is None:  # vLLM itself does not know it
        with pytest.raises(ValueError):
            resolve(model=target, spec_model=str(DRAFT))
        return
    with pytest.raises(LongSpecError, match=f"^model: .*{sentence}"):
        resolve(model=target, spec_model=str(DRAFT))
