"""The entry point `vllm.general_plugins`: vLLM calls `register` in every process."""

import logging
import sys
from types import TracebackType

from pydantic import ValidationError

from vllm_longspec import SUPPORTED_VLLM
from vllm_longspec.errors import LongSpecError
from vllm_longspec.runtime.vllm_versions import (
    ANY_VERSION,
    installed_vllm,
    is_served,
    is_tested,
)

logger = logging.getLogger("vllm.longspec")


def register() -> None:
    """Make `method="longspec"` known to vLLM; without it, vLLM behaves as it does alone.

    On another vLLM version, say so and change nothing.
    """
    version = installed_vllm()
    tested = is_tested(version)
    if not is_served(version):
        logger.warning(
            "vllm-longspec works with vLLM %s and stands aside: this is vLLM %s. "
            "--speculative-model is not available. With %s=1 it is, if all that LongSpec needs of "
            "vLLM is as it was.",
            SUPPORTED_VLLM,
            version or "unknown",
            ANY_VERSION,
        )
        return
    try:
        register_interpreted_kernels()
        from vllm_longspec.runtime import patches
        from vllm_longspec.runtime.roles import register_stand_ins

        patches.apply(check_all=not tested)
        register_stand_ins()
    except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
        logger.warning("vllm-longspec stands aside, this vLLM was changed: %s", error)
        return
    if not tested:
        logger.warning(
            "vllm-longspec was tested with vLLM %s, this is vLLM %s: what LongSpec needs is as it "
            "was, but whether outputs equal plain decoding's was not tested.",
            SUPPORTED_VLLM,
            version,
        )
    if sys.excepthook is not report_mistake:
        global _previous_excepthook
        _previous_excepthook = sys.excepthook
        sys.excepthook = report_mistake


def register_interpreted_kernels() -> None:
    from triton import knobs

    if knobs.runtime.interpret:
        from vllm_longspec.runtime.triton_cpu.interpreter import lighten_interpreter
        from vllm_longspec.runtime.triton_cpu.kernels import register_cpu_kernels

        lighten_interpreter()
        register_cpu_kernels()


def mistake_in(error: BaseException) -> LongSpecError | None:
    """The error itself, or the one that pydantic wrapped while it made one of vLLM's configs."""
    if isinstance(error, LongSpecError):
        return error
    found = error.errors() if isinstance(error, ValidationError) else []
    causes = [one.get("ctx", {}).get("error") for one in found]
    return next((cause for cause in causes if isinstance(cause, LongSpecError)), None)


_previous_excepthook = sys.__excepthook__


def report_mistake(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """An uncaught LongSpecError is a user's mistake: its sentence, without a traceback."""
    mistake = mistake_in(error)
    if mistake is not None:
        print(f"vllm-longspec: {mistake}", file=sys.stderr)
    else:
        _previous_excepthook(kind, error, trace)
