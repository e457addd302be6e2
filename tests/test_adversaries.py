"""Drafts that propose nonsense, in a cache of NaN: tokens stay plain vLLM's."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Engine, Output, assert_same, longspec, text_prompt
from poison import poison
from processes import EngineProcess
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

EOS, STOPS = 1, [11, 12, 13, 199]
TREE = {"tree_shape": [3, 4, 4], "num_speculative_tokens": 9}
Top = tuple[torch.Tensor, torch.Tensor]  # log-probabilities, tokens; [num_rows, k] each


def put_first(tokens: list[int]) -> Callable[[Any, torch.Tensor, Top], Top]:
    def change(draft: Any, hidden: torch.Tensor, top: Top) -> Top:
        for column, token in enumerate(tokens[: top[1].shape[1]]):
            top[1][:, column] = token
        top[0][:, 0] = 0.0
        return top

    return change


def with_logprobs(value: float) -> Callable[[Any, torch.Tensor, Top], Top]:
    return lambda draft, hidden, top: (torch.full_like(top[0], value), top[1])


# What each makes of a level's most probable tokens.
ADVERSARIES: dict[str, Callable[[Any, torch.Tensor, Top], Top]] = {
    "the end at each node": put_first([EOS]),
    "stop tokens": put_first(STOPS),
    "one token only": put_first([5] * 4),
    "all as probable": with_logprobs(-1.0),
    "nothing is possible": with_logprobs(float("-inf")),
    "no number": with_logprobs(float("nan")),
}
HIDDEN = {"hidden states of NaN": float("nan"), "infinite hidden states": float("inf")}


def turn_into(engine: Engine, name: str) -> None:
    """Makes the engine's draft that adversary."""
    from vllm_longspec.draft.longspec import LongSpecDraft

    cls: Any = LongSpecDraft
    top_tokens = cls.top_tokens = getattr(cls, "own_top_tokens", cls.top_tokens)
    cls.own_top_tokens = top_tokens

    def changed(self: Any, hidden: torch.Tensor, next_width: int) -> Top:
        if name in HIDDEN:
            top: Top = top_tokens(self, torch.full_like(hidden, HIDDEN[name]), next_width)
            return top
        return ADVERSARIES[name](self, hidden, top_tokens(self, hidden, next_width))

    cls.top_tokens = changed


CASES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9},
    {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.2, "min_tokens": 6},
    {"temperature": 0, "stop_token_ids": STOPS, "min_tokens": 3},
    {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex=r"[a-f]{3}\d{2}")},
    {"temperature": 0.9, "seed": 5, "bad_words": ["self", "("], "logprobs": 2},
]
PROMPTS = [text_prompt(i, 20 + 45 * i) for i in range(len(CASES))]
PARAMS = [
    SamplingParams(**{"max_tokens": 9, "ignore_eos": i % 2 == 0, **case})
    for i, case in enumerate(CASES)
]


@pytest.fixture(scope="module")
def plain() -> Iterator[list[Output]]:
    engine = EngineProcess()
    yield engine.generate(PROMPTS, PARAMS)
    engine.close()


@pytest.fixture(scope="module")
def speculating() -> Iterator[EngineProcess]:
    engine = EngineProcess(longspec(**TREE))
    yield engine
    engine.close()


@pytest.mark.parametrize("name", [*ADVERSARIES, *HIDDEN])
def test_an_adversary(plain: list[Output], speculating: EngineProcess, name: str) -> None:
    speculating.call(turn_into, name)
    speculating.call(poison)
    before = speculating.counters().get("drafts", 0)
    assert_same(plain, speculating.generate(PROMPTS, PARAMS), PROMPTS)
    assert speculating.counters()["drafts"] > before
