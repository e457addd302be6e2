import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

if torch.cuda.is_available():
    # Asking made CUDA unusable in forked processes; engines then have to be spawned.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

# Two engines run at once (Makefile). By default each would take a thread a core, pinned to it.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "default",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")


# The modules that take longest, longest first. One that is started when the others are done leaves
# the other worker without work (Makefile: two workers, each takes the next module in this order).
LONGEST = (
    "test_tensor_parallel", "test_server", "test_lossless", "test_as_on_a_gpu", "test_mistakes",
    "test_random", "test_compile", "test_lookup_draft", "test_architectures", "test_sliding",
    "test_tree_stats",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # stable


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def light_interpreter() -> None:
    """As the plugin does in an engine: most of the time of the tests is spent in kernels."""
    triton = sys.modules.get("triton")
    if triton is not None and triton.knobs.runtime.interpret:
        from vllm_longspec.runtime.triton_cpu.interpreter import lighten_interpreter

        lighten_interpreter()
