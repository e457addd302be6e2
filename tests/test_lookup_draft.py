"""Copies of the text alone: equality with plain vLLM, and that they are accepted. float32, CPU."""

import pytest
import torch
from gpu_like import generate_gpu_like
from helpers import assert_same, synthetic_prompt, text_prompt
from processes import EngineProcess
from vllm import SamplingParams

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

LOOKUP = {"method": "longspec", "draft": "lookup"}
REPEATED = text_prompt(3, 150)
PROMPTS = [
    [*REPEATED, *REPEATED[:90]],
    [*text_prompt(5, 300), *text_prompt(5, 40)],
    synthetic_prompt(2, 200),
    text_prompt(7, 120),
]
PARAMS = [
    SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=48, ignore_eos=True)
    for i in range(4)
]
# The tokens are drawn from what was computed before; a chain of what is copied.
PARAMS += [
    SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, repetition_penalty=1.1),
    SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2),
]
PROMPTS += [PROMPTS[0], PROMPTS[2]]


def test_lookup_draft() -> None:
    engine = EngineProcess()
    expected = engine.generate(PROMPTS, PARAMS)
    engine.close()
    engine = EngineProcess(LOOKUP)
    got = [engine.generate(PROMPTS, PARAMS), engine.one_by_one(PROMPTS[:2], PARAMS[:2])]
    counters = engine.counters()
    engine.close()
    print(counters)
    assert_same(expected, got[0], PROMPTS)
    assert_same(expected[:2], got[1], PROMPTS[:2])
    assert counters["accepted_tokens"] > 100
    few = LOOKUP | {"num_speculative_tokens": 3}
    as_on_a_gpu, replays = generate_gpu_like(few, [(PROMPTS[:3], PARAMS[:3])])
    assert_same(expected[:3], as_on_a_gpu[0], PROMPTS[:3])
    assert "CudaGraphManager, 4 requests" in replays
