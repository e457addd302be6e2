"""Every refusal of the front end, and that the table of vLLM's switches names them all."""

import copy
import dataclasses
import json
import re
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from check_vllm import installed
from helpers import DRAFT, ROOT, TARGET, load_script
from quantised import FORMATS
from vllm_source import switches_of

from vllm_longspec import plugin
from vllm_longspec.errors import LongSpecError

plugin.register()

from vllm import SamplingParams  # noqa: E402
from vllm.config import ParallelConfig  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

from vllm_longspec.runtime import request_switch, supported, switches  # noqa: E402
from vllm_longspec.runtime.options import LongSpecSpeculativeConfig  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the refusals are the same; dtype float32 is for CPUs"
)

TESTS = Path(__file__).parent
KINDS = {
    "arguments": switches.ARGUMENTS,
    "variables": switches.VARIABLES,
    "parameters": switches.PARAMETERS,
}
# Of each engine argument that is refused, at all or in part: a value that is, and the word the
# sentence begins with if it is another one.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "pipeline_parallel_size": [({"pipeline_parallel_size": 2}, "")],
    "decode_context_parallel_size": [
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "")
    ],
    "prefill_context_parallel_size": [({"prefill_context_parallel_size": 2}, "")],
    "ubatch_size": [({"ubatch_size": 2}, "")],
    "enable_dbo": [({"enable_dbo": True}, "")],
    "enable_batch_sharded_sampling": [
        ({"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2}, "")
    ],
    "kv_cache_dtype": [({"kv_cache_dtype": "fp8"}, ""), ({"kv_cache_dtype": "bfloat16"}, "")],
    "disable_hybrid_kv_cache_manager": [({"disable_hybrid_kv_cache_manager": True}, "")],
    "kv_offloading_size": [({"kv_offloading_size": 1.0}, "")],
    "kv_sharing_fast_prefill": [({"kv_sharing_fast_prefill": True}, "")],
    "enable_lora": [
        ({"enable_lora": True, "tensor_parallel_size": 2}, ""),
        ({"enable_lora": True, "quantization": "fp8_per_channel"}, ""),
    ],
    "attention_backend": [
        ({"attention_backend": "TRITON_ATTN"}, ""),
        ({"attention_config": {"backend": "FLASHINFER"}}, "attention_backend"),
    ],
    "attention_config": [
        ({"attention_config": {"backend_per_kind": {"full_attention": "TRITON_ATTN"}}}, ""),
        ({"attention_config": {"use_non_causal": True}}, ""),
    ],
    "enable_prompt_embeds": [({"enable_prompt_embeds": True}, "")],
    "return_sampling_mask": [({"return_sampling_mask": True}, "")],
    "enable_trace_replay": [({"enable_trace_replay": True}, "")],
    "enable_return_routed_experts": [
        ({"enable_return_routed_experts": True}, ""),
    ],
    "aux_output_config": [({"aux_output_config": {"enable_return_routed_experts": True}}, "")],
    "watermark_config": [({"watermark_config": {"algorithm": "gumbel"}}, "")],
    "weight_transfer_config": [({"weight_transfer_config": {"backend": "nccl"}}, "")],
    "cpu_offload_gb": [({"cpu_offload_gb": 1}, "")],
    "offload_group_size": [({"offload_group_size": 2}, "")],
    "offload_backend": [({"offload_backend": "prefetch"}, "")],
    "model_impl": [({"model_impl": "transformers"}, "")],
    "load_format": [
        ({"load_format": name}, "")
        for name in (
            "bitsandbytes", "fastsafetensors", "gguf", "instanttensor", "ipc_cache",
            "modelexpress", "runai_streamer", "runai_streamer_sharded", "tensorizer",
        )
    ],
    "model_weights": [({"model_weights": str(TARGET)}, "")],
    "max_num_batched_tokens": [({"max_num_batched_tokens": 31}, "")],
    "max_num_scheduled_tokens": [({"max_num_scheduled_tokens": 20}, "")],
    "long_prefill_token_threshold": [({"long_prefill_token_threshold": 16}, "")],
    "additional_config": [({"additional_config": {"a": 1}}, "")],
    "all2all_backend": [({"all2all_backend": "deepep_low_latency"}, "")],
    "diffusion_config": [({"diffusion_config": {"canvas_length": 8}}, "")],
    "disable_sliding_window": [({"disable_sliding_window": True}, "")],
    "distributed_executor_backend": [({"distributed_executor_backend": "external_launcher"}, "")],
    "dp_sync_interval": [({"dp_sync_interval": 2}, "")],
    "ec_transfer_config": [({"ec_transfer_config": SimpleNamespace()}, "")],
    "elastic_ep_max_dp_size": [({"elastic_ep_max_dp_size": 4}, "")],
    "enable_nccl_comm_suspend": [({"enable_nccl_comm_suspend": True}, "")],
    "expert_placement_strategy": [({"expert_placement_strategy": "round_robin"}, "")],
    "jit_monitor_mode": [({"jit_monitor_mode": "error"}, "")],
    "kv_cache_dtype_skip_layers": [({"kv_cache_dtype_skip_layers": ["0"]}, "")],
    "prefill_schedule_interval": [({"prefill_schedule_interval": 2}, "")],
    "prefix_cache_retention_interval": [({"prefix_cache_retention_interval": 128}, "")],
    "prefix_match_unit": [({"prefix_match_unit": 16}, "")],
    "quantization_config": [
        ({"quantization": "fp8_per_channel", "quantization_config": {"ignore": ["lm_head"]}}, "")
    ],
    "runner": [({"runner": "pooling"}, "")],
    "scheduler_cls": [({"scheduler_cls": "builtins.dict"}, "")],
    "sleep_mode_offload_cudagraph": [({"sleep_mode_offload_cudagraph": True}, "")],
    "worker_cls": [({"worker_cls": "a.b"}, "")],
}  # fmt: skip

# The same of what vLLM refuses here itself or has not in every minor.
REFUSED_AS_TYPED: dict[str, Any] = {
    "enable_elastic_ep": True,
    "enable_eplb": True,
    "enable_fault_tolerance": True,
    "model_class_overrides": {"LlamaForCausalLM": "a:b"},
    "sleep_mode_backend": "other",
}


def resolve(**options: Any) -> LongSpecSpeculativeConfig:
    asked = {} if "speculative_config" in options else {"spec_model": str(DRAFT)}
    args = EngineArgs(**{"model": str(TARGET), "dtype": "float32", **asked, **options})
    return args.create_engine_config().speculative_config


@pytest.mark.parametrize(
    ("field", "options", "begins"),
    [(field, *case) for field, cases in REFUSED.items() for case in cases],
)
def test_refused_arguments(field: str, options: dict[str, Any], begins: str) -> None:
    with pytest.raises(LongSpecError, match=f"^{begins or field}[:,]") as error:
        resolve(**options)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_read_right(kind: str) -> None:
    """`switches_of` reads a vLLM that is not installed as this one is."""
    import msgspec
    from vllm import envs

    here = {
        "arguments": {field.name for field in dataclasses.fields(AsyncEngineArgs)},
        "variables": set(envs.environment_variables),
        "parameters": {field.name for field in msgspec.structs.fields(SamplingParams)},
    }
    assert names_of_installed()[kind] == here[kind]


@cache
def names_of_installed() -> dict[str, set[str]]:
    root = installed()
    assert root is not None
    return switches_of(root)


def test_the_refused_are_tested() -> None:
    """But for what takes another target, another device or another vLLM; those have tests of their
    own."""
    elsewhere = {"dtype", "kv_transfer_config", "model", "quantization"}
    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    theirs = {*switches.ARGUMENTS.refused, *switches.ARGUMENTS.in_part} & fields
    assert theirs - elsewhere == {*REFUSED, *REFUSED_AS_TYPED} & fields


@pytest.mark.parametrize("kind", KINDS)
def test_the_table(kind: str) -> None:
    """A switch stands in one of its parts; what works is named in the modules that show it, or in
    what these import. That nothing of vLLM's is missing: test_check_vllm.py."""
    table = KINDS[kind]
    unread = names_of_installed()[kind] - table.names
    assert unread == set(), "read what it does, then name it in runtime/switches.py"
    named = [*table.works, *table.refused, *" ".join(table.no_matter.values()).split()]
    assert sorted(set(named)) == sorted(named) and set(table.in_part) <= set(table.works)
    for name, modules in table.works.items():
        said = [text_of(module) for module in modules.split(", ")]
        ways = name, name.replace("_", "-")
        assert all(any(re.search(rf"\b{way}\b", text) for way in ways) for text in said), name
    for name, sentence in table.refused.items():
        assert re.fullmatch(r"LongSpec.*; .*", sentence), name


@cache
def text_of(module: str) -> str:
    """Of a test module, with what it has from others in `tests`."""
    text = (TESTS / module).read_text()
    imported = re.findall(r"^from (\w+) import", text, re.MULTILINE)
    others = [f"{name}.py" for name in imported if (TESTS / f"{name}.py").is_file()]
    benches = re.findall(r"^from vllm_longspec\.bench\.(\w+) import", text, re.MULTILINE)
    sources = [ROOT / f"vllm_longspec/bench/{name}.py" for name in benches]
    sources.append(TESTS / "conftest.py")
    return "".join([text, *map(text_of, others), *(path.read_text() for path in sources)])


def test_the_pages() -> None:
    script = load_script(ROOT / "scripts/switches_table.py")
    for page, text in script.pages().items():
        assert page.read_text() == text, "run scripts/switches_table.py"


def test_what_is_accepted() -> None:
    """What `vllm serve` fills in, and values that say no more than a default."""
    args = AsyncEngineArgs(model=str(TARGET), dtype="float32", spec_model=str(DRAFT))
    assert args.create_engine_config().speculative_config.method == "longspec"
    resolve(dtype="bfloat16", kv_cache_dtype="bfloat16")
    resolve(kv_offloading_size=0, enable_dbo=False, enable_batch_sharded_sampling=False)
    resolve(dtype="bfloat16", quantization="fp8_per_channel")


def test_arguments_that_nobody_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a vLLM that is not supported yet, with VLLM_LONGSPEC_ANY_VERSION=1."""
    known = switches.ARGUMENTS
    works = {name: tests for name, tests in known.works.items() if name != "watermark"}
    monkeypatch.setattr(supported, "ARGUMENTS", dataclasses.replace(known, works=works))
    resolve()
    with pytest.raises(LongSpecError, match=r"^watermark: LongSpec does not know .* vLLM \d.*out$"):
        resolve(watermark=0.1)
    known = switches.VARIABLES
    works = {name: tests for name, tests in known.works.items() if "NANS" not in name}
    monkeypatch.setattr(supported, "VARIABLES", dataclasses.replace(known, works=works))
    resolve()
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "0")  # as without it
    resolve()
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    with pytest.raises(LongSpecError, match=r"^VLLM_RAISE_ON_LOGIT_NANS: .*; unset it$"):
        resolve()


def test_parameters_that_nobody_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert request_switch.unknown_parameters() == {}
    request_switch.check_request(SamplingParams(min_p=0.1))
    monkeypatch.setattr(request_switch, "unknown_parameters", lambda: {"min_p": 0.0})
    request_switch.check_request(SamplingParams())
    with pytest.raises(VLLMValidationError, match=r"^min_p: LongSpec does not know this param"):
        request_switch.check_request(SamplingParams(min_p=0.1))


def test_refused_as_typed() -> None:
    args = EngineArgs(model=str(TARGET), dtype="float32")
    model = args.create_model_config()
    fields = {field.name for field in dataclasses.fields(args)}
    for field in fields & set(REFUSED_AS_TYPED):
        typed = copy.copy(args)
        setattr(typed, field, REFUSED_AS_TYPED[field])
        with pytest.raises(LongSpecError, match=f"^{field}: "):
            supported.check_supported(typed, model, ParallelConfig())


def test_a_connector_is_refused() -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(LongSpecError, match=r"^kv_transfer_config: "):
        resolve(kv_transfer_config=connector)


REFUSED_VARIABLES = {
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "VLLM_BATCH_INVARIANT": "1",
    "VLLM_ENABLE_STARTUP_PLAN": "1", "VLLM_FLOAT32_MATMUL_PRECISION": "high",
    "VLLM_GPU_SYNC_CHECK": "error", "VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype": "int8"}',
    "VLLM_HUMMING_ONLINE_QUANT_CONFIG": '{"dtype": "int4"}', "VLLM_KV_CACHE_LAYOUT": "LBHNC",
    "VLLM_MARLIN_INPUT_DTYPE": "int8", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "uniform_random",
    "VLLM_USE_BREAKABLE_CUDAGRAPH": "1", "VLLM_USE_RUST_FRONTEND": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}  # fmt: skip


def test_refused_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    known = switches.VARIABLES
    assert set(REFUSED_VARIABLES) == {*known.refused, *known.in_part}
    args = EngineArgs(model=str(TARGET), dtype="float32")
    model, parallel = args.create_model_config(), ParallelConfig()
    supported.check_supported(args, model, parallel)
    for name, value in REFUSED_VARIABLES.items():
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            if name == "VLLM_ALLOW_LONG_MAX_MODEL_LEN":
                supported.check_supported(args, model, parallel)
                args.max_model_len = 40_000
                model = args.create_model_config()
            with pytest.raises(LongSpecError, match=f"^{name}: .*unset it"):
                supported.check_supported(args, model, parallel)


def test_arguments_that_vllm_moves() -> None:
    """A second config of the same arguments finds there what the first one put there."""
    args = EngineArgs(model=str(TARGET), dtype="float32", gdn_prefill_backend="triton")
    args.additional_config["gdn_prefill_backend"] = args.gdn_prefill_backend
    supported.check_supported(args, args.create_model_config(), ParallelConfig())


def test_both_flags_that_name_a_draft(capsys: pytest.CaptureFixture[str]) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = (["--speculative-model", str(DRAFT)], ["--spec-model", "other"])
    for first, second in (flags, flags[::-1]):
        with pytest.raises(SystemExit):
            parser.parse_args([*first, *second])
        said = capsys.readouterr().err
        assert "not allowed with argument" in said and "--speculative-model" in said


def write_target(folder: Path, **changes: Any) -> str:
    shutil.copytree(TARGET, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


FP8_CACHE = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {},
    "ignore": [], "quantization_status": "compressed",
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False,
                        "symmetric": True},
}  # fmt: skip
MODELOPT_FP8_CACHE = {
    "quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
    "producer": {"name": "modelopt"}, "exclude_modules": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
          "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2},
         "^model: .*sliding-window"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"],
          "sliding_window": 128}, "^model: .*sliding-window attention in every layer"),
        ({"layer_types": ["full_attention", "chunked_attention"] * 2},
         "^model: .*layers of chunked_attention"),
        ({"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "sliding_window": 64,
          "no_rope_layers": [1, 0, 1, 1],
          "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2]},
         "^model: .*rotary embeddings"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, None),
        ({"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"],
          "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 32,
          "qk_nope_head_dim": 32, "v_head_dim": 64}, "^model: .*MLA"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 16,
          "n_groups": 1, "expand": 2}, "^model: .*linear or state-space"),
        ({"model_type": "granite", "architectures": ["GraniteForCausalLM"],
          "attention_sinks": True}, "^model: .*attention sinks"),
        ({"attn_logit_softcapping": 50.0}, "^model: .*cap attention logits"),
        ({"attention_chunk_size": 8192}, "^model: .*chunked attention"),
        ({"alibi": True}, "^model: .*ALiBi"),
        ({"model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": 704,
          "word_embed_proj_dim": 256, "do_layer_norm_before": True, "rope_parameters": None,
          "rope_theta": None}, "^model: .*rotary embeddings"),
        ({"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"],
          "no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4},
         "^model: .*rotary embeddings"),
        ({"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}, "^model_impl: "),
        ({"head_dim": 264}, "^model: .*heads of at most 256 numbers, not 264"),
        ({"quantization_config": FP8_CACHE}, "^kv_cache_dtype: .* that the checkpoint asks for"),
        ({"quantization_config": MODELOPT_FP8_CACHE},
         "^kv_cache_dtype: .* that the checkpoint asks for"),
        ({"v_head_dim": 32}, "^model: .*values have heads of 32 numbers and their keys of 64"),
    ],
    ids=["qwen2-window", "mistral-window", "chunked-layers", "no-rope-in-the-last-full", "t5",
         "mla", "mamba", "sinks", "soft-cap", "chunks",
         "alibi", "opt", "no-rope-in-the-last", "olmo2", "large-heads", "compressed-tensors-cache",
         "modelopt-cache", "values"],
)  # fmt: skip
def test_unsupported_targets(tmp_path: Path, changes: dict[str, Any], sentence: str | None) -> None:
    target = write_target(tmp_path / "target", **changes)
    if sentence is None:  # vLLM itself does not know it
        with pytest.raises(ValueError):
            resolve(model=target)
        return
    with pytest.raises(LongSpecError, match=sentence):
        resolve(model=target)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": 0}, "^window: 0 is not a whole number of at least 1"),
        ({"window": -5}, "^window: -5 is not"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "^hidden_act: .*silu, not gelu_pytorch_tanh"),
    ],
)
def test_drafts_whose_layer_cannot_run(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(DRAFT, draft)
    path = draft / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(LongSpecError, match=sentence):
        resolve(spec_model=str(draft))


@pytest.mark.parametrize(
    "asked",
    [
        {"alibi_slopes": [0.5]},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"logits_soft_cap": 30.0},
        {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_layers_that_ask_for_more_than_plain_attention(asked: dict[str, Any]) -> None:
    """What a config does not tell is refused where a worker builds the layers, on CUDA too."""
    from vllm_longspec.verify.cpu_backend import LongSpecCpuImpl

    LongSpecCpuImpl(4, 64, 0.125, 2, logits_soft_cap=0.0)
    LongSpecCpuImpl(4, 64, 0.125, 2, sliding_window=128, sinks=torch.zeros(4))
    with pytest.raises(LongSpecError, match=r"^model: LongSpec does not support targets with"):
        LongSpecCpuImpl(4, 64, 0.125, 2, **asked)


def test_heads_that_the_config_does_not_tell() -> None:
    """Falcon's `num_kv_heads`; layers of different heads."""
    from vllm_longspec.draft.longspec import check_target_layer

    draft = SimpleNamespace(num_kv_heads=2, head_size=64)
    check_target_layer(SimpleNamespace(**vars(draft), sliding_window=None), draft)
    with pytest.raises(LongSpecError, match=r"^model: vLLM loads a layer with a window of 64 "):
        check_target_layer(SimpleNamespace(**vars(draft), sliding_window=64), draft)
    for heads, size in ((1, 64), (2, 32)):
        layer = SimpleNamespace(num_kv_heads=heads, head_size=size, sliding_window=None)
        with pytest.raises(LongSpecError, match=f"^model: .* {heads} key-value heads of {size} "):
            check_target_layer(layer, draft)
    values = SimpleNamespace(num_kv_heads=2, head_size=64, head_size_v=32)
    with pytest.raises(LongSpecError, match=r"^model: .* values have heads of 32 numbers"):
        check_target_layer(values, draft)


def test_an_untested_target_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its architecture or by what quantises it; served with a warning if the user wants to."""
    said: list[str] = []
    logger = SimpleNamespace(warning_once=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(supported, "logger", logger)
    int8, _ = FORMATS["compressed-tensors int8"]
    quantised = write_target(tmp_path / "target", quantization_config=int8)
    any_target = "VLLM_LONGSPEC_ANY_TARGET"
    resolve()
    resolve(model=quantised)
    for model, tested, about in (
        (quantised, "TESTED_QUANTIZATIONS", "targets quantised by compressed-tensors"),
        (str(TARGET), "TESTED", "llama targets"),
    ):
        monkeypatch.setattr(supported, tested, ("qwen3",))
        monkeypatch.delenv(any_target, raising=False)
        with pytest.raises(LongSpecError, match=f"^model: outputs of {about} were not") as error:
            resolve(model=model)
        assert str(error.value).endswith(f"set {any_target}=1")
        with pytest.raises(LongSpecError, match="were not compared"):  # copies of the text too
            resolve(model=model, speculative_config={"method": "longspec", "draft": "lookup"})
        assert said == []
        monkeypatch.setenv(any_target, "1")
        resolve(model=model)
        assert len(said) == 1 and said.pop().startswith(f"LongSpec: outputs of {about} were not")


def test_a_sleeping_engine_keeps_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    args = EngineArgs(
        model=str(TARGET), dtype="float32", spec_model=str(DRAFT), enable_sleep_mode=True
    )
    target = args.create_engine_config().model_config
    assert "draft.*" in target.sleep_preserve_parameter_names
    args = dataclasses.replace(args, sleep_preserve_parameter_names=["lm_head.*"])
    target = args.create_engine_config().model_config
    assert target.sleep_preserve_parameter_names == ["lm_head.*", "draft.*"]


def test_the_log_line_is_short() -> None:
    said = repr(resolve())
    assert len(said) < 500 and "4 16 16 16 16" in said and "method='longspec'" in said
