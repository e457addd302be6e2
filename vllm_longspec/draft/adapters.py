"""A target without its LoRA adapters, which are those of a batch's rows and not of a draft's."""

import copy
from typing import Any

from torch import nn
from vllm.lora.layers.base import BaseLayerWithLoRA


def without_adapters(module: nn.Module) -> Any:
    """The module itself or, where vLLM put layers with adapters into it, a copy that shares all the
    others and has their base layers."""
    if isinstance(module, BaseLayerWithLoRA):
        return module.base_layer
    children = {
        name: None if child is None else without_adapters(child)
        for name, child in module._modules.items()
    }
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    shared = copy.copy(module)
    shared._modules = children
    return shared
