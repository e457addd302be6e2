"""Loading: idempotent, silent without LongSpec, aside on another vLLM."""

import subprocess
import sys

import pytest

from vllm_longspec import plugin

COMMON = "import logging; logging.basicConfig(); from vllm_longspec import plugin\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """In a fresh interpreter: the plugin changes vLLM for good."""
    return subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=300
    )


def test_another_version_stands_aside() -> None:
    done = run(
        "plugin.installed_vllm_version = lambda: '0.33.1'\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        "before = vars(EngineArgs).copy()\n"
        "plugin.register()\n"
        "assert vars(EngineArgs).copy() == before\n"
        "import sys; assert 'vllm_longspec.runtime.patches' not in sys.modules\n"
    )
    assert done.returncode == 0, done.stderr
    assert "works with vLLM 0.32.0 and stands aside: this is vLLM 0.33.1" in done.stderr


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


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_longspec.config import LongSpecError

    plugin.report_mistake(LongSpecError, LongSpecError("tree_shape: is empty"), None)
    assert capsys.readouterr().err == "vllm-longspec: tree_shape: is empty\n"
