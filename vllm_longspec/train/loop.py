"""The training loop: AdamW and cosine, stage after stage, the target frozen."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vllm_longspec.config import (
    LongSpecConfig,
    LongSpecError,
    check_layer,
    context_length,
    draft_config_for,
    num_drafted_tokens,
    record_target,
)
from vllm_longspec.draft.checkpoint import check_checkpoint, read_draft_config
from vllm_longspec.draft.trim import most_frequent
from vllm_longspec.train import checkpoint, progress
from vllm_longspec.train.model import (
    DraftLayer,
    init_weights,
    load_draft,
    save_draft,
)
from vllm_longspec.train.objective import (
    MAX_SHIFT,
    DraftedHead,
    agreement,
    draft_loss,
    drafted_head,
    labels_in,
)
from vllm_longspec.train.packing import Rows, make_batch, pack, step_batches, step_data
from vllm_longspec.train.recipe import Recipe, Stage, has_room
from vllm_longspec.train.target import load_target, run_target, target_config
from vllm_longspec.train.tokens import first_token, learned, token_ids

__all__ = ["load_target", "train"]

BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1
LOG_EVERY = 20
MAX_HELD_OUT = 32  # sequences
MAX_HELD_OUT_TOKENS = 1 << 17
TOKENISING_TIMEOUT = timedelta(days=2)  # how long processes wait for the one that tokenises


@dataclass
class Run:
    recipe: Recipe
    accelerator: Accelerator
    console: Console
    target: PreTrainedModel
    first_token: int | None  # of every piece
    log: list[progress.Row]
    stop: list[int]  # the signals that came


def train(recipe: Recipe) -> bool:
    """Train a draft layer by `recipe` and write it, its log and its loss plot to its output folder.

    An unfinished run of the same recipe in that folder is continued, from its last checkpoint, and
    ends with the same weights as one that was never interrupted. The same recipe draws the same
    data, positions, shifts and initial weights on any device and any number of processes. Returns
    False if a signal stopped it (after a checkpoint). Raises LongSpecError for a target or data
    that cannot be used.
    """
    checkpoint.check_folder(recipe)
    config = target_config(recipe.target)
    layer = first_layer(recipe, config)
    timeout = InitProcessGroupKwargs(timeout=TOKENISING_TIMEOUT)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[timeout])
    if accelerator.device.type == "cuda":
        accelerator.state._mixed_precision = "bf16"
    for stage in recipe.stages:
        if stage.sequences_per_step % accelerator.num_processes:
            raise LongSpecError(
                f"sequences_per_step: {stage.sequences_per_step} in stage {stage.name!r} cannot be "
                f"divided among {accelerator.num_processes} processes; choose a multiple"
            )
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    tokenizer = AutoTokenizer.from_pretrained(recipe.target)
    # Data is tried before the output folder is made.
    with accelerator.main_process_first():
        prepared = [prepare_rows(recipe, stage, tokenizer) for stage in recipe.stages]
        if accelerator.is_main_process:
            checkpoint.start_run(recipe)
    if recipe.draft_vocab_size is not None:
        keep_frequent_tokens(
            layer, recipe.draft_vocab_size, [tokens for tokens, _ in prepared], console
        )
    finished, running, steps = where(recipe)
    if len(finished) == len(recipe.stages) and (recipe.output / "model.safetensors").is_file():
        console.print(f"{recipe.output} is finished; nothing to do")
        return True
    run = Run(
        recipe, accelerator, console, load_target(recipe.target, accelerator.device),
        first_token(tokenizer),
        progress.load_log(recipe.output, finished, running, steps)
        if accelerator.is_main_process
        else [],
        [],
    )  # fmt: skip
    accelerator.wait_for_everyone()
    console.print(f"{sum(p.numel() for p in trainable(layer)) / 1e6:.2f}M trainable parameters")
    with stop_signals(run.stop):
        for index, stage in enumerate(recipe.stages):
            folder = recipe.output / checkpoint.STAGES / stage.name
            if stage.name in finished:
                console.print(f"stage {stage.name}: finished before")
                layer = load_draft(folder)
                continue
            start = steps if stage.name == running else 0
            if start:
                layer = load_draft(recipe.output / checkpoint.CHECKPOINT)
            layer.config.window = stage.window or recipe.window or layer.config.window
            if not train_stage(run, index, layer, *prepared[index], start):
                return False
            if accelerator.is_main_process:
                checkpoint.save_stage(layer, folder)
            layer = layer.to("cpu")
    if accelerator.is_main_process:
        save_draft(layer, recipe.output)
        checkpoint.remove(recipe.output / checkpoint.CHECKPOINT)
        progress.plot_loss(
            run.log, [(s.name, s.steps) for s in recipe.stages], recipe.output / progress.PLOT_FILE
        )
    console.print(f"wrote {recipe.output}")
    return True


def first_layer(recipe: Recipe, config: Any) -> DraftLayer:
    draft_config = draft_config_for(config)
    check_layer(draft_config)
    num_drafted_tokens(draft_config_for(config, draft_vocab_size=recipe.draft_vocab_size))
    layer = DraftLayer(draft_config)
    if recipe.init is None:
        init_weights(layer, torch.Generator().manual_seed(recipe.stages[0].seed))
    else:
        check_init(recipe.init, layer.config)
        layer = load_draft(recipe.init)
    record_target(layer.config, config, recipe.target)
    return layer


def check_init(folder: Path, config: LongSpecConfig) -> None:
    """Raises LongSpecError unless training can start from the draft in `folder`."""
    try:
        draft = read_draft_config(folder)
    except LongSpecError as error:
        raise LongSpecError(f"init: {str(error).removeprefix('draft: ')}") from error
    if getattr(draft, "draft_vocab_size", None) is not None:
        raise LongSpecError(
            f"init: the head of {folder} is trimmed; give the draft it was trimmed from"
        )
    check_checkpoint(folder, config)


def keep_frequent_tokens(
    layer: DraftLayer, size: int, texts: list[np.ndarray], console: Console
) -> None:
    """Of what the stages learn, each text [num_tokens] int32 as stored."""
    vocab_size = layer.config.vocab_size
    counts = sum(np.bincount(learned(tokens), minlength=vocab_size) for tokens in texts)
    assert isinstance(counts, np.ndarray)
    ids = most_frequent(counts, size)
    layer.keep_tokens(torch.from_numpy(ids))
    share = counts[ids].sum() / counts.sum()
    console.print(f"{size:,} of {vocab_size:,} tokens cover {share:.2%} of the text")


def trainable(layer: DraftLayer) -> list[torch.nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def where(recipe: Recipe) -> tuple[list[str], str | None, int]:
    """The finished stages, the one with a checkpoint, and how many of its steps are done."""
    stages = recipe.output / checkpoint.STAGES
    for stage in recipe.stages:
        checkpoint.recover(stages / stage.name)
    finished = [s.name for s in recipe.stages if (stages / s.name).is_dir()]
    running, steps = checkpoint.load_progress(recipe.output) or (None, 0)
    return finished, running, steps


def prepare_rows(
    recipe: Recipe, stage: Stage, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, Rows]:
    """Flat tokens and the rows of a stage."""
    enough = stage.max_sequences and stage.max_sequences * stage.sequence_length
    only_answers = stage.train_on == "answers"
    tokens, lengths = token_ids(recipe.sources(stage), tokenizer, enough, only_answers)
    rows = pack(lengths, stage.sequence_length, tokens if only_answers else None)
    rows = rows[: stage.max_sequences]
    if len(rows) < 2:
        raise LongSpecError(
            f"data: {len(rows)} sequences of {stage.sequence_length} tokens are too few for stage "
            f"{stage.name!r}; give more text or lower sequence_length"
        )
    return tokens, rows


def train_stage(
    run: Run, index: int, layer: DraftLayer, tokens: np.ndarray, rows: Rows, start: int
) -> bool:
    """Train `layer` in place. False if a signal stopped it."""
    accelerator, console, recipe = run.accelerator, run.console, run.recipe
    stage = recipe.stages[index]
    most = min(MAX_HELD_OUT, MAX_HELD_OUT_TOKENS // stage.sequence_length, len(rows) // 10)
    num_held_out = max(1, most)
    held_out, rows = rows[len(rows) - num_held_out :], rows[: len(rows) - num_held_out]
    console.print(
        f"stage {stage.name}: {len(rows):,} sequences of up to {stage.sequence_length} tokens, "
        f"{stage.steps} steps of {stage.sequences_per_step} on {accelerator.num_processes} x "
        f"{accelerator.device.type}" + (f", going on at step {start}" if start else "")
    )
    if stage.positions == "anchor-offset" and not has_room(stage, longest_position(run)):
        console.print(
            f"stage {stage.name}: the target's {longest_position(run):,} positions leave no room "
            "for anchor-offset indices; set context_length in the recipe if it is made for more"
        )
    layer.recompute = recipe.gradient_checkpointing
    layer.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(
        trainable(layer), lr=stage.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    if start:
        checkpoint.load_optimizer(layer, optimizer, recipe.output / checkpoint.CHECKPOINT)
    model = accelerator.prepare_model(layer)
    head = drafted_head(run.target.get_output_embeddings().weight, layer.draft_token_ids)
    before = sum(s.steps for s in recipe.stages[:index])
    writer = None
    if accelerator.is_main_process:
        writer = progress.tensorboard_writer(recipe.output, console, before + start)
    seconds, seen = 0.0, 0
    started = time.perf_counter()
    with progress.progress_bar(console) as bar:
        task = bar.add_task(stage.name, total=stage.steps, completed=start, info="")
        for step in range(start, stage.steps):
            rate = stage.learning_rate * learning_rate_factor(step, stage.steps)
            loss, num_tokens = train_step(
                run, stage, index, model, head, optimizer, tokens, rows, step, rate
            )
            seen += num_tokens
            if step % LOG_EVERY == 0 or step == stage.steps - 1:
                value = float(accelerator.reduce(loss, "mean"))
                seconds = time.perf_counter() - started
                row = {
                    "stage": stage.name, "step": step, "loss": value,
                    "learning_rate": rate, "tokens_per_second": round(seen / seconds),
                }  # fmt: skip
                info = f"loss {value:.3f}, {seen / seconds:,.0f} tokens/s"
                bar.update(task, completed=step + 1, info=info)
                if not console.is_terminal and step % progress.PRINT_EVERY == 0:
                    console.print(f"step {step}, {seconds:.0f} s, {info}")
                if accelerator.is_main_process:
                    record(run, row, writer, before + step)
            done = step + 1
            if run.stop or (done % recipe.checkpoint_every == 0 and done < stage.steps):
                if accelerator.is_main_process:
                    checkpoint.save_checkpoint(
                        layer, optimizer, recipe.output / checkpoint.CHECKPOINT, stage.name, done
                    )
                if run.stop:
                    console.print(f"stopped after step {done}; the same command goes on from here")
                    return False
    if writer:
        writer.close()
    console.print(f"{stage.steps - start} steps in {seconds:.0f} s, {seen / seconds:,.0f} tokens/s")
    accelerator.free_memory()
    if accelerator.is_main_process:
        rates = held_out_agreement(run, layer, tokens, held_out)
        console.print(
            "agrees with the target's most probable token at shift 1, 2, ...: "
            + ", ".join(f"{rate:.3f}" for rate in rates)
        )
    return True


def longest_position(run: Run) -> int:
    return run.recipe.context_length or context_length(run.target.config)


def train_step(
    run: Run,
    stage: Stage,
    index: int,
    model: torch.nn.Module,
    head: DraftedHead,
    optimizer: torch.optim.Optimizer,
    tokens: np.ndarray,
    rows: Rows,
    step: int,
    learning_rate: float,
) -> tuple[torch.Tensor, int]:
    """One update. This process's loss (their mean is the step's) and the step's tokens."""
    accelerator, target = run.accelerator, run.target
    reach = longest_position(run) if stage.positions == "anchor-offset" else None
    data = step_data(
        rows, step, (stage.seed, index), stage.sequences_per_step, stage.max_shift, reach
    )
    per_process = stage.sequences_per_step // accelerator.num_processes
    first = accelerator.process_index * per_process
    share = range(first, first + per_process)
    total = torch.zeros((), device=accelerator.device)
    left = math.ceil(per_process / stage.sequences_per_batch)
    for batch in step_batches(tokens, data, share, stage.sequences_per_batch, run.first_token):
        left -= 1
        batch = batch.to(accelerator.device)
        batch.labels = labels_in(head, batch.labels)
        state = run_target(target, batch.tokens, batch.positions, batch.lengths, batch.runs)
        with accelerator.no_sync(model) if left else nullcontext():
            with bf16(accelerator.device):
                loss = draft_loss(model, head.weight, state, batch, batch.shifts, stage.learn_from)
            # Processes average their gradients, so each takes its share of the mean that often.
            loss = loss * (accelerator.num_processes / data.num_labels)
            accelerator.backward(loss)
        total += loss.detach()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return total, data.num_tokens


def held_out_agreement(run: Run, layer: DraftLayer, tokens: np.ndarray, rows: Rows) -> list[float]:
    def batches() -> Iterator[Any]:
        for row in range(len(rows)):
            batch = make_batch(tokens, [rows[row : row + 1]], first_token=run.first_token)
            yield batch.to(run.accelerator.device)

    with bf16(run.accelerator.device):
        return agreement(layer.eval(), run.target, batches(), MAX_SHIFT + 1)


def bf16(device: torch.device) -> torch.autocast:
    """For the layer's products on a GPU; its weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def record(run: Run, row: progress.Row, writer: Any, step: int) -> None:
    run.log.append(row)
    progress.append_log(row, run.recipe.output)
    if writer:
        for name in ("loss", "learning_rate", "tokens_per_second"):
            writer.add_scalar(name, row[name], step)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero."""
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def stop_signals(received: list[int]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM is kept in `received`; a second one acts as always."""

    def receive(number: int, _: Any) -> None:
        received.append(number)
        for kind, handler in before.items():
            signal.signal(kind, handler)

    before = {kind: signal.signal(kind, receive) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
