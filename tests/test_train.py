"""The trainer: positions, packing, the draft's view, recipes, runs that stop and go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DRAFT, TARGET
from hypothesis import given, settings
from hypothesis import strategies as st
from training import (
    data,  # noqa: F401
    on_the_cpu_with_an_own_cache,  # noqa: F401
    one_stage,
    run,
    same,
    weights,
    write_recipe,
)
from transformers import AutoConfig

from vllm_longspec.config import PUBLISHED_ARCHITECTURES, draft_config_for, recorded_target
from vllm_longspec.draft.checkpoint import check_checkpoint
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train import loop
from vllm_longspec.train import recipe as recipes
from vllm_longspec.train.loop import learning_rate_factor
from vllm_longspec.train.loss import IGNORED
from vllm_longspec.train.model import DraftLayer, init_weights, load_draft, save_draft
from vllm_longspec.train.objective import draft_loss, drafted_head, labels_in
from vllm_longspec.train.packing import Batch, make_batch, pack, step_batches, step_data
from vllm_longspec.train.positions import draw_anchor_offsets, piece_positions
from vllm_longspec.train.target import load_target, run_target

CPU = torch.device("cpu")


@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=8),
    st.integers(1100, 40_000),
    st.integers(0, 2**31 - 1),
)
def test_anchor_offset_positions(lengths: list[int], longest: int, seed: int) -> None:
    sizes = np.asarray(lengths)
    drawn = draw_anchor_offsets(sizes, longest, np.random.default_rng(seed))
    positions = piece_positions(sizes, *drawn)
    for piece in np.split(positions, np.cumsum(sizes)[:-1]):
        assert piece.max() < max(min(30_000, longest - 1000), len(piece))
        steps = np.diff(piece)
        assert (steps >= 1).all()
        jumps = (steps > 1).nonzero()[0]
        assert len(jumps) <= 1 and (jumps < 4).all()  # sinks, one jump, the rest


def test_offsets_reach_the_whole_range() -> None:
    sizes, generator = np.full(2000, 1024), np.random.default_rng(0)
    drawn = draw_anchor_offsets(sizes, 32_768, generator)
    positions = piece_positions(sizes, *drawn).reshape(2000, 1024)
    assert positions[:, -1].min() < 2_000 and positions[:, -1].max() > 29_500
    sinks = positions[:, :5]
    assert {int((row == np.arange(5)).sum()) for row in sinks if row[4] > 4} == {0, 1, 2, 3, 4}


@given(st.lists(st.integers(0, 70), min_size=1, max_size=30), st.integers(6, 30))
def test_packing_keeps_all_text_in_order(sizes: list[int], length: int) -> None:
    rows = pack(np.asarray(sizes), length)
    ends = np.cumsum(sizes)
    kept = np.zeros(sum(sizes), int)
    for start, size in zip(rows.starts, rows.lengths, strict=True):
        assert np.searchsorted(ends, start, "right") == np.searchsorted(
            ends, start + size - 1, "right"
        )
        assert size == length or size == sizes[np.searchsorted(ends, start, "right")] % length
        kept[start : start + size] += 1
    remainders = sum(size % length == 1 for size in sizes)
    assert kept.max(initial=0) <= 1 and (kept == 0).sum() == remainders
    for row in range(len(rows)):
        one = rows[row : row + 1]
        assert 0 < one.lengths.sum() <= length


def test_an_epoch_reads_every_row_once_and_shares_add_up() -> None:
    """However a step's rows are divided among processes and batches, they are the same."""
    tokens = np.arange(1000, dtype=np.int32)
    rows = pack(np.asarray([37, 5, 90, 12, 300, 8, 60]), 24)
    steps = [step_data(rows, step, (3, 0), 4, 4, 40_000) for step in range(2 * len(rows))]
    numbers = {rows.starts[rows.first[row]]: row for row in range(len(rows))}
    order = [numbers[row.starts[0]] for data in steps for row in data.rows]
    for epoch in range(8):
        assert sorted(order[epoch * len(rows) : (epoch + 1) * len(rows)]) == list(range(len(rows)))
    assert len({tuple(order[i : i + len(rows)]) for i in (0, len(rows))}) == 2
    shifts = [np.concatenate(data.shifts).tolist() for data in steps]
    assert {shift for drawn in shifts for shift in drawn} == {1, 2, 3, 4}
    assert any(len(set(drawn)) > 1 for drawn in shifts)  # not one for a whole step
    whole = next(step_batches(tokens, steps[5], range(4), 4))
    parts = [
        batch
        for share in (range(2), range(2, 4))
        for batch in step_batches(tokens, steps[5], share, 1)
    ]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts], 1))
    assert torch.equal(whole.positions, torch.cat([part.positions for part in parts], 1))
    assert whole.lengths == sum((part.lengths for part in parts), ())
    assert whole.shifts == sum((part.shifts for part in parts), ())
    assert int((whole.labels != IGNORED).sum()) == steps[5].num_labels


@pytest.fixture(scope="module")
def target():
    return load_target(TARGET, CPU)


def random_layer(config, seed: int = 0) -> DraftLayer:
    layer = DraftLayer(draft_config_for(config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return layer


def packed(pieces: list[np.ndarray]) -> Batch:
    tokens, sizes = np.concatenate(pieces), np.asarray([len(piece) for piece in pieces])
    return make_batch(tokens, [pack(sizes, int(sizes.sum()) + 1)])


@settings(max_examples=12)
@given(st.integers(0, 2), st.integers(1, 4), st.integers(0, 1000))
def test_a_document_changes_nothing_in_another(target, changed: int, shift: int, seed: int) -> None:
    """Nor does it matter that they are packed at all: losses add up, gradients too."""
    generator = np.random.default_rng(seed)
    pieces = [generator.integers(4, 4000, n) for n in generator.integers(2, 24, 3)]
    layer = random_layer(target.config)
    layer.config.window = 5

    def losses(pieces: list[np.ndarray], of: int) -> torch.Tensor:
        batch = packed(pieces)
        only = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces]) == of
        batch.labels[torch.from_numpy(~only)] = IGNORED
        state = run_target(target, batch.tokens, batch.positions, batch.lengths)
        return draft_loss(layer, target.lm_head.weight, state, batch, shift)

    other = list(pieces)
    other[changed] = generator.integers(4, 4000, len(pieces[changed]))
    for document in range(3):
        alone = losses([pieces[document]], 0)
        torch.testing.assert_close(losses(pieces, document), alone, rtol=1e-5, atol=1e-4)
        if document != changed:
            torch.testing.assert_close(losses(other, document), alone, rtol=1e-5, atol=1e-4)
    assert losses(other, changed) != losses(pieces, changed)


def test_each_piece_has_its_own_shift(target) -> None:
    generator = np.random.default_rng(0)
    pieces = [generator.integers(4, 4000, n) for n in (20, 3, 30)]
    layer, head, shifts = random_layer(target.config), target.lm_head.weight, (4, 4, 1)

    def loss(pieces: list[np.ndarray], shift: int | tuple[int, ...]) -> torch.Tensor:
        batch = packed(pieces)
        state = run_target(target, batch.tokens, batch.positions, batch.lengths)
        return draft_loss(layer, head, state, batch, shift)

    alone = sum(loss([piece], shift) for piece, shift in zip(pieces, shifts, strict=True))
    torch.testing.assert_close(loss(pieces, shifts), alone, rtol=1e-5, atol=1e-4)
    assert loss(pieces, shifts) != loss(pieces, 4)


def test_shifted_queries_see_only_what_drafting_sees() -> None:
    """A change of the target's keys at position j reaches outputs from j + shift on, no others."""
    config = draft_config_for(AutoConfig.from_pretrained(TARGET))
    layer = DraftLayer(config)
    init_weights(layer, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.cross_attn.o_proj.weight, std=0.1)
    length, changed = 40, 17
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(1, length, config.hidden_size, generator=generator)
    kv = torch.randn(2, 1, config.num_key_value_heads, length, config.head_dim, generator=generator)
    other = kv.clone()
    other[:, :, :, changed] += 1
    positions = torch.arange(length)[None]
    for shift in (1, 2, 4):
        a, b = (layer(embeddings, positions, *pair, shift) for pair in (kv, other))
        differs = (a != b).any(-1)[0]
        assert differs.tolist() == [i >= changed + shift for i in range(length)]


def test_schedule() -> None:
    factors = [learning_rate_factor(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and max(factors) == 1
    assert factors[99] == 1 and factors[-1] < 1e-4
    assert factors[100:] == sorted(factors[100:], reverse=True)


def test_gradients_reach_every_used_parameter_and_no_other(target) -> None:
    """The same ones with the layer recomputed in the backward pass."""
    tokens = np.random.default_rng(0).integers(4, 4000, 64)
    batch = packed([tokens[:40], tokens[40:]])
    state = run_target(target, batch.tokens, batch.positions, batch.lengths)
    gradients = []
    for recompute in (False, True):
        layer = random_layer(target.config)
        layer.recompute = recompute
        draft_loss(layer, target.lm_head.weight, state, batch, 2).backward()
        for name, parameter in layer.named_parameters():
            unused = name.startswith(("cross_attn.k_proj", "cross_attn.v_proj"))
            assert (parameter.grad is None) == unused, name
        gradients.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(parameter.grad is None for parameter in target.parameters())


def test_learns_from_the_target(target) -> None:
    """Its distribution at each token that has a next one, whatever that one is in the text."""
    tokens = np.random.default_rng(0).integers(4, 4000, 64)
    batch = packed([tokens[:40], tokens[40:]])
    state = run_target(target, batch.tokens, batch.positions, batch.lengths)
    layer, head = random_layer(target.config), target.lm_head.weight
    hidden = layer(
        state.embeddings, batch.positions, state.key, state.value, 2, batch.lengths
    )[0]  # fmt: skip
    wanted = target.lm_head(state.hidden[0]).softmax(-1)
    each = -(wanted * (hidden @ head.T).log_softmax(-1)).sum(-1)
    ends = [39, 63]
    expected = each.sum() - each[ends].sum()
    loss = draft_loss(layer, head, state, batch, 2, "target")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
    assert loss != draft_loss(layer, head, state, batch, 2, "text")


def test_learns_a_part_of_the_vocabulary(target) -> None:
    """Distributions over that part, at places whose next token is in it."""
    tokens = np.random.default_rng(0).integers(4, 4000, 64)
    batch = packed([tokens])
    ids = torch.from_numpy(np.unique(tokens[::2]))
    state = run_target(target, batch.tokens, batch.positions, batch.lengths)
    layer, weight = random_layer(target.config), target.lm_head.weight
    hidden = layer(state.embeddings, batch.positions, state.key, state.value, 2)[0]
    wanted = target.lm_head(state.hidden[0])[:, ids].softmax(-1)
    each = -(wanted * (hidden @ weight[ids].T).log_softmax(-1)).sum(-1)
    expected = each[:-1][torch.isin(batch.labels[:-1], ids)].sum()
    head = drafted_head(weight, ids)
    batch.labels = labels_in(head, batch.labels)
    loss = draft_loss(layer, head.weight, state, batch, 2, "target")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)


def test_a_draft_of_frequent_tokens_is_written(tmp_path: Path, data: Path) -> None:
    """What `trim-head` would keep of the same text, after each stage and at the end."""
    recipe = recipes.load_recipe(write_recipe(tmp_path, data, draft_vocab_size=300))
    assert loop.train(recipe)
    drafts = [load_draft(recipe.output / part) for part in (".", "stages/short", "stages/long")]
    check_checkpoint(recipe.output, drafts[0].config)
    assert {draft.config.draft_vocab_size for draft in drafts} == {300}
    assert all(torch.equal(draft.draft_token_ids, drafts[0].draft_token_ids) for draft in drafts)
    assert bool((drafts[0].draft_token_ids.diff() > 0).all())
    with pytest.raises(LongSpecError, match="draft_vocab_size: 5000 is not between 1 and"):
        loop.train(recipe.model_copy(update={"draft_vocab_size": 5000, "output": tmp_path / "o"}))


def test_saved_and_loaded(tmp_path: Path) -> None:
    layer = DraftLayer(draft_config_for(AutoConfig.from_pretrained(TARGET)))
    init_weights(layer, torch.Generator().manual_seed(3))
    save_draft(layer, tmp_path, torch.float32)
    again = load_draft(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True)
    )


def test_the_command(tmp_path: Path, data: Path) -> None:
    """Twice with one seed and different memory use: one result; the loss falls."""
    common = ("--steps", 8, "--learning-rate", 4e-3, "--seed", 5)
    for name, more in (("a", ()), ("b", ()), ("c", ("--sequences-per-batch", 3))):
        done = one_stage(data, tmp_path / name, *common, *more)
        assert done.exit_code == 0, done.output
    first, again, smaller = (weights(tmp_path / name / "stages/train") for name in "abc")
    assert same(first, again)
    for name in first:
        torch.testing.assert_close(first[name], smaller[name], atol=2e-3, rtol=1e-2)
    served = weights(tmp_path / "a")
    assert same(served, {name: tensor.bfloat16() for name, tensor in first.items()})
    log = [json.loads(line) for line in (tmp_path / "a/training_log.jsonl").open()]
    assert log[-2]["loss"] < log[0]["loss"] - 0.1
    assert 1 <= log[-1]["tokens_per_verification"] <= 1 + len(log[-1]["agreement"])
    assert (tmp_path / "a/loss.png").stat().st_size > 5000
    assert list((tmp_path / "a/tensorboard").rglob("events*"))
    assert "0.87M trainable parameters" in done.output
    assert "nothing to do" in one_stage(data, tmp_path / "a", *common).output


def test_starts_from_a_draft(tmp_path: Path, data: Path) -> None:
    """A tiny step leaves the weights at those it started from."""
    done = one_stage(data, tmp_path / "draft", "--steps", 1, "--learning-rate", 1e-9,
                     "--init", DRAFT, "--window", 99)  # fmt: skip
    assert done.exit_code == 0, done.output
    before, after = weights(DRAFT), weights(tmp_path / "draft")
    for name in set(after) & set(before):
        assert torch.allclose(after[name].float(), before[name].float(), rtol=0, atol=1e-8), name
    assert set(after) >= {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    first, again = (AutoConfig.from_pretrained(f) for f in (DRAFT, tmp_path / "draft"))
    assert (again.window, first.hidden_size) == (99, again.hidden_size)
    assert recorded_target(again) == str(TARGET)


def test_mistakes(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    trimmed, published = tmp_path / "trimmed", tmp_path / "published"
    for folder, changes in (
        (trimmed, {"draft_vocab_size": 8}),
        (published, {"architectures": [PUBLISHED_ARCHITECTURES[0]], "model_type": "llama"}),
    ):
        folder.mkdir()
        config = json.loads((DRAFT / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
    base = ("--target", TARGET, "--output", tmp_path / "draft")
    for arguments, sentence in (
        ((*base, "--data", "/no/such.jsonl"), "data: /no/such.jsonl is not a file"),
        ((*base, "--data", data, "--steps", 0), "--steps: 0 is not valid"),
        ((*base, "--data", data, "--learn-from", "me"), "--learn-from: 'me' is not valid"),
        ((*base, "--data", data, "--target", "/no/model"), "target: /no/model does not exist"),
        ((*base, "--data", data, "--target", other), "is a 'gpt2' model"),
        ((*base, "--data", data, "--init", "/no/draft"), "init: /no/draft has no config.json"),
        ((*base, "--data", data, "--init", TARGET), f"init: {TARGET} is not a LongSpec draft"),
        ((*base, "--data", data, "--init", trimmed), f"init: the draft in {trimmed} knows a part"),
        ((*base, "--data", data, "--init", published), f"{published} holds no *.safetensors"),
        ((*base, "--data", data, "--resume"), "holds no run"),
        ((*base, "--data", data, "--log-with", "wandb"), "log_with: wandb is not installed; pip"),
        (base, "data: stage 'train' has none; give --data"),
        (("--data", data), "--target: is missing"),
        ((*base, "--config", tmp_path / "no.yaml"), "no.yaml cannot be read"),
        ((*base, "--config", write_recipe(tmp_path, data), "--steps", 3), "--steps: belongs to a"),
    ):  # fmt: skip
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": [{"name": "a"}]}, r"stages\.0\.steps: is missing in .*recipe\.yaml"),
        ({"stages": []}, r"stages: \[\] in .*recipe\.yaml is not valid"),
        ({"epochs": 3}, r"epochs: is no field of a recipe .*; use target, output, data"),
        ({"context_length": 1064}, r"context_length: 1064 leaves no room .* more than 1064"),
        ({"context_length": "long"}, r"context_length: 'long' in .*recipe\.yaml is not valid"),
        ({"window": "wide"}, r"window: 'wide' in .*recipe\.yaml is not valid"),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: Path, data: Path, changes: dict, sentence: str) -> None:
    with pytest.raises(LongSpecError, match=sentence):
        recipes.load_recipe(write_recipe(tmp_path, data, **changes))


def test_offsets_reach_what_the_target_is_made_for(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a linearly scaled target, whose max_position_embeddings are the unscaled ones; the
    recipe's word is above that."""
    scaled = Path(shutil.copytree(TARGET, tmp_path / "target"))
    config = json.loads((scaled / "config.json").read_text())
    config |= {"max_position_embeddings": 4096, "rope_theta": 1e6,
               "rope_scaling": {"type": "linear", "factor": 4.0}}  # fmt: skip
    del config["rope_parameters"]
    (scaled / "config.json").write_text(json.dumps(config))
    asked, real = [], loop.step_data

    def step_data(*arguments):
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(loop, "step_data", step_data)
    for name, changes in (("derived", {}), ("own", {"context_length": 20_000})):
        (tmp_path / name).mkdir()
        path = write_recipe(tmp_path / name, data, target=str(scaled), **changes)
        loop.train(recipes.load_recipe(path))
    assert asked == [*[16_384] * 4, *[None] * 3, *[20_000] * 4, *[None] * 3]
    assert "no room" not in capsys.readouterr().out
    config |= {"max_position_embeddings": 1000, "rope_scaling": None}
    (scaled / "config.json").write_text(json.dumps(config))
    (tmp_path / "short").mkdir()
    loop.train(recipes.load_recipe(write_recipe(tmp_path / "short", data, target=str(scaled))))
    assert "the target's 1,000 positions leave no room for anchor-offset" in capsys.readouterr().out
