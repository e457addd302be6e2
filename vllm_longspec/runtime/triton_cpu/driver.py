from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from vllm_longspec.runtime.triton_cpu import (
    HAS_REAL_TRITON_CPU,
    is_cpu_build,
    serves_this_vllm,
)

if HAS_REAL_TRITON_CPU:
    from triton.backends.cpu.driver import CPUDriver  # noqa: F401
else:
    if is_cpu_build() and serves_this_vllm():
        knobs.runtime.interpret = True

    class InterpreterDriver(DriverBase):
        """Active under vLLM's CPU build, so that vLLM sees exactly one Triton driver."""

        @classmethod
        def is_active(cls) -> bool:
            return is_cpu_build() and serves_this_vllm()

        def get_current_target(self) -> GPUTarget:
            """One that no backend compiles for: torch's inductor asks, and uses C++ then."""
            return GPUTarget("cpu", 0, 0)

    # Triton takes only classes without abstract methods; interpreted kernels never call the others.
    InterpreterDriver.__abstractmethods__ = frozenset()
