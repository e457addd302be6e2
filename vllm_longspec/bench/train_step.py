"""What a training step costs at the shape of a model people serve, with random weights."""

import resource
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vllm_longspec.bench.shapes import target_config
from vllm_longspec.config import context_length, draft_config_for
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_file
from vllm_longspec.train.attention import choose_backend
from vllm_longspec.train.loop import bf16, trainable
from vllm_longspec.train.memory import device_room, fits, memory_of
from vllm_longspec.train.model import DraftLayer, init_weights
from vllm_longspec.train.objective import draft_loss
from vllm_longspec.train.packing import make_batch, pack
from vllm_longspec.train.positions import MAX_SHIFT
from vllm_longspec.train.sharding import empty_target, fill_with_noise, shard
from vllm_longspec.train.target import check_target, default_dtype, run_target
from vllm_longspec.train.together import Together, processes_of, settings_for_processes
from vllm_longspec.writing import write_json

GIB = 2**30
TIMED_STEPS = 4


def train_step_report(
    shape: str,
    sequence_length: int,
    sequences: int,
    gradient_checkpointing: bool,
    output: Path | None = None,
    shard_target: bool | None = None,
) -> dict[str, Any]:
    """Time and memory of a whole step: target forward, draft forward and backward, AdamW.

    Every sequence is one document. Under `accelerate launch` each process has so many `sequences`,
    and the target is sharded over them where it does not fit, or by `shard_target`. Raises
    LongSpecError for an unknown shape or a length out of range.
    """
    if output is not None:
        claim_file(output, ("seconds_per_step", "trainable_parameters"))
    config = target_config(shape)
    check_target(config, shape)
    if not MAX_SHIFT < sequence_length <= context_length(config):
        raise LongSpecError(
            f"sequence_length: {sequence_length} is not between {MAX_SHIFT + 1} and "
            f"{context_length(config)}; choose one of these"
        )
    if sequences < 1:
        raise LongSpecError(f"sequences: {sequences} is not a whole number of at least 1")
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=settings_for_processes())
    together = processes_of(accelerator)
    if shard_target and together.size == 1:
        raise LongSpecError(
            "shard_target: there is one process; start several with accelerate launch"
        )
    device, dtype = accelerator.device, default_dtype(accelerator.device)
    torch.manual_seed(0)
    layer = DraftLayer(draft_config_for(config))
    init_weights(layer, torch.Generator().manual_seed(0))
    layer.recompute = gradient_checkpointing
    layer.to(device).train()
    empty, room = empty_target(config, dtype), device_room(device)
    whole, parts = (
        memory_of(
            empty, layer.config, device, together.size, sharded, sequences * sequence_length
        )
        for sharded in (False, True)
    )  # fmt: skip
    (too_large,) = together.any(not fits(whole, room))
    sharded = together.size > 1 and (too_large if shard_target is None else shard_target)
    target = random_target(config, device, together, sharded)
    optimizer = torch.optim.AdamW(trainable(layer), lr=1e-5)
    model = accelerator.prepare_model(layer)
    head = target.get_output_embeddings().weight
    tokens = torch.randint(config.vocab_size, (sequences * sequence_length,)).numpy()
    rows = pack(torch.full((sequences,), sequence_length).numpy(), sequence_length)
    batch = make_batch(tokens, [rows]).to(device)

    def step() -> float:
        state = run_target(target, batch.tokens, batch.positions, batch.lengths)
        with bf16(device):
            loss = draft_loss(model, head, state, batch, MAX_SHIFT)
        (loss / len(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()) / len(tokens)  # waits for the device

    step()  # kernels are chosen, the optimiser's state is made
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        loss = step()
    seconds = (time.perf_counter() - started) / TIMED_STEPS
    (peak,) = together.most(peak_memory(device))
    result: dict[str, Any] = {
        "shape": shape,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "processes": together.size,
        "sharded": sharded,
        "torch": torch.__version__,
        "attention": attention_kernel(config, dtype, device),
        "sequence_length": sequence_length,
        "sequences": sequences,
        "gradient_checkpointing": gradient_checkpointing,
        "trainable_parameters": sum(p.numel() for p in trainable(layer)),
        "loss": loss,
        "seconds_per_step": seconds,
        "tokens_per_second": together.size * len(tokens) / seconds,
        "peak_memory_gib": peak / GIB,
        "computed_memory_gib": (parts if sharded else whole).total / GIB,
    }
    if together.rank == 0:
        Console().print(summary(result), soft_wrap=True)
        if output is not None:
            write_json(output, result)
    return result


def random_target(
    config: PreTrainedConfig, device: torch.device, together: Together, sharded: bool
) -> PreTrainedModel:
    dtype = default_dtype(device)
    if sharded:
        target = empty_target(config, dtype)
        shard(target, device, together)
        fill_with_noise(target, device, config.initializer_range)
        return target
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return target.eval().requires_grad_(False)


def attention_kernel(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> str:
    query, key = (
        torch.empty(0, heads, config.head_dim, dtype=dtype, device=device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    return choose_backend(query, key)


def peak_memory(device: torch.device) -> int:
    """Bytes: reserved on the GPU, weights of the target included; of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(result: dict[str, Any]) -> str:
    processes = result["processes"]
    shared = ", which share the target" if result["sharded"] else ""
    on = f"{processes} processes{shared}, each {result['device']}"
    return (
        f"{result['shape']}, {result['sequences']} x {result['sequence_length']:,} tokens on "
        f"{on if processes > 1 else result['device']} ({result['attention']}): "
        f"{result['seconds_per_step']:.2f} s a step, "
        f"{result['tokens_per_second']:,.0f} tokens/s, peak memory "
        f"{result['peak_memory_gib']:.1f} GiB, computed {result['computed_memory_gib']:.1f}"
    )
