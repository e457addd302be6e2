import torch
from triton import knobs
from triton.backends.driver import DriverBase

from vllm_longspec.runtime.triton_cpu import HAS_REAL_TRITON_CPU

if HAS_REAL_TRITON_CPU:
    from triton.backends.cpu.driver import CPUDriver  # noqa: F401
else:
    if not torch.cuda.is_available():
        knobs.runtime.interpret = True

    class InterpreterDriver(DriverBase):
        """Active where there is no GPU, so that vLLM sees exactly one Triton driver."""

        @classmethod
        def is_active(cls) -> bool:
            return not torch.cuda.is_available()

    # Triton takes only classes without abstract methods; interpreted kernels never call the others.
    InterpreterDriver.__abstractmethods__ = frozenset()
