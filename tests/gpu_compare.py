"""LongSpec against plain vLLM on a GPU, in bf16: equal up to near-ties of two logits."""

import math
from pathlib import Path
from typing import Any

from helpers import (
    Engine,
    Output,
    assert_same_up_to_near_ties,
    bf16_spacing,
    longspec,
    spacings_of_a_difference,
    text_prompt,
)

NUM_PROMPTS = 16
OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": NUM_PROMPTS,
    "enforce_eager": False, "kv_cache_memory_bytes": 1 << 29, "gpu_memory_utilization": 0.05,
    "logprobs_mode": "processed_logits",
    # Full graphs without torch.compile, which takes most of a start.
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}  # fmt: skip


def greedy() -> tuple[list[list[int]], list[Any]]:
    from vllm import SamplingParams

    prompts = [text_prompt(i, 3 + 40 * i) for i in range(NUM_PROMPTS)]
    params = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, logprobs=4)
    return prompts, [params] * NUM_PROMPTS


def plain_outputs(**options: Any) -> tuple[list[Output], int]:
    """And by how many spacings of bf16 the distance of the best two logits differs, at most, from
    plain decoding's own at other batch sizes."""
    prompts, params = greedy()
    engine = Engine(**options)
    expected = engine.generate(prompts, params)
    widest = 1
    for size in (8, 4, 2):
        for first in range(0, NUM_PROMPTS, size):
            part = slice(first, first + size)
            for one, other in zip(
                expected[part], engine.generate(prompts[part], params[part]), strict=True
            ):
                widest = max([widest, *spacings_of_a_difference(one, other), *noise(one, other)])
    engine.close()
    return expected, widest


def noise(one: Output, other: Output) -> list[int]:
    """At each token until the outputs differ: how much the distance of the best two logits of the
    first is another one in the second, in spacings of bf16, rounded up."""
    found = []
    for ours, theirs, token, same in zip(
        one.logprobs, other.logprobs, one.tokens, other.tokens, strict=True
    ):
        best, second = sorted(ours, key=lambda key: -ours[key])[:2]
        if best in theirs and second in theirs:
            distances = [logits[best] - logits[second] for logits in (ours, theirs)]
            found.append(math.ceil(abs(distances[0] - distances[1]) / bf16_spacing(ours[best])))
        if token != same:
            break
    return found


def compare(name: str, *drafts: Path, **options: Any) -> None:
    """Of each draft, that outputs are plain vLLM's up to near-ties."""
    expected, widest = plain_outputs(**options)
    assert all(len(set(output.tokens)) > 2 for output in expected)
    for draft in drafts:
        engine = Engine(
            longspec(model=str(draft), tree_shape=[4, 8, 8], num_speculative_tokens=15), **options
        )
        got = engine.generate(*greedy())
        counters = engine.counters()
        engine.close()
        # Few prompts do not show the widest; a wrong node's logits would be tens of spacings off.
        differing = assert_same_up_to_near_ties(expected, got, max(4, 2 * widest))
        print(
            f"{name}, {draft.name}: {NUM_PROMPTS - differing} of {NUM_PROMPTS} identical; plain "
            f"decoding's own near-ties within {widest} spacings; {counters}"
        )
