"""The patch for vLLM: it applies to the vLLM that is installed, and with it LongSpec replaces
nothing in vLLM."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

PATCH = ROOT / "patches/0001-plugins-add-speculative-methods.patch"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `vllm` is the installed one, file by file a link, with the patch applied."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(installed, folder / "vllm", copy_function=os.symlink)
    for path in re.findall(r"^--- a/(\S+)", PATCH.read_text(), re.MULTILINE):
        copy = folder / path
        if copy.is_symlink():
            source = copy.resolve()
            copy.unlink()
            shutil.copy(source, copy)
    done = subprocess.run(["git", "apply", str(PATCH)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def check(name: str, patched: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tests/patched_vllm.py", name], capture_output=True, text=True,
        cwd=ROOT, timeout=600, env=os.environ | {"PYTHONPATH": str(patched)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["nothing_is_replaced", "vllm_asks_the_registry"])
def test_with_the_patch(name: str, patched: Path) -> None:
    check(name, patched)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 equality is for CPUs")
def test_a_patched_vllm_generates_what_plain_vllm_does(patched: Path) -> None:
    check("outputs_are_plain_decodings", patched)
