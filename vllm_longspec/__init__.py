"""LongSpec for vLLM: lossless tree speculation for long contexts."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _version() -> str:
    """As installed. A source tree may have moved on since, or never have been installed: of it
    only the release that it comes after or leads to is said."""
    try:
        installed = version("vllm-longspec")
    except PackageNotFoundError:
        installed = "0"
    in_tree = (Path(__file__).parents[1] / "pyproject.toml").exists()
    return f"{release(installed)}+source" if in_tree else installed


def release(of: str) -> str:
    """Without what changes from commit to commit."""
    return re.split(r"\.dev|\+", of)[0]


__version__ = _version()
VLLM_VERSIONS = ("0.32", "0.33")  # minors, the newest last
SUPPORTED_VLLM = " or ".join(VLLM_VERSIONS)  # for messages
