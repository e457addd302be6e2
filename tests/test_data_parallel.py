"""Two engines in parallel on data, on one machine's CPU."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import DRAFT, text_prompt
from openai import OpenAI
from test_server import MODEL, OPTIONS, client

from vllm_longspec.eval.server import running_servers

pytestmark = [
    pytest.mark.full,  # three engines start
    pytest.mark.skipif(torch.cuda.is_available(), reason="float32 equality is for CPUs"),
]

NUM_REQUESTS = 12
SCHEDULE = [[1, 1, 15], [2, 3, 7], [4, 8, 2]]  # vLLM drops it: the workers follow it


def test_outputs_are_plain_ones() -> None:
    """A dozen at once, so that each engine has batches of every size of the schedule as requests
    end one after another; greedy and seeded."""
    longspec = {
        "method": "longspec",
        "model": str(DRAFT),
        "num_speculative_tokens_per_batch_size": SCHEDULE,
    }
    engines = ["--data-parallel-size", "2", "--speculative-config", json.dumps(longspec)]
    with running_servers((MODEL, OPTIONS), (MODEL, [*OPTIONS, *engines])) as (plain, parallel):
        expected = answers(client(plain))
        got = answers(client(parallel))
        metrics = parallel.metrics()
    assert got == expected
    assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > NUM_REQUESTS


def answers(server: OpenAI) -> list[Any]:
    # Before the threads: what imports transformers' modules when they are asked for fails in them.
    prompts = [text_prompt(i, 20 + 30 * i) for i in range(NUM_REQUESTS)]

    def answer(i: int) -> Any:
        choice = server.completions.create(
            model=MODEL, prompt=prompts[i], max_tokens=8 + 3 * i,
            temperature=0.8 * (i % 2), seed=i, extra_body={"return_token_ids": True},
        ).choices[0]  # fmt: skip
        return choice.token_ids, choice.finish_reason

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return list(pool.map(answer, range(NUM_REQUESTS)))
