"""Copies of the text: the plain version against what it says, the kernels against it."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_longspec.draft.inputs import ProposalInputs
from vllm_longspec.draft.lookup import POSITIONS, Lookup, torch_find, triton_find
from vllm_longspec.tree.lookup import (
    BUCKETS,
    COPY_DEPTH,
    DECAY,
    MAX_MATCH,
    MIN_MATCH,
    PRIOR,
    PRIOR_WEIGHT,
    Seen,
    bucket,
    continuation,
    longest_match,
)

MAX_REQS = 4
FEW_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=90)


def match_length(tokens: list[int], position: int) -> int:
    length = 0
    while length < MAX_MATCH and length <= position:
        if tokens[position - length] != tokens[len(tokens) - 1 - length]:
            break
        length += 1
    return length


@given(FEW_TOKENS)
def test_longest_match(tokens: list[int]) -> None:
    length, position = longest_match(torch.tensor(tokens))
    lengths = [match_length(tokens, i) for i in range(len(tokens) - 1)]
    assert length == max(lengths, default=0)
    if length:
        assert position == max(i for i, n in enumerate(lengths) if n == length)


def test_what_follows_a_match() -> None:
    text = torch.arange(40)
    assert continuation(text, 9) == list(range(10, 10 + COPY_DEPTH))
    # Past the end the period goes on.
    assert continuation(torch.tensor([9, 1, 2, 3, 1, 2, 3]), 3) == ([1, 2, 3] * COPY_DEPTH)[:16]


def test_buckets() -> None:
    assert [bucket(n) for n in (0, 2, 3, 7, 32, 47)] == [0, 0, 1, 4, 10, 10]
    assert len(PRIOR) == len(PRIOR_WEIGHT) == len(BUCKETS) and BUCKETS[0] == MIN_MATCH
    assert all(a < b for a, b in pairwise(PRIOR))


def test_learning() -> None:
    """Hits up to the first miss; what was committed beyond the copy says nothing."""
    seen, copied = Seen.nothing(), list(range(16))
    seen.learn(copied, 2, [0, 1, 9, 3])
    assert seen.tries.tolist() == [1, 1, 1] + [0] * 8
    assert seen.hits.tolist() == [1, 1, 0] + [0] * 8
    seen.learn(copied, 2, [0])
    assert seen.tries.tolist()[:3] == pytest.approx([1 + DECAY, 1, 1])
    assert seen.scores(2)[0] == pytest.approx(math.log((1 + DECAY + 3.2) / (1 + DECAY + 8)))
    wrong, right = Seen.nothing(), Seen.nothing()
    for _ in range(200):
        wrong.learn(copied, 12, [99])
        right.learn(copied, 12, [*copied, 7])
    assert math.exp(wrong.scores(12)[0]) < 0.1 and math.exp(right.scores(12)[-1]) > 0.5
    assert float(wrong.tries.max()) == pytest.approx(64, rel=0.1)


def batch(
    device: torch.device, slots: list[int], context_lens: list[int], new: list[bool]
) -> ProposalInputs:
    inputs = ProposalInputs.allocate(MAX_REQS, COPY_DEPTH, device)
    rows = len(slots)
    inputs.slots[:rows] = torch.tensor(slots)
    inputs.context_lens[:rows] = torch.tensor(context_lens, dtype=torch.int32)
    inputs.new_positions[:rows, 0] = torch.where(
        torch.tensor(new), inputs.context_lens[:rows] - 1, -1
    )
    return inputs


def assert_alike(by_triton: Lookup, by_torch: Lookup, rows: int) -> None:
    for name in ("tokens", "copied", "length", "root", "generation"):
        assert torch.equal(getattr(by_triton, name), getattr(by_torch, name)), name
    for name in ("scores", "expected", "hits", "tries"):
        torch.testing.assert_close(
            getattr(by_triton, name), getattr(by_torch, name), atol=1e-4, rtol=1e-4
        )


@example(seed=0, num_rows=1, vocab_size=1, steps=3, length=2 * POSITIONS + 3)
@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, MAX_REQS),
    vocab_size=st.sampled_from([1, 2, 5, 300]),
    steps=st.integers(1, 4),
    length=st.sampled_from([1, 2, 3, 20, 90, POSITIONS, POSITIONS + 40]),
)
@settings(max_examples=25)
def test_find(device, seed, num_rows, vocab_size, steps, length) -> None:
    """Steps that commit from no to more tokens than are copied, padding, prompts in pieces, slots
    that change hands."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    max_len = length + steps * 20 + 1
    text = torch.randint(0, vocab_size, (MAX_REQS, max_len), generator=generator, dtype=torch.int32)
    text[:, length:] = text[:, : max_len - length] if integer(0, 2) else text[:, length:]
    all_tokens = text.to(device)
    slots = torch.randperm(MAX_REQS, generator=generator)[:num_rows].tolist()
    context_lens = [integer(max(1, length - 5), length + 1) for _ in slots]
    by_triton, by_torch = (Lookup(MAX_REQS, max_len, device) for _ in range(2))
    generations = torch.zeros(MAX_REQS, dtype=torch.int32, device=device)
    for _ in range(steps):
        in_batch = [slot if integer(0, 5) else -1 for slot in slots]
        inputs = batch(device, in_batch, context_lens, [bool(integer(0, 5)) for _ in slots])
        triton_find(by_triton, inputs, all_tokens, generations, num_rows)
        torch_find(by_torch, inputs, all_tokens, generations, num_rows)
        assert_alike(by_triton, by_torch, num_rows)
        for row in range(num_rows):
            if by_triton.tokens[row, 0] < 0:
                assert (by_triton.scores[row] == -math.inf).all() and not by_triton.expected[row]
        context_lens = [min(n + integer(1, 20), max_len - 1) for n in context_lens]
        if not integer(0, 3):
            generations[slots[0]] += 1


def test_a_slot_that_another_request_took(device) -> None:
    """It starts afresh, though after a preemption the text goes on where it stood."""
    text = torch.tensor([[1, 2, 3, 4] * 20], dtype=torch.int32).repeat(MAX_REQS, 1).to(device)
    for find in (triton_find, torch_find):
        lookup = Lookup(MAX_REQS, text.shape[1], device)
        generations = torch.zeros(MAX_REQS, dtype=torch.int32, device=device)
        for context_len in (20, 30, 40):
            find(lookup, batch(device, [1], [context_len], [True]), text, generations, 1)
        # At 20 the match has 17 tokens, at 30 it has 27.
        assert lookup.tries[1].tolist()[BUCKETS.index(16) :] == pytest.approx([7, 8, 5], rel=0.15)
        assert torch.equal(lookup.hits, lookup.tries)
        learnt = float(lookup.expected[0])
        generations[1] += 1
        find(lookup, batch(device, [1], [41], [True]), text, generations, 1)
        assert not lookup.tries[1].any() and float(lookup.expected[0]) < learnt


def test_a_long_text(device) -> None:
    """Several blocks of positions for each split; the latest of the longest matches wins."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = 140 * POSITIONS if device.type == "cuda" else 9 * POSITIONS
    text = torch.randint(0, 50, (1, num_tokens), generator=generator, dtype=torch.int32)
    phrase = torch.arange(100, 140, dtype=torch.int32)
    for at in (40, 3 * POSITIONS - 20, num_tokens - 700):
        text[0, at : at + 40] = phrase
    text[0, -20:] = phrase[:20]
    lookup = Lookup(1, num_tokens, device)
    inputs = batch(device, [0], [num_tokens - 1], [True])
    generations = torch.zeros(1, dtype=torch.int32, device=device)
    triton_find(lookup, inputs, text.to(device), generations, 1)
    assert lookup.tokens[0].tolist() == phrase[20:36].tolist()
    assert int(lookup.length[0]) == 20
