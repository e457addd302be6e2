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

from vllm_longspec import VLLM_VERSIONS
from vllm_longspec.runtime.vllm_versions import installed_vllm, minor_of


def patch_for(minor: tuple[int, int]) -> Path:
    return ROOT / "patches/vllm-{}.{}-speculative-methods.patch".format(*minor)


PATCH = patch_for(minor_of(installed_vllm()))


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


def test_each_version_has_a_patch() -> None:
    files = {patch_for(minor_of(version)) for version in VLLM_VERSIONS}
    assert files == set((ROOT / "patches").glob("*.patch"))


def check(name: str, patched: Path) -> None:
    path = os.pathsep.join([str(patched), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "tests/patched_vllm.py", name], capture_output=True, text=True,
        cwd=ROOT, timeout=600, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["nothing_is_replaced", "vllm_asks_the_registry"])
def test_with_the_patch(name: str, patched: Path) -> None:
    check(name, patched)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 equality is for CPUs")
def test_a_patched_vllm_generates_what_plain_vllm_does(patched: Path) -> None:
    check("outputs_are_plain_decodings", patched)
