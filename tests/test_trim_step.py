"""What a worker makes of a step that vLLM scheduled, and what it learns of it two steps later."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_longspec.runtime.controller import NONE
from vllm_longspec.runtime.hooks import trim
from vllm_longspec.runtime.observations import LAG, Batch, Observations


def scheduled(drafts: dict[str, int], others: dict[str, int]) -> SchedulerOutput:
    """Draft tokens of requests that decode; tokens of those in prefill."""
    output = SchedulerOutput.make_empty()
    output.scheduled_spec_decode_tokens = {name: [-1] * n for name, n in drafts.items()}
    output.num_scheduled_tokens = {name: 1 + n for name, n in drafts.items()} | others
    output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
    return output


def runner(slots: dict[str, int], nodes: int | None) -> tuple[Any, list[list[int]]]:
    """One whose requests' trees have `nodes`; and the slots that it was asked about."""
    asked: list[list[int]] = []

    def nodes_to_verify(of: np.ndarray) -> int | None:
        asked.append(of.tolist())
        return nodes

    speculator = SimpleNamespace(nodes_to_verify=nodes_to_verify)
    states = SimpleNamespace(req_id_to_index=slots)
    return SimpleNamespace(speculator=speculator, req_states=states), asked


@pytest.mark.parametrize("nodes", [0, 3, 7])
def test_as_many_nodes_as_the_trees_have(nodes: int) -> None:
    """A request that vLLM preempted has no slot; prefills stay; what was scheduled is untouched:
    the scheduler counts by it."""
    output = scheduled({"a": 7, "b": 2, "new": 7}, {"prompt": 100})
    before = (dict(output.num_scheduled_tokens), dict(output.scheduled_spec_decode_tokens))
    made, asked = runner({"a": 4, "b": 0, "prompt": 2}, nodes)
    step = trim(output, made)
    assert asked == [[4, 0]]
    kept = {name: min(n, nodes) for name, n in (("a", 7), ("b", 2), ("new", 7))}
    assert step.num_scheduled_tokens == {name: 1 + n for name, n in kept.items()} | {"prompt": 100}
    assert step.total_num_scheduled_tokens == sum(step.num_scheduled_tokens.values())
    drafted = {name: len(tokens) for name, tokens in step.scheduled_spec_decode_tokens.items()}
    assert drafted == {name: n for name, n in kept.items() if n}
    assert before == (output.num_scheduled_tokens, output.scheduled_spec_decode_tokens)


@pytest.mark.parametrize("regex", ["[ab]+", None])
def test_a_new_request_that_is_padded(regex: str | None) -> None:
    """All but its prompt's last token are cached: vLLM schedules a verification, and with a grammar
    as many masks."""
    output = scheduled({"a": 7, "new": 7}, {})
    grammar = None if regex is None else StructuredOutputsParams(regex=regex)
    params = SamplingParams(structured_outputs=grammar)
    new: Any = SimpleNamespace(req_id="new", sampling_params=params)
    output.scheduled_new_reqs = [new]
    step = trim(output, runner({"a": 1}, 0)[0])
    assert step is output if regex else not step.scheduled_spec_decode_tokens


def test_what_is_not_trimmed() -> None:
    output = scheduled({"a": 7}, {})
    for nodes in (None, 7, 9):  # None: a grammar has masks for all nodes
        assert trim(output, runner({"a": 0}, nodes)[0]) is output
    plain = scheduled({}, {"prompt": 5})
    assert trim(plain, runner({}, 0)[0]) is plain


def batch(slots: list[int], step: int) -> Batch:
    nothing = np.zeros(len(slots), dtype=np.int64)
    plans = np.array([NONE, *[1] * (len(slots) - 1)])
    return Batch(np.array(slots), np.full(len(slots), step), plans, nothing, nothing, nothing, None)


def test_observations_come_two_steps_later() -> None:
    observations = Observations(4, torch.device("cpu"))
    seen = []
    for step in range(8):
        seen.append(observations.receive())
        if step == 3:
            observations.skip()
            continue
        slots = list(range(1 + step % 3))
        numbers = torch.tensor([1 + step + slot for slot in slots], dtype=torch.int32)
        expected = None if step == 5 else numbers.float() / 2
        observations.send(batch(slots, step), numbers, numbers - 1, expected)
        numbers.zero_()  # the device goes on
    assert seen[:LAG] == [None] * LAG and seen[3 + LAG] is None
    for step in (0, 1, 2, 4, 5):
        arrived = seen[step + LAG]
        assert arrived is not None and arrived.generations[0] == step
        assert arrived.accepted.tolist() == [step + slot for slot in range(1 + step % 3)]
        assert arrived.copied.tolist() == arrived.accepted.tolist()
        assert (arrived.copies_expected is None) == (step == 5)
        others = arrived.of(arrived.plans != NONE)
        assert others.slots.tolist() == list(range(1, 1 + step % 3))
        assert others.accepted.tolist() == arrived.accepted.tolist()[1:]
    assert len(observations.free) == 1  # the others are on their way
