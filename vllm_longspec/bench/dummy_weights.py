"""Dummy weights of the size of trained ones, inside vLLM's worker: with vLLM's own, which are next
to nothing, a router likes all experts alike and sends every token to the first ones.

`worker_extension_cls="vllm_longspec.bench.dummy_weights.DummyWeights"`, or one whose module imports
this one. As in `bench/synthetic_worker.py` a function is replaced when the module is imported,
before weights are loaded.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

STD = 0.02  # as most models begin their training

_load_weights = DummyModelLoader.load_weights


@torch.no_grad()
def load_weights(loader: DummyModelLoader, model: nn.Module, model_config: Any) -> None:
    _load_weights(loader, model, model_config)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                continue  # of quantised weights, whose scales are made elsewhere
            if "norm" in type(module).__name__.lower():
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=STD)


DummyModelLoader.load_weights = load_weights


class DummyWeights:
    """Mixed into vLLM's worker."""
