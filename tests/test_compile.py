"""Every kernel compiles for every kind of GPU within its shared memory, as it is launched there."""

from itertools import product
from typing import Any

import pytest
import torch
from ahead import in_subprocess as in_own_process
from compiled import FP8_SINCE, SHARED_KIB, Case, Program, in_subprocess

from vllm_longspec.config import (
    MAX_HEAD_SIZE,
    MAX_LEVEL_NODES,
    MAX_LEVELS,
    MAX_TREE_NODES,
    MAX_VERIFIED_NODES,
    resolve_tree,
)
from vllm_longspec.runtime.compile_ahead import compile_ahead
from vllm_longspec.verify.splits import long_steps

CHIPS = tuple(SHARED_KIB)
TENSOR_MEMORY = 512  # columns
# What a kernel may move out of registers, bytes a thread; the ring's at head size 128 does most.
SPILLED = 512
# As wide and as many as there may be.
LARGEST = Case(
    tree_shape=(*[MAX_LEVEL_NODES] * 7, MAX_TREE_NODES - 7 * MAX_LEVEL_NODES),
    m=MAX_VERIFIED_NODES, num_reqs=(1,),
)  # fmt: skip
DEEPEST = Case(tree_shape=(1,) * MAX_LEVELS, m=MAX_LEVELS, num_reqs=(1,))
SMALL = (4, 16)  # a level of one node and one of four
LEVEL: dict[str, Any] = {"tree_shape": (4, 16), "m": 3}
ATTENTION = ("_ring_attention_kernel", "_tree_attention_kernel")
# Those whose blocks follow the vocabulary or the hidden size.
VOCABULARY = ("_group_maxima_kernel", "_top_tokens_kernel", "_round_kernel")
ROWS = (1, 6, 128)  # requests that lead to 16, 32 and 64 rows a program
# In `make test`; the others have the tensor cores of 89, and no less memory.
CHOSEN = (89, 90, 100, 120)


def check(kernels: list[str], programs: list[Program]) -> None:
    for program in programs:
        assert program.shared <= SHARED_KIB[program.chip] * 1024, program
        assert program.tensor_memory <= TENSOR_MEMORY, program
        assert program.spilled is None or program.spilled <= SPILLED, program
    not_launched = set(kernels) - {program.kernel for program in programs}
    if all(program.chip < FP8_SINCE for program in programs):
        not_launched.discard("_round_kernel")
    assert not not_launched, "tests/compiled.py launches no case of these"


@pytest.mark.parametrize(
    "chips",
    [CHOSEN, pytest.param(tuple(set(CHIPS) - set(CHOSEN)), marks=pytest.mark.full)],
    ids=("chosen", "others"),
)
def test_largest_heads_on_every_chip(chips: tuple[int, ...]) -> None:
    kernels, programs = in_subprocess(chips, [Case(head_size=MAX_HEAD_SIZE, num_reqs=ROWS)])
    check(kernels, programs)
    rings = [p for p in programs if p.kernel == "_ring_attention_kernel"]
    assert {p.constants["ROWS"] for p in rings} == {16, 32}
    assert {p.constants["SPLITS"] > 1 for p in rings} == {False, True}
    assert {p.chip for p in rings} == set(chips)


@pytest.mark.full
def test_usual_heads_and_extreme_trees() -> None:
    few_rows = Case(tree_shape=(2, 2), m=3, num_reqs=(1,))
    cases = [Case(num_reqs=ROWS), Case(head_size=80, num_reqs=(128,)), few_rows, LARGEST, DEEPEST]
    kernels, programs = in_subprocess([90], cases, assemble=True)
    check(kernels, programs)
    rings = [p for p in programs if p.kernel == "_ring_attention_kernel"]
    assert {p.constants["ROWS"] for p in rings} == {16, 32, 64}
    windows = [p for p in programs if p.kernel == "_window_attention_kernel"]
    assert {p.constants["SPLITS"] > 1 for p in windows} == {False, True}


@pytest.mark.full
def test_other_heads_fit_the_smallest_chips() -> None:
    """Those of the smallest shared memory, with the most rows. Blocks are as large as the next
    power of two, and the groups of queries are of any number."""
    cases = [
        Case(head_size=128, heads=(24, 8), num_reqs=(128,), tree_shape=SMALL),
        Case(head_size=192, heads=(14, 2), num_reqs=(128,), tree_shape=SMALL),
    ]
    _, programs = in_subprocess([89, 120], cases, only=ATTENTION)
    for program in programs:
        assert program.shared <= SHARED_KIB[program.chip] * 1024, program
    assert {p.constants["HEAD"] for p in programs} == {128, 192}
    assert {p.constants["GROUP"] for p in programs if "GROUP" in p.constants} == {3, 7}
    assert {(p.chip, p.kernel) for p in programs} >= set(product([89, 120], ATTENTION))


def test_vocabularies_and_hidden_sizes() -> None:
    """Gemma 3's (27B, 270M), gpt-oss's: no powers of two, or no multiples of 128."""
    cases = [
        Case(vocab_size=262_144, hidden_size=5376, inner_size=21_504, num_reqs=(1,), **LEVEL),
        Case(vocab_size=262_144, hidden_size=640, inner_size=2048, num_reqs=(1,), **LEVEL),
        Case(vocab_size=201_088, hidden_size=2880, inner_size=2880, num_reqs=(1,), **LEVEL),
    ]
    _, programs = in_subprocess([89], cases, assemble=True, only=VOCABULARY)
    for program in programs:
        assert program.shared <= SHARED_KIB[program.chip] * 1024, program
        assert program.spilled == 0, program
    assert {p.kernel for p in programs} == set(VOCABULARY)


def test_extreme_trees_are_accepted() -> None:
    for case in (LARGEST, DEEPEST):
        resolve_tree(case.tree_shape, case.m)


def test_steps_over_many_keys() -> None:
    """Those that cycles were measured with; larger heads take smaller ones."""
    assert {long_steps(head_size) for head_size in range(8, 129, 8)} == {(64, 128, 3)}
    assert {long_steps(head_size) for head_size in range(136, 257, 8)} == {(32, 64, 2)}


@pytest.mark.full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("head_size", range(8, MAX_HEAD_SIZE + 1, 8))
def test_all_heads(chip: int, head_size: int) -> None:
    groups = [(8, 8), (8, 1), (32, 8), (28, 4), (16, 1)] if head_size % 64 == 0 else [(32, 8)]
    if head_size == 128:
        groups += [(4, 2), (6, 2), (10, 2), (12, 2)]
    cases = [Case(head_size=head_size, heads=heads, num_reqs=(1, 6, 16, 128)) for heads in groups]
    if head_size in (128, 256):
        cases.append(Case(head_size=head_size, dtype="float16"))
    check(*in_subprocess([chip], cases, assemble=True))


@pytest.mark.full
@pytest.mark.parametrize("chip", CHIPS)
def test_all_trees(chip: int) -> None:
    """The default schedule's, wide ones, many verified; vocabularies, layers and windows too."""
    cases = [
        LARGEST,
        DEEPEST,
        *(Case(tree_shape=(8, 16, 16, 16, 16, 16, 16, 16), m=m) for m in (31, 23, 15)),
        *(Case(tree_shape=(8, *[8] * d), m=m) for d, m in ((3, 11), (2, 7), (1, 5))),
        *(Case(tree_shape=(2, 2), m=m) for m in (1, 2, 3)),
        Case(tree_shape=(64,) * 8, m=127),
        Case(tree_shape=(32,) * 16, m=128),
        Case(trimmed=True, vocab_size=32_768),
        Case(vocab_size=1000, window=4096, slots=64),
        Case(vocab_size=262_144, hidden_size=8192, inner_size=28_672, heads=(64, 8)),
        Case(head_size=64, hidden_size=64, inner_size=176, heads=(4, 2), slots=32),
    ]
    check(*in_subprocess([chip], cases, assemble=True))


def test_ahead_of_launches() -> None:
    """What is compiled before a capture is what it launches; no kernel's output that was not
    launched is an index of anything that is."""
    out = in_own_process()
    few, all_calls = out["calls"]
    assert few < all_calls / 2
    assert out["ahead"] == out["launched"] and len(out["ahead"]) > 20
    # Of those that fail nothing is left, the others are there.
    assert out["failed"] and set(out["failed"]) == {"_expand_kernel does not compile"}
    assert out["without"] == [name for name in out["launched"] if "_expand_kernel" not in name]


def test_nothing_is_ahead_of_a_cpu() -> None:
    compile_ahead(torch.device("cpu"), [lambda: pytest.fail("called")])
