"""LoRA adapters of the target: each request's own, the draft of the base model for all."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapters import LAYERS, RANK, write_adapter
from helpers import Engine, Output, assert_same, longspec, text_prompt
from processes import EngineProcess
from torch import nn
from vllm import SamplingParams
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.request import LoRARequest

from vllm_longspec.draft.adapters import without_adapters

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; on GPUs it is refused"
)

LORA: dict[str, Any] = {
    "enable_lora": True, "max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": RANK,
    "lora_dtype": "bfloat16", "lora_target_modules": LAYERS,
}  # fmt: skip
PROMPTS = [text_prompt(i, 30 + 60 * i) for i in range(8)]
# By turn the adapter of each request; -1: none. The third is loaded while the server serves, and
# another makes room for it. (Plain vLLM's kernels for CPUs give a request without an adapter one of
# those that others in its step have.)
TURNS = ([0, 1, 0, 1, 1, 0, 0, 1], [-1, -1], [2, 0, 2, 0])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_adapter(folder / str(i), seed=i, head=i == 2) for i in range(3)]


def serve(engine: Engine, adapters: list[str]) -> list[Output]:
    """All turns of a server with adapters, one of which is taken away in between."""
    outputs = []
    requests = [LoRARequest(str(i), 1 + i, path) for i, path in enumerate(adapters)]
    for turn, chosen in enumerate(TURNS):
        params = [
            SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=20, ignore_eos=True)
            for i in range(len(chosen))
        ]
        loras = [None if i < 0 else requests[i] for i in chosen]
        outputs += engine.generate(PROMPTS[: len(chosen)], params, loras)
        if turn == 0:
            assert engine.llm.llm_engine.remove_lora(2)
    return outputs


@pytest.fixture(scope="module")
def outputs(adapters: list[str]) -> Iterator[dict[str, list[Output]]]:
    made = {}
    for name, speculative_config in (("plain", None), ("longspec", longspec())):
        engine = EngineProcess(speculative_config, **LORA)
        made[name] = engine.call(serve, adapters)
        if speculative_config:
            assert engine.counters()["accepted_tokens"] > 30
        engine.close()
    yield made


def test_each_request_s_adapter(outputs: dict[str, list[Output]]) -> None:
    prompts = [PROMPTS[i] for turn in TURNS for i in range(len(turn))]
    assert_same(outputs["plain"], outputs["longspec"], prompts)
    # The adapters do change the tokens.
    of_prompts = [output.tokens for output in outputs["plain"]]
    adapted, base, by_the_third = of_prompts[:2], of_prompts[8:10], of_prompts[10:12]
    assert adapted[0] != base[0] != by_the_third[0] != adapted[0]
    assert adapted[1] != base[1]


class Adapted(BaseLayerWithLoRA):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base


def test_the_target_without_its_adapters() -> None:
    plain = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleList([nn.ReLU()])})
    assert without_adapters(plain) is plain
    head, norm = nn.Linear(2, 2), nn.LayerNorm(2)
    target = nn.Module()
    target.model = nn.ModuleDict({"embed": Adapted(plain["a"]), "norm": norm})
    target.lm_head, target.gone = Adapted(head), None
    base: Any = without_adapters(target)
    assert base.lm_head is head and base.model["embed"] is plain["a"] and base.gone is None
    assert base.model["norm"] is norm
    assert isinstance(target.lm_head, Adapted) and isinstance(target.model["embed"], Adapted)
