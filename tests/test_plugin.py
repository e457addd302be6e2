"""Loading: idempotent, silent without LongSpec, aside on another vLLM."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_longspec import plugin
from vllm_longspec.runtime.vllm_versions import installed_vllm, is_tested

COMMON = "import logging; logging.basicConfig(); from vllm_longspec import plugin\n"
ANOTHER = """\
import vllm_longspec
vllm_longspec.VLLM_VERSIONS, vllm_longspec.SUPPORTED_VLLM = ("0.30", "0.31"), "0.30 or 0.31"
"""


def run(code: str, before: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter: the plugin changes vLLM for good, and Triton keeps its switch to the
    interpreter in the environment."""
    return subprocess.run(
        [sys.executable, "-c", before + COMMON + code], capture_output=True, text=True,
        timeout=300,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables,
    )  # fmt: skip


def test_another_version_stands_aside() -> None:
    done = run(
        "plugin.installed_vllm = lambda: '0.34.1'\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "before = vars(EngineArgs).copy()\n"
        "plugin.register()\n"
        "assert vars(EngineArgs).copy() == before\n"
        "import sys; assert 'vllm_longspec.runtime.patches' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr
    assert "works with vLLM 0.32 or 0.33 and stands aside: this is vLLM 0.34.1" in done.stderr


@pytest.mark.parametrize(
    "version, tested",
    [("0.32.0", True), ("0.33.2+cpu", True), ("0.33.1rc1", True), ("0.31.9", False),
     ("0.34.0", False), ("1.33.0", False), ("0.3.30", False), ("dev", False), (None, False)],
)  # fmt: skip
def test_tested_versions(version: str | None, tested: bool) -> None:
    assert is_tested(version) == tested


LOAD_ANY_VERSION = """
from vllm.engine.arg_utils import EngineArgs
before = EngineArgs.create_speculative_config
plugin.register()
import sys; sys.exit(EngineArgs.create_speculative_config is before)
"""


def test_any_version_loads_where_all_that_is_needed_is_there() -> None:
    done = run(LOAD_ANY_VERSION, before=ANOTHER, VLLM_LONGSPEC_ANY_VERSION="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"this is vLLM {installed_vllm()}: what LongSpec needs is as it was" in done.stderr


def test_any_version_stands_aside_where_what_workers_use_differs() -> None:
    change = (
        "from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler\n"
        "RejectionSampler._verify = lambda self, logits: None"
    )
    done = run(change + LOAD_ANY_VERSION, before=ANOTHER, VLLM_LONGSPEC_ANY_VERSION="1")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "stands aside, this vLLM was changed" in done.stderr and "._verify has" in done.stderr


PLAIN_ANSWER = """
import os; os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM("examples/models/nano-target", dtype="float32", max_model_len=256, enforce_eager=True,
          kv_cache_memory_bytes=1 << 26)
params = SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=1)
(answer,) = llm.generate(["import os"], params)
assert len(answer.outputs[0].token_ids) == 8
from triton import knobs; assert not knobs.runtime.interpret
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM in float32 on a CPU")
def test_plain_vllm_works_beside_a_plugin_for_another_version() -> None:
    """Through to tokens: on a CPU, Triton's interpreter must stand aside too."""
    done = run(PLAIN_ANSWER, before=ANOTHER)
    assert done.returncode == 0, done.stderr[-3000:]
    said = f"works with vLLM 0.30 or 0.31 and stands aside: this is vLLM {installed_vllm()}"
    assert said in done.stderr + done.stdout


def test_a_triton_backend_for_a_plugin_that_is_not_loaded_hides() -> None:
    """`VLLM_PLUGINS` names the plugins to load."""
    check = "from triton.backends import backends; print(sorted(backends))"
    found = [
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True,
                       env=os.environ | {"VLLM_PLUGINS": names}).stdout
        for names in ("other", "other,longspec")
    ]  # fmt: skip
    assert ("cpu" in found[0], "cpu" in found[1]) == (torch.cuda.is_available(), True)


def test_a_changed_symbol_stands_aside() -> None:
    done = run(
        "from vllm.engine.arg_utils import EngineArgs\n"
        "EngineArgs.create_speculative_config = lambda self, other: None\n"
        "before = EngineArgs.add_cli_args\n"
        "plugin.register()\n"
        "assert EngineArgs.add_cli_args is before\n"
    )
    assert done.returncode == 0, done.stderr
    assert "stands aside" in done.stderr and "create_speculative_config" in done.stderr


def test_registering_twice_changes_nothing_more() -> None:
    done = run(
        "import sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "plugin.register()\n"
        "state = EngineArgs.create_speculative_config, EngineArgs.add_cli_args, sys.excepthook\n"
        "plugin.register()\n"
        "assert state == (\n"
        "    EngineArgs.create_speculative_config, EngineArgs.add_cli_args, sys.excepthook)\n"
    )
    assert done.returncode == 0, done.stderr


def test_without_longspec_vllm_makes_its_own_config() -> None:
    done = run(
        "plugin.register()\n"
        "from vllm.config import SpeculativeConfig\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "args = EngineArgs(model='examples/models/nano-target')\n"
        "assert args.create_engine_config().speculative_config is None\n"
        "args.speculative_config = {'method': 'ngram', 'num_speculative_tokens': 3}\n"
        "config = args.create_engine_config()\n"
        "assert type(config.speculative_config) is SpeculativeConfig\n"
        "assert not config.scheduler_config.async_scheduling\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_a_request_asks_of_longspec_is_checked_with_longspec_only() -> None:
    done = run(
        "plugin.register()\n"
        "from types import SimpleNamespace\n"
        "from vllm.exceptions import VLLMValidationError\n"
        "from vllm.sampling_params import SamplingParams\n"
        "from vllm_longspec.runtime.request_switch import is_off\n"
        "ours = SimpleNamespace(method='longspec')\n"
        "def ask(config, **given):\n"
        "    params = SamplingParams(**given)\n"
        "    params._validate_spec_decode(config)\n"
        "    return is_off(params)\n"
        "assert [ask(ours), ask(ours, extra_args={'other': 1})] == [False] * 2\n"
        "assert not ask(ours, extra_args={'longspec': 'on'}, min_p=0.1)\n"
        "assert ask(ours, extra_args={'longspec': 'off'})\n"
        "wrong = 'of', 'OFF', '', 0, 1.5, True, None, ['off'], {}, 'x' * 9999\n"
        "for value in wrong:\n"
        "    for other in None, SimpleNamespace(method='ngram'):\n"
        "        ask(other, extra_args={'longspec': value})\n"
        "    try: ask(ours, extra_args={'longspec': value})\n"
        "    except VLLMValidationError as error: said = str(error)\n"
        "    else: raise AssertionError(value)\n"
        '    assert \'longspec has to be "on" or "off", not \' in said and len(said) < 300\n'
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_longspec.errors import LongSpecError

    plugin.report_mistake(LongSpecError, LongSpecError("tree_shape: is empty"), None)
    assert capsys.readouterr().err == "vllm-longspec: tree_shape: is empty\n"


def test_a_mistake_that_pydantic_wrapped_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from pydantic import TypeAdapter, ValidationError
    from pydantic.dataclasses import dataclass

    from vllm_longspec.errors import LongSpecError

    @dataclass
    class Config:
        model: str

        def __post_init__(self) -> None:
            raise LongSpecError(f"model: {self.model} is a draft")

    with pytest.raises(ValidationError) as raised:
        Config("x")
    plugin.report_mistake(ValidationError, raised.value, None)
    assert capsys.readouterr().err == "vllm-longspec: model: x is a draft\n"
    with pytest.raises(ValidationError) as other:
        TypeAdapter(int).validate_python("x")
    plugin.report_mistake(ValidationError, other.value, None)
    assert "validation error" in capsys.readouterr().err
