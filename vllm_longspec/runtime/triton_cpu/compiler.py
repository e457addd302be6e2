from triton.backends.compiler import BaseBackend, GPUTarget

from vllm_longspec.runtime.triton_cpu import HAS_REAL_TRITON_CPU

if HAS_REAL_TRITON_CPU:
    from triton.backends.cpu.compiler import CPUBackend  # noqa: F401
else:

    class InterpreterBackend(BaseBackend):
        """Never compiles: `driver.py` switches Triton to its interpreter."""

        @staticmethod
        def supports_target(target: GPUTarget) -> bool:
            return False

    # Triton takes only classes without abstract methods; interpreted kernels never call them.
    InterpreterBackend.__abstractmethods__ = frozenset()
