"""What test_patches.py runs in a process that finds the patched vLLM first."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

from helpers import DRAFT, TARGET


def nothing_is_replaced() -> None:
    """Loading the plugin changes no attribute of a vLLM module, nor of a class that it replaces
    methods of elsewhere."""
    import vllm.config.vllm
    import vllm.v1.worker.gpu.model_runner  # noqa: F401
    from vllm.config import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.spec_decode.metrics import SpecDecodingProm
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    loaded = [module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"]
    owners = [
        *loaded, EngineArgs, SamplingParams, SchedulerConfig, SpecDecodingProm, GPUModelRunner,
        CudaGraphManager, ModelCudaGraphManager,
    ]  # fmt: skip

    def contents() -> Iterator[tuple[str, Any]]:
        for owner in owners:
            for name, value in list(vars(owner).items()):
                if callable(value) or isinstance(value, staticmethod) or name.endswith("Types"):
                    yield f"{owner.__name__}.{name}", value

    from vllm_longspec import plugin

    plugin.register_interpreted_kernels()  # through vLLM's own dispatcher, on a CPU
    before = dict(contents())
    assert len(before) > 1000 and "vllm.config.vllm.NgramGPUTypes" in before
    plugin.register()
    changed = [name for name, value in contents() if before.get(name) is not value]
    assert not changed, changed


def vllm_asks_the_registry() -> None:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu import cudagraph_utils as graphs
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.spec_decode import init_speculator

    from vllm_longspec import plugin
    from vllm_longspec.runtime import hooks

    plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--speculative-model", str(DRAFT), "--spec-tokens", "7", "--async-scheduling"]
    args = EngineArgs.from_cli_args(parser.parse_args(["--model", str(TARGET), *flags]))
    config = args.create_engine_config()
    ours: Any = config.speculative_config
    assert type(ours).__name__ == "LongSpecSpeculativeConfig", ours
    assert (ours.method, ours.num_speculative_tokens) == ("longspec", 7), ours
    assert parser.parse_args(["--spec-method", "longspec"]).spec_method == "longspec"
    chain = {"method": "ngram", "num_speculative_tokens": 3}
    args = EngineArgs(str(TARGET), speculative_config=chain)
    ngram = args.create_engine_config().speculative_config
    assert type(ngram).__name__ == "SpeculativeConfig", ngram

    params = SamplingParams(min_p=0.1, logit_bias={5: 1.0})
    params._validate_spec_decode(ours)
    try:
        params._validate_spec_decode(ngram)
    except VLLMValidationError:
        pass
    else:
        raise AssertionError("vLLM's own methods have to refuse min_p still")
    asking = SamplingParams(min_p=0.1, extra_args={"longspec": "fast"})
    try:
        asking._validate_spec_decode(ours)
    except VLLMValidationError as error:
        assert "longspec" in str(error), error
    else:
        raise AssertionError("what LongSpec refuses of a request was not asked")

    hooks.create_speculator = lambda *given: given
    assert init_speculator(config, "device", "states") == (config, "device", "states")

    def list_all(self: Any, vllm_config: Any, *rest: Any, **more: Any) -> None:
        full = CUDAGraphMode.FULL
        self.vllm_config, self.max_num_reqs, self._candidates = vllm_config, 4, {}
        self.cudagraph_mode, sizes = CUDAGraphMode.FULL_DECODE_ONLY, [1, 2, 4, 8, 16, 32]
        self.compilation_config = SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=32
        )
        self.lora_capture_cases = [0]
        self._capture_descs = {
            full: [graphs.BatchExecutionDescriptor(full, 4 * rows, 4, rows) for rows in (8, 2)]
        }

    graphs.CudaGraphManager.__init__ = list_all
    for speculative, left in ((ours, {8, 1}), (ngram, {8, 2}), (None, {8, 2})):
        vllm_config = SimpleNamespace(speculative_config=speculative, num_speculative_tokens=7)
        manager = graphs.ModelCudaGraphManager(vllm_config, None, CUDAGraphMode.FULL, 8)
        descs = manager._capture_descs[CUDAGraphMode.FULL]
        assert {desc.uniform_token_count for desc in descs} == left, speculative

    def verify(slots: Any) -> int:
        raise LookupError(slots)

    runner: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(speculative_config=ours),
        speculator=SimpleNamespace(nodes_to_verify=verify),
        req_states=SimpleNamespace(req_id_to_index={"a": 3}),
    )
    scheduled = SchedulerOutput.make_empty()
    scheduled.scheduled_spec_decode_tokens = {"a": [-1]}
    try:
        inspect.unwrap(GPUModelRunner.execute_model)(runner, scheduled)
    except LookupError as error:
        assert "3" in str(error), error
    else:
        raise AssertionError("LongSpec was not asked how much to verify")
    vllm_asks_how_to_count(ours, ngram)


def vllm_asks_how_to_count(ours: Any, ngram: Any) -> None:
    from vllm.v1.engine import core
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics
    from vllm.v1.spec_decode import metrics, registry  # type: ignore[attr-defined]
    from vllm.v1.worker.gpu import model_runner

    asked: list[Any] = []

    def scheduler_class(base: Any) -> Any:
        raise LookupError(base)

    method = registry.get_speculative_method(ours)
    asking = replace(
        method,
        report_verified=lambda *given: asked.append(given),
        scheduler_class=scheduler_class,
        num_positions=lambda config: 5,
    )
    registry.register_speculative_method("longspec", asking)
    for config, positions in ((ours, 5), (ngram, 3)):
        unregister_vllm_metrics()
        prom = metrics.SpecDecodingProm(config, ["engine"], {0: ["0"]})
        assert len(prom.counter_spec_decode_num_accepted_tokens_per_pos[0]) == positions

    given = MagicMock()
    given.speculative_config = ours
    given.scheduler_config.get_scheduler_cls.return_value = "a scheduler"
    stubs = ("measure_encoder_output_widths", "StructuredOutputManager")
    with patch.multiple(core, **{name: MagicMock() for name in stubs}):
        try:
            core.EngineCore.__init__(MagicMock(), given, MagicMock(), True)
        except LookupError as error:
            assert error.args == ("a scheduler",), error
        else:
            raise AssertionError("LongSpec was not asked for the scheduler's class")

    runner = MagicMock(pcp_manager=None, speculator=None, num_speculative_steps=0)
    runner.vllm_config.speculative_config = ours
    runner.sample.return_value = [MagicMock()] * 3
    with patch.object(model_runner, "AsyncOutput"):
        output = inspect.unwrap(model_runner.GPUModelRunner.sample_tokens)(runner, None)
    assert asked == [(output, runner)]


def outputs_are_plain_decodings() -> None:
    from helpers import Engine, assert_same, longspec, text_prompt
    from vllm import SamplingParams

    prompts = [text_prompt(0, 200), text_prompt(1, 60)]
    params = [SamplingParams(max_tokens=40, temperature=t, seed=3) for t in (0, 0.8)]
    outputs = []
    for speculation in (None, longspec()):
        engine = Engine(speculation)
        outputs.append(engine.generate(prompts, params))
        accepted = engine.counters().get("accepted_tokens", 0)
        engine.close()
    assert accepted > 20
    assert_same(*outputs, prompts)


CHECKS = (nothing_is_replaced, vllm_asks_the_registry, outputs_are_plain_decodings)

if __name__ == "__main__":
    importlib.import_module("vllm.v1.spec_decode.registry")  # of the patch
    {check.__name__: check for check in CHECKS}[sys.argv[1]]()
