"""Equality with plain vLLM on two tensor-parallel ranks, which have to choose and to propose alike;
float32, on a CPU."""

import json
import shutil
from collections import Counter
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
from processes import own_process
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
from vllm_longspec.runtime.controller import NONE
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
CHOICES = {"random": choose_at_random, "costs": choose_by_costs}
CACHED = text_prompt(3, 200)


def request(arrival: int, prompt: list[int], **params: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_tokens": 14, "ignore_eos": True, **params}
    return {"prompt": prompt, "params": params, "arrival": arrival, "aborted": None}


REQUESTS = [
    request(0, CACHED),
    request(0, text_prompt(1, 37), temperature=0.8, seed=5, max_tokens=24),
    request(2, synthetic_prompt(2, 90), max_tokens=32),  # a cycle: copies are right
    request(3, text_prompt(4, 60), repetition_penalty=1.2, max_tokens=12),
    request(4, text_prompt(9, 25), structured_outputs={"regex": r"[a-f]{9}\d{30}"}),
    request(9, [*CACHED[:150], *text_prompt(5, 9)]),  # after a prefix that is cached
    request(10, text_prompt(6, 17), extra_args={"longspec": "off"}, max_tokens=12),
    request(11, text_prompt(8, 20), temperature=1.0, seed=None, max_tokens=10),
    request(12, text_prompt(7, 30), temperature=1.0, seed=8, top_p=0.9),
]


def serve_all(folders: dict[str, Path]) -> dict[str, Any]:
    """In a process of its own: tokens of `REQUESTS`, by number, and what else the tests look at."""
    prepare_to_fork()
    served: dict[str, Any] = {"plain": plain_tokens(REQUESTS)}
    original, options.resolve_menus = options.resolve_menus, lambda *args, **kwargs: MENUS
    engine = start(longspec(), block_size=16)
    plans = [*plans_of(MENUS), None]  # the last one: NONE
    for name, choose in CHOICES.items():
        engine.llm.collective_rpc(choose, args=(folders["costs"],))
        tokens = serve(engine, REQUESTS)
        of_ranks = engine.llm.collective_rpc(chosen)
        served[name] = tokens, [[plans[plan] for plan in of_rank] for of_rank in of_ranks]
        engine.llm.reset_prefix_cache()
    for name in ("prefix_cache_hits", "spec_decode_num_accepted_tokens"):
        served[name] = engine.counter(f"vllm:{name}")
    engine.close()

    options.resolve_menus = original
    model = str(folders["target"])
    served["plain, one KV head"] = plain_tokens(FEW, model=model)
    draft = longspec(model=str(folders["draft"]), quantization="fp8", tree_shape=[4, 4])
    engine = start(draft, model=model)
    served["heads"] = engine.llm.collective_rpc(head_of_draft)
    served["one KV head"] = serve(engine, FEW)
    served["plans, one KV head"] = engine.llm.collective_rpc(chosen)
    served["counters, one KV head"] = engine.counters()
    engine.close()
    return served


def plain_tokens(requests: list[dict[str, Any]], **options: Any) -> dict[int, list[int]]:
    engine = start(None, **options)
    tokens = serve(engine, requests)
    engine.close()
    return tokens


FEW = REQUESTS[:3]
HELD = torch.arange(0, 4096, 3)  # tokens that a trimmed draft proposes, of both ranks' shards


def make_folders(folder: Path) -> dict[str, Path]:
    """For costs; and the nano pair with the first of its two KV heads, which each rank then holds.
    This draft's head is trimmed."""
    made = {"costs": folder}
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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folders = make_folders(tmp_path_factory.mktemp("ranks"))
    with own_process() as pool:
        return pool.submit(serve_all, folders).result()


def assert_plain(plain: dict[int, list[int]], got: dict[int, list[int]]) -> None:
    """But for the request without a seed, of which the ranks compare what they sampled."""
    assert plain.keys() == got.keys()
    seeded = [i for i in sorted(plain) if REQUESTS[i]["params"].get("seed", 0) is not None]
    expected, outputs = ([Output(of[i], "") for i in seeded] for of in (plain, got))
    assert_same(expected, outputs, [REQUESTS[i]["prompt"] for i in seeded])


@pytest.mark.parametrize("name", CHOICES)
def test_plain_tokens(served: dict[str, Any], name: str) -> None:
    """With another plan at every step, and with the controller's choice; that both ranks choose
    and propose alike is asserted in each step, by `ranks.watch`."""
    tokens, of_ranks = served[name]
    print(Counter(of_ranks[0]))
    assert of_ranks == [of_ranks[0]] * RANKS
    assert_plain(served["plain"], tokens)
    assert {SMALL, DEEP, WIDE} <= set(of_ranks[0])
    copies = [plan for plan in of_ranks[0] if plan is not None and not plan.tree_shape]
    assert copies or name != "random"


def test_what_happened_on_the_way(served: dict[str, Any]) -> None:
    assert served["prefix_cache_hits"] >= 2 * 128
    assert served["spec_decode_num_accepted_tokens"] > 100


def test_fewer_kv_heads_than_ranks(served: dict[str, Any]) -> None:
    """And one tree for all steps, and a head of the draft's own, in FP8: all its rows on each
    rank."""
    rows = load_file(TARGET / "model.safetensors")["model.embed_tokens.weight"][HELD]  # tied
    (shape, size), *others = served["heads"]
    assert others == [(shape, size)] * (RANKS - 1)
    # FP8 wants a multiple of 16 rows; those that are added are zero.
    assert shape == [len(rows) + -len(rows) % 16, rows.shape[1]]
    assert size == pytest.approx(float(rows.abs().sum()), rel=0.01)
    assert_plain(served["plain, one KV head"], served["one KV head"])
    plans = served["plans, one KV head"]
    assert set(plans[0]) <= {0, NONE} and plans == [plans[0]] * RANKS
    print(Counter(plans[0]), served["counters, one KV head"])
    assert served["counters, one KV head"]["accepted_tokens"] > 10
