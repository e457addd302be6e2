"""Replayed drafts against the oracle of the draft layer, plain loops, and vLLM's own counts."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import DRAFT, ROOT, TARGET, Engine, documents, load_script, longspec, text_prompt
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.config import (
    FULL,
    SLIDING,
    LongSpecConfig,
    cross_attention_layer,
    draft_config_for,
)
from vllm_longspec.draft.reference import draft_layer
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval import replay as acceptance
from vllm_longspec.eval.replay import (
    Continuations,
    Replay,
    check_lengths,
    grow_trees,
    load_replayed_draft,
    markdown_table,
    own_cache,
    replay,
    sample_continuations,
    summarise,
)
from vllm_longspec.train.model import DraftLayer, save_draft
from vllm_longspec.train.target import load_target
from vllm_longspec.tree.accept import accept

WINDOW = 12
VOCAB = 12


WINDOWS = {"layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 5, "eos_token_id": None}


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tiny(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Two grouped heads; sure enough of its tokens that drafts can be right. Gemma 3 has windows,
    and the layer that drafts read is not the last."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "initializer_range": 0.3,
    }  # fmt: skip
    if request.param == "llama":
        config = LlamaConfig(**shape)
    else:
        config = Gemma3TextConfig(**shape | WINDOWS | {"num_hidden_layers": 3})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def random_draft(target: PreTrainedModel, seed: int) -> DraftLayer:
    generator = torch.Generator().manual_seed(seed)
    layer = DraftLayer(draft_config_for(target.config, window=WINDOW))
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return layer.requires_grad_(False)


def text_for(target: PreTrainedModel, prompt_length: int, num_new: int) -> Continuations:
    generator = torch.Generator().manual_seed(prompt_length)
    prompts = torch.randint(0, VOCAB, (3, prompt_length), generator=generator)
    return sample_continuations(target, prompts, num_new, 0.7, generator)


def plain_tree(
    layer: DraftLayer,
    target: PreTrainedModel,
    text: Continuations,
    row: int,
    root: int,
    tree_shape: tuple[int, ...],
    m: int,
) -> tuple[list[int], list[int]]:
    """(tokens, parents) of root and kept nodes: every token through the oracle, paths as lists."""
    embed, ids = target.get_input_embeddings(), layer.draft_token_ids
    known = range(VOCAB) if ids is None else ids.tolist()
    head = target.get_output_embeddings().weight
    key, value = (x[row, :, :root].transpose(0, 1) for x in (text.key, text.value))
    paths: list[tuple[int, ...]] = [()]
    scores = {(): 0.0}
    level = paths
    for width in tree_shape:
        candidates = []
        for path in level:
            tokens = torch.cat([text.tokens[row, : root + 1], torch.tensor(path).long()])
            index = torch.arange(len(tokens))
            distance = index[:, None] - index[None, :]
            hidden = draft_layer(
                layer.state_dict(), layer.config, embed(tokens), index,
                (distance >= 0) & (distance <= WINDOW), key, value,
                torch.ones(len(tokens), root, dtype=torch.bool),
            )  # fmt: skip
            logprobs = linear(hidden[-1], head)[list(known)].log_softmax(-1).tolist()
            candidates += [
                (scores[path] + logprob, (*path, token))
                for token, logprob in zip(known, logprobs, strict=True)
            ]
        best = sorted(candidates, reverse=True)[:width]
        scores |= {path: score for score, path in best}
        level = [path for _, path in best]
        paths += level
    kept = sorted(paths[1:], key=lambda path: -scores[path])[:m]
    nodes = [path for path in paths if path in [(), *kept]]
    return (
        [int(text.tokens[row, root]), *(path[-1] for path in nodes[1:])],
        [-1, *(nodes.index(path[:-1]) for path in nodes[1:])],
    )


@pytest.mark.parametrize(
    ("prompt_length", "tree_shape", "m", "kept"),
    [
        (3, (5, 9, 4), 12, None),
        (WINDOW - 1, (1, 1, 1, 1), 4, None),
        (4 * WINDOW, (6, 16, 16), 24, None),
        (4 * WINDOW, (6, 16, 16), 24, [0, 2, 3, 5, 6, 8, 9, 11]),
    ],
)
def test_replay_is_what_the_oracle_serves(
    tiny: PreTrainedModel,
    prompt_length: int,
    tree_shape: tuple[int, ...],
    m: int,
    kept: list[int] | None,
) -> None:
    """Contexts within, at and beyond the window; all nodes kept, and some; a trimmed head; every
    verification's count, rows advancing at their own pace."""
    max_tokens, depth = 9, len(tree_shape)
    text = text_for(tiny, prompt_length, max_tokens + depth)
    layer = random_draft(tiny, prompt_length + 1)
    if kept is not None:
        layer.keep_tokens(torch.tensor(kept))
    expected = []
    for row in range(3):
        ahead = text.tokens[row].tolist()
        committed, counts = 1, []
        while committed < max_tokens:
            root = prompt_length + committed - 1
            tokens, parents = plain_tree(layer, tiny, text, row, root, tree_shape, m)
            level = [0]
            for parent in parents[1:]:
                level.append(level[parent] + 1)
            # What the target says where the tree has gone along with it; elsewhere it is not asked.
            emitted, path = accept(tokens, parents, [ahead[root + d + 1] for d in level])
            assert emitted == ahead[root + 1 : root + 2 + len(path)]
            counts.append(len(path))
            committed += len(path) + 1
        expected.append(counts)
    assert replay(layer, tiny, text, tree_shape, m, max_tokens) == expected
    assert kept is not None or any(count > 1 for counts in expected for count in counts)

    roots = prompt_length + torch.tensor([0, 3, 7])
    own = own_cache(layer, tiny.get_input_embeddings(), text)
    trees = grow_trees(layer, tiny, text, own, roots, tree_shape, m)
    for row, root in enumerate(roots.tolist()):
        tokens, parents = plain_tree(layer, tiny, text, row, root, tree_shape, m)
        assert trees.tokens[row].tolist() == tokens[1:]
        assert trees.parents[row].tolist() == parents


def test_continuations(tiny: PreTrainedModel) -> None:
    """Greedy ones are the target's own, and the cache is that of one forward over all of them."""
    prompts = torch.randint(0, VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(1)
    text = sample_continuations(tiny, prompts, 10, 0, generator)
    expected = tiny.generate(
        prompts, max_new_tokens=10, do_sample=False, eos_token_id=None,
        attention_mask=torch.ones_like(prompts),  # else it takes token 0 for padding
    )  # fmt: skip
    assert torch.equal(text.tokens, expected)
    cache = tiny(text.tokens, use_cache=True).past_key_values
    read = cache.layers[cross_attention_layer(tiny.config)]
    torch.testing.assert_close(text.key, read.keys[:, :, :-1])
    torch.testing.assert_close(text.value, read.values[:, :, :-1])
    sampled = [
        sample_continuations(tiny, prompts, 10, 1.5, torch.Generator().manual_seed(s)).tokens
        for s in (1, 1, 2)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[1], sampled[2])


def test_numbers_of_a_replay() -> None:
    outputs = [list(range(10)), [1] * 10]
    result = summarise("d", 100, 0.8, (2, 2), 3, [[0, 2, 1], [1]], outputs)
    assert (result.verifications, result.tokens, result.prompts) == (4, 20, 2)
    assert result.mean_acceptance_length == 2
    assert result.per_depth == [0.75, 0.25]
    assert result.repeated_8grams == pytest.approx(2 / 6)
    assert result.standard_error == 0  # both prompts have the same mean
    uneven = summarise("d", 100, 0.8, (2, 2), 3, [[0, 0], [2, 2]], outputs)
    assert uneven.standard_error == pytest.approx(math.sqrt(2 * (4 + 4)) / 4)
    other = Replay(**(vars(result) | {"context": 2000, "mean_acceptance_length": 1.5}))
    assert markdown_table([result, other]).splitlines() == [
        "| draft | nodes | T | 100 tokens | 2,000 tokens |",
        "|---|---|---|---|---|",
        "| d | 3 | 0.8 | 2.00 ± 0.00 | 1.50 ± 0.00 |",
    ]


def test_contexts_end_at_one_place_and_batches_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()[:3]))
    sample, prompts = acceptance.sample_continuations, []

    def spy(target: Any, batch: torch.Tensor, *rest: Any) -> Continuations:
        prompts.append(batch)
        return sample(target, batch, *rest)

    monkeypatch.setattr(acceptance, "sample_continuations", spy)
    results = []
    for limit in (1 << 18, 200):
        monkeypatch.setattr(acceptance, "PROMPT_TOKENS_AT_ONCE", limit)
        results.append(
            list(
                acceptance.measure_drafts(
                    str(TARGET), {"d": DRAFT}, data, [60, 100], [0.0], [3], (2, 2), 3, 6
                )
            )
        )
    assert [p.shape for p in prompts] == [(3, 60), (3, 100), *[(3, 60), (2, 100), (1, 100)]]
    assert torch.equal(prompts[0], prompts[1][:, -60:])
    assert results[0] == results[1] and [r.context for r in results[0]] == [60, 100]


def test_contexts_that_vllm_serves_of_a_scaled_target_are_replayed() -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = LlamaConfig(max_position_embeddings=4096, rope_parameters=linear)
    check_lengths(config, [16_000], 384)
    with pytest.raises(LongSpecError, match="do not fit the target's 16384 positions"):
        check_lengths(config, [16_001], 384)


def run_replay(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", "replay", *arguments])


def test_mistakes(tmp_path: Path) -> None:
    other = LlamaConfig(hidden_size=32, num_attention_heads=4, vocab_size=VOCAB)
    save_draft(DraftLayer(draft_config_for(other)), tmp_path / "other")
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "' + "def f(x): return x\\n" * 300 + '"}\n')
    good = {"--target": str(TARGET), "--draft": str(DRAFT), "--data": str(data)}
    short = {"--context": "64", "--num-prompts": "1", "--max-tokens": "4"}
    for changes, sentence in (
        ({"--target": "/no/model"}, "target: /no/model does not exist"),
        ({"--target": str(tmp_path)}, f"target: {tmp_path} has no config.json"),
        ({"--draft": "/no/draft"}, "draft: /no/draft does not exist"),
        ({"--draft": str(tmp_path)}, f"draft: {tmp_path} has no config.json"),
        ({"--draft": str(tmp_path / "other")}, "has hidden_size 32, the target 256"),
        ({"--data": "/no/text"}, "data: /no/text is not a file"),
        ({"--context": "32768"}, "context: 32768 and 9 new tokens do not fit"),
        ({"--nodes": "69"}, "num_speculative_tokens: 69 is more than the 68 nodes"),
        ({"--tree-shape": "4 x"}, "tree_shape: level 2 is 'x'"),
    ):  # fmt: skip
        options = good | short | changes
        done = run_replay(*(word for pair in options.items() for word in pair))
        assert done.exit_code == 2, done.output
        assert sentence in done.output.replace("\n", ""), done.output
    written = {"--output": str(tmp_path / "r.json"), "--plot": str(tmp_path / "r.png")}
    done = run_replay(*(word for pair in (good | short | written).items() for word in pair))
    assert done.exit_code == 0, done.output
    assert "| nano-draft | 68 | 0.8 |" in done.output
    assert (tmp_path / "r.json").exists() and (tmp_path / "r.png").stat().st_size > 5000
    again = run_replay(*(word for pair in (good | short | written).items() for word in pair))
    assert again.exit_code == 0, again.output  # over its own files
    pdf = {"--plot": str(tmp_path / "r.pdf")}
    done = run_replay(*(word for pair in (good | short | pdf).items() for word in pair))
    assert done.exit_code == 2 and "give one in .png or .svg" in done.stderr


def decoded_without_copies(nodes: int, prompts: list[list[int]], max_tokens: int) -> Any:
    """In a process of its own, whose trees are the draft's alone, as a replay's are."""
    from vllm_longspec.eval.acceptance import decode
    from vllm_longspec.runtime import proposer

    proposer.COPY_DEPTH = 0
    engine = Engine(longspec(num_speculative_tokens=nodes))
    return decode(engine.llm, "LongSpec", prompts, 0.0, max_tokens, len(prompts))


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp32: FlashAttention has no such kernel")
def test_replay_counts_what_vllm_counts() -> None:
    """Float32, greedy: verifications and accepted nodes at each depth, node for node."""
    from processes import own_process

    max_tokens, nodes, shape = 48, 31, (4, 16, 16, 16, 16)
    prompts = [text_prompt(i, 700) for i in range(4)]
    with own_process() as process:
        served = process.submit(decoded_without_copies, nodes, prompts, max_tokens).result()
    target = load_target(TARGET, torch.device("cpu"))
    text = sample_continuations(
        target, torch.tensor(prompts), max_tokens + len(shape), 0, torch.Generator()
    )
    outputs = text.tokens[:, 700 : 700 + max_tokens].tolist()
    assert outputs == served.outputs
    counts = replay(load_replayed_draft(DRAFT, target), target, text, shape, nodes, max_tokens)
    replayed = summarise("d", 700, 0.0, shape, nodes, counts, outputs)
    print(replayed, served.verifications, served.per_depth)
    assert replayed.verifications == served.verifications
    assert replayed.per_depth == served.per_depth
    assert replayed.mean_acceptance_length == pytest.approx(served.mean_acceptance_length)


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return load_script(ROOT / "examples/ablation.py")


def test_only_missing_drafts_are_measured(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(_: str, drafts: dict[str, Path], contexts: list[int], **options: Any) -> list[Replay]:
        asked.append(sorted(drafts))
        outputs = [[1] * options["max_tokens"]] * options["num_prompts"]
        return [
            summarise(name, context, 0.8, options["tree_shape"], 3, [[1]] * len(outputs), outputs)
            for context in contexts
            for name in drafts
        ]

    monkeypatch.setattr(ablation, "measure_drafts", fake)
    file = tmp_path / "results.json"

    def measure(drafts: str, contexts: list[int], num_prompts: int = 2) -> list[tuple[str, int]]:
        results = ablation.measure(
            TARGET, dict.fromkeys(drafts, DRAFT), file, (2, 2), contexts=contexts,
            temperatures=[0.8], nodes=[3], num_prompts=num_prompts, max_tokens=8,
        )  # fmt: skip
        return [(result.draft, result.context) for result in results]

    assert measure("ba", [100, 200]) == [("b", 100), ("b", 200), ("a", 100), ("a", 200)]
    assert len(measure("abc", [100, 200])) == 6
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))  # cut off before c's last
    assert len(measure("abc", [100, 200])) == 6
    measure("abc", [200])
    measure("abc", [200], num_prompts=3)
    assert asked == [["a", "b"], ["c"], ["c"], ["a", "b", "c"]]


def run_ablation(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "examples/ablation.py", *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_mistakes_of_the_ablation(ablation: ModuleType) -> None:
    for target, variants, sentence in (
        (TARGET, ["no-such"], "variant: 'no-such' is unknown; choose among base"),
        (Path("/no/model"), ["base"], "target: /no/model has no config.json"),
    ):
        with pytest.raises(LongSpecError, match=sentence):
            ablation.check_names([target], variants)
    with pytest.raises(LongSpecError, match="steps: 3 values for 2 targets"):
        ablation.for_each("steps", [1, 2, 3], [TARGET, DRAFT])


@pytest.mark.full
def test_ablation(tmp_path: Path) -> None:
    """Two drafts trained and measured; the second time nothing is done again."""
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()[:3]))
    arguments = (
        "--target", str(TARGET), "--data", str(data), "--held-out", str(data), "--output",
        str(tmp_path / "out"), "--variant", "base", "--variant", "window-128", "--steps", "2",
        "--sequence-length", "64", "--sequences-per-step", "2", "--sequences-per-batch", "2",
        "--max-sequences", "20", "--context", "64", "--context", "200", "--temperature", "0",
        "--num-prompts", "2", "--max-tokens", "8",
    )  # fmt: skip
    done = run_ablation(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "base: trained in" in done.stdout and "| window-128 | 68 | 0 |" in done.stdout
    target = tmp_path / "out/nano-target"
    windows = [LongSpecConfig.from_pretrained(target / v).window for v in ("base", "window-128")]
    assert windows == [512, 128]
    assert (tmp_path / "out/nano-target-windows.png").stat().st_size > 5000
    results = (tmp_path / "out/results.json").read_text()
    again = run_ablation(*arguments)
    assert "base: trained before" in again.stdout and "measured" not in again.stdout
    assert (tmp_path / "out/results.json").read_text() == results
    other = run_ablation(*arguments, "--learning-rate", "1e-3")
    assert other.returncode == 2 and "holds a run of another recipe" in other.stderr
