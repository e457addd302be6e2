"""The training loop: AdamW and cosine, stage after stage, the target frozen."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_longspec.config import (
    LongSpecConfig,
    check_layer,
    context_length,
    draft_config_for,
    num_drafted_tokens,
    read_tokenizer,
    record_target,
)
from vllm_longspec.draft.checkpoint import check_checkpoint, read_draft_config
from vllm_longspec.draft.trim import most_frequent
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import LEAST_ROOM, check_room
from vllm_longspec.report import check_plotting
from vllm_longspec.train import checkpoint, progress
from vllm_longspec.train.dry_run import write_untrained
from vllm_longspec.train.held_out import HeldOut, bf16, split_rows
from vllm_longspec.train.model import DraftLayer, init_weights, load_draft
from vllm_longspec.train.objective import (
    DraftedHead,
    chain_acceptance,
    draft_loss,
    drafted_head,
    labels_in,
)
from vllm_longspec.train.packing import Rows, pack, step_batches, step_data
from vllm_longspec.train.plan import describe_work, on_gpus, plan_memory
from vllm_longspec.train.recipe import TENSORBOARD, Recipe, Stage, has_room
from vllm_longspec.train.sharding import load_sharded_target
from vllm_longspec.train.stop import Stop, stop_signals
from vllm_longspec.train.target import load_target, run_target, target_config
from vllm_longspec.train.together import Together, processes_of, settings_for_processes
from vllm_longspec.train.tokens import first_token, learned, token_ids
from vllm_longspec.train.trackers import chosen_trackers, end_trackers, numbers, start_trackers
from vllm_longspec.train.watch import Watch

__all__ = ["load_target", "train"]

WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.1
COUNTED_AT_ONCE = 1 << 22  # tokens


@dataclass
class Run:
    recipe: Recipe
    accelerator: Accelerator
    console: Console
    target: PreTrainedModel
    first_token: int | None  # of every piece
    log: list[progress.Row]
    stop: Stop
    together: Together


def train(recipe: Recipe, dry_run: bool = False) -> bool:
    """Train a draft layer by `recipe` and write it, its log and its loss plot to its output folder.

    An unfinished run of the same recipe in that folder is continued, from its last checkpoint, and
    ends with the same weights as one that was never interrupted; a finished one goes on where the
    steps of its last stage were raised. The same recipe draws the same data, positions, shifts and
    initial weights on any device and any number of processes. Returns False if a signal stopped it
    (after a checkpoint). Raises LongSpecError for a target or data that cannot be used.

    `dry_run`: only says what the run would take, and writes its draft untrained.
    """
    stop = Stop()
    with stop_signals(stop), ExitStack() as held:
        return train_stages(recipe, stop, dry_run, held)


def train_stages(recipe: Recipe, stop: Stop, dry_run: bool, held: ExitStack) -> bool:
    checkpoint.check_folder(recipe)
    check_plotting()
    trackers = chosen_trackers(recipe)
    config = target_config(recipe.target)
    layer = first_layer(recipe, config)
    check_lengths(recipe, config)
    disk = bytes_written(recipe, layer)
    check_room(recipe.output, disk)
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=settings_for_processes(),
        log_with=trackers,
        project_config=ProjectConfiguration(logging_dir=str(recipe.output / TENSORBOARD)),
    )
    if accelerator.device.type == "cuda":
        accelerator.state._mixed_precision = "bf16"
    for stage in recipe.stages:
        if stage.sequences_per_step % accelerator.num_processes:
            raise LongSpecError(
                f"sequences_per_step: {stage.sequences_per_step} in stage {stage.name!r} cannot be "
                f"divided among {accelerator.num_processes} processes; choose a multiple"
            )
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True)
    together = processes_of(accelerator)
    draft = draft_config_for(config, draft_vocab_size=recipe.draft_vocab_size)
    plan = plan_memory(recipe, config, draft, accelerator.device, together)
    console.print("\n".join(plan.lines))
    if dry_run:
        console.print("\n".join([on_gpus(recipe, config, draft), *describe_work(recipe, disk)]))
        if accelerator.is_main_process:
            console.print(write_untrained(layer, recipe))
        return True
    tokenizer = read_tokenizer(recipe.target)
    if recipe.chat_template is not None:
        tokenizer.chat_template = recipe.chat_template
    # Data is tried before the output folder is made.
    prepared = together.main_first(
        lambda: [prepare_rows(recipe, stage, tokenizer) for stage in recipe.stages]
    )
    together.on_main(lambda: checkpoint.start_run(recipe, held))
    if recipe.draft_vocab_size is not None:
        keep_frequent_tokens(
            layer, recipe.draft_vocab_size, [tokens for tokens, _ in prepared], console
        )
    done = checkpoint.done(recipe)
    if len(done.finished) == len(recipe.stages) and checkpoint.is_written(recipe):
        console.print(f"{recipe.output} is finished; nothing to do")
        return True
    if plan.sharded:
        target = load_sharded_target(recipe.target, accelerator.device, together)
    else:
        target = load_target(recipe.target, accelerator.device)
    run = Run(
        recipe, accelerator, console, target, first_token(tokenizer),
        progress.load_log(recipe.output, done.finished, done.running, done.steps)
        if accelerator.is_main_process
        else [],
        stop,
        together,
    )  # fmt: skip
    accelerator.wait_for_everyone()
    if not trackers:
        console.print("no tracker: tensorboard is not installed")
    start_trackers(accelerator, recipe, steps_before(recipe, done))
    console.print(f"{sum(p.numel() for p in trainable(layer)) / 1e6:.2f}M trainable parameters")
    for index, stage in enumerate(recipe.stages):
        folder = recipe.output / checkpoint.STAGES / stage.name
        if stage.name in done.finished:
            console.print(f"stage {stage.name}: finished before")
            layer = load_draft(folder)
            continue
        start = 0
        if stage.name == done.running and done.folder is not None:
            start, layer = done.steps, load_draft(done.folder)
        layer.config.window = stage.window or recipe.window or layer.config.window
        tokens, rows = prepared[index]
        rows, held_out_rows = split_rows(rows, stage)
        held_out = HeldOut(
            run.target, tokens, held_out_rows, run.first_token, accelerator.device, together
        )
        if not train_stage(run, index, layer, tokens, rows, held_out, start, done):
            return False
        if accelerator.is_main_process:
            stop.finishing = lambda: "finishing what is being written"
        together.on_main(partial(checkpoint.save_stage, layer, folder, stage.steps))
        last = index == len(recipe.stages) - 1
        if last:
            together.on_main(partial(checkpoint.save_served, layer, recipe))
        judge(run, index, layer, held_out, stage.steps - 1)
        layer = layer.to("cpu")
        if run.together.any(stop.asked)[0] and not last:
            console.print(f"stopped after stage {stage.name}; the same command goes on from here")
            end_trackers(accelerator)
            return False
    if accelerator.is_main_process:
        if not checkpoint.is_written(recipe):
            checkpoint.save_served(layer, recipe)
        if run.log:
            stages = [(stage.name, stage.steps) for stage in recipe.stages]
            progress.plot_loss(run.log, stages, recipe.output / progress.PLOT_FILE)
    end_trackers(accelerator)
    console.print(f"wrote {recipe.output}")
    return True


def check_lengths(recipe: Recipe, config: Any) -> None:
    """Raises LongSpecError for sequences longer than the target is made for."""
    longest = recipe.context_length or context_length(config)
    for stage in recipe.stages:
        if stage.sequence_length > longest:
            raise LongSpecError(
                f"sequence_length: {stage.sequence_length} of stage {stage.name!r} is more than "
                f"the target's {longest} positions; lower it, or set context_length in a recipe"
            )


def bytes_written(recipe: Recipe, layer: DraftLayer) -> int:
    """Of a run at most: a checkpoint of three tensors a parameter, while it is replaced twice; the
    stages' drafts in float32, which a run that goes on has already; the one that is served."""
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    there = (recipe.output / checkpoint.CHECKPOINT).is_dir()
    copies = 3 if there else 6 + len(recipe.stages)
    return LEAST_ROOM + parameters * (4 * copies + 2)


def steps_before(recipe: Recipe, done: checkpoint.Done) -> int:
    finished = sum(stage.steps for stage in recipe.stages if stage.name in done.finished)
    return finished + done.steps * (done.running is not None and done.running not in done.finished)


def first_layer(recipe: Recipe, config: Any) -> DraftLayer:
    draft_config = draft_config_for(config)
    check_layer(draft_config)
    num_drafted_tokens(draft_config_for(config, draft_vocab_size=recipe.draft_vocab_size))
    layer = DraftLayer(draft_config)
    if recipe.init is None:
        generator = torch.Generator().manual_seed(recipe.stages[0].seed)
        init_weights(layer, generator, recipe.initial_weights == "zero-output")
    else:
        check_init(recipe.init, layer.config)
        layer = load_draft(recipe.init)
    record_target(layer.config, config, recipe.target)
    return layer


def check_init(folder: Any, config: LongSpecConfig) -> None:
    """Raises LongSpecError unless training can start from the draft in `folder`."""
    try:
        draft = read_draft_config(folder)
    except LongSpecError as error:
        raise LongSpecError(f"init: {str(error).removeprefix('draft: ')}") from error
    if getattr(draft, "draft_vocab_size", None) is not None:
        raise LongSpecError(
            f"init: the draft in {folder} knows a part of the vocabulary; give one "
            "trained without draft_vocab_size, or the one it was trimmed from"
        )
    check_checkpoint(folder, config)


def keep_frequent_tokens(
    layer: DraftLayer, size: int, texts: list[np.ndarray], console: Console
) -> None:
    """Of what the stages learn, each text [num_tokens] int32 as stored."""
    vocab_size = layer.config.vocab_size
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in texts:
        for start in range(0, len(tokens), COUNTED_AT_ONCE):  # bincount makes int64 of them
            part = learned(tokens[start : start + COUNTED_AT_ONCE])
            counts += np.bincount(part, minlength=vocab_size)
    ids = most_frequent(counts, size)
    layer.keep_tokens(torch.from_numpy(ids))
    share = counts[ids].sum() / counts.sum()
    console.print(f"{size:,} of {vocab_size:,} tokens cover {share:.2%} of the text")


def trainable(layer: DraftLayer) -> list[torch.nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


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
    run: Run,
    index: int,
    layer: DraftLayer,
    tokens: np.ndarray,
    rows: Rows,
    held_out: HeldOut,
    start: int,
    done: checkpoint.Done,
) -> bool:
    """Train `layer` in place. False if a signal stopped it."""
    accelerator, console, recipe = run.accelerator, run.console, run.recipe
    stage, is_main = recipe.stages[index], run.accelerator.is_main_process
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
        trainable(layer), lr=stage.learning_rate, betas=recipe.betas, eps=recipe.epsilon,
        weight_decay=WEIGHT_DECAY,
    )  # fmt: skip
    if start and not checkpoint.load_optimizer(layer, optimizer, done.folder):
        console.print(f"stage {stage.name}: without its checkpoint AdamW starts anew")
    model = accelerator.prepare_model(layer)
    head = drafted_head(run.target.get_output_embeddings().weight, layer.draft_token_ids)
    before = sum(s.steps for s in recipe.stages[:index])
    folder, last = recipe.output / checkpoint.CHECKPOINT, index == len(recipe.stages) - 1
    losses, counted, saved = torch.zeros((), device=accelerator.device), 0, time.monotonic()

    def save(steps: int) -> None:
        checkpoint.save_checkpoint(layer, optimizer, folder, stage.name, steps)

    with Watch(console, stage, start) as watch:
        run.stop.finishing = watch.finishing if is_main else lambda: ""
        for step in range(start, stage.steps):
            rate = stage.learning_rate * learning_rate_factor(step, stage.steps)
            losses += train_step(
                run, stage, index, model, head, optimizer, tokens, rows, step, rate,
                watch.batch_done,
            )  # fmt: skip
            counted += 1
            watch.step_done(step)
            stop, time_due, judge_due = run.together.any(
                run.stop.asked,
                is_main and watch.time_due(),
                is_main and held_out.due(watch.elapsed, watch.tokens_per_second),
            )
            if watch.row_due(step) or time_due or stop:
                value = float(accelerator.reduce(losses, "mean")) / counted
                if not math.isfinite(value):
                    raise LongSpecError(
                        f"learning_rate: the loss of stage {stage.name!r} is no number at step "
                        f"{step + 1}; lower it, or set gradient_clipping. What was saved before is "
                        f"in {recipe.output}"
                    )
                losses, counted = torch.zeros_like(losses), 0
                watch.log(value)
                record(run, before + step, {
                    "stage": stage.name, "step": step, "loss": value, "learning_rate": rate,
                    "tokens_per_second": round(watch.tokens_per_second),
                    "seconds_left": round(watch.seconds_left),
                })  # fmt: skip
            watch.show()
            unfinished = step + 1 < stage.steps
            if judge_due and unfinished and not stop:
                judge(run, index, layer, held_out, step, watch.elapsed)
            old = time.monotonic() - saved >= 60 * recipe.checkpoint_every_minutes
            if stop:
                run.together.on_main(partial(save, step + 1))
            elif is_main and old and unfinished:
                try_to_save(run, partial(save, step + 1))
                saved = time.monotonic()
            if stop and unfinished:
                console.print(f"stopped after step {step + 1}; the same command goes on from here")
                end_trackers(accelerator)
                return False
    if start < stage.steps:
        console.print(
            f"{stage.steps - start} steps in {watch.elapsed:.0f} s, "
            f"{watch.tokens_per_second:,.0f} tokens/s"
        )
    if last and start < stage.steps:
        run.together.on_main(partial(save, stage.steps))
    accelerator.free_memory()
    return True


def try_to_save(run: Run, save: Callable[[], object]) -> None:
    """A full disk ends no run in between: there is time to make room, and the checkpoint before is
    still there."""
    try:
        save()
    except LongSpecError as error:
        run.console.print(f"{error}; going on without, the next checkpoint is tried in time")


def judge(
    run: Run, index: int, layer: DraftLayer, held_out: HeldOut, step: int, elapsed: float = 0.0
) -> None:
    """By held-out text, unless the run is asked to stop; on all processes."""
    rates = held_out.judge(layer, lambda: run.stop.asked, elapsed)
    if rates is None:
        return
    stages, accepted = run.recipe.stages, chain_acceptance(rates)
    run.console.print(
        f"step {step + 1}: agrees with the target's most probable token at shift 1, 2, ...: "
        + ", ".join(f"{rate:.3f}" for rate in rates)
        + f"; about {accepted:.2f} tokens a verification as a chain of {len(rates)} at T=0"
    )
    record(run, sum(stage.steps for stage in stages[:index]) + step, {
        "stage": stages[index].name, "step": step, "agreement": rates,
        "tokens_per_verification": accepted,
    })  # fmt: skip


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
    batch_done: Callable[[int, int, int], None],
) -> torch.Tensor:
    """One update. This process's loss; their mean is the step's. `batch_done` is told of each batch
    its number, how many there are, and the whole step's tokens."""
    accelerator, target = run.accelerator, run.target
    reach = longest_position(run) if stage.positions == "anchor-offset" else None
    data = step_data(
        rows, step, (stage.seed, index), stage.sequences_per_step, stage.max_shift, reach
    )
    per_process = stage.sequences_per_step // accelerator.num_processes
    first = accelerator.process_index * per_process
    share = range(first, first + per_process)
    total = torch.zeros((), device=accelerator.device)
    num_batches = math.ceil(per_process / stage.sequences_per_batch)
    batches = step_batches(tokens, data, share, stage.sequences_per_batch, run.first_token)
    for number, batch in enumerate(batches, start=1):
        batch = batch.to(accelerator.device)
        batch.labels = labels_in(head, batch.labels)
        state = run_target(target, batch.tokens, batch.positions, batch.lengths, batch.runs)
        with accelerator.no_sync(model) if number < num_batches else nullcontext():
            with bf16(accelerator.device):
                loss = draft_loss(model, head.weight, state, batch, batch.shifts, stage.learn_from)
            # Processes average their gradients, so each takes its share of the mean that often.
            loss = loss * (accelerator.num_processes / data.num_labels)
            accelerator.backward(loss)
        total += loss.detach()
        batch_done(number, num_batches, data.num_tokens)
    if run.recipe.gradient_clipping is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.recipe.gradient_clipping)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return total


def record(run: Run, step: int, row: progress.Row) -> None:
    """`step`: of all stages."""
    if not run.accelerator.is_main_process:
        return
    run.log.append(row)
    try:
        progress.append_log(row, run.recipe.output)
    except OSError as error:  # a run is worth more than its log
        run.console.print(f"{progress.LOG_FILE} cannot be written ({error.strerror})")
    run.accelerator.log(numbers(row), step=step)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine to zero.

    Transformers' schedule of this kind wastes the first step at a rate of 0, and its scheduler is
    one more state to save and restore: this one follows from the step, as the data does.
    """
    warmup = max(1, int(steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
