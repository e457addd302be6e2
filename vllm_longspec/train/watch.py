"""What a stage shows while it runs: a bar, or where there is no terminal a line every half minute,
within long steps, too; and how long is left."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_longspec.train.recipe import Stage

LOG_SECONDS = 30
LEAST_ROWS = 100  # of the log, for a stage that is shorter than so many times LOG_SECONDS


class Watch:
    def __init__(self, console: Console, stage: Stage, start: int) -> None:
        self.console, self.stage, self.start = console, stage, start
        self.done = float(start)  # steps, with parts of the one that runs
        self.tokens = 0.0  # trained since `start`
        self.said = ""  # the last loss
        self.began = self.logged = self.shown = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.bar.add_task(stage.name, total=stage.steps, completed=start, info="")

    def __enter__(self) -> "Watch":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, self.elapsed)

    @property
    def seconds_per_step(self) -> float | None:
        trained = self.done - self.start
        return self.elapsed / trained if trained > 0 else None

    @property
    def seconds_left(self) -> float:
        return (self.seconds_per_step or 0.0) * (self.stage.steps - self.done)

    def batch_done(self, batches: int, of: int, num_tokens: int) -> None:
        """Of a step of `num_tokens`."""
        self.done += 1 / of
        self.tokens += num_tokens / of
        within = f"batch {batches} of {of}" if 1 < of != batches else ""
        self.show(within)

    def step_done(self, step: int) -> None:
        self.done = float(step + 1)  # the sum of parts is not quite one

    def show(self, within: str = "") -> None:
        now = time.monotonic()
        info = ", ".join(
            part for part in (within, self.said, f"{self.tokens_per_second:,.0f} tokens/s") if part
        )
        self.bar.update(self.task, completed=self.done, info=info)
        if not self.console.is_terminal and now - self.shown >= LOG_SECONDS:
            self.shown = now
            left = timedelta(seconds=round(self.seconds_left))
            name, steps = self.stage.name, self.stage.steps
            self.console.print(f"{name}: step {int(self.done)} of {steps}, {info}, {left} left")

    def row_due(self, step: int) -> bool:
        """By the step alone, the same on every process; by time it is `time_due`."""
        last = step == self.stage.steps - 1
        return last or step % max(1, self.stage.steps // LEAST_ROWS) == 0

    def time_due(self) -> bool:
        return time.monotonic() - self.logged >= LOG_SECONDS

    def log(self, loss: float) -> None:
        self.logged = time.monotonic()
        self.said = f"loss {loss:.3f}"

    def finishing(self) -> str:
        """What is said at Ctrl-C."""
        each = self.seconds_per_step
        if each is None:
            return "finishing the step, then a checkpoint"
        left = each * (1 - self.done % 1)
        return f"finishing the step, about {max(1, round(left))} s, then a checkpoint"
