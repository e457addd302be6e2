"""Every refusal of the front end, and which of vLLM's engine arguments are tried or refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET
from quantised import FORMATS

from vllm_longspec import plugin
from vllm_longspec.errors import LongSpecError

plugin.register()

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

from vllm_longspec.runtime.options import LongSpecSpeculativeConfig  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the refusals are the same; dtype float32 is for CPUs"
)

# Of an engine argument: a value that is refused, and the word the sentence begins with if it is
# another one.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "pipeline_parallel_size": [({"pipeline_parallel_size": 2}, "")],
    "decode_context_parallel_size": [
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "")
    ],
    "ubatch_size": [({"ubatch_size": 2}, "")],
    "enable_dbo": [({"enable_dbo": True}, "")],
    "enable_batch_sharded_sampling": [
        ({"enable_batch_sharded_sampling": True, "tensor_parallel_size": 2}, "")
    ],
    "kv_cache_dtype": [({"kv_cache_dtype": "fp8"}, ""), ({"kv_cache_dtype": "bfloat16"}, "")],
    "disable_hybrid_kv_cache_manager": [({"disable_hybrid_kv_cache_manager": True}, "")],
    "kv_offloading_size": [({"kv_offloading_size": 1.0}, "")],
    "kv_sharing_fast_prefill": [({"kv_sharing_fast_prefill": True}, "")],
    "enable_lora": [({"enable_lora": True}, "")],
    "attention_backend": [
        ({"attention_backend": "TRITON_ATTN"}, ""),
        ({"attention_config": {"backend": "FLASHINFER"}}, "attention_backend"),
    ],
    "attention_config": [
        ({"attention_config": {"backend_per_kind": {"full_attention": "TRITON_ATTN"}}}, "")
    ],
    "enable_prompt_embeds": [({"enable_prompt_embeds": True}, "")],
    "return_sampling_mask": [({"return_sampling_mask": True}, "")],
    "enable_trace_replay": [({"enable_trace_replay": True}, "")],
    "enable_return_routed_experts": [
        ({"enable_return_routed_experts": True}, ""),
        ({"aux_output_config": {"enable_return_routed_experts": True}}, ""),
    ],
    "watermark_config": [({"watermark_config": {"algorithm": "gumbel"}}, "")],
    "weight_transfer_config": [({"weight_transfer_config": {"backend": "nccl"}}, "")],
    "cpu_offload_gb": [({"cpu_offload_gb": 1}, "")],
    "offload_group_size": [({"offload_group_size": 2}, "cpu_offload_gb")],
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
}  # fmt: skip
# With what else an engine is started in the tests, by field of EngineArgs.
TRIED = {
    "async_scheduling": "test_lossless.py, gpu_like.py",
    "block_size": "test_lossless.py",
    "data_parallel_size": "test_options.py",
    "dtype": "test_lossless.py",
    "enable_chunked_prefill": "test_lossless.py",
    "enable_sleep_mode": "test_gpu.py",
    "enforce_eager": "test_lossless.py, test_gpu.py",
    "kv_transfer_config": "test_bench.py",
    "logits_processors": "test_lossless.py",
    "logprobs_mode": "test_lossless.py",
    "max_model_len": "test_lossless.py",
    "max_num_seqs": "test_lossless.py",
    "num_gpu_blocks_override": "test_lossless.py",
    "quantization": "test_quantised.py, test_gpu_quantised.py",
    "spec_method": "test_options.py",
    "spec_model": "test_options.py",
    "spec_tokens": "test_options.py",
    "speculative_config": "test_options.py",
    "structured_outputs_config": "test_lossless.py",
    "tensor_parallel_size": "test_tensor_parallel.py",
}
# Read, and neither tried with LongSpec nor refused: what ends in the front end, what only other
# targets or platforms have, and what vLLM does around a step without asking what is in it. A field
# that vLLM adds belongs in one of the three.
UNTRIED = """
_api_process_count _api_process_rank additional_config aggregate_engine_logging all2all_backend
allow_deprecated_quantization allowed_local_media_path allowed_media_domains aux_output_config
code_revision collect_detailed_traces compilation_config config_format convert
cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_params
cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets data_parallel_address
data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
default_mm_loras device_ids diffusion_config disable_cascade_attn disable_chunked_mm_input
disable_custom_all_reduce disable_log_stats disable_nccl_for_dp_synchronization
disable_sliding_window distributed_executor_backend distributed_timeout_seconds download_dir
dp_sync_interval ec_manager_config ec_transfer_config elastic_ep_max_dp_size
enable_cumem_allocator enable_elastic_ep enable_ep_weight_filter enable_eplb
enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp
enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details
enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint enable_mfu_metrics
enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras
enable_nccl_comm_suspend enable_prefix_caching enable_shm_tensor_arena
enable_tower_connector_lora engram_config eplb_config expert_placement_strategy
fail_on_environ_validation fault_tolerance_config fully_sharded_loras gdn_prefill_backend
generation_config gpu_memory_utilization hf_config_path hf_overrides hf_token ignore_patterns
interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode jit_monitor_verbose
kda_decode_backend kda_prefill_backend kernel_config kv_cache_dtype_skip_layers
kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample kv_events_config
kv_offloading_backend language_model_only limit_mm_per_prompt linear_backend log_config_file
log_level logging_config long_prefill_token_threshold_adaptive lora_dtype lora_target_modules
mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds
mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr master_port max_cpu_loras
max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_lora_rank max_loras
max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_parallel_loading_workers
media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype
mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path
mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_processor_kwargs
mm_shm_cache_max_object_size_mb mm_tensor_ipc model model_class_overrides
model_loader_extra_config moe_backend monokernel nnodes node_rank numa_bind
numa_bind_cpus numa_bind_nodes offload_backend offload_num_in_group offload_params
offload_prefetch_step optimization_level otlp_traces_endpoint override_generation_config
per_request_spec_decode_metrics performance_mode pooler_config prefill_context_parallel_size
prefill_schedule_interval prefix_cache_retention_interval prefix_caching_hash_algo
prefix_match_unit profiler_config pt_load_map_location quantization_config
ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin
renderer_num_workers replayssm_buffer_len revision runner safetensors_load_strategy
safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_cls
scheduler_reserve_full_isl scheduling_policy seed served_model_name
show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling skip_tokenizer_init
sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
sparse_indexer_topk_backend specialize_active_lora stream_interval swa_bounded_replay
tokenizer tokenizer_mode tokenizer_revision tokens_only trust_remote_code
use_fp64_gumbel use_replayssm use_tqdm_on_load video_pruning_method video_pruning_rate
watchdog_config watermark worker_cls worker_extension_cls
""".split()  # noqa: SIM905


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


def test_the_table_names_arguments_of_vllm() -> None:
    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert {*REFUSED, *TRIED} <= fields
    assert fields - {*REFUSED, *TRIED, *UNTRIED} == set()
    for field, modules in TRIED.items():
        for module in modules.split(", "):
            assert (Path(__file__).parent / module).is_file(), field


def test_a_connector_is_refused() -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(LongSpecError, match=r"^kv_transfer_config: "):
        resolve(kv_transfer_config=connector)


def test_refused_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("VLLM_BATCH_INVARIANT", "1"),
        ("VLLM_USE_V2_MODEL_RUNNER", "0"),
        ("VLLM_KV_CACHE_LAYOUT", "LBHNC"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            with pytest.raises(LongSpecError, match=f"^{name}: .*; unset it"):
                resolve()


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
    from vllm_longspec.runtime import supported

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


def test_the_log_line_is_short() -> None:
    said = repr(resolve())
    assert len(said) < 500 and "4 16 16 16 16" in said and "method='longspec'" in said
