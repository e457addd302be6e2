"""Conversations: each turn's prompt is all that was said, and is found in the prefix cache."""

from typing import Any

import pytest
import torch
from helpers import Engine, longspec, text_prompt
from processes import EngineProcess
from vllm import SamplingParams

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

NUM_TURNS, NUM_TOKENS = 10, 9
# Prompts in pieces beside decodes.
OPTIONS: dict[str, Any] = {
    "block_size": 32, "max_num_batched_tokens": 96, "enable_chunked_prefill": True,
}  # fmt: skip


def talk(engine: Engine, num_talkers: int) -> dict[str, list[Any]]:
    """By turn: tokens of the answers, tokens of the prompts that were found, blocks in use."""
    cached = [text_prompt(i, 70 + 50 * i) for i in range(num_talkers)]
    seen: dict[str, list[Any]] = {"answers": [], "found": [], "in use": []}
    for turn in range(NUM_TURNS):
        before = engine.counter("vllm:prefix_cache_hits")
        params = [
            SamplingParams(
                temperature=0.6 * (i % 2), seed=10 * turn + i, max_tokens=NUM_TOKENS + i,
                ignore_eos=True,
            )
            for i in range(num_talkers)
        ]  # fmt: skip
        answers = [output.tokens for output in engine.generate(cached, params)]
        seen["answers"].append(answers)
        seen["found"].append(engine.counter("vllm:prefix_cache_hits") - before)
        seen["in use"].append(engine.counter("vllm:kv_cache_usage_perc"))
        cached = [
            [*text, *answer, *text_prompt(turn + i, 15 + 8 * i)]
            for i, (text, answer) in enumerate(zip(cached, answers, strict=True))
        ]
    return seen


def both(num_talkers: int, **options: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Plain vLLM's, LongSpec's."""
    found = []
    for speculative_config in (None, longspec()):
        engine = EngineProcess(speculative_config, **OPTIONS, **options)
        found.append(engine.call(talk, num_talkers))
        engine.close()
    return found[0], found[1]


def test_ten_turns() -> None:
    plain, speculated = both(2)
    assert plain["answers"] == speculated["answers"]
    assert plain["found"] == speculated["found"] and sum(plain["found"]) > 2000
    assert not any(plain["in use"]) and not any(speculated["in use"])


@pytest.mark.full
def test_ten_turns_in_a_small_pool() -> None:
    """Where conversations wait for each other's blocks and lose them, and a ring takes four."""
    plain, speculated = both(4, num_gpu_blocks_override=42)
    assert plain["answers"] == speculated["answers"]
    assert not any(speculated["in use"])


def converse(engine: Engine) -> list[list[int]]:
    """Tokens of each chunk of sessions whose input is streamed, then of ordinary requests that find
    a session's text in the cache."""
    from vllm.sampling_params import RequestOutputKind

    vllm = engine.llm.llm_engine
    client = vllm.engine_core
    core = client.engine_core
    answers, texts = [], []
    for session in range(4):
        name, text = f"session {session}", []
        for chunk in range(3):
            tokens = text_prompt(session + 7 * chunk, 20 + 9 * session)
            params = SamplingParams(
                temperature=0, max_tokens=6 + 2 * session + chunk, ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            request = vllm.input_processor.process_inputs(
                name, {"prompt_token_ids": tokens}, params, ("generate",), resumable=True
            )
            client.add_request(request)
            answer: list[int] = []
            finished = False
            while not finished:
                outputs, executed = core.step_fn()
                core.post_step(executed)
                for output in (o for of in (outputs or {}).values() for o in of.outputs):
                    answer += output.new_token_ids
                    finished |= output.finish_reason is not None
            answers.append(answer)
            text += [*tokens, *answer[:-1]]  # the last one is dropped where a session goes on
        core.abort_requests([name])
        texts.append(text)
    for _ in range(3):
        core.step_fn()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return answers + [output.tokens for output in engine.generate(texts, [params] * len(texts))]


def test_streamed_input() -> None:
    """A tree may be accepted beyond a chunk's last token, which was never said."""
    said = []
    for speculative_config in (None, longspec()):
        engine = EngineProcess(speculative_config, block_size=32)
        said.append(engine.call(converse))
        engine.close()
    assert said[0] == said[1]
