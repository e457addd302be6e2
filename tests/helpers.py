"""Engines, prompts and comparisons that several test modules share."""

import importlib.util
import json
import lzma
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "examples/models/nano-target"
DRAFT = ROOT / "examples/models/nano-draft"
CORPUS = ROOT.parent / "shared/corpus/dev.jsonl.xz"


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TARGET)


@cache
def documents() -> list[str]:
    """Long held-out texts: the project's corpus where it is at hand, else Python's own source,
    which the target was trained on like on any other Python."""
    if CORPUS.exists():
        with lzma.open(CORPUS, "rt") as lines:
            texts = [json.loads(line)["text"] for line in lines]
    else:
        library = Path(json.__file__).parent.parent
        texts = [path.read_text() for path in sorted(library.glob("*.py"))]
    return [text for text in texts if len(text) > 40_000]


def text_prompt(index: int, length: int) -> list[int]:
    """`length` tokens of a document, not from its start."""
    text = documents()[index % len(documents())]
    ids = tokenizer()(text[100 * index : 100 * index + 8 * length + 4000])["input_ids"]
    if len(ids) < length:
        ids = ids * (length // max(1, len(ids)) + 1)
    return ids[:length]


def synthetic_prompt(index: int, length: int) -> list[int]:
    """Tokens no text has: a repeated short cycle, or a walk through the vocabulary."""
    if index % 2:
        return [(5 + index * 37 + i * 911) % 4090 + 4 for i in range(length)]
    return [(17 * index + i % (3 + index)) % 4000 + 50 for i in range(length)]


def load_script(path: Path) -> ModuleType:
    """A Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of the real size whose tensors, all zero, take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@dataclass
class Output:
    tokens: list[int]
    text: str
    logprobs: list[dict[int, float]] = field(default_factory=list)


class Engine:
    """A vLLM engine in float32 on a CPU, as small as the tests allow."""

    def __init__(self, speculative_config: dict[str, Any] | None = None, **options: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "model": str(TARGET),
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 4,
            "kv_cache_memory_bytes": 1 << 27,
            "enforce_eager": True,
            "disable_log_stats": False,
        }
        self.llm = LLM(**(defaults | options), speculative_config=speculative_config)

    def generate(
        self, prompts: list[list[int]], params: list[Any], loras: list[Any] | None = None
    ) -> list[Output]:
        """`loras`: the LoRARequest of each prompt, or None."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            params,
            lora_request=loras,
            use_tqdm=False,
        )
        return [
            Output(
                list(o.outputs[0].token_ids),
                o.outputs[0].text,
                [
                    {token: entry.logprob for token, entry in position.items()}
                    for position in o.outputs[0].logprobs or []
                ],
            )
            for o in outputs
        ]

    def one_by_one(self, prompts: list[list[int]], params: list[Any]) -> list[Output]:
        """Concurrency 1."""
        return [
            self.generate([prompt], [param])[0]
            for prompt, param in zip(prompts, params, strict=True)
        ]

    def counters(self) -> dict[str, int]:
        return {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
            for metric in self.llm.get_metrics()
            if "spec_decode" in metric.name and hasattr(metric, "value")
        }

    def counter(self, name: str) -> int:
        """One of vLLM's, by its whole name."""
        return {metric.name: metric for metric in self.llm.get_metrics()}[name].value

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def longspec(**options: Any) -> dict[str, Any]:
    return {"method": "longspec", "model": str(DRAFT), **options}


def assert_same(expected: list[Output], got: list[Output], prompts: list[list[int]]) -> None:
    """Token for token; a difference is reported with where it starts."""
    for i, (plain, speculated) in enumerate(zip(expected, got, strict=True)):
        if plain.tokens == speculated.tokens:
            continue
        at = next(
            (
                j
                for j, (a, b) in enumerate(zip(plain.tokens, speculated.tokens, strict=False))
                if a != b
            ),
            min(len(plain.tokens), len(speculated.tokens)),
        )
        pytest.fail(
            f"prompt {i} ({len(prompts[i])} tokens) differs from token {at} on: "
            f"plain {plain.tokens[at : at + 5]}, LongSpec {speculated.tokens[at : at + 5]}"
        )


def bf16_spacing(value: float) -> float:
    """Distance from a number to the next one in bf16."""
    return 2.0 ** (math.floor(math.log2(max(abs(value), 1e-6))) - 7)


def assert_same_up_to_near_ties(
    expected: list[Output], got: list[Output], spacings: int = 2
) -> int:
    """Where two greedy bf16 outputs first differ, plain decoding's logits of the two tokens have to
    be at most `spacings` of bf16's numbers apart: each may be the next one. Wants `logprobs=2` or
    more and `logprobs_mode="processed_logits"`. Returns how many outputs differ."""
    differing = 0
    for i, (plain, speculated) in enumerate(zip(expected, got, strict=True)):
        for difference in spacings_of_a_difference(plain, speculated):
            differing += 1
            print(f"prompt {i} differs: the two logits are {difference} spacings apart")
            assert difference <= spacings
    return differing


def spacings_of_a_difference(plain: Output, other: Output) -> list[int]:
    """Where two greedy bf16 outputs first differ, how far the best logit of the first is from that
    of the other's token (from the least that is known, if that is none of them), in spacings of
    bf16, rounded up; nothing where they do not differ."""
    assert len(plain.tokens) == len(other.tokens)
    pairs = zip(plain.tokens, other.tokens, strict=True)
    at = next((j for j, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return []
    logits = plain.logprobs[at]
    best, least = max(logits.values()), min(logits.values())
    return [math.ceil((best - logits.get(other.tokens[at], least)) / bf16_spacing(best))]
