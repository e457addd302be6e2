"""Quantised checkpoints of tiny targets, written by hand: the formats that tools outside write.

Weights are rounded to nearest, which is no worse than any tool's for what is compared here.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import (
    PIECES,
    close,
    inspect_here,
    propose_what_is_known,
    small_tree,
    write_draft,
    write_target,
)
from helpers import Engine, Output, text_prompt
from safetensors.torch import load_file, save_file

GROUP = 32  # inputs of a scale, of 4-bit formats
# Of eight outputs in one int32, which one lies where.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def quantise(folder: Path, name: str, head: bool = False) -> None:
    """Rounds the linear layers of the checkpoint in `folder`, in place; with `head` lm_head too."""
    config, layer = FORMATS[name]
    path = folder / "model.safetensors"
    tensors: Tensors = {}
    for tensor_name, tensor in load_file(path).items():
        module = tensor_name.removesuffix(".weight")
        chosen = module.endswith("_proj") or (head and module == "lm_head")
        if tensor_name.endswith(".weight") and chosen:
            made = layer(tensor.float())
            tensors |= {f"{module}.{key}": value.contiguous() for key, value in made.items()}
        else:
            tensors[tensor_name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    quantization = config | ({"lm_head": True} if head else {})
    if quantization["quant_method"] == "compressed-tensors" and not head:
        quantization["ignore"] = ["lm_head"]
    (folder / "config.json").write_text(
        json.dumps(stored | {"quantization_config": quantization}, indent=2)
    )


def by_row(
    weight: torch.Tensor,  # [output_size, input_size]
    largest: float,
    dtype: torch.dtype,
) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / largest
    rounded = weight / scale
    return {
        "weight": (rounded.round() if dtype == torch.int8 else rounded).to(dtype),
        "weight_scale": scale,  # [output_size, 1]
    }


def int8_rows(weight: torch.Tensor) -> Tensors:
    return by_row(weight, 127, torch.int8)


def fp8_rows(weight: torch.Tensor) -> Tensors:
    return by_row(weight, 448, torch.float8_e4m3fn)


def fp8_tensor(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def fp8_blocks(weight: torch.Tensor) -> Tensors:
    """Blocks of 128 x 128; `weight_scale_inv` is what a block is multiplied by."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padded = torch.zeros(128 * rows, 128 * columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, 128, columns, 128)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    rounded = (blocks / scale).reshape_as(padded)[: weight.shape[0], : weight.shape[1]]
    return {
        "weight": rounded.to(torch.float8_e4m3fn),
        "weight_scale_inv": scale[:, 0, :, 0],
    }


def four_bits(
    weight: torch.Tensor,  # [output_size, input_size]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[output_size, input_size] from 0 to 15, 8 being zero; [output_size, num_groups] scales."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    return ((groups / scale).round() + 8).clamp(0, 15).view_as(weight).int(), scale[:, :, 0]


def packed(
    numbers: torch.Tensor,  # [..., size] int32 from 0 to 15
    order: tuple[int, ...] = tuple(range(8)),
) -> torch.Tensor:  # [..., size / 8] int32
    eights = numbers.unflatten(-1, (-1, 8))[..., list(order)].long()
    shifts = 4 * torch.arange(8)
    return (eights << shifts).sum(-1).to(torch.uint32).view(torch.int32)


def packed_rows(weight: torch.Tensor) -> Tensors:
    """compressed-tensors' `pack-quantized`."""
    numbers, scale = four_bits(weight)
    return {
        "weight_packed": packed(numbers),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def gptq(weight: torch.Tensor) -> Tensors:
    numbers, scale = four_bits(weight)
    num_groups, size = scale.shape[1], weight.shape[0]
    return {
        "qweight": packed(numbers).t(),  # [input_size / 8, output_size]
        # One less than the zero that is subtracted.
        "qzeros": packed(torch.full((num_groups, size), 7)),
        "scales": scale.t(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }


def awq(weight: torch.Tensor) -> Tensors:
    numbers, scale = four_bits(weight)
    num_groups, size = scale.shape[1], weight.shape[0]
    return {
        "qweight": packed(numbers.t(), AWQ_ORDER),  # [input_size, output_size / 8]
        "qzeros": packed(torch.full((num_groups, size), 8), AWQ_ORDER),
        "scales": scale.t(),
    }


def compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": inputs,
            "weights": {"symmetric": True, "dynamic": False, "group_size": None} | weights}},
    }  # fmt: skip


def by_token(kind: str) -> dict[str, Any]:
    return {
        "num_bits": 8, "type": kind, "strategy": "token", "dynamic": True, "symmetric": True,
        "group_size": None,
    }  # fmt: skip


def channels(kind: str) -> dict[str, Any]:
    return {"num_bits": 8, "type": kind, "strategy": "channel"}


# What config.json says, and what becomes of a layer's weight.
FORMATS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], Tensors]]] = {
    "compressed-tensors int8": (
        compressed("int-quantized", channels("int"), by_token("int")), int8_rows,
    ),
    "compressed-tensors fp8": (
        compressed("float-quantized", channels("float"), by_token("float")), fp8_rows,
    ),
    "compressed-tensors int4": (
        compressed("pack-quantized", {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None),
        packed_rows,
    ),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8_tensor),
    "fp8 blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        fp8_blocks,
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        gptq,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
         "version": "gemm"},
        awq,
    ),
}  # fmt: skip
# `--quantization` of an unquantised checkpoint.
ONLINE = ("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8")

LENGTHS = (1, 5, 100, 40)
NEW_TOKENS = 24


@dataclass
class Outputs:
    plain: list[Output]
    got: list[Output]
    accepted: int
    drafts: int
    reads_own_head: bool
    methods: set[str]  # of the draft's layers


def outputs_of(folder: Path, name: str, head: bool) -> Outputs:
    """In a process of its own, in float32. The draft proposes what plain vLLM wrote, so that trees
    are accepted; every second request is seeded."""
    from vllm import SamplingParams

    stand_in_for_four_bits()
    allow_float32()
    config = write_target(folder, "llama")
    write_draft(folder / "draft", config)
    if name not in ONLINE:
        quantise(folder, name, head)
    inspect_here(config.architectures[0])
    prompts = [text_prompt(i, length) for i, length in enumerate(LENGTHS)]

    params = [
        SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2
        )
        for i in range(len(prompts))
    ]
    options = PIECES | {
        "model": str(folder), "logprobs_mode": "processed_logits",
        "quantization": name if name in ONLINE else None,
    }  # fmt: skip
    engine = Engine(**options)
    plain = engine.generate(prompts, params)
    close(engine)
    known = propose_what_is_known()
    known += [[*prompt, *output.tokens] for prompt, output in zip(prompts, plain, strict=True)]
    engine = Engine(small_tree(folder / "draft"), **options)
    got = engine.generate(prompts, params)
    counters = engine.counters()
    (head_and_methods,) = engine.llm.collective_rpc(of_the_draft)
    close(engine)
    known.clear()
    return Outputs(plain, got, counters["accepted_tokens"], counters["drafts"], *head_and_methods)


def of_the_draft(worker: Any) -> tuple[bool, set[str]]:
    draft = worker.model_runner.speculator.draft.model
    methods = (getattr(module, "quant_method", None) for module in draft.modules())
    return draft.own_logits is not None, {type(method).__name__ for method in methods if method}


def stand_in_for_four_bits() -> None:
    """vLLM's product with 4-bit weights is in its builds for CPUs with AVX-512 alone, and in bf16:
    here weights are unpacked when they are loaded."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        unpack_quantized_values_into_int32 as unpacked,
    )

    def in_order(parameter: Any, transposed: bool) -> torch.Tensor:
        return parameter.data.t().contiguous() if transposed else parameter.data

    def process(self: Any, layer: Any) -> None:
        weight, scale, zero = self._get_weight_params(layer)[:3]
        kind = self.config.weight_type
        numbers = unpacked(in_order(weight, weight.input_dim == 1), kind, 0).float()
        scales = in_order(scale, scale.output_dim == 0).float()
        zeros = torch.full_like(scales, 8)
        if self.config.zero_points:
            zeros = unpacked(in_order(zero, zero.output_dim == 0), kind, 1).float()
        size = numbers.shape[0] // scales.shape[0]
        scales, zeros = (x.repeat_interleave(size, 0) for x in (scales, zeros))
        layer.unpacked = ((numbers - zeros) * scales).t().contiguous().to(scale.dtype)

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.unpacked, bias)

    CPUWNA16LinearKernel.process_weights_after_loading = process
    CPUWNA16LinearKernel.apply_weights = apply


def allow_float32() -> None:
    """What these methods compute on a CPU here, torch computes in float32 too."""
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    for method in (AutoAWQConfig, AutoGPTQConfig, OnlineQuantizationConfig):
        method.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])  # type: ignore
