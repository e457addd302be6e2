"""Triton backend ``cpu``: kernels run in Triton's own interpreter where there is no GPU.

Triton finds it through the entry-point group ``triton.backends``; vLLM asks for a backend of this
name on a CPU. A real triton-cpu uses the same name: where one is installed, its classes are used.
"""

from importlib.util import find_spec
from pathlib import Path

_triton = find_spec("triton")
# Triton imports this module while it is being imported itself, so look at files only.
HAS_REAL_TRITON_CPU = _triton is not None and any(
    Path(folder, "backends", "cpu").is_dir()
    for folder in _triton.submodule_search_locations or ()
)
