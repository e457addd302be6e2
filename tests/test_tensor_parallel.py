"""Equality with plain vLLM on two tensor-parallel ranks, which have to choose and to propose alike;
float32, on a CPU."""

import json
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DRAFT,
    TARGET,
    Output,
    assert_same,
    longspec,
    synthetic_prompt,
    text_prompt,
)
from ranks import (
    RANKS,
    choose_at_random,
    choose_by_costs,
    chosen,
    head_of_draft,
    prepare_to_fork,
    start,
)
from safetensors.torch import load_file, save_file
from test_random import serve

from vllm_longspec.draft.checkpoint import TOKEN_IDS
from vllm_longspec.runtime import options
from vllm_longspec.runtime.menus import Menu, plans_of, with_copies
from vllm_longspec.tree.budget import Plan

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; on GPUs it was tried by hand"
)

SMALL, DEEP, WIDE = Plan((2, 2), 3), Plan((2, 4, 4, 4), 11), Plan((8, 16), 20)
MENUS = [
    with_copies(Menu(1, 2, (SMALL, DEEP, WIDE), WIDE)),
    with_copies(Menu(3, 4, (SMALL,), SMALL)),
]
CACHED = text_prompt(3, 200)


def request(arrival: int, prompt: list[int], **params: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **params}
    return {"prompt": prompt, "params": params, "arrival": arrival, "aborted": None}


REQUESTS = [
    request(0, CACHED),
    request(0, text_prompt(1, 37), temperature=0.8, seed=5, max_tokens=30),
    request(2, synthetic_prompt(2, 90), max_tokens=40),  # a cycle: copies are right
    request(3, text_prompt(4, 60), repetition_penalty=1.2, max_tokens=12),  # a chain
    request(9, [*CACHED[:150], *text_prompt(5, 9)]),  # after a prefix that is cached
    request(10, text_prompt(6, 17), extra_args={"longspec": "off"}, max_tokens=12),
    request(12, text_prompt(7, 30), temperature=1.0, seed=8, top_p=0.9),
]


def in_a_process(function: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def plain_tokens(**options: Any) -> dict[int, list[int]]:
    """Of `REQUESTS`, by number."""
    engine = start(None, **options)
    tokens = serve(engine, REQUESTS)
    engine.close()
    return tokens


def assert_plain(plain: dict[int, list[int]], got: dict[int, list[int]]) -> None:
    expected, outputs = (
        [Output(tokens[i], "") for i in range(len(REQUESTS))] for tokens in (plain, got)
    )
    assert_same(expected, outputs, [request["prompt"] for request in REQUESTS])


CHOICES = {"default": None, "random": choose_at_random, "costs": choose_by_costs}


def serve_by_each_choice() -> tuple[Any, dict[str, Any], dict[str, float]]:
    """What plain vLLM gives; by choice tokens and each rank's plans, by name; vLLM's counters."""
    prepare_to_fork()
    plain = plain_tokens()
    options.resolve_menus = lambda *args, **kwargs: MENUS  # type: ignore[assignment]
    engine = start(longspec(), block_size=16, max_model_len=512, num_gpu_blocks_override=64)
    plans = [*plans_of(MENUS), None]  # the last one: NONE
    results = {}
    for name, choose in CHOICES.items():
        if choose is not None:
            engine.llm.collective_rpc(choose)
        tokens = serve(engine, REQUESTS)
        of_ranks = engine.llm.collective_rpc(chosen)
        results[name] = tokens, [[plans[plan] for plan in of_rank] for of_rank in of_ranks]
        engine.llm.reset_prefix_cache()
    counts = {
        m.name.removeprefix("vllm:"): getattr(m, "value", 0) for m in engine.llm.get_metrics()
    }
    engine.close()
    return plain, results, counts


@pytest.fixture(scope="module")
def served() -> Any:
    return in_a_process(serve_by_each_choice)


@pytest.mark.parametrize("name", CHOICES)
def test_plain_tokens(served: Any, name: str) -> None:
    """With one tree a step, another plan at every step, and the controller's choice; that both
    ranks propose alike is asserted in each step, by `ranks.watch`."""
    plain, results, counts = served
    tokens, of_ranks = results[name]
    print(Counter(of_ranks[0]), counts)
    assert len(of_ranks) == RANKS and of_ranks[0] == of_ranks[1]
    assert_plain(plain, tokens)
    taken = set(of_ranks[0])
    if name == "default":
        assert taken == {WIDE, SMALL}
    else:
        assert {plan for plan in taken if plan} >= {SMALL} and len(taken) > 3
        assert any(plan is not None and not plan.tree_shape for plan in taken)  # a copy
    assert counts["spec_decode_num_accepted_tokens"] > 100


HELD = torch.arange(0, 4096, 3)  # tokens that a trimmed draft proposes, of both ranks' shards


def with_one_kv_head(folder: Path) -> dict[str, Path]:
    """The nano pair with the first of its two KV heads, which each rank then holds; the draft's
    own head is trimmed."""
    made = {}
    for name, source in (("target", TARGET), ("draft", DRAFT)):
        made[name] = Path(shutil.copytree(source, folder / name))
        config = json.loads((source / "config.json").read_text()) | {"num_key_value_heads": 1}
        tensors = load_file(source / "model.safetensors")
        for key, tensor in tensors.items():
            if "k_proj" in key or "v_proj" in key:
                tensors[key] = tensor[: config["head_dim"]].clone()
        if name == "draft":
            config["draft_vocab_size"], tensors[TOKEN_IDS] = len(HELD), HELD
        save_file(tensors, made[name] / "model.safetensors", metadata={"format": "pt"})
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


def serve_one_kv_head(folders: dict[str, Path]) -> Any:
    prepare_to_fork()
    model = str(folders["target"])
    plain = plain_tokens(model=model)
    draft = longspec(model=str(folders["draft"]), quantization="fp8", tree_shape=[4, 4])
    engine = start(draft, model=model)
    heads = engine.llm.collective_rpc(head_of_draft)
    tokens, counters = serve(engine, REQUESTS), engine.counters()
    engine.close()
    return plain, tokens, counters, heads


def test_fewer_kv_heads_than_ranks(tmp_path: Path) -> None:
    """And a head of the draft's own, in FP8: all its rows on each rank."""
    folders = with_one_kv_head(tmp_path)
    plain, tokens, counters, heads = in_a_process(serve_one_kv_head, folders)
    print(counters, heads)
    assert heads == [([len(HELD), 256], heads[0][1])] * RANKS
    assert_plain(plain, tokens)
    assert counters["accepted_tokens"] > 10
