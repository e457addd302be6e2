"""Triton backend ``cpu``: kernels run in Triton's own interpreter where there is no GPU.

Triton finds it through the entry-point group ``triton.backends``; vLLM asks for a backend of this
name on a CPU. A real triton-cpu uses the same name: where one is installed, its classes are used.
"""

from importlib.util import find_spec

HAS_REAL_TRITON_CPU = find_spec("triton.backends.cpu") is not None
