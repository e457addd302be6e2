"""The trainer: positions, shifted attention, a falling loss, one result for one seed."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DRAFT, TARGET, documents
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_longspec.config import LongSpecError, draft_config_for
from vllm_longspec.train.data import read_documents
from vllm_longspec.train.loop import learning_rate_factor
from vllm_longspec.train.model import DraftLayer, init_weights, load_draft, save_draft
from vllm_longspec.train.objective import draft_loss, run_target
from vllm_longspec.train.positions import anchor_offset_positions


@given(st.integers(1, 8), st.integers(2, 300), st.integers(1100, 40_000), st.integers(0, 2**31 - 1))
def test_anchor_offset_positions(sequences: int, length: int, longest: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = anchor_offset_positions(sequences, length, longest, generator)
    assert positions.shape == (sequences, length)
    assert int(positions.max()) < max(min(30_000, longest - 1000), length)
    steps = positions.diff(dim=1)
    assert bool((steps >= 1).all())
    jumps = steps > 1
    assert bool((jumps.sum(1) <= 1).all())  # sinks, one jump, the rest
    assert all(int(row.nonzero()[0]) < 4 for row in jumps if row.any())


def test_offsets_reach_the_whole_range() -> None:
    generator = torch.Generator().manual_seed(0)
    last = anchor_offset_positions(2000, 1024, 32_768, generator)[:, -1]
    assert int(last.min()) < 2_000 and int(last.max()) > 29_500
    sinks = anchor_offset_positions(2000, 1024, 32_768, generator)[:, :5]
    assert {int((row == torch.arange(5)).sum()) for row in sinks if row[4] > 4} == {0, 1, 2, 3, 4}


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


def test_gradients_reach_every_used_parameter_and_no_other() -> None:
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).requires_grad_(False)
    layer = DraftLayer(draft_config_for(target.config))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    tokens = torch.randint(4, 4000, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).expand(2, -1)
    state = run_target(target, tokens, positions)
    draft_loss(layer, target.get_output_embeddings(), state, tokens, positions, 2).backward()
    for name, parameter in layer.named_parameters():
        unused = name.startswith(("cross_attn.k_proj", "cross_attn.v_proj"))
        assert (parameter.grad is None) == unused, name
    assert all(parameter.grad is None for parameter in target.parameters())


def test_saved_and_loaded(tmp_path: Path) -> None:
    layer = DraftLayer(draft_config_for(AutoConfig.from_pretrained(TARGET)))
    init_weights(layer, torch.Generator().manual_seed(3))
    save_draft(layer, tmp_path, torch.float32)
    again = load_draft(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True)
    )


def run_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_longspec.cli", "train", "--target", str(TARGET), *arguments],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl.xz"
    with lzma.open(path, "wt") as lines:
        for i, text in enumerate(documents()[:6]):
            lines.write(json.dumps(text if i % 2 else {"text": text}) + "\n")
    return path


def test_the_command(tmp_path: Path, data: Path) -> None:
    """Twice with one seed and different memory use: one result; the loss falls."""
    common = ["--data", str(data), "--steps", "8", "--sequence-length", "128",
              "--sequences-per-step", "4", "--learning-rate", "4e-3", "--seed", "5"]  # fmt: skip
    weights = []
    for name, extra in (("a", []), ("b", []), ("c", ["--sequences-per-batch", "2"])):
        done = run_train(*common, "--output", str(tmp_path / name), "--sequences-per-batch", "4",
                         *extra)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    first, again, smaller = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in first:
        assert torch.allclose(first[name].float(), smaller[name].float(), atol=2e-3), name
    log = [json.loads(line) for line in (tmp_path / "a/training_log.jsonl").open()]
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    assert (tmp_path / "a/loss.png").stat().st_size > 5000
    assert "0.87M trainable parameters" in done.stdout


def test_starts_from_a_draft(tmp_path: Path, data: Path) -> None:
    """A tiny step leaves the weights at those it started from."""
    done = run_train("--data", str(data), "--steps", "1", "--sequence-length", "128",
                     "--sequences-per-step", "2", "--sequences-per-batch", "2",
                     "--learning-rate", "1e-9", "--init", str(DRAFT),
                     "--output", str(tmp_path / "draft"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (load_file(f / "model.safetensors") for f in (DRAFT, tmp_path / "draft"))
    for name in set(after) & set(before):
        assert torch.allclose(after[name].float(), before[name].float(), rtol=0, atol=1e-8), name
    assert set(after) >= {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    first, again = (AutoConfig.from_pretrained(f) for f in (DRAFT, tmp_path / "draft"))
    assert (first.window, first.hidden_size) == (again.window, again.hidden_size)


def test_mistakes(tmp_path: Path, data: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"fine"\n{"txt": 1}\n')
    with pytest.raises(LongSpecError, match=r"line 2 of .*bad\.jsonl is neither"):
        list(read_documents(bad))
    out = ("--output", str(tmp_path / "draft"))
    for arguments, sentence in (
        (["--data", "/no/such.jsonl"], "data: /no/such.jsonl is not a file"),
        (["--data", str(data), "--steps", "0"], "--steps: 0 is not valid"),
        (["--data", str(data), "--target", "/no/model"], "target: "),
        (["--data", str(data), "--sequences-per-step", "6", "--sequences-per-batch", "4"],
         "sequences_per_batch: 4 does not divide sequences_per_step 6"),
        (["--data", str(data), "--init", "/no/draft"], "init: /no/draft has no config.json"),
        (["--data", str(data), "--init", str(TARGET)],
         f"{TARGET} lacks cross_attn.o_proj.weight"),
    ):  # fmt: skip
        done = run_train(*arguments, *out)
        assert done.returncode != 0
        assert sentence in done.stderr and "Traceback" not in done.stderr, done.stderr[-1500:]
        assert not (tmp_path / "draft").exists()
