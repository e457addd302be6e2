"""What a request asks of LongSpec, as its slot is told to the kernels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_longspec.draft.inputs import CHAIN, OFF, TREE
from vllm_longspec.runtime.model_state import LongSpecModelState
from vllm_longspec.runtime.slots import Slots

GRAMMAR = StructuredOutputsParams(regex="a+")


@pytest.mark.parametrize(
    "given, mode",
    [({}, TREE), ({"extra_args": {"longspec": "on"}}, TREE),
     ({"presence_penalty": 0.5}, TREE),
     ({"structured_outputs": GRAMMAR}, CHAIN),
     ({"structured_outputs": GRAMMAR, "extra_args": {"longspec": "on"}}, CHAIN),
     ({"extra_args": {"longspec": "off"}}, OFF),
     ({"structured_outputs": GRAMMAR, "extra_args": {"longspec": "off"}}, OFF)],
)  # fmt: skip
def test_a_slot_gets_the_mode_of_its_request(
    given: dict[str, Any], mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a slot whose last request asked otherwise."""
    state = LongSpecModelState.__new__(LongSpecModelState)
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    monkeypatch.setattr(
        "vllm_longspec.runtime.slots.UvaBackedTensor",
        lambda size, dtype: SimpleNamespace(np=np.zeros(size, dtype=np.int32)),
    )
    for before in (TREE, CHAIN, OFF):
        slots = Slots(2)
        slots.modes.np[:] = before
        runtime: Any = SimpleNamespace(chain_only=False, slots=slots)
        state.runtime = runtime
        request: Any = SimpleNamespace(sampling_params=SamplingParams(**given))
        state.add_request(1, request)
        assert slots.modes.np.tolist() == [before, mode]
