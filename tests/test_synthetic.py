"""A text's acceptance where weights are dummies: the draws, the walk, what a tree then accepts."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_longspec.bench.report import PLAIN
from vllm_longspec.bench.synthetic import NAMED_TEXTS, SyntheticText, agree
from vllm_longspec.bench.throughput import (
    LONGSPEC,
    Throughput,
    over,
    throughput_report,
    throughput_table,
)
from vllm_longspec.cli import app
from vllm_longspec.tree.accept import accept
from vllm_longspec.tree.budget import HARD, MAX_GUESSES, accepted_tokens, reach
from vllm_longspec.tree.expand import expand_level
from vllm_longspec.tree.prune import prune
from vllm_longspec.tree.shape import mask_words, node_depths

CPU = torch.device("cpu")


def text_tree(text: SyntheticText, shape: list[int], m: int) -> Any:
    """The tree of a draft whose guesses have the text's log-probabilities."""
    k = max(shape)
    scores, tokens, parents = [torch.zeros(1, 1)], [], []
    first, width = 0, 1
    for level in shape:
        guessed = torch.arange(k).expand(1, width, k) + 1000 * len(tokens)
        logprobs = text.logprobs[:k].expand(1, width, k)
        level_tokens, level_scores, parent = expand_level(scores[-1], logprobs, guessed, level)
        scores.append(level_scores)
        tokens.append(level_tokens)
        parents.append(parent + first)
        first, width = first + width, level
    depths = node_depths(shape)
    return prune(
        torch.cat(tokens, 1), torch.cat(scores[1:], 1), torch.cat(parents, 1), depths, len(shape),
        m, mask_words(m),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMED_TEXTS)
@pytest.mark.parametrize(
    ("shape", "m"), [([8, 16, 16, 16, 16], 31), ([1, 1, 1], 3), ([2] * 10, 11)]
)
def test_a_tree_accepts_what_the_text_says(name: str, shape: list[int], m: int) -> None:
    requests = 4000
    text = SyntheticText(CPU, name, seed=1)
    tree = text_tree(text, shape, m)
    tokens = torch.cat([torch.tensor([[7]]), tree.tokens], 1).repeat(requests, 1)
    starts = torch.arange(requests + 1, dtype=torch.int32) * (1 + m)
    own = torch.full((requests * (1 + m),), 5)
    targets, nodes = agree(
        own, tokens.flatten(), starts, tree.parents.repeat(requests, 1),
        text.draw_ranks(requests, 1 + m),
    )  # fmt: skip
    levels = [0] * len(shape)
    for target, node in zip(targets.view(requests, -1), nodes.view(requests, -1), strict=True):
        _, path = accept(node.tolist(), tree.parents[0].tolist(), target.tolist())
        for depth in range(len(path)):
            levels[depth] += 1
    probabilities = NAMED_TEXTS[name]
    expected = reach(shape, m, probabilities.guesses()) if probabilities else [0.0] * len(shape)
    for count, probability in zip(levels, expected, strict=True):
        assert count / requests == pytest.approx(probability, abs=0.03)
    if probabilities:
        length = accepted_tokens(shape, m, probabilities.guesses())
        assert 1 + sum(levels) / requests == pytest.approx(length, rel=0.03)


def test_requests_of_different_sizes() -> None:
    """The first has a root alone, the second a chain of two, the third two children, the first of
    which has one; unused nodes are never right."""
    starts = torch.tensor([0, 1, 4, 9], dtype=torch.int32)
    parents = torch.tensor([[-1, -1, -1, -1, -1], [-1, 0, 1, -1, -1], [-1, 0, 0, 1, -1]])
    nodes = torch.tensor([9, 9, 21, 22, 9, 31, 32, 33, -1])
    own = torch.arange(100, 109)
    for ranks, targets, kept in (
        ([0, 0, 0], [100, 21, 22, 103, 31, 33, 106, 107, 108], [9, 9, 21, 22, 9, 31, -1, 33, -1]),
        ([1, 1, 1], [100, 101, 102, 103, 32, 105, 106, 107, 108],
         [9, 9, -1, -1, 9, -1, 32, -1, -1]),
        ([MAX_GUESSES] * 3, list(range(100, 109)), [9, 9, -1, -1, 9, -1, -1, -1, -1]),
    ):  # fmt: skip
        drawn = torch.tensor(ranks)[:, None].expand(3, 5)
        forced, accepted = agree(own, nodes, starts, parents, drawn)
        assert forced.tolist() == targets and accepted.tolist() == kept
        assert forced.dtype == own.dtype and accepted.dtype == nodes.dtype
    assert own.tolist() == list(range(100, 109))


def test_draws_are_seeded_and_texts_exchanged_in_place() -> None:
    text = SyntheticText(CPU, "t0", seed=3)
    buffer, first = text.logprobs, text.draw_ranks(50, 8)
    assert first.min() == 0 and first.max() <= MAX_GUESSES
    text.choose("t0", 3)
    assert torch.equal(text.draw_ranks(50, 8), first)
    text.choose("t0", 4)
    assert not torch.equal(text.draw_ranks(50, 8), first)
    text.choose("none", 3)
    assert bool((text.draw_ranks(50, 8) == MAX_GUESSES).all())
    assert text.logprobs is buffer and buffer[:MAX_GUESSES].exp().tolist() == pytest.approx(
        HARD.guesses()
    )
    assert all(a > b for a, b in itertools.pairwise(buffer.tolist()))


def test_table() -> None:
    results = [
        Throughput(LONGSPEC, "t0", 4096, 1, [390.0, 410.0], 4.5, 11.25, {"none": 3, "a": 9}),
        Throughput(LONGSPEC, "t0", 4096, 4, [700.0, 700.0], 4.5, 25.7),
        Throughput(PLAIN, "", 4096, 1, [195.0, 205.0], 1.0, 5.0),
    ]
    assert [over(r, results) for r in results] == [2.0, None, 1.0]
    lines = throughput_table(results).splitlines()
    assert lines[2] == (
        "| 4,096 | 1 | t0 | 400.0 | 390.0 410.0 | 2.00x | 4.50 | 11.25 | none: 3; a: 9 |"
    )
    assert "| plain |" in lines[3] and "|  | 4.50 |" in lines[4]


def test_mistakes(tmp_path: Path) -> None:
    out = ["bench", "throughput", "--output", str(tmp_path / "out")]
    for arguments, sentence in (
        (["--text", "t2"], "text: 't2' is none of t1, t0.8, t0, none"),
        (["--shape", "nonsense"], "shape: 'nonsense' is unknown; use one of "),
        (["--side-by-side"], "--side-by-side: needs --kv-cache-gib"),
    ):
        done = CliRunner().invoke(app, [*out, *arguments])
        assert done.exit_code == 2, (arguments, done.exception)
        (said,) = (line for line in done.output.splitlines() if "vllm-longspec" in line)
        assert said.startswith(f"vllm-longspec: {sentence}")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 is for CPUs")
def test_throughput(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 1 << 28,
    }  # fmt: skip
    texts = ["t0", "none"]
    results = throughput_report("tiny", [64], [2], texts, 12, 512, tmp_path, **options)
    assert [(r.proposer, r.text) for r in results] == [
        (PLAIN, ""), (LONGSPEC, "t0"), (LONGSPEC, "none"),
    ]  # fmt: skip
    record = json.loads((tmp_path / "throughput.json").read_text())
    assert record["shape"] == "tiny" and record["tokens"] == 12
    for r, written in zip(results, record["results"], strict=True):
        assert len(r.runs) == 2 and min(r.runs) > 0
        assert written["over_plain"] == over(r, results) is not None
        if r.text == "t0":  # 5.3 on average, of few steps
            assert 2 < r.tokens_per_step <= 6
            assert sum(r.steps.values()) > 0 and "none" not in r.steps
        else:
            assert r.tokens_per_step == pytest.approx(1)
    assert len((tmp_path / "throughput.md").read_text().splitlines()) == 2 + len(results)


def test_dummy_weights_of_a_trained_size() -> None:
    """So large that a router tells experts apart, norms that change nothing, quantised weights as
    vLLM makes them."""
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    vllms = DummyModelLoader.load_weights
    try:
        from vllm_longspec.bench import dummy_weights

        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.RMSNorm(64))
        model.rounded = torch.nn.Parameter(
            torch.zeros(4, dtype=torch.float8_e4m3fn), requires_grad=False
        )
        with torch.no_grad():
            model[1].weight.zero_()
        loader = SimpleNamespace(_process_online_quant_layer=None)
        dummy_weights.load_weights(loader, model, None)
        assert float(model[0].weight.detach().std()) == pytest.approx(dummy_weights.STD, rel=0.1)
        assert (model[1].weight == 1).all() and model.rounded.dtype == torch.float8_e4m3fn
    finally:
        DummyModelLoader.load_weights = vllms
