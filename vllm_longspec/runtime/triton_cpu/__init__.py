"""Triton backend ``cpu``: kernels run in Triton's own interpreter under vLLM's CPU build.

Triton finds it through the entry-point group ``triton.backends``; vLLM asks for a backend of this
name on a CPU. A real triton-cpu uses the same name: where one is installed, its classes are used.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_longspec.runtime.vllm_versions import installed_vllm, is_served

_triton = find_spec("triton")
# Triton imports this module while it is being imported itself, so look at files only.
HAS_REAL_TRITON_CPU = _triton is not None and any(
    Path(folder, "backends", "cpu").is_dir() for folder in _triton.submodule_search_locations or ()
)


def is_cpu_build() -> bool:
    return "cpu" in (installed_vllm() or "")


def serves_this_vllm() -> bool:
    """Not another version's CPU build, nor one that is told to load other plugins only: without
    the plugin's stand-ins, not every kernel of vLLM runs in the interpreter."""
    allowed = os.environ.get("VLLM_PLUGINS")
    loaded = allowed is None or "longspec" in allowed.split(",")
    return loaded and is_served(installed_vllm())


class _WithoutCpu(ModuleType):
    """`triton.backends` as it is without this package."""

    @property
    def backends(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self)["backends"].items() if name != "cpu"}


if _triton and is_cpu_build() and not serves_this_vllm() and not HAS_REAL_TRITON_CPU:
    # vLLM goes by the name alone, and Triton has no way for a backend to decline.
    import_module("triton.backends").__class__ = _WithoutCpu
