"""The check of another vLLM by its source: it fits what fits, and names each kind of damage."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import check_vllm
import pytest
import vllm_releases
from check_vllm import check, installed
from helpers import ROOT
from vllm_releases import UnreachableError, newest, unpacked

from vllm_longspec import VLLM_VERSIONS
from vllm_longspec.runtime.vllm_versions import installed_vllm, is_tested


def test_the_installed_vllm_fits() -> None:
    root = installed()
    assert root is not None and check(root).problems == []


GONE = "is gone"
# File in vllm/, what to replace there and by what (None: the file goes), what has to be said.
DAMAGE: dict[str, tuple[str, str, str | None, list[str]]] = {
    "a module": (
        "v1/spec_decode/dynamic/utils.py", "", None,
        [f"options.py:\\d+: vllm.v1.spec_decode.dynamic.utils.validate_\\w+ {GONE}"],
    ),
    "a name": (
        "utils/math_utils.py", r"def next_power_of_2\(", "def power_of_2(",
        [f"graphs.py:\\d+: vllm.utils.math_utils.next_power_of_2 {GONE}"],
    ),
    "an attribute of a module": (
        "envs.py", r"VLLM_KV_CACHE_LAYOUT\b", "VLLM_LAYOUT",
        [f"supported.py:\\d+: vllm.envs.VLLM_KV_CACHE_LAYOUT {GONE}",
         "VLLM_LAYOUT, of vLLM's variables, is not in runtime/switches.py"],
    ),
    "a parameter of what is called through an object": (
        "v1/worker/gpu/sample/states.py", r"def apply_top_k_top_p\(\n        self,",
        "def apply_top_k_top_p(\n        self,\n        rows: int,",
        [r"SamplingStates.apply_top_k_top_p has parameters self, rows, logits",
         r"sampler.py:\d+: states.apply_top_k_top_p needs idx_mapping_np"],
    ),
    "an attribute of a class": (
        "config/compilation.py", r"\n    FULL =", "\n    WHOLE =",
        [f"\\w+.py:\\d+: CUDAGraphMode.FULL {GONE}"],
    ),
    "a parameter of what is replaced": (
        "sampling_params.py", r"def _validate_spec_decode\(\s*self,", "def _validate_spec_decode(",
        ["SamplingParams._validate_spec_decode has parameters speculative_config, not self"],
    ),
    "what a worker overrides": (
        "v1/core/single_type_kv_cache_manager.py", "def _claim_ring_block", "def _claim_block",
        [f"CircularBufferManager._claim_ring_block {GONE}"],
    ),
    "another parameter of an override": (
        "v1/worker/gpu/model_states/default.py", r"def prepare_inputs\(\s*self,",
        "def prepare_inputs(self, layout,",
        ["DefaultModelState.prepare_inputs gets layout too"],
    ),
    "an optional parameter that is passed now": (
        "v1/worker/gpu/model_runner.py", r"\Z",
        "\nstate.prepare_attn(model_specific_attn_metadata=None)\n",
        ["DefaultModelState.prepare_attn gets model_specific_attn_metadata too"],
    ),
    "a hook": (
        "v1/worker/gpu/model_states/interface.py", "def preprocess_state", "def before_forward",
        ["DefaultModelState.preprocess_state is gone, nobody calls the override"],
    ),
    "a keyword of a function": (
        "v1/worker/gpu/sample/gumbel.py", r"is_drafting: bool", "drafts: bool",
        ["sampler.py:\\d+: gumbel_sample has no parameter is_drafting",
         "sampler.py:\\d+: gumbel_sample needs drafts"],
    ),
    "a field of a config": (
        "config/model.py", r"\n    spec_target_max_model_len:", "\n    target_max_model_len:",
        ["options.py:\\d+: ModelConfig has no parameter spec_target_max_model_len"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a vLLM with all the damage."""
    root, copy = installed(), tmp_path_factory.mktemp("damaged")
    assert root is not None
    shutil.copytree(
        root / "vllm", copy / "vllm", copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__", "*.json", "*.so"),
    )  # fmt: skip
    for name, (path, before, after, _) in DAMAGE.items():
        file = copy / "vllm" / path
        text = file.read_text()
        file.unlink()
        if after is not None:
            damaged, count = re.subn(before, after, text)
            assert count > 0, f"{name}: {path} has no {before}"
            file.write_text(damaged)
    return check(copy, root).problems


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, problems: list[str]) -> None:
    for said in DAMAGE[name][3]:
        assert any(re.search(said, problem) for problem in problems), "\n".join(problems)


def test_nothing_else_is_named(problems: list[str]) -> None:
    expected = "|".join(said for *_, named in DAMAGE.values() for said in named)
    assert [problem for problem in problems if not re.search(expected, problem)] == []


@pytest.mark.parametrize("minor", [*VLLM_VERSIONS, None], ids=lambda minor: minor or "newest")
def test_releases(minor: str | None) -> None:
    """On the registry: the newest of each supported minor has to fit. Of the newest of all, if it
    is not supported yet, the summary names what does not."""
    try:
        version = str(newest("vllm", minor))
        is_here = (installed_vllm() or "").split("+")[0] == version
        root = installed() if is_here else unpacked("vllm", version)
    except UnreachableError as error:
        pytest.skip(f"vLLM's {minor or 'newest'} release was not checked: {error}")
    assert root is not None
    said = check(root, installed()).problems
    print(f"vLLM {version}:", said or "fits")
    if said and not is_tested(version):
        pytest.xfail(f"vLLM {version} does not fit: {'; '.join(said)}")
    assert said == []


def test_an_unreachable_registry_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_vllm.py", "--newest"])
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert check_vllm.main() == 3
    assert "the newest vLLM was not checked: pip index: " in capsys.readouterr().out


def test_releases_by_minor(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "vllm (0.34.0)\nAvailable versions: 0.34.0, 0.33.10, 0.33.9, 0.3.3\n"
    monkeypatch.setattr(vllm_releases, "pip", lambda *arguments: listed)
    asked = (None, "0.33", "0.3", "0.32")
    assert [newest("vllm", minor) for minor in asked] == ["0.34.0", "0.33.10", "0.3.3", None]


def test_the_check_imports_no_vllm() -> None:
    """It runs on any machine, for any vLLM."""
    assert importlib.util.find_spec("vllm") is not None
    code = "import check_vllm as c, sys; c.check(c.installed()); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", check=True, timeout=300)
