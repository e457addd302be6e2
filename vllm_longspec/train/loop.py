"""The training loop: AdamW and cosine over fixed-length sequences, the target frozen."""

import json
import math
import time
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_longspec.config import LongSpecError, draft_config_for
from vllm_longspec.draft.checkpoint import check_checkpoint
from vllm_longspec.train.data import read_documents, token_sequences
from vllm_longspec.train.model import DraftLayer, init_weights, load_draft, save_draft
from vllm_longspec.train.objective import MAX_SHIFT, agreement, draft_loss, run_target
from vllm_longspec.train.positions import anchor_offset_positions

LOG_FILE = "training_log.jsonl"
PLOT_FILE = "loss.png"
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1
LOG_EVERY = 20
PRINT_EVERY = 200  # where the output is no terminal
NUM_HELD_OUT = 32


class TrainOptions(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Path
    data: Path
    output: Path
    init: Path | None = None
    steps: PositiveInt = 3000
    learning_rate: PositiveFloat = 5e-4
    sequence_length: Annotated[int, Field(gt=MAX_SHIFT + 1)] = 1024
    sequences_per_step: PositiveInt = 64
    sequences_per_batch: PositiveInt = 64
    max_sequences: PositiveInt | None = None
    anchor_offset: bool = True
    seed: NonNegativeInt = 0


def train(options: TrainOptions) -> None:
    """Train a draft layer for `options.target` and write it, its log and its loss plot.

    The same options and seed draw the same data, positions, shifts and initial weights on any
    device. Raises LongSpecError for a target or data that cannot be used.
    """
    if options.sequences_per_step % options.sequences_per_batch:
        raise LongSpecError(
            f"sequences_per_batch: {options.sequences_per_batch} does not divide "
            f"sequences_per_step {options.sequences_per_step}; choose a divisor"
        )
    if not (options.target / "config.json").is_file():
        raise LongSpecError(f"target: {options.target} has no config.json; give a model's folder")
    if options.init is not None and not (options.init / "config.json").is_file():
        raise LongSpecError(
            f"init: {options.init} has no config.json; give a LongSpec draft's folder"
        )
    console = Console()
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device

    config = AutoConfig.from_pretrained(options.target)
    target = load_target(options.target, device)
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    sequences = torch.from_numpy(
        token_sequences(
            read_documents(options.data), tokenizer, options.sequence_length, options.max_sequences
        )
    )
    console.print(f"{len(sequences)} sequences of {options.sequence_length} tokens on {device}")
    if len(sequences) <= NUM_HELD_OUT:
        raise LongSpecError(f"data: {len(sequences)} sequences are too few; give more text")
    held_out = sequences[-NUM_HELD_OUT:].long().to(device)
    sequences = sequences[:-NUM_HELD_OUT]

    generator = torch.Generator().manual_seed(options.seed)
    layer = DraftLayer(draft_config_for(config))
    init_weights(layer, generator)
    if options.init is not None:
        check_checkpoint(options.init, layer.config)
        layer = load_draft(options.init)
    trainable = [p for p in layer.parameters() if p.requires_grad]
    console.print(f"{sum(p.numel() for p in trainable) / 1e6:.2f}M trainable parameters")
    optimizer = torch.optim.AdamW(
        trainable, lr=options.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, options.steps)
    )
    layer, optimizer = accelerator.prepare(layer, optimizer)
    head = target.get_output_embeddings()

    options.output.mkdir(parents=True, exist_ok=True)
    log = []
    batches = options.sequences_per_step // options.sequences_per_batch
    started = time.perf_counter()
    with Progress(
        TextColumn("Training"), BarColumn(), TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(), console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("train", total=options.steps, info="")
        for step in range(options.steps):
            chosen = torch.randint(
                len(sequences), (options.sequences_per_step,), generator=generator
            )
            positions = step_positions(options, config.max_position_embeddings, generator)
            shift = int(torch.randint(1, MAX_SHIFT + 1, (), generator=generator))
            losses = []
            for part in range(batches):
                rows = slice(
                    part * options.sequences_per_batch, (part + 1) * options.sequences_per_batch
                )
                tokens = sequences[chosen[rows]].long().to(device)
                at = positions[rows].to(device)
                state = run_target(target, tokens, at)
                with accelerator.autocast():
                    loss = draft_loss(layer, head, state, tokens, at, shift) / batches
                accelerator.backward(loss)
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % LOG_EVERY == 0 or step == options.steps - 1:
                value = float(sum(losses))
                log.append({"step": step, "shift": shift, "loss": value})
                progress.update(task, completed=step + 1, info=f"loss {value:.3f}")
                if not console.is_terminal and step % PRINT_EVERY == 0:
                    seconds = time.perf_counter() - started
                    console.print(f"step {step}, {seconds:.0f} s, loss {value:.3f}")

    seconds = time.perf_counter() - started
    tokens_per_step = options.sequences_per_step * options.sequence_length
    console.print(
        f"{options.steps} steps in {seconds:.0f} s, "
        f"{options.steps * tokens_per_step / seconds:,.0f} tokens/s"
    )
    layer = accelerator.unwrap_model(layer).eval()
    with accelerator.autocast():
        rates = agreement(layer, target, held_out, MAX_SHIFT + 1)
    console.print(
        "agrees with the target's most probable token at shift 1, 2, ...: "
        + ", ".join(f"{rate:.3f}" for rate in rates)
    )
    save_draft(layer, options.output)
    (options.output / LOG_FILE).write_text("".join(json.dumps(row) + "\n" for row in log))
    plot_loss(log, options.output / PLOT_FILE)
    console.print(f"wrote {options.output}")


def load_target(folder: Path, device: torch.device) -> PreTrainedModel:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return target.eval().requires_grad_(False)


def step_positions(
    options: TrainOptions, max_position: int, generator: torch.Generator
) -> torch.Tensor:  # [sequences_per_step, sequence_length]
    size = (options.sequences_per_step, options.sequence_length)
    if not options.anchor_offset:
        return torch.arange(size[1]).expand(size)
    return anchor_offset_positions(*size, max_position, generator)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plot_loss(log: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for shift in sorted({row["shift"] for row in log}):
        rows = [row for row in log if row["shift"] == shift]
        axes.plot(
            [row["step"] for row in rows], [row["loss"] for row in rows],
            label=f"shift {shift}", linewidth=0.9,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="next-token cross entropy", title="Draft layer training")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
