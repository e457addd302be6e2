"""A target that one device cannot hold, over the devices of a run: each process keeps its part of
each decoder layer and has one layer whole at a time (torch's FSDP2). Every process reads its own
batch, so results are those of a target that is whole. Embeddings, final norm and head, which are
read as plain weights, are whole everywhere."""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vllm_longspec.train.target import default_dtype, read_target, target_config
from vllm_longspec.train.together import Together


def load_sharded_target(folder: Any, device: torch.device, together: Together) -> PreTrainedModel:
    """As `load_target` does. The main process reads it into its host's memory and sends each tensor
    to all. Raises LongSpecError on all of them for what went wrong on one."""
    config, dtype = target_config(str(folder)), default_dtype(device)
    weights: dict[str, Any] = {}
    together.on_main(
        lambda: weights.update(read_target(folder, torch.device("cpu"), dtype).state_dict())
    )
    target = empty_target(config, dtype)
    shard(target, device, together)
    move_buffers(target, device)
    # Torch takes the device from what is there already; where nothing is, it guesses.
    target.model.norm.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(target, weights, options=options)
    target.tie_weights()
    return target.eval().requires_grad_(False)


def empty_target(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Without memory for its parameters; as if it were not quantised."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with init_empty_weights(include_buffers=False):
        target = AutoModelForCausalLM.from_config(plain, dtype=dtype)
    target.tie_weights()  # again: each parameter was made anew
    return target.eval().requires_grad_(False)


def shard(target: PreTrainedModel, device: torch.device, together: Together) -> None:
    """In place, before it has weights or with the same ones everywhere."""
    mesh = init_device_mesh(device.type, (together.size,))
    layers = decoder_layers(target)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # As the root of its layers the model lets the next one arrive while one computes.
    sharded = set(layers.parameters())
    whole = {parameter for parameter in target.parameters() if parameter not in sharded}
    fully_shard(target.model, mesh=mesh, ignored_params=whole)


def decoder_layers(target: PreTrainedModel) -> nn.ModuleList:
    return target.model.layers


def move_buffers(target: PreTrainedModel, device: torch.device) -> None:
    for module in target.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def fill_with_noise(target: PreTrainedModel, device: torch.device, std: float) -> None:
    """Random weights for an empty target, each process its own part."""
    move_buffers(target, device)
    for module in target.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                filled = torch.empty_like(parameter, device=device)
                own = filled.to_local() if isinstance(filled, DTensor) else filled
                own.normal_(std=std)
                module._parameters[name] = nn.Parameter(filled, requires_grad=False)
    target.tie_weights()
