"""Every change LongSpec makes to vLLM, each with its reason; nothing else is patched.

What vLLM offers hooks for goes through them: the general plugin, the model and attention-backend
registries, `ModelState`, the KV-cache spec registry, the Triton kernel registry. Where `patches/`
is applied to vLLM there is a registry of speculative methods too; then nothing is replaced.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, get_args

from vllm_longspec.runtime import hooks
from vllm_longspec.runtime.options import METHOD
from vllm_longspec.runtime.vllm_versions import installed_vllm, minor_of

# Of the patches in patches/.
REGISTRY = "vllm.v1.spec_decode.registry"
# What is replaced, with the parameters it has to have.
REPLACED = {
    "vllm.v1.worker.gpu.spec_decode.init_speculator": ("vllm_config", "device", "req_states"),
    "vllm.engine.arg_utils.EngineArgs.create_speculative_config": (
        "self", "target_model_config", "target_parallel_config",
    ),
    "vllm.engine.arg_utils.EngineArgs.add_cli_args": ("parser",),
    "vllm.sampling_params.SamplingParams._validate_spec_decode": ("self", "speculative_config"),
    "vllm.config.scheduler.SchedulerConfig.get_scheduler_cls": ("self",),
    "vllm.v1.spec_decode.metrics.SpecDecodingProm.__init__": (
        "self", "speculative_config", "labelnames", "per_engine_labelvalues", "is_diffusion",
    ),
}  # fmt: skip
# Methods that our subclasses override or call, and those that only workers need replaced; they
# are checked when a worker builds the proposer; of a vLLM that was not tested, when the plugin
# loads.
OVERRIDDEN = {
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler._verify": (
        "self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping",
        "idx_mapping_np", "expanded_idx_mapping", "expanded_local_pos",
        "seq_lens_upper_bound_np", "verify_draft_sampled",
    ),
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler._get_logprobs_tensors": (
        "self", "sampled", "num_sampled", "logits", "cu_num_logits", "cu_num_logits_np",
        "max_num_logprobs",
    ),
    "vllm.v1.worker.gpu.sample.sampler.Sampler.apply_sampling_params": (
        "self", "logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos",
        "input_ids", "expanded_local_pos", "seq_lens_upper_bound_np", "skip_top_k_top_p",
    ),
    "vllm.v1.worker.gpu.sample.sampler.Sampler.get_logprobs_dims": (
        "self", "idx_mapping_np", "include_token_ids",
    ),
    "vllm.v1.worker.gpu.sample.states.SamplingStates.apply_top_k_top_p": (
        "self", "logits", "expanded_idx_mapping", "idx_mapping_np",
    ),
    "vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager._init_candidates": ("self",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model": (
        "self", "scheduler_output", "intermediate_tensors", "dummy_run", "skip_attn_for_dummy_run",
        "is_profile", "context_len", "valid_dummy_state_slots", "randomize_inputs",
    ),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample_tokens": ("self", "grammar_output"),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner._set_active_loras": (
        "self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler.update_from_output": (
        "self", "scheduler_output", "model_runner_output",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler.make_spec_decoding_stats": (
        "self", "spec_decoding_stats", "num_draft_tokens", "num_accepted_tokens",
        "num_invalid_spec_tokens", "request_id",
    ),
    "vllm.v1.core.sched.scheduler.Scheduler._free_request_blocks": ("self", "request"),
    "vllm.v1.core.sched.scheduler.Scheduler._handle_stopped_request": ("self", "request"),
    "vllm.v1.core.kv_cache_manager.KVCacheManager.cache_blocks": (
        "self", "request", "num_computed_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager.CircularBufferManager._claim_ring_block": (
        "self", "request_id", "record_for_zeroing",
    ),
}  # fmt: skip

_applied = False


def apply(check_all: bool = False) -> None:
    """Idempotent. Raises RuntimeError if a symbol is not what it was in the vLLMs that were tested;
    `check_all`: if one that only workers use is not, too."""
    global _applied
    if _applied:
        return
    if check_all:
        check_parameters(OVERRIDDEN)
    if importlib.util.find_spec(REGISTRY) is not None:
        register_method()
    else:
        check_parameters(REPLACED)
        patch_speculative_config()
        patch_command_line()
        patch_sampling_params()
        if lists_async_methods():
            patch_async_scheduling()
        patch_speculator()
        patch_scheduler()
        patch_prometheus()
    _applied = True


def register_method() -> None:
    registry = importlib.import_module(REGISTRY)
    properties = {"async_scheduling": True} if lists_async_methods() else {}
    registry.register_speculative_method(
        METHOD,
        registry.SpeculativeMethod(
            create_config=hooks.create_config,
            create_speculator=create_speculator,
            add_cli_args=hooks.add_cli_args,
            filter_cudagraphs=hooks.filter_cudagraphs,
            trim=hooks.trim,
            check_sampling_params=hooks.check_sampling_params,
            report_verified=hooks.report_verified,
            scheduler_class=hooks.scheduler_class,
            num_positions=hooks.num_positions,
            **properties,
        ),
    )


def check_parameters(symbols: dict[str, tuple[str, ...]]) -> None:
    for name, expected in symbols.items():
        found = tuple(inspect.signature(resolve(name)).parameters)
        if found != expected:
            raise RuntimeError(f"{name} has parameters {found}, not {expected}")


def resolve(name: str) -> Callable[..., Any]:
    """The object a dotted name stands for: a module's attribute, or one of a class in it."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


def patch_speculative_config() -> None:
    """`EngineArgs.create_speculative_config` makes a SpeculativeConfig, whose `method` is a closed
    Literal. For LongSpec it makes our subclass instead."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_speculative_config

    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        ours = hooks.create_config(self, target_model_config, target_parallel_config)
        if ours is not None:
            return ours
        return original(self, target_model_config, target_parallel_config)

    EngineArgs.create_speculative_config = create_speculative_config


def patch_command_line() -> None:
    """`EngineArgs.add_cli_args` offers the methods of that Literal, and no flag of a plugin's."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        method = parser._option_string_actions["--spec-method"]
        method.choices = [*method.choices, METHOD]
        hooks.add_cli_args(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def patch_sampling_params() -> None:
    """vLLM refuses min_p and logit_bias whenever anything speculates, which LongSpec need not, and
    knows nothing of what a request may ask of LongSpec."""
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._validate_spec_decode

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if getattr(speculative_config, "method", None) == METHOD:
            hooks.check_sampling_params(self)
        else:
            original(self, speculative_config)

    SamplingParams._validate_spec_decode = _validate_spec_decode


def lists_async_methods() -> bool:
    """Whether async scheduling is for listed methods; since 0.33 the V2 runner has it for all."""
    return minor_of(installed_vllm()) < (0, 33)


def patch_async_scheduling() -> None:
    """`VllmConfig` allows async scheduling only for the methods of a few Literals. LongSpec drafts
    on the device, like n-gram on a GPU, and joins that one."""
    import vllm.config.vllm as vllm_config

    if METHOD not in get_args(vllm_config.NgramGPUTypes):
        vllm_config.NgramGPUTypes = Literal["ngram_gpu", METHOD]


def patch_speculator() -> None:
    """`init_speculator` knows a closed list of methods. The model runner imports it by name, so it
    is replaced in its own module, before, and in the model runner's if that is already loaded."""
    import vllm.v1.worker.gpu.spec_decode as spec_decode

    original = spec_decode.init_speculator

    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if vllm_config.speculative_config.method != METHOD:
            return original(vllm_config, device, req_states)
        speculator = create_speculator(vllm_config, device, req_states)
        patch_graph_candidates()
        patch_execute_model()
        patch_sample_tokens()
        if vllm_config.lora_config is not None:
            patch_active_loras()
        return speculator

    spec_decode.init_speculator = init_speculator
    model_runner = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if model_runner is not None:
        model_runner.init_speculator = init_speculator  # type: ignore[attr-defined]


def create_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
    check_parameters(OVERRIDDEN)
    return hooks.create_speculator(vllm_config, device, req_states)


def replace_once(owner: type, name: str, replacement: Callable[[Any], Callable[..., Any]]) -> None:
    """`replacement` of a method in its place, in a process whose engine is not the first one
    either."""
    original = getattr(owner, name)
    if getattr(original, "by_longspec", False):
        return
    # With its signature, which `check_parameters` reads again for the process's next engine.
    replaced: Any = functools.wraps(original)(replacement(original))
    replaced.by_longspec = True
    setattr(owner, name, replaced)


def speculates(runner: Any) -> bool:
    return getattr(runner.speculator, "method", None) == METHOD


def patch_graph_candidates() -> None:
    """`ModelCudaGraphManager` lists which graphs to capture in its constructor and asks nobody.
    Nothing passes the manager on before it is used, so that its method is replaced, by workers
    that have a LongSpec proposer."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    def replacement(original: Any) -> Callable[..., Any]:
        def _init_candidates(self: Any) -> None:
            original(self)
            hooks.filter_cudagraphs(self)

        return _init_candidates

    replace_once(ModelCudaGraphManager, "_init_candidates", replacement)


def patch_execute_model() -> None:
    """A worker verifies what was scheduled; vLLM trims that for chains only, by confidences of
    their tokens (`AdaptiveVerificationManager`). `execute_model` is where the scheduler's output
    arrives, replaced by workers that have a LongSpec proposer."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def replacement(original: Any) -> Callable[..., Any]:
        def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if speculates(self):
                scheduler_output = hooks.trim(scheduler_output, self)
            return original(self, scheduler_output, *args, **kwargs)

        return execute_model

    replace_once(GPUModelRunner, "execute_model", replacement)


def patch_sample_tokens() -> None:
    """A scheduler counts what it scheduled as drafted; nothing that a worker returns says what it
    verified of that. `sample_tokens` is where its output for the scheduler leaves, replaced by
    workers that have a LongSpec proposer."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def replacement(original: Any) -> Callable[..., Any]:
        def sample_tokens(self: Any, grammar_output: Any) -> Any:
            output = original(self, grammar_output)
            if speculates(self):
                hooks.report_verified(output, self)
            return output

        return sample_tokens

    replace_once(GPUModelRunner, "sample_tokens", replacement)


def patch_active_loras() -> None:
    """`GPUModelRunner` gives a head's adapters one row of logits a request, and a verification has
    one for each node (vLLM's own speculation has several, too). `_set_active_loras` is where it
    says which adapter a row has, replaced by workers that have a LongSpec proposer."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def replacement(original: Any) -> Callable[..., Any]:
        def _set_active_loras(self: Any, loras: Any, *args: Any, **kwargs: Any) -> None:
            if speculates(self):
                loras = hooks.loras_of_rows(loras, self)
            original(self, loras, *args, **kwargs)

        return _set_active_loras

    replace_once(GPUModelRunner, "_set_active_loras", replacement)


def patch_scheduler() -> None:
    """An engine asks `SchedulerConfig.get_scheduler_cls` for its scheduler's class, whatever method
    it has. What it gets makes LongSpec's of that where the method is LongSpec."""
    from vllm.config.scheduler import SchedulerConfig

    original = SchedulerConfig.get_scheduler_cls

    def get_scheduler_cls(self: Any) -> Any:
        base = original(self)
        if not isinstance(base, type):  # what a user's function makes is left alone
            return base

        class Chosen(base):  # type: ignore[misc, valid-type]
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                if cls is not Chosen:
                    return super().__new__(cls)
                config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
                ours = getattr(config.speculative_config, "method", None) == METHOD
                return (hooks.scheduler_class(base) if ours else base)(*args, **kwargs)

        Chosen.__name__, Chosen.__qualname__ = base.__name__, base.__qualname__
        Chosen.__module__, Chosen.__doc__ = base.__module__, base.__doc__
        return Chosen

    SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def patch_prometheus() -> None:
    """`SpecDecodingProm` makes a counter for each draft token that is scheduled."""
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    original = SpecDecodingProm.__init__

    @functools.wraps(original)
    def init(self: Any, speculative_config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(speculative_config, "method", None) == METHOD:
            positions = hooks.num_positions(speculative_config)
            speculative_config = SimpleNamespace(num_speculative_tokens=positions)
        original(self, speculative_config, *args, **kwargs)

    SpecDecodingProm.__init__ = init
