"""What a run will take, said before anything is loaded: memory, whether the target is sharded,
steps, tokens and disk."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from vllm_longspec.config import LongSpecConfig
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import size
from vllm_longspec.train.memory import Memory, device_room, fits, run_memory
from vllm_longspec.train.recipe import Recipe
from vllm_longspec.train.sharding import empty_target
from vllm_longspec.train.target import default_dtype, quantisation
from vllm_longspec.train.together import Together

GPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    sharded: bool
    lines: list[str]  # to be printed


def plan_memory(
    recipe: Recipe,
    config: PreTrainedConfig,
    draft: LongSpecConfig,
    device: torch.device,
    together: Together,
) -> Plan:
    """The same on all processes. Raises LongSpecError for a target that cannot be sharded."""
    method = quantisation(config)
    if recipe.shard_target and method is not None:
        raise LongSpecError(
            f"shard_target: {recipe.target} is quantised ({method}), and only plain weights are "
            "sharded; leave shard_target out, or give the model that is not quantised"
        )
    target, room = empty_target(config, default_dtype(device)), device_room(device)
    whole, parts = (
        run_memory(recipe, target, draft, device, together.size, sharded)
        for sharded in (False, True)
    )
    too_large, does_not_fit = together.any(not fits(whole, room), not fits(parts, room))
    sharded = method is None and (too_large if recipe.shard_target is None else recipe.shard_target)
    lines = []
    if sharded and together.size == 1:
        sharded = False
        if recipe.shard_target:
            lines = ["shard_target: there is one process, which has the target whole"]
    memory = parts if sharded else whole
    lines += describe(memory, together.size if sharded else 1, room)
    if method is not None:
        lines.append(f"the target is quantised ({method}); it is counted as if it were not")
    if does_not_fit if sharded else too_large:
        lines.append(
            "this may not fit: more GPUs (accelerate launch) share a target that is not quantised, "
            "and fewer sequences_per_batch or a shorter sequence_length need less for activations"
        )
    return Plan(sharded, lines)


def describe(memory: Memory, parts: int, room: int | None) -> list[str]:
    """`parts`: that the target's layers are in."""
    rows = [
        ("target's layers" + (f", one of {parts} parts" if parts > 1 else ""), memory.layers),
        ("layers that are whole for a moment", memory.whole_layers),
        ("embeddings, norm, head", memory.shared),
        ("draft, its gradients, AdamW", memory.draft),
        (f"activations of {memory.tokens:,} tokens, some logits", memory.activations),
    ]
    lines = [f"  {what:44} {size(count):>12}" for what, count in rows if count]
    there = "" if room is None else f" of {size(room)} that are there"
    return ["memory of each process, computed:", *lines, f"  {size(memory.total)}{there}"]


def on_gpus(recipe: Recipe, config: PreTrainedConfig, draft: LongSpecConfig) -> str:
    """For a dry run, wherever it runs."""
    device = torch.device("cuda")
    target = empty_target(config, torch.bfloat16)
    needed = []
    for count in GPUS:
        sharded = count > 1 and quantisation(config) is None
        needed.append(size(run_memory(recipe, target, draft, device, count, sharded).total))
    return (
        f"on {', '.join(map(str, GPUS))} GPUs, the target sharded where there are several: "
        f"{', '.join(needed)} each"
    )


def describe_work(recipe: Recipe, disk: int) -> list[str]:
    """`disk`: bytes that are written at most."""
    lines = [
        f"stage {stage.name}: {stage.steps:,} steps of {stage.sequences_per_step} x "
        f"{stage.sequence_length:,} tokens, at most "
        f"{stage.steps * stage.sequences_per_step * stage.sequence_length:,}"
        for stage in recipe.stages
    ]
    return [*lines, f"{size(disk)} of disk at most in {recipe.output}"]
