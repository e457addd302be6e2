"""Equality with plain vLLM on engines, requests and arrivals drawn at random; float32, on a CPU.

`LONGSPEC_SEED=7 pytest tests/test_random.py` draws another case; the seed is in the test's name.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_like import choose_at_random
from helpers import Engine, Output, assert_same, longspec, synthetic_prompt, text_prompt
from processes import EngineProcess, own_process

from vllm_longspec.runtime.menus import Menu, with_copies
from vllm_longspec.tree.budget import Plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

NUM_REQUESTS = 12
SHAPES = ([1], [1, 1, 1], [2, 4], [4, 8, 8], [3, 1, 5, 2], [8, 16, 16], [4, 16, 16, 16, 16])
SEED = int(os.environ.get("LONGSPEC_SEED", "0"))


def draw_menus(rng: random.Random, max_num_seqs: int) -> list[Menu] | None:
    """Plans of which each step takes another, or none; None: the engine follows its options."""
    if rng.random() < 0.4:
        return None
    menus, first = [], 1
    while first <= max_num_seqs:
        last = rng.randint(first, max_num_seqs)
        shapes = rng.sample(SHAPES, rng.randint(1, 3))
        plans = tuple(Plan(tuple(shape), rng.randint(1, min(40, sum(shape)))) for shape in shapes)
        menus.append(with_copies(Menu(first, last, plans, plans[0])))
        first = last + 1
    return menus


def draw_engine(rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """A speculative config, and what else the engine is started with."""
    shape = rng.choice(SHAPES)
    speculative: dict[str, Any] = {"tree_shape": shape}
    max_num_seqs = rng.randint(2, 6)
    if rng.random() < 0.6:
        first, schedule = 1, []
        while first <= max_num_seqs:
            last = rng.randint(first, max_num_seqs)
            nodes = rng.randint(0 if schedule else 1, sum(shape))
            schedule.append([first, last, nodes])
            first = last + 1
        speculative["num_speculative_tokens_per_batch_size"] = schedule
    else:
        speculative["num_speculative_tokens"] = rng.randint(1, sum(shape))
    if rng.random() < 0.3:
        speculative["quantization"] = "fp8"
    options = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.choice([96, 192, 512, 2048]),
        "num_gpu_blocks_override": rng.choice([90, 140, 400]),
        "block_size": 16,
        "enable_prefix_caching": rng.random() < 0.7,
    }
    return longspec(**speculative), options


def draw_requests(rng: random.Random) -> list[dict[str, Any]]:
    """Prompts, sampling parameters, the step at which each arrives and, of some, ends early."""
    requests: list[dict[str, Any]] = []
    for _ in range(NUM_REQUESTS):
        prompt = rng.choice([text_prompt, synthetic_prompt])(
            rng.randrange(16), rng.choice([1, 2, 17, 63, 130, 300, 513, 640])
        )
        if requests and rng.random() < 0.3:  # a prefix that may be cached
            prompt = rng.choice(requests)["prompt"][: rng.randint(1, 400)] + prompt[:200]
        params: dict[str, Any] = {
            "temperature": rng.choice([0.0, 0.0, 0.6, 1.0]), "seed": rng.randrange(1000),
            "max_tokens": rng.randint(1, 40), "ignore_eos": True,
        }  # fmt: skip
        for name, values in (
            ("top_p", [0.9]), ("top_k", [1, 20]), ("min_p", [0.05]), ("logprobs", [3]),
            ("repetition_penalty", [1.2]), ("presence_penalty", [0.8]), ("min_tokens", [3]),
            ("stop_token_ids", [[11, 12, 13, 199]]), ("logit_bias", [{100: 4.0}]),
            ("frequency_penalty", [0.5]), ("bad_words", [["self", "("], ["import"]]),
            ("structured_outputs", [{"regex": r"[a-f]{9}\d{30}"}]),
        ):  # fmt: skip
            if rng.random() < 0.15:
                params[name] = rng.choice(values)
        params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
        arrival = rng.randint(0, 20)
        aborted = arrival + rng.randint(1, 12) if rng.random() < 0.15 else None
        requests.append(
            {"prompt": prompt, "params": params, "arrival": arrival, "aborted": aborted}
        )
    return requests


def sampling(params: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = params.get("structured_outputs")
    if grammar is None:
        return SamplingParams(**params)
    return SamplingParams(**params | {"structured_outputs": StructuredOutputsParams(**grammar)})


def run(
    speculative: dict[str, Any],
    options: dict[str, Any],
    requests: list[dict[str, Any]],
    menus: list[Menu] | None,
) -> tuple[dict[int, list[int]], dict[str, int]]:
    """In a process of its own, in which a step is made when it is asked for: the tokens of the
    requests that ran to their end, by number, and vLLM's counters."""
    if menus is not None:
        choose_at_random(menus, Counter())
    engine = Engine(speculative, **options)
    return serve(engine, requests), engine.counters()


def serve(engine: Engine, requests: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Of an engine that makes a step when it is asked for."""
    llm = engine.llm.llm_engine
    tokens: dict[int, list[int]] = {}
    step, waiting = 0, list(enumerate(requests))
    while waiting or llm.has_unfinished_requests():
        for i, request in [entry for entry in waiting if entry[1]["arrival"] <= step]:
            prompt = {"prompt_token_ids": request["prompt"]}
            llm.add_request(str(i), prompt, sampling(request["params"]))
        waiting = [entry for entry in waiting if entry[1]["arrival"] > step]
        llm.abort_request([str(i) for i, r in enumerate(requests) if r["aborted"] == step])
        for output in llm.step():
            if output.finished:
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 3000, "the engine makes no progress"
    return tokens


@pytest.fixture(scope="module")
def plain() -> Iterator[EngineProcess]:
    engine = EngineProcess(max_num_seqs=8)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "seed", [SEED, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 12))]
)
def test_any_engine_gives_plain_tokens(plain: EngineProcess, seed: int) -> None:
    rng = random.Random(seed)
    speculative, options = draw_engine(rng)
    requests = draw_requests(rng)
    menus = draw_menus(rng, options["max_num_seqs"])
    print(seed, speculative, options, menus)
    with own_process() as pool:
        tokens, counters = pool.submit(run, speculative, options, requests, menus).result()
    print(counters)
    ended = [i for i, request in enumerate(requests) if request["aborted"] is None]
    assert set(ended) <= set(tokens)
    prompts = [requests[i]["prompt"] for i in ended]
    expected = plain.generate(prompts, [sampling(requests[i]["params"]) for i in ended])
    assert_same(expected, [Output(tokens[i], "") for i in ended], prompts)
