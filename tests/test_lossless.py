"""The product: with LongSpec, vLLM returns the tokens it returns without. float32, on a CPU."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers import (
    Output,
    assert_same,
    assert_same_up_to_near_ties,
    longspec,
    synthetic_prompt,
    text_prompt,
)
from poison import poison
from processes import EngineProcess
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

NEW_TOKENS = 64
LENGTHS = (1, 2, 5, 17, 63, 128, 300, 511, 512, 513, 700, 1000, 1500, 2500, 4000, 6000)
PROMPTS = [text_prompt(i, length) for i, length in enumerate(LENGTHS)]
SYNTHETIC_LENGTHS = (1, 16, 40, 100, 515, 900, 2000, 3000)
PROMPTS += [synthetic_prompt(i, length) for i, length in enumerate(SYNTHETIC_LENGTHS)]
SHORT = (0, 3, 8, 11, 13, 19)
SHORTEST = (1, 6, 9, 18)
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "chain of 5": {"tree_shape": [1] * 5},
    "1": {"tree_shape": [1]},
    "2 2 2 in FP8": {"tree_shape": [2, 2, 2], "quantization": "fp8"},
}
CHOSEN = ("default",)  # in `make test`; chains are what test_chain_fallback drafts
FULL = pytest.mark.full
LONG_CONTEXT: dict[str, Any] = {
    "max_model_len": 8192,
    # Else nano's JSON is blanks.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    # Of text that is code.
    "reasoning_config": {"reasoning_start_str": "(", "reasoning_end_str": " # enough\n"},
}

Case = tuple[list[list[int]], list[SamplingParams]]


def greedy(prompts: list[list[int]]) -> Case:
    return prompts, [
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True) for _ in prompts
    ]


class Plain:
    """Plain vLLM, and the outputs it already gave."""

    def __init__(self) -> None:
        self.engine = EngineProcess(**LONG_CONTEXT)
        self.outputs: dict[str, Output] = {}

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Output]:
        keys = [f"{p}{msgspec.structs.asdict(q)}" for p, q in zip(prompts, params, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self.outputs]
        made = self.engine.generate([prompts[i] for i in new], [params[i] for i in new])
        self.outputs |= {keys[i]: output for i, output in zip(new, made, strict=True)}
        return [self.outputs[key] for key in keys]


@pytest.fixture(scope="module")
def plain() -> Iterator[Plain]:
    made = Plain()
    yield made
    made.engine.close()


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in CHOSEN else FULL) for name in SHAPES],
)
def speculating(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    engine = EngineProcess(longspec(**SHAPES[request.param]), **LONG_CONTEXT)
    engine.shape = request.param  # type: ignore[attr-defined]
    yield engine
    engine.close()


@pytest.mark.parametrize("chosen", [SHORTEST, pytest.param(range(24), marks=FULL)], ids=len)
def test_greedy_one_by_one(plain: Plain, speculating: EngineProcess, chosen: Any) -> None:
    case = greedy([PROMPTS[i] for i in chosen])
    assert_same(plain.generate(*case), speculating.one_by_one(*case), case[0])


@pytest.mark.parametrize("chosen", [SHORT, pytest.param(range(24), marks=FULL)], ids=len)
def test_greedy_four_at_once(plain: Plain, speculating: EngineProcess, chosen: Any) -> None:
    case = greedy([PROMPTS[i] for i in chosen])
    assert_same(plain.generate(*case), speculating.generate(*case), case[0])


SAMPLING: dict[str, dict[str, Any]] = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "all": {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
}


@pytest.mark.parametrize("chosen", [(6, 9), pytest.param(range(0, 24, 2), marks=FULL)], ids=len)
def test_seeded_sampling(plain: Plain, speculating: EngineProcess, chosen: Any) -> None:
    prompts = [PROMPTS[i] for i in chosen for _ in SAMPLING]
    params = [
        SamplingParams(**options, seed=100 * i + n, max_tokens=32, ignore_eos=True)
        for i in chosen
        for n, options in enumerate(SAMPLING.values())
    ]
    assert_same(plain.generate(prompts, params), speculating.generate(prompts, params), prompts)


@pytest.fixture(scope="module")
def default_tree() -> Iterator[EngineProcess]:
    engine = EngineProcess(longspec(), **LONG_CONTEXT)
    engine.call(poison)
    yield engine
    engine.close()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["alpha", "beta"]}, "size": {"enum": [1, 22, 333]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
JSON = StructuredOutputsParams(json=SCHEMA)
HISTORIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "frequency": {"frequency_penalty": 0.9},
    "presence": {"presence_penalty": 1.5, "temperature": 0.8, "seed": 7},
    "all penalties": {"presence_penalty": -0.5, "frequency_penalty": 0.2, "top_p": 0.9,
                      "repetition_penalty": 1.1, "temperature": 1.0, "seed": 8},
    "bad words": {"bad_words": ["self", " return", "import os"]},
    "thinking": {"thinking_token_budget": 6},
}  # fmt: skip
GRAMMARS: dict[str, dict[str, Any]] = {
    "json": {"structured_outputs": JSON},
    "regex": {"structured_outputs": StructuredOutputsParams(regex=r"[a-f]{9}\d{5}"),
              "repetition_penalty": 1.2},
    "choice": {"structured_outputs": StructuredOutputsParams(choice=["yes sir", "no"]),
               "temperature": 1.0, "seed": 3},
}  # fmt: skip


@pytest.mark.parametrize("chosen", [(6,), pytest.param((2, 9, 11), marks=FULL)], ids=len)
def test_what_depends_on_the_tokens_before(
    plain: Plain, default_tree: EngineProcess, chosen: Any
) -> None:
    """Penalties, bad words and budgets along each node's path; grammars, of which a chain is
    drafted."""
    every = {**HISTORIES, **GRAMMARS, "none": {}}
    prompts = [PROMPTS[i] for i in chosen for _ in every]
    usual = {"temperature": 0, "max_tokens": 32}
    params = [
        SamplingParams(**{**usual, "ignore_eos": name not in GRAMMARS, **options})
        for _ in chosen
        for name, options in every.items()
    ]
    expected = plain.generate(prompts, params)
    assert_same(expected, default_tree.generate(prompts, params), prompts)
    texts = dict(zip(every, (output.text for output in expected), strict=False))
    assert len({texts[name] for name in (*HISTORIES, "none")}) == len(HISTORIES) + 1
    assert " # enough\n" in texts["thinking"]
    assert texts["choice"] in ("yes sir", "no") and '"size"' in texts["json"]
    assert re.fullmatch(r"[a-f]{0,9}\d{0,5}", texts["regex"])


def test_a_penalty_that_changes_no_choice_costs_no_acceptance(default_tree: EngineProcess) -> None:
    verifications = []
    for penalty in (0.0, 1e-7):
        before = default_tree.counters()["drafts"]
        params = SamplingParams(
            temperature=0, max_tokens=48, ignore_eos=True, frequency_penalty=penalty
        )
        output = default_tree.generate([PROMPTS[9]], [params])[0]
        verifications.append((output.tokens, default_tree.counters()["drafts"] - before))
    assert verifications[0] == verifications[1]


OTHER: dict[str, dict[str, Any]] = {
    "logit bias": {"logit_bias": {100: 5.0, 11: -20.0}},
    "allowed tokens": {"allowed_token_ids": list(range(4, 400))},
    "min tokens": {"min_tokens": 12, "stop_token_ids": [11, 12, 13, 199], "ignore_eos": False},
    "stop token": {"stop_token_ids": [11, 12, 13, 199], "ignore_eos": False},
    "stop text": {"stop": ["\n", "self"], "ignore_eos": False},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "seven tokens": {"max_tokens": 7},
}


def test_other_sampling_parameters(plain: Plain, default_tree: EngineProcess) -> None:
    prompts = [PROMPTS[i] for i in (5, 9) for _ in OTHER]
    params = [
        SamplingParams(**{"temperature": 0, "max_tokens": 40, "ignore_eos": True, **options})
        for _ in range(2)
        for options in OTHER.values()
    ]
    expected, got = plain.generate(prompts, params), default_tree.generate(prompts, params)
    assert_same(expected, got, prompts)
    assert [output.text for output in expected] == [output.text for output in got]


def test_logprobs(plain: Plain, default_tree: EngineProcess) -> None:
    prompts = [PROMPTS[i] for i in (3, 7)]
    params = [
        SamplingParams(temperature=t, seed=5, max_tokens=24, ignore_eos=True, logprobs=5,
                       prompt_logprobs=p)
        for t, p in ((0, None), (0.9, 2))
    ]  # fmt: skip
    expected, got = plain.generate(prompts, params), default_tree.generate(prompts, params)
    assert_same(expected, got, prompts)
    for a, b in zip(expected, got, strict=True):
        assert len(a.logprobs) == len(b.logprobs) == 24
        for ours, theirs in zip(b.logprobs, a.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_logprobs_of_chosen_tokens(plain: Plain, default_tree: EngineProcess) -> None:
    """`logprob_token_ids`, alone and beside the most probable ones."""
    prompts = [PROMPTS[i] for i in (3, 7)]
    params = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprob_token_ids=ids,
                       logprobs=n)
        for ids, n in (([5, 6, 7], None), ([5, 6], 2))
    ]  # fmt: skip
    expected, got = plain.generate(prompts, params), default_tree.generate(prompts, params)
    assert_same(expected, got, prompts)
    for a, b, ids in zip(expected, got, ([5, 6, 7], [5, 6]), strict=True):
        assert len(a.logprobs) == len(b.logprobs) == 20
        for ours, theirs in zip(b.logprobs, a.logprobs, strict=True):
            assert set(ids) <= set(ours) and ours == pytest.approx(theirs, abs=1e-4)


def test_cached_prefixes(plain: Plain, default_tree: EngineProcess) -> None:
    """A cache hit skips the target's prefill, but the ring is per request and starts empty."""
    start = PROMPTS[12]
    for i in range(3):
        case = greedy([[*start, *PROMPTS[i + 2]], [*start[:700], *PROMPTS[i + 4]]])
        assert_same(plain.generate(*case), default_tree.generate(*case), case[0])
    assert default_tree.counter("vllm:prefix_cache_hits") >= 3000


def test_up_to_the_longest_context(plain: Plain, default_tree: EngineProcess) -> None:
    """The scheduler cuts the last trees at max_model_len."""
    for missing in (1, 2, 9, 37):
        case = greedy([text_prompt(3, LONG_CONTEXT["max_model_len"] - missing)])
        got = default_tree.generate(*case)
        assert len(got[0].tokens) == missing
        assert_same(plain.generate(*case), got, case[0])


def test_chunked_prefills_and_preemption(plain: Plain) -> None:
    """Few tokens a step and few blocks: prefills in pieces beside decodes, requests that lose
    their cache and start again. In blocks of 16 a ring takes eight."""
    engine = EngineProcess(
        longspec(),
        block_size=16,
        max_num_batched_tokens=192,
        num_gpu_blocks_override=80,
        enable_chunked_prefill=True,
    )
    prompts = [text_prompt(i, 150 + 90 * i) for i in range(4)]
    params = [
        SamplingParams(temperature=0.6 * (i % 2), seed=i, max_tokens=80, ignore_eos=True)
        for i in range(4)
    ]
    got = engine.generate(prompts, params)
    preemptions = engine.counter("vllm:num_preemptions")
    # The draft sees a prompt in pieces as it sees one of which all but the end is cached.
    verifications = [engine.counters()["drafts"]]
    for _ in range(2):
        engine.generate(*greedy([text_prompt(7, 600)]))
        verifications.append(engine.counters()["drafts"])
    # All but the last token of its prompt is cached, so that vLLM schedules a verification at once.
    cached_prompt = [text_prompt(2, 33)]
    grammar = StructuredOutputsParams(regex=r"[a-f]{9}\d{5}")
    params_of_it = [SamplingParams(temperature=0, max_tokens=12, structured_outputs=grammar)]
    engine.generate(*greedy(cached_prompt))
    with_grammar = engine.generate(cached_prompt, params_of_it)
    engine.close()
    assert preemptions > 0
    assert_same(plain.generate(cached_prompt, params_of_it), with_grammar, cached_prompt)
    assert_same(plain.generate(prompts, params), got, prompts)
    in_pieces, cached = np.diff(verifications)
    assert 0 < in_pieces == cached


def test_bf16_up_to_near_ties() -> None:
    """What a CPU serves a bf16 checkpoint in unless told otherwise."""
    prompts = [PROMPTS[i] for i in (2, 6, 7, 9)]
    penalties: list[dict[str, float]] = [{}, {}, {}, {"repetition_penalty": 1.2}]
    params = [
        SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=2, **penalty)
        for penalty in penalties
    ]
    outputs = []
    for speculative_config in (None, longspec()):
        engine = EngineProcess(
            speculative_config, dtype="bfloat16", logprobs_mode="processed_logits"
        )
        outputs.append(engine.generate(prompts, params))
        accepted = engine.counters().get("accepted_tokens", 0)
        engine.close()
    assert accepted > 24
    # On an AMD EPYC 7.330 and 7.291 (float32) become 7.344 and 7.281 in plain decoding, and 7.3125
    # both in LongSpec: two spacings, since each logit moved by one.
    assert assert_same_up_to_near_ties(*outputs, spacings=2) <= 2
