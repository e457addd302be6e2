"""What nobody wrote becomes NaN, so that a kernel that reads it shows at once."""

from typing import Any

import torch
from helpers import Engine


def poison(engine: Engine) -> None:
    """Of an engine that serves nothing: its KV cache, rings included, and from then on what torch
    allocates without values."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert engine.llm.reset_prefix_cache()
    assert engine.llm.collective_rpc(fill) != [0]


def fill(worker: Any) -> int:
    """How many layers' caches."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers if torch.is_tensor(layer.kv_cache)]
    for cache in caches:
        cache.fill_(float("nan"))
    return len(caches)
