"""How well a draft does on text that it is not trained on, while it is trained and at the end."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from vllm_longspec.train.loss import IGNORED
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.objective import agreement
from vllm_longspec.train.packing import Rows, make_batch
from vllm_longspec.train.positions import MAX_SHIFT
from vllm_longspec.train.recipe import Stage
from vllm_longspec.train.together import Together

MAX_HELD_OUT = 32  # sequences
MAX_HELD_OUT_TOKENS = 1 << 17
SHARE = 0.03  # of a stage's time, at most
LEAST_SECONDS = 30  # between two judgements
COST = 3  # of a held-out token in tokens trained, before the first judgement was timed


class Interrupted(Exception):  # noqa: N818
    """A process of the run was asked to stop."""


def split_rows(rows: Rows, stage: Stage) -> tuple[Rows, Rows]:
    """Those to train on, and the last ones, to judge by."""
    most = min(MAX_HELD_OUT, MAX_HELD_OUT_TOKENS // stage.sequence_length, len(rows) // 10)
    last = len(rows) - max(1, most)
    return rows[:last], rows[last:]


def bf16(device: torch.device) -> torch.autocast:
    """For the layer's products on a GPU; its weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class HeldOut:
    def __init__(
        self,
        target: PreTrainedModel,
        tokens: np.ndarray,
        rows: Rows,
        first_token: int | None,
        device: torch.device,
        together: Together,
    ) -> None:
        self.target, self.tokens, self.rows = target, tokens, rows
        self.first_token, self.device, self.together = first_token, device, together
        self.seconds = 0.0  # of all judgements
        self.last: float | None = None  # of the last one
        self.judged_at = 0.0  # seconds into the stage

    def due(self, elapsed: float, tokens_per_second: float) -> bool:
        """Whether there is time for a judgement, `elapsed` seconds into a stage that trains so
        many tokens a second."""
        if elapsed - self.judged_at < LEAST_SECONDS:
            return False
        cost = self.last
        if cost is None:
            cost = COST * int(self.rows.lengths.sum()) / max(1.0, tokens_per_second)
        return self.seconds + cost <= SHARE * elapsed

    def judge(
        self, layer: DraftLayer, stop: Callable[[], bool], elapsed: float = 0.0
    ) -> list[float] | None:
        """Agreement at shift 1, 2, ...; None if it was stopped. All processes judge at the same
        time, each by a part of the rows; `stop`: whether this one was asked to."""
        started, training = time.monotonic(), layer.training
        together, count = self.together, len(self.rows)

        def batches() -> Iterator[Any]:
            for first in range(0, count, together.size):
                if together.any(stop())[0]:
                    raise Interrupted
                number = first + together.rank
                row = min(number, count - 1)
                batch = make_batch(
                    self.tokens, [self.rows[row : row + 1]], first_token=self.first_token
                )
                if number >= count:  # a sharded target runs on all processes or on none
                    batch.labels.fill_(IGNORED)
                yield batch.to(self.device)

        try:
            with bf16(self.device):
                hits, total = agreement(layer.eval(), self.target, batches(), MAX_SHIFT + 1)
            *hits, total = together.sum(*hits, total)
            return [hit / total for hit in hits]
        except Interrupted:
            return None
        finally:
            layer.train(training)
            self.last = time.monotonic() - started
            self.seconds += self.last
            self.judged_at = elapsed
