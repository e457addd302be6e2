"""Equality with plain vLLM, many switches at once: those of `runtime/switches.py` that no other
test starts an engine with; float32, on a CPU."""

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import close
from helpers import Engine, longspec, text_prompt
from processes import own_process

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

REASONER = Path(__file__).with_name("reasoner.py")
VARIABLES = {
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1", "VLLM_RAISE_ON_LOGIT_NANS": "1",
    "VLLM_CPU_ATTN_SPLIT_KV": "0", "VLLM_MAX_NUM_BAD_WORDS": "5",
    "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS": "40",
}  # fmt: skip
# Few blocks, few tokens a step, and requests that overtake others.
SCHEDULING: dict[str, Any] = {
    "scheduling_policy": "priority", "scheduler_cls": "test_switches.Watched",
    "max_num_active_seqs": 3, "max_num_seqs": 4, "max_num_batched_tokens": 256,
    "max_num_scheduled_tokens": 192, "long_prefill_token_threshold": 64,
    "long_prefill_token_threshold_adaptive": True, "scheduler_reserve_full_isl": False,
    "watermark": 0.05, "stream_interval": 4, "block_size": 32, "num_gpu_blocks_override": 44,
    "enable_prefix_caching": False, "worker_extension_cls": "test_switches.Extension",
    "kv_cache_metrics": True, "kv_cache_metrics_sample": 1.0, "cudagraph_metrics": True,
    "enable_logging_iteration_details": True, "performance_mode": "throughput",
    "optimization_level": 0, "distributed_executor_backend": "uni",
}  # fmt: skip
SAMPLING: dict[str, Any] = {
    "max_logprobs": 40, "logprobs_mode": "processed_logprobs", "seed": 7, "runner": "generate",
    "model_impl": "vllm", "enable_chunked_prefill": False, "attention_backend": "CPU_ATTN",
    "prefix_caching_hash_algo": "sha256_cbor",
    "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
    "hf_overrides": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    "linear_backend": "torch", "ir_op_priority": {"rms_norm": ["native"]},
    "kernel_config": {"enable_jit_warmup": False}, "optimization_level": 3,
    "performance_mode": "interactivity", "reasoning_parser": "to_a_colon",
    "reasoning_parser_plugin": str(REASONER), "reasoning_config": {"reasoning_end_str": " so:"},
    "structured_outputs_config": {"backend": "guidance"},
}  # fmt: skip
# What is slow in Triton's interpreter, and a custom processor, with which chains are drafted.
NOISE: dict[str, Any] = {
    "use_fp64_gumbel": True, "logits_processors": ["test_switches:NotTwice"],
    "logprobs_mode": "raw_logits", "attention_config": {"flash_attn_version": 3},
}  # fmt: skip
KINDS = {"scheduling": SCHEDULING, "sampling": SAMPLING, "noise": NOISE}
SCORED, REPEATS, BUDGET, GRAMMAR = 4, 5, 12, 13  # of the requests of "sampling"
TREE = {"tree_shape": [3, 3, 3], "num_speculative_tokens": 6}


def requests_of(kind: str) -> list[tuple[list[int], dict[str, Any]]]:
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    thinking = [*text_prompt(6, 70), 0]
    repeats = RepetitionDetectionParams(max_pattern_size=6, min_count=3)
    if kind == "scheduling":
        return [
            (text_prompt(i, 120 + 60 * i),
             {"temperature": 0.8 * (i % 2), "seed": i, "max_tokens": 24, "ignore_eos": True})
            for i in range(8)
        ]  # fmt: skip
    if kind == "noise":
        return [
            (text_prompt(i, 30 + 20 * i),
             {"temperature": 0.9 * (i % 2), "seed": i, "max_tokens": 8, "ignore_eos": True,
              "logprobs": 2})
            for i in range(3)
        ]  # fmt: skip
    cached = text_prompt(2, 200)
    found: list[tuple[list[int], dict[str, Any]]] = [
        (cached, {"logprobs": 30, "flat_logprobs": True}),
        (text_prompt(1, 40), {"temperature": 0.9, "seed": 3, "logprobs": 2, "stream_interval": 3}),
        (text_prompt(3, 30), {"temperature": 1.0, "top_k": 30, "n": 2, "seed": 4}),
        (text_prompt(4, 25), {"temperature": 1.0, "top_p": 0.9}),  # by the engine's seed
        (cached[:50], {"prompt_logprob_token_ids": [[5, 6, 7]] * 19, "prompt_logprob_start": 30}),
        ([7, 8, 9] * 20, {"repetition_detection": repeats, "max_tokens": 40}),
        (text_prompt(5, 60), {"stop": ["self", "\n"], "include_stop_str_in_output": True}),
        (text_prompt(7, 60), {"detokenize": False}),
        (text_prompt(8, 60), {"skip_special_tokens": False, "allowed_token_ids": [0, 2, 90, 400],
                              "spaces_between_special_tokens": False}),
        ([*cached, 9], {"skip_reading_prefix_cache": True}),
        ([*cached, 11, 12], {"temperature": 0.7, "seed": 5, "min_p": 0.02}),
        (text_prompt(9, 60), {"bad_words": ["self", " return"]}),
        (thinking, {"thinking_token_budget": 5}),
        (thinking, {"structured_outputs": StructuredOutputsParams(regex=r"[a-f]{9}\d{5}"),
                    "ignore_eos": False, "max_tokens": 36}),
    ]  # fmt: skip
    usual = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return [(prompt, usual | asked) for prompt, asked in found]


def answers(engine: Engine, kind: str) -> list[dict[str, Any]]:
    """Each request's outputs, all that a client gets of them."""
    from vllm import SamplingParams

    asked = requests_of(kind)
    priorities = None if kind != "scheduling" else [(5 * i) % 8 for i in range(len(asked))]
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in asked],
        [SamplingParams(**params) for _, params in asked],
        use_tqdm=False,
        priority=priorities,
    )
    return [
        {
            "tokens": [list(one.token_ids) for one in output.outputs],
            "text": [one.text for one in output.outputs],
            "ends": [(one.finish_reason, one.stop_reason) for one in output.outputs],
            "logprobs": [numbers(one.logprobs) for one in output.outputs],
            "prompt": output.prompt_token_id_logprobs,
        }
        for output in outputs
    ]


def numbers(positions: Any) -> list[dict[int, float]]:
    return [{t: entry.logprob for t, entry in at.items()} for at in positions or ()]


@dataclass
class Made:
    answers: list[dict[str, Any]]
    preempted: int
    counters: dict[str, int]
    rows: list[int]  # that NaNs were counted in, by call
    steps: int  # of a user's scheduler
    extended: bool  # the worker, by a user's class


def both(kind: str) -> list[Made]:
    """Of plain vLLM and of LongSpec, in a process of its own."""
    import reasoner  # noqa: F401
    from vllm.config.reasoning import ReasoningConfig

    rows = count_nans()
    options = dict(KINDS[kind])
    if "reasoning_config" in options:
        options["reasoning_config"] = ReasoningConfig(**options["reasoning_config"])
    found = []
    for speculative in (None, longspec(**TREE)):
        engine = Engine(speculative, **options)
        found.append(
            Made(
                answers(engine, kind),
                engine.counter("vllm:num_preemptions"),
                engine.counters(),
                list(rows),
                named()["Watched"].steps,  # type: ignore[attr-defined]
                engine.llm.collective_rpc(hasattr, args=("named_by_the_extension",))[0],
            )
        )
        named()["Watched"].steps = 0  # type: ignore[attr-defined]
        rows.clear()
        close(engine)
    return found


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as changed:
        for name, value in VARIABLES.items():
            changed.setenv(name, value)
        with own_process() as pool:
            yield pool


@pytest.mark.parametrize("kind", KINDS)
def test_many_switches_at_once(process: ProcessPoolExecutor, kind: str) -> None:
    plain, speculated = process.submit(both, kind).result()
    for i, (expected, got) in enumerate(zip(plain.answers, speculated.answers, strict=True)):
        for of in ("tokens", "text", "ends"):
            assert got[of] == expected[of], (i, of)
        assert got["prompt"] == pytest.approx(expected["prompt"], abs=1e-3)
        for one, other in zip(expected["logprobs"], got["logprobs"], strict=True):
            for ours, theirs in zip(other, one, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-3)
    assert speculated.counters["accepted_tokens"] > 0
    assert max(plain.rows) <= 8 < max(speculated.rows) or kind != "scheduling"  # nodes, too
    if kind == "scheduling":
        assert speculated.preempted > 0 and plain.steps > 0 and speculated.steps > 0
        assert plain.extended and speculated.extended
    elif kind == "sampling":
        assert speculated.answers[SCORED]["prompt"].shape == (19, 3)
        texts = [answer["text"][0] for answer in speculated.answers]
        assert speculated.answers[REPEATS]["ends"] == [("repetition", "repetition_detected")]
        assert " so:" in texts[BUDGET] and re.search(r":[a-f]{9}\d{5}$", texts[GRAMMAR])


def count_nans() -> list[int]:
    """vLLM's count of NaNs in torch, since Triton's interpreter has no `isnan`; notes the number of
    rows."""
    from vllm.v1.worker.gpu.sample import sampler
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    counted: list[int] = []

    def get_num_nans(logits: torch.Tensor) -> torch.Tensor:
        counted.append(len(logits))
        return logits.isnan().sum(-1, dtype=torch.int32)

    for module in (sampler, rejection_sampler):
        module.get_num_nans = get_num_nans
    return counted


class Extension:
    """Of a worker."""

    def named_by_the_extension(self) -> str:
        return type(self).__name__


@cache
def named() -> dict[str, type]:
    """Classes of a user's that vLLM asks this module for by name; where they inherit from is heavy
    to import."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

    class Watched(Scheduler):
        """Counts its steps."""

        steps = 0

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            Watched.steps += 1  # LongSpec's scheduler inherits from this one
            return super().schedule(*args, **kwargs)

    class NotTwice(LogitsProcessor):
        """No token twice in a row."""

        def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
            return logits.scatter_(1, ctx.input_ids.long()[:, None], -50.0)

    return {"Watched": Watched, "NotTwice": NotTwice}


def __getattr__(name: str) -> Any:
    if name in ("Watched", "NotTwice"):
        return named()[name]
    raise AttributeError(name)
