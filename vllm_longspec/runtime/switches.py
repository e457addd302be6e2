"""Every switch of vLLM: arguments of an engine, environment variables, parameters of a request; of
each whether it works with LongSpec, is refused or does not matter.

Plain data, without vLLM, so that scripts read it too. What a vLLM has beside it is unread: a test
fails for it (`scripts/check_vllm.py`), and it is refused (`supported.py`). The tables in
docs/compatibility.md and docs/switches.md are written from it, by `scripts/switches_table.py`.
"""

from dataclasses import dataclass
from functools import cached_property

from vllm_longspec.runtime.vllm_versions import installed_vllm


@dataclass(frozen=True)
class Switches:
    works: dict[str, str]
    """By name, the test modules that set it."""
    in_part: dict[str, str]
    """Of some that work, what of them is refused; `supported.py` and `options.py` say when."""
    refused: dict[str, str]
    """The sentence for any value but the default's."""
    no_matter: dict[str, str]
    """By reason, names."""

    @cached_property
    def reasons(self) -> dict[str, str]:
        return {name: why for why, names in self.no_matter.items() for name in names.split()}

    @cached_property
    def names(self) -> set[str]:
        return {*self.works, *self.refused, *self.reasons}


def unknown(what: str) -> str:
    """Begins the sentence for one that is in no table."""
    return f"LongSpec does not know this {what} of vLLM {installed_vllm()}"


UNTRIED = "LongSpec was not tried with it; leave it out"
UNSET = "LongSpec was not tried with it; unset it"

# Fields of vLLM's EngineArgs and AsyncEngineArgs.
ARGUMENTS = Switches(
    works={
        "async_scheduling": "test_as_on_a_gpu.py, test_tree_stats.py",
        "attention_backend": "test_switches.py",
        "attention_config": "test_switches.py",
        "block_size": "test_lossless.py",
        "compilation_config": "test_gpu.py",
        "cudagraph_capture_sizes": "test_as_on_a_gpu.py, test_graphs.py",
        "cudagraph_metrics": "test_switches.py",
        "data_parallel_size": "test_data_parallel.py",
        "disable_log_stats": "test_lossless.py",
        "distributed_executor_backend": "test_switches.py",
        "dtype": "test_lossless.py, test_gpu.py",
        "enable_chunked_prefill": "test_switches.py",
        "enable_logging_iteration_details": "test_switches.py",
        "enable_lora": "test_lora.py",
        "enable_prefix_caching": "test_random.py, test_switches.py",
        "enable_sleep_mode": "test_gpu.py",
        "enforce_eager": "test_lossless.py, test_gpu.py",
        "gpu_memory_utilization": "test_gpu.py",
        "hf_overrides": "test_switches.py",
        "ir_op_priority": "test_switches.py",
        "kernel_config": "test_switches.py",
        "kv_cache_dtype": "test_supported.py",
        "kv_cache_memory_bytes": "test_lossless.py, test_gpu.py",
        "kv_cache_metrics": "test_switches.py",
        "kv_cache_metrics_sample": "test_switches.py",
        "kv_events_config": "test_switches.py",
        "kv_transfer_config": "test_bench.py",
        "linear_backend": "test_switches.py",
        "load_format": "test_load_formats.py",
        "logits_processors": "test_switches.py",
        "logprobs_mode": "test_lossless.py, test_switches.py",
        "long_prefill_token_threshold": "test_switches.py",
        "long_prefill_token_threshold_adaptive": "test_switches.py",
        "lora_dtype": "test_lora.py",
        "lora_target_modules": "test_lora.py",
        "max_cpu_loras": "test_lora.py",
        "max_cudagraph_capture_size": "test_as_on_a_gpu.py, test_graphs.py",
        "max_logprobs": "test_switches.py",
        "max_lora_rank": "test_lora.py",
        "max_loras": "test_lora.py",
        "max_model_len": "test_lossless.py",
        "max_num_active_seqs": "test_switches.py",
        "max_num_batched_tokens": "test_lossless.py, test_random.py",
        "max_num_scheduled_tokens": "test_switches.py",
        "max_num_seqs": "test_lossless.py, test_random.py",
        "model": "test_architectures.py",
        "model_impl": "test_switches.py",
        "num_gpu_blocks_override": "test_lossless.py, test_random.py",
        "optimization_level": "test_switches.py",
        "per_request_spec_decode_metrics": "test_tree_stats.py",
        "performance_mode": "test_switches.py",
        "prefix_caching_hash_algo": "test_switches.py",
        "quantization": "test_quantised.py, test_gpu_quantised.py",
        "quantization_config": "test_quantised.py",
        "reasoning_config": "test_switches.py",
        "reasoning_parser": "test_switches.py",
        "reasoning_parser_plugin": "test_switches.py",
        "runner": "test_switches.py",
        "scheduler_cls": "test_switches.py",
        "scheduler_reserve_full_isl": "test_switches.py",
        "scheduling_policy": "test_switches.py",
        "seed": "test_switches.py",
        "skip_tokenizer_init": "test_distribution.py",
        "sleep_preserve_parameter_names": "test_supported.py",
        "spec_method": "test_options.py",
        "spec_model": "test_options.py",
        "spec_tokens": "test_options.py",
        "speculative_config": "test_options.py",
        "stream_interval": "test_switches.py",
        "structured_outputs_config": "test_lossless.py, test_switches.py",
        "tensor_parallel_size": "test_tensor_parallel.py",
        "use_fp64_gumbel": "test_switches.py",
        "watermark": "test_switches.py",
        "worker_extension_cls": "test_switches.py",
    },
    in_part={
        "attention_backend": "backends other than FlashAttention",
        "attention_config": "backends other than FlashAttention, and all but `backend` and "
        "`flash_attn_version`",
        "distributed_executor_backend": "all but `mp`, `uni` and `ray`, which was not run",
        "dtype": "float32 on a GPU",
        "enable_lora": "on a GPU, of several devices or engines, of a quantised target, of one "
        "with experts: none was compared yet",
        "kv_cache_dtype": "a quantised KV cache, typed or asked for by the checkpoint; another "
        "dtype than the model's",
        "kv_transfer_config": "KV connectors, but vLLM's DecodeBenchConnector",
        "load_format": "all but `auto`, `hf`, `safetensors`, `pt`, `npcache`, `mistral`, "
        "`sharded_state`, `dummy`; the others were not tried. The draft is read from its folder "
        "whatever the target's is, but for `dummy`",
        "long_prefill_token_threshold": "fewer tokens than one verification has",
        "max_num_batched_tokens": "fewer tokens than one verification has; a step that cannot hold "
        "every request's is warned of",
        "max_num_scheduled_tokens": "fewer tokens than one verification has; a step that cannot "
        "hold every request's is warned of",
        "model": "a target [that nobody tested](#targets), by its architecture or by what "
        "quantises it; heads of more than 256 numbers, values of other sizes than keys, or others "
        "in the layer that the draft reads than the config says; MLA, chunked, linear or "
        "state-space attention; a sliding window in every layer, or Qwen's `max_window_layers`; "
        "attention sinks that a config's field asks for, caps on attention logits; ALiBi, M-RoPE, "
        "no rotary embeddings (in the last full layer either); encoder-decoder and multimodal "
        "targets",
        "model_impl": "transformers' implementation of a target",
        "quantization": "methods that [nobody compared](#quantised-weights)",
        "quantization_config": "all but what `quantization` makes of it",
        "runner": "anything but generation",
        "scheduler_cls": "classes that do not inherit from vLLM's scheduler",
    },
    refused={
        "additional_config": UNTRIED,
        "all2all_backend": UNTRIED,
        "aux_output_config": "LongSpec verifies nodes that are not accepted, and what is computed "
        "of these would be returned too; leave it out",
        "cpu_offload_gb": "LongSpec does not support weights outside the GPU; leave it out",
        "decode_context_parallel_size": "LongSpec does not support context parallelism; set it to "
        "1",
        "diffusion_config": "LongSpec needs a target that writes token by token; leave it out",
        "disable_hybrid_kv_cache_manager": "LongSpec's ring needs the hybrid KV cache manager; "
        "leave the flag out",
        "disable_sliding_window": "LongSpec was not tried with a window that is switched off; "
        "leave it out, or lower max_model_len",
        "dp_sync_interval": UNTRIED,
        "ec_transfer_config": "LongSpec drafts text only; leave it out",
        "elastic_ep_max_dp_size": "LongSpec does not follow engines that come and go; leave it out",
        "enable_batch_sharded_sampling": "LongSpec needs every request's accepted tokens on every "
        "rank; leave it out",
        "enable_dbo": "LongSpec does not support dual batch overlap; leave it out",
        "enable_elastic_ep": "LongSpec does not follow engines that come and go; leave it out",
        "enable_eplb": "LongSpec was not tried with experts that move between ranks; leave it out",
        "enable_fault_tolerance": "LongSpec does not follow engines that come and go; leave it out",
        "enable_nccl_comm_suspend": UNTRIED,
        "enable_prompt_embeds": "LongSpec drafts from token ids; leave it out",
        "enable_return_routed_experts": "LongSpec verifies nodes that are not accepted, and their "
        "experts would be returned too; leave it out",
        "enable_trace_replay": "LongSpec does not support it; leave it out",
        "expert_placement_strategy": UNTRIED,
        "jit_monitor_mode": "LongSpec compiles some kernels when they are first needed; leave it "
        "out",
        "kv_cache_dtype_skip_layers": "LongSpec does not support a quantised KV cache; leave it "
        "out",
        "kv_offloading_size": "LongSpec does not support offloading of the KV cache; leave it out",
        "kv_sharing_fast_prefill": "LongSpec does not support it; leave it out",
        "model_class_overrides": "LongSpec was compared with vLLM's own classes only; leave it out",
        "model_weights": "LongSpec was not tried with weights in an object store or elsewhere than "
        "the target's config; fetch them into its folder",
        "offload_backend": "LongSpec does not support weights outside the GPU; leave it out",
        "offload_group_size": "LongSpec does not support weights outside the GPU; leave it out",
        "pipeline_parallel_size": "LongSpec does not support pipeline parallelism; set it to 1",
        "prefill_context_parallel_size": "LongSpec does not support context parallelism; set it to "
        "1",
        "prefill_schedule_interval": UNTRIED,
        "prefix_cache_retention_interval": UNTRIED,
        "prefix_match_unit": "LongSpec's ring has blocks of other sizes than the target's; leave "
        "it out",
        "return_sampling_mask": "LongSpec does not support it; leave it out",
        "sleep_mode_backend": "LongSpec was tried with the default one only; leave it out",
        "sleep_mode_offload_cudagraph": "LongSpec was not tried with graphs that leave the GPU; "
        "leave it out",
        "ubatch_size": "LongSpec does not support micro-batches; leave it out",
        "watermark_config": "LongSpec does not support watermarks; leave it out",
        "weight_transfer_config": "LongSpec's draft does not follow a target whose weights are "
        "sent to it; leave it out",
        "worker_cls": "LongSpec's proposer lives in vLLM's own workers; leave it out, or give "
        "worker_extension_cls",
    },
    no_matter={
        "the front end alone reads it": """
            allowed_local_media_path allowed_media_domains enable_log_requests
            fail_on_environ_validation generation_config interleave_mm_strings io_processor_plugin
            max_num_queued_reqs max_num_queued_tokens override_generation_config
            renderer_num_workers served_model_name shutdown_timeout tokens_only
            _api_process_count _api_process_rank""",
        "where config, tokenizer and weights come from; what vLLM reads there is checked": """
            allow_deprecated_quantization code_revision config_format download_dir hf_config_path
            hf_token ignore_patterns revision tokenizer tokenizer_mode tokenizer_revision
            trust_remote_code""",
        "how weights are read, before there is a step": """
            enable_ep_weight_filter max_parallel_loading_workers model_loader_extra_config
            pt_load_map_location safetensors_load_strategy safetensors_prefetch_block_size
            safetensors_prefetch_num_threads use_tqdm_on_load""",
        "what is logged, counted or profiled": """
            aggregate_engine_logging collect_detailed_traces custom_histogram_buckets
            enable_layerwise_nvtx_tracing enable_mfu_metrics jit_monitor_verbose log_config_file
            log_level logging_config otlp_traces_endpoint profiler_config ray_workers_use_nsight
            show_hidden_metrics_for_version watchdog_config""",
        "where processes run and how they reach each other; LongSpec's ranks talk through vLLM's "
        "tensor-parallel group. Run on one host only": """
            cpu_distributed_timeout_seconds data_parallel_address data_parallel_backend
            data_parallel_external_lb data_parallel_hybrid_lb data_parallel_multi_port_external_lb
            data_parallel_rank data_parallel_rpc_port data_parallel_size_local
            data_parallel_start_rank device_ids disable_custom_all_reduce
            disable_nccl_for_dp_synchronization distributed_timeout_seconds
            enable_shm_tensor_arena master_addr master_port nnodes node_rank numa_bind
            numa_bind_cpus numa_bind_nodes""",
        "which kernels the target's own layers take; LongSpec calls these layers as plain decoding "
        "does. Run with vLLM's choice only": """
            enable_flashinfer_autotune moe_backend""",
        "on which ranks experts lie; each layer's output is the same on all. Not run with "
        "LongSpec: vLLM's kernel for CPUs fails": """
            enable_expert_parallel""",
        "where GPU memory comes from": """
            enable_cumem_allocator""",
        "nothing in vLLM reads it any more": """
            disable_cascade_attn""",
        "of multimodal targets, which are refused": """
            disable_chunked_mm_input ec_manager_config enable_mm_embeds enable_mm_processor_stats
            language_model_only limit_mm_per_prompt media_io_kwargs mm_device_do_normalize
            mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
            mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only
            mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
            mm_processor_cache_type mm_processor_device mm_processor_kwargs
            mm_shm_cache_max_object_size_mb mm_tensor_ipc skip_mm_profiling video_pruning_method
            video_pruning_rate""",
        "of pooling targets, which are refused": """
            convert pooler_config""",
        "of targets with state-space, linear, MLA or sparse attention, which are refused": """
            enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint
            gdn_prefill_backend kda_decode_backend kda_prefill_backend mamba_backend
            mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds
            mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm replayssm_buffer_len
            sparse_indexer_topk_backend use_replayssm""",
        "of architectures that are refused untested: DeepSeek-V4.1, Qwen4": """
            enable_hc_sp engram_config monokernel swa_bounded_replay""",
        "of adapters where `enable_lora` is refused: several devices, experts, graphs of a GPU, "
        "images, classes": """
            default_mm_loras enable_mixed_moe_lora_format enable_moe_shared_loras
            enable_tower_connector_lora fully_sharded_loras max_lora_cls_labels
            specialize_active_lora""",
        "only with context parallelism, which is refused": """
            cp_kv_cache_interleave_size dcp_comm_backend dcp_kv_cache_interleave_size
            dcp_q_replicate""",
        "only with `enable_dbo` or `ubatch_size`, which are refused": """
            dbo_decode_token_threshold dbo_prefill_token_threshold""",
        "only with `enable_eplb` or `enable_fault_tolerance`, which are refused": """
            eplb_config fault_tolerance_config""",
        "only with `cpu_offload_gb`, `offload_group_size` or `kv_offloading_size`, which are "
        "refused": """
            cpu_offload_params kv_offloading_backend offload_num_in_group offload_params
            offload_prefetch_step""",
    },
)

# Of `vllm.envs`.
VARIABLES = Switches(
    works={
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "test_supported.py",
        "VLLM_CACHE_ROOT": "test_controller.py",
        "VLLM_COMPUTE_NANS_IN_LOGITS": "test_switches.py",
        "VLLM_CPU_ATTN_SPLIT_KV": "test_switches.py",
        "VLLM_CPU_OMP_THREADS_BIND": "test_lossless.py",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "test_lossless.py",
        "VLLM_FLOAT32_MATMUL_PRECISION": "test_supported.py",
        "VLLM_KV_CACHE_LAYOUT": "test_supported.py",
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "test_switches.py",
        "VLLM_MAX_NUM_BAD_WORDS": "test_switches.py",
        "VLLM_PLUGINS": "test_plugin.py",
        "VLLM_RAISE_ON_LOGIT_NANS": "test_switches.py",
        "VLLM_USE_V2_MODEL_RUNNER": "test_supported.py",
        "VLLM_WORKER_MULTIPROC_METHOD": "test_tensor_parallel.py, test_gpu.py",
    },
    in_part={
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "a max_model_len beyond what the target's config says",
        "VLLM_FLOAT32_MATMUL_PRECISION": "with a float32 target",
        "VLLM_KV_CACHE_LAYOUT": "layouts but BLNHC",
        "VLLM_USE_V2_MODEL_RUNNER": "the value 0",
    },
    refused={
        "VLLM_BATCH_INVARIANT": "LongSpec is not batch-invariant, a verification sums in another "
        "order than plain decoding; unset it",
        "VLLM_ENABLE_STARTUP_PLAN": "LongSpec needs more memory than a plan made without it says; "
        "unset it",
        "VLLM_GPU_SYNC_CHECK": UNSET,
        "VLLM_HUMMING_INPUT_QUANT_CONFIG": UNSET,
        "VLLM_HUMMING_ONLINE_QUANT_CONFIG": UNSET,
        "VLLM_MARLIN_INPUT_DTYPE": UNSET,
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": "LongSpec verifies a target that routes as it was "
        "trained to; unset it",
        "VLLM_USE_BREAKABLE_CUDAGRAPH": UNSET,
        "VLLM_USE_RUST_FRONTEND": "LongSpec's checks of a request and its counters are in the "
        "Python front end; unset it",
    },
    no_matter={
        "how vLLM is built and packed": """
            CMAKE_BUILD_TYPE MAX_JOBS NVCC_THREADS VERBOSE VLLM_BUILD_COMMIT VLLM_BUILD_PIPELINE
            VLLM_BUILD_URL VLLM_DOCKER_BUILD_CONTEXT VLLM_IMAGE_TAG VLLM_MAIN_CUDA_VERSION
            VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX VLLM_SKIP_VERSION_SUFFIX VLLM_TARGET_DEVICE
            VLLM_USE_PRECOMPILED VLLM_USE_PRECOMPILED_RUST""",
        "the front end alone reads it": """
            VLLM_API_KEY VLLM_BEAM_ALWAYS_CONSTRAIN_OUTPUT VLLM_CHAT_TEMPLATE_FUEL
            VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT VLLM_DEBUG_LOG_API_SERVER_RESPONSE
            VLLM_DISABLE_REQUEST_ID_RANDOMIZATION VLLM_ENABLE_COHERE_API
            VLLM_ENABLE_RESPONSES_API_STORE VLLM_ENFORCE_STRICT_TOOL_CALLING
            VLLM_ENGINE_READY_TIMEOUT_S VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS
            VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS VLLM_HTTP_MAX_REQUEST_BODY_SIZE
            VLLM_HTTP_TIMEOUT_KEEP_ALIVE VLLM_KEEP_ALIVE_ON_ENGINE_DEATH
            VLLM_MAX_COMPLETION_PROMPTS VLLM_MAX_N_SEQUENCES VLLM_MAX_STOP_STRINGS
            VLLM_REQUEST_BODY_LOG_LEVEL VLLM_RUST_FRONTEND_PATH VLLM_SERVER_DEV_MODE
            VLLM_SKIP_MODEL_NAME_VALIDATION VLLM_SYSTEM_START_DATE
            VLLM_TOOL_JSON_ERROR_AUTOMATIC_RETRY VLLM_TOOL_PARSE_REGEX_TIMEOUT_SECONDS
            VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT VLLM_USE_FASTOKENS VLLM_USE_RUST_BENCH
            VLLM_V1_OUTPUT_PROC_CHUNK_SIZE""",
        "where config and weights come from, and how they are read": """
            S3_ACCESS_KEY_ID S3_ENDPOINT_URL S3_SECRET_ACCESS_KEY VLLM_ASSETS_CACHE
            VLLM_ASSETS_CACHE_MODEL_CLEAN VLLM_CONFIG_ROOT VLLM_FASTSAFETENSORS_QUEUE_SIZE
            VLLM_MODEL_REDIRECT_PATH VLLM_USE_MODELSCOPE""",
        "what is logged, counted, profiled or dumped": """
            FORCE_COLOR NO_COLOR VLLM_CONFIGURE_LOGGING VLLM_CUSTOM_SCOPES_FOR_PROFILING
            VLLM_DEBUG_DUMP_PATH VLLM_DEBUG_MFU_METRICS VLLM_DEBUG_WORKSPACE VLLM_DISABLE_LOG_LOGO
            VLLM_DO_NOT_TRACK VLLM_GC_DEBUG VLLM_LOGGING_COLOR VLLM_LOGGING_CONFIG_PATH
            VLLM_LOGGING_LEVEL VLLM_LOGGING_PREFIX VLLM_LOGGING_STREAM
            VLLM_LOG_BATCHSIZE_INTERVAL VLLM_LOG_MODEL_INSPECTION VLLM_LOG_STATS_INTERVAL
            VLLM_NO_USAGE_STATS VLLM_NVTX_SCOPES_FOR_PROFILING VLLM_PATTERN_MATCH_DEBUG
            VLLM_PROCESS_NAME_PREFIX VLLM_RINGBUFFER_WARNING_INTERVAL VLLM_TRACE_FUNCTION
            VLLM_USAGE_SOURCE VLLM_USAGE_STATS_SERVER""",
        "where processes run and how they reach each other; LongSpec's ranks talk through vLLM's "
        "tensor-parallel group": """
            CUDA_VISIBLE_DEVICES LOCAL_RANK VLLM_ALLOW_INSECURE_SERIALIZATION
            VLLM_ALLREDUCE_USE_FLASHINFER
            VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC VLLM_ALLREDUCE_USE_SYMM_MEM VLLM_DISABLE_PYNCCL
            VLLM_DISTRIBUTED_USE_SPLIT_GROUP VLLM_DP_MASTER_IP VLLM_DP_MASTER_PORT VLLM_DP_RANK
            VLLM_DP_RANK_LOCAL VLLM_DP_SIZE VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
            VLLM_FLASHINFER_ALLREDUCE_BACKEND VLLM_GPU_NIC_PCIE_MAPPING VLLM_HOST_IP
            VLLM_LOOPBACK_IP VLLM_MQ_MAX_CHUNK_BYTES_MB VLLM_MSGPACK_ZERO_COPY_THRESHOLD
            VLLM_NCCL_INCLUDE_PATH VLLM_NCCL_SO_PATH VLLM_NIC_SELECTION_VARS VLLM_PORT
            VLLM_RANDOMIZE_DP_DUMMY_INPUTS VLLM_RAY_BUNDLE_INDICES VLLM_RAY_DP_PACK_STRATEGY
            VLLM_RAY_DP_PLACEMENT_NODE_IPS VLLM_RAY_EXTRA_ENV_VARS_TO_COPY
            VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY VLLM_RAY_PER_WORKER_GPUS VLLM_RPC_BASE_PATH
            VLLM_SKIP_P2P_CHECK VLLM_USE_NCCL_SYMM_MEM VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE
            VLLM_USE_RAY_COMPILED_DAG_OVERLAP_COMM VLLM_USE_RAY_V2_EXECUTOR_BACKEND
            VLLM_USE_SPINLOOP_EXT VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS""",
        "which libraries of the device are loaded, and how much of it is taken": """
            CUDA_HOME LD_LIBRARY_PATH VLLM_CPU_KVCACHE_SPACE VLLM_CPU_NUM_OF_RESERVED_CPU
            VLLM_CUDART_SO_PATH VLLM_CUDA_COMPATIBILITY_PATH VLLM_ENABLE_CUDA_COMPATIBILITY
            VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS VLLM_WSL2_ENABLE_PIN_MEMORY""",
        "how torch compiles the target and keeps that; it compiles nothing of LongSpec": """
            VLLM_COMPILE_CACHE_SAVE_FORMAT VLLM_CPU_CI_ENV VLLM_DISABLE_COMPILE_CACHE
            VLLM_ENABLE_CUDAGRAPH_GC VLLM_ENABLE_INDUCTOR_COORDINATE_DESCENT_TUNING
            VLLM_ENABLE_INDUCTOR_MAX_AUTOTUNE VLLM_ENABLE_PREGRAD_PASSES VLLM_FORCE_AOT_LOAD
            VLLM_TRITON_JIT_WARMUP_NUM_THREADS VLLM_USE_AOT_COMPILE VLLM_USE_BYTECODE_HOOK
            VLLM_USE_LAYERNAME VLLM_USE_MEGA_AOT_ARTIFACT VLLM_USE_STANDALONE_COMPILE""",
        "which kernels the target's own layers take; LongSpec calls these layers as plain decoding "
        "does": """
            VLLM_B12X_MOE_FP4_FORCE_A16 VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER
            VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD VLLM_CPU_INT4_W4A8
            VLLM_DEEP_GEMM_WARMUP VLLM_DISABLED_KERNELS VLLM_DISABLE_SHARED_EXPERTS_STREAM
            VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS
            VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE VLLM_HAS_FLASHINFER_CUBIN
            VLLM_HUMMING_MOE_GEMM_TYPE VLLM_HUMMING_USE_F16_ACCUM VLLM_MARLIN_USE_ATOMIC_ADD
            VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE VLLM_MOE_SKIP_PADDING VLLM_MOE_USE_DEEP_GEMM
            VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD
            VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD VLLM_TRITON_FORCE_FIRST_CONFIG
            VLLM_TUNED_CONFIG_FOLDER VLLM_USE_DEEP_GEMM VLLM_USE_DEEP_GEMM_E8M0
            VLLM_USE_DEEP_GEMM_TMA_ALIGNED_SCALES VLLM_USE_FLASHINFER_MOE_INT4
            VLLM_USE_FUSED_MOE_GROUPED_TOPK VLLM_USE_OINK_OPS VLLM_USE_TRITON_AWQ
            VLLM_ZENTORCH_WEIGHT_PREPACK""",
        "by what requests without a seed are sampled where nothing is drafted; of the same "
        "distribution": """
            VLLM_USE_FLASHINFER_SAMPLER""",
        "how grammars are compiled and kept": """
            VLLM_REGEX_COMPILATION_TIMEOUT_S VLLM_V1_USE_OUTLINES_CACHE VLLM_XGRAMMAR_CACHE_MB""",
        "how events about the cache are written": """
            VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES""",
        "of vLLM's adaptive verification, which is for chains; LongSpec has its own": """
            VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN""",
        "nothing in vLLM reads it any more": """
            VLLM_TEST_FORCE_LOAD_FORMAT""",
        "of backends other than FlashAttention, or transformers' layers, which are refused": """
            VLLM_TRITON_USE_TD VLLM_USE_HW_AGNOSTIC""",
        "of other devices than GPUs by NVIDIA and CPUs, which are refused": """
            VLLM_ROCM_AITER_MEGA_MOE_FUSE_SHARED_EXPERTS VLLM_ROCM_AITER_MLA_ASM_PADDING
            VLLM_ROCM_AITER_MLA_DCP_VERIFY VLLM_ROCM_AITER_MOE_DISPATCH_POLICY
            VLLM_ROCM_FP8_MFMA_PAGE_ATTN VLLM_ROCM_FP8_PADDING VLLM_ROCM_MOE_PADDING
            VLLM_ROCM_MONO_DECODE VLLM_ROCM_MUSE_MOE_ONLINE_QUANT VLLM_ROCM_MUSE_MOE_REDUCE_DTYPE
            VLLM_ROCM_QUICK_REDUCE_CAST_BF16_TO_FP16 VLLM_ROCM_QUICK_REDUCE_MAX_SIZE_BYTES_MB
            VLLM_ROCM_QUICK_REDUCE_MIN_SIZE_BYTES_MB VLLM_ROCM_QUICK_REDUCE_QUANTIZATION
            VLLM_ROCM_QUICK_REDUCE_QUANTIZATION_MIN_SIZE_KB VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT
            VLLM_ROCM_SLEEP_MEM_CHUNK_SIZE VLLM_ROCM_USE_AITER VLLM_ROCM_USE_AITER_CUSTOM_AR
            VLLM_ROCM_USE_AITER_FP4BMM VLLM_ROCM_USE_AITER_FP4_ASM_GEMM
            VLLM_ROCM_USE_AITER_FP8BMM VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS
            VLLM_ROCM_USE_AITER_LINEAR VLLM_ROCM_USE_AITER_LINEAR_HIPBMM VLLM_ROCM_USE_AITER_MHA
            VLLM_ROCM_USE_AITER_MLA VLLM_ROCM_USE_AITER_MOE VLLM_ROCM_USE_AITER_MOE_A4W4_DSV4
            VLLM_ROCM_USE_AITER_MOE_SITUV2 VLLM_ROCM_USE_AITER_RMSNORM
            VLLM_ROCM_USE_AITER_TRITON_GEMM VLLM_ROCM_USE_AITER_TRITON_ROPE
            VLLM_ROCM_USE_AITER_TRITON_SPARSE_MLA VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION
            VLLM_ROCM_USE_SKINNY_GEMM VLLM_TPU_USING_PATHWAYS VLLM_XLA_CACHE_PATH
            VLLM_XLA_CHECK_RECOMPILATION VLLM_XLA_USE_SPMD VLLM_XPU_FORCE_N_CONTIG_WEIGHT
            VLLM_XPU_INC_WNA16_BACKEND VLLM_XPU_PP_MICROBATCH VLLM_XPU_USE_SAMPLER_KERNEL""",
        "of multimodal targets, which are refused": """
            VLLM_AUDIO_FETCH_TIMEOUT VLLM_IMAGE_FETCH_TIMEOUT VLLM_MAX_AUDIO_CLIP_FILESIZE_MB
            VLLM_MAX_AUDIO_DECODE_BYTES VLLM_MAX_AUDIO_DECODE_DURATION_S
            VLLM_MAX_AUDIO_PREPROCESS_WORKERS VLLM_MAX_EMBED_DECODE_BYTES VLLM_MAX_IMAGE_PIXELS
            VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES
            VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB VLLM_MEDIA_CACHE VLLM_MEDIA_CACHE_MAX_SIZE_MB
            VLLM_MEDIA_CACHE_TTL_HOURS VLLM_MEDIA_CONNECTOR VLLM_MEDIA_FETCH_MAX_RETRIES
            VLLM_MEDIA_LOADING_THREAD_COUNT VLLM_MEDIA_URL_ALLOW_REDIRECTS
            VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME VLLM_VIDEO_FETCH_TIMEOUT
            VLLM_VIDEO_LOADER_BACKEND""",
        "of targets with state-space, linear, MLA, sparse or chunked attention, which are "
        "refused": """
            VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE
            VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE VLLM_GDN_DECODE_KERNEL VLLM_MLA_DISABLE
            VLLM_SPARSE_INDEXER_MAX_LOGITS_MB VLLM_SSM_CONV_STATE_LAYOUT""",
        "of architectures that are refused untested: DeepSeek, Dots, HY, Kimi, Step": """
            VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION VLLM_ENABLE_GEMM_RS VLLM_ENABLE_HPC_OPS
            VLLM_KIMI_K3_AUX_ATTN_RES_STREAM VLLM_KIMI_K3_GEMM_AR
            VLLM_KIMI_K3_SHARD_SP_SHARED_EXPERT VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD
            VLLM_REPLICATE_EMBED VLLM_STEP5_SHARD_SP_SHARED_EXPERT""",
        "which adapters the front end loads, and when": """
            VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_LORA_RESOLVER_CACHE_DIR
            VLLM_LORA_RESOLVER_HF_REPO_LIST""",
        "of adapters on a GPU, where `enable_lora` is refused": """
            VLLM_LORA_DISABLE_PDL VLLM_LORA_ENABLE_DUAL_STREAM""",
        "only with pipeline or context parallelism, or `enable_dbo`, which are refused": """
            VLLM_DBO_COMM_SMS VLLM_DCP_Q_REPLICATE VLLM_PP_LAYER_PARTITION VLLM_USE_DIRECT_DCP_A2A
            VLLM_USE_DIRECT_DCP_KV_GATHER VLLM_USE_DIRECT_DCP_Q_GATHER
            VLLM_USE_RAY_WRAPPED_PP_COMM""",
        "only with `enable_elastic_ep` or another `all2all_backend`, which are refused": """
            VLLM_DEEPEPLL_NVFP4_DISPATCH VLLM_DEEPEP_BUFFER_SIZE_MB
            VLLM_DEEPEP_HIGH_THROUGHPUT_FORCE_INTRA_NODE VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL
            VLLM_DEEPEP_V2_ALLOW_HYBRID_MODE VLLM_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION
            VLLM_DEEPEP_V2_PREFER_OVERLAP VLLM_ELASTIC_EP_DRAIN_REQUESTS
            VLLM_ELASTIC_EP_SCALE_UP_LAUNCH VLLM_FLASHINFER_MOE_A2A_LOW_PRECISION_COMBINE""",
        "only with connectors of KV or encoder caches, or what is offloaded, which are refused": """
            MOONCAKE_PREFERRED_SEGMENT MOONCAKE_REQUESTER_LOCAL_HOSTNAME VLLM_EC_SIDE_CHANNEL_HOST
            VLLM_EC_SIDE_CHANNEL_PORT VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS
            VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT VLLM_MOONCAKE_BOOTSTRAP_PORT
            VLLM_MOONCAKE_CONNECTOR_TIMEOUT VLLM_MOONCAKE_DISK_STAGING_USABLE_RATIO
            VLLM_MOONCAKE_LOAD_RECV_THREADS VLLM_MOONCAKE_STORE_TIER_LOG
            VLLM_NIXL_SIDE_CHANNEL_HOST VLLM_NIXL_SIDE_CHANNEL_PORT VLLM_P2P_HANDSHAKE_TIMEOUT_S
            VLLM_P2P_IDLE_TIMEOUT_S VLLM_P2P_MAX_PEERS VLLM_P2P_SIDE_CHANNEL_HOST
            VLLM_P2P_SIDE_CHANNEL_PORT VLLM_USE_SIMPLE_KV_OFFLOAD
            VLLM_WEIGHT_OFFLOADING_DISABLE_PIN_MEMORY VLLM_WEIGHT_OFFLOADING_DISABLE_UVA""",
    },
)

# Fields of vLLM's SamplingParams.
PARAMETERS = Switches(
    works={
        "allowed_token_ids": "test_lossless.py",
        "bad_words": "test_lossless.py",
        "extra_args": "test_request_switch.py",
        "flat_logprobs": "test_switches.py",
        "frequency_penalty": "test_lossless.py",
        "ignore_eos": "test_lossless.py",
        "include_stop_str_in_output": "test_switches.py",
        "logit_bias": "test_lossless.py",
        "logprob_token_ids": "test_lossless.py",
        "logprobs": "test_lossless.py",
        "max_tokens": "test_lossless.py",
        "min_p": "test_lossless.py",
        "min_tokens": "test_lossless.py",
        "n": "test_switches.py",
        "presence_penalty": "test_lossless.py",
        "prompt_logprob_start": "test_switches.py",
        "prompt_logprob_token_ids": "test_switches.py",
        "prompt_logprobs": "test_lossless.py",
        "repetition_detection": "test_switches.py",
        "repetition_penalty": "test_lossless.py",
        "seed": "test_lossless.py",
        "skip_reading_prefix_cache": "test_switches.py",
        "stop": "test_lossless.py",
        "stop_token_ids": "test_lossless.py",
        "structured_outputs": "test_lossless.py",
        "temperature": "test_lossless.py",
        "thinking_token_budget": "test_switches.py",
        "top_k": "test_lossless.py",
        "top_p": "test_lossless.py",
    },
    in_part={"extra_args": "a `longspec` that is neither `on` nor `off`"},
    refused={},
    no_matter={
        "the front end alone reads it": """
            detokenize output_kind skip_clone skip_special_tokens spaces_between_special_tokens
            stream_interval""",
        "vLLM makes it of the others": """
            _all_stop_token_ids _bad_words_token_ids _eos_token_id _watermarking_skipped
            output_text_buffer_length""",
        "only with `watermark_config`, which is refused": "watermarking",
        "only with `enable_trace_replay`, which is refused; vLLM refuses it itself": """
            trace_decode_token_ids""",
        "only with `enable_return_routed_experts`, which is refused": """
            routed_experts_prompt_start""",
    },
)

KINDS = {"arguments": ARGUMENTS, "variables": VARIABLES, "parameters": PARAMETERS}
