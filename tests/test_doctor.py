"""Every fault is named with its fix; nothing is started."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET, write_sparse
from typer.testing import CliRunner

from vllm_longspec import cli, doctor
from vllm_longspec.bench.shapes import draft_config, target_config
from vllm_longspec.doctor import Check, diagnose
from vllm_longspec.draft.checkpoint import expected_tensors
from vllm_longspec.draft.convert import convert
from vllm_longspec.runtime import options as options_module
from vllm_longspec.runtime.options import MAX_BATCH, cost_shape
from vllm_longspec.tree import budget

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the checks of a machine without a GPU"
)


def found(checks: list[Check], topic: str) -> Check:
    (check,) = (check for check in checks if check.topic == topic)
    return check


def problems(checks: list[Check]) -> list[str]:
    return [check.topic for check in checks if check.state == "problem"]


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DRAFT, tmp_path / "draft"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_all_well_but_for_the_gpu() -> None:
    checks = diagnose(str(TARGET), str(DRAFT))
    assert problems(checks) == []
    gpu = found(checks, "GPU")
    assert gpu.state == "warning" and "CPU" in gpu.found
    assert found(checks, "tree").found == "1-128 requests: 4 16 16 16 16, 31 nodes"
    # 4 layers of 2 heads of 64 in bf16, in blocks of 128 tokens: one holds 512 slots.
    assert "a request: 0.25 MiB at any length, as much as 128 tokens" in (
        found(checks, "memory").found
    )
    assert "no cost model of a CPU" in found(checks, "expected cost").found


def test_weights_of_a_trimmed_draft(draft: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(draft / "model.safetensors")
    used = [
        x for name, x in tensors.items() if not name.startswith(("cross_attn.k", "cross_attn.v"))
    ]
    save_file(tensors | {"draft_token_ids": torch.arange(2048)}, draft / "model.safetensors")
    edit_config(draft, draft_vocab_size=2048)
    said = found(diagnose(str(TARGET), str(draft)), "memory").found
    size = sum(2 * x.numel() for x in used) / 2**20
    assert f"weights: {size:.1f} MiB and 1.0 MiB for a copy of 2,048 rows of the head" in said


@pytest.mark.parametrize(
    "version, said", [("0.34.1+cpu", "0.34.1+cpu: LongSpec stands aside"), (None, "not installed")]
)
def test_another_vllm(version: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: version)
    checks = diagnose(str(TARGET), str(DRAFT))
    assert problems(checks) == ["vLLM"]
    vllm = found(checks, "vLLM")
    assert vllm.found == said and "pip install 'vllm==0.33.*'" in vllm.fix
    assert found(checks, "plugin").state == "warning"
    assert found(checks, "draft").found == "not checked"


def test_a_vllm_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: "0.34.1+cpu")
    monkeypatch.setenv("VLLM_LONGSPEC_ANY_VERSION", "1")
    checks = diagnose()
    vllm = found(checks, "vLLM")
    assert vllm.state == "warning" and "0.34.1+cpu: not tested" in vllm.found
    assert found(checks, "plugin").state == "OK"


def test_a_plugin_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,more")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    checks = diagnose()
    assert problems(checks) == ["plugin", "model runner"]
    assert "VLLM_PLUGINS=other,more" in found(checks, "plugin").found
    assert "add longspec" in found(checks, "plugin").fix
    assert found(checks, "model runner").fix == "unset VLLM_USE_V2_MODEL_RUNNER"


def test_a_plugin_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "entry_points", lambda group: [SimpleNamespace(name="other")])
    (check,) = [c for c in diagnose(draft=str(DRAFT)) if c.state == "problem"]
    assert check.topic == "plugin" and "with pip" in check.fix


def test_a_changed_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager

    monkeypatch.setattr(CircularBufferManager, "_claim_ring_block", lambda self, request: None)
    plugin = found(diagnose(), "plugin")
    assert plugin.state == "problem" and "_claim_ring_block has parameters" in plugin.found
    assert "install vLLM 0.32 or 0.33 again" in plugin.fix


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [("Tesla V100", 7, 0), ("NVIDIA H200", 9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(made))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda i: SimpleNamespace(
            name=made[i][0], major=made[i][1], minor=made[i][2], total_memory=32 << 30
        ),
    )  # fmt: skip
    old, new = (check for check in diagnose() if check.topic == "GPU")
    assert old.state == "problem" and "compute capability 8.0" in old.fix
    assert (new.state, new.found) == (
        "OK", "1: NVIDIA H200, 32 GiB, compute capability 9.0",
    )  # fmt: skip


def test_a_cuda_build_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_vllm", lambda: "0.32.0")
    gpu = found(diagnose(), "GPU")
    assert gpu.state == "problem" and "nvidia-smi" in gpu.fix


def test_wrong_drafts_and_targets(draft: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(TARGET, tmp_path / "other"))
    edit_config(other, vocab_size=5000)
    window = Path(shutil.copytree(TARGET, tmp_path / "window"))
    edit_config(
        window, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=128
    )
    level = Path(shutil.copytree(DRAFT, tmp_path / "level"))
    edit_config(level, tree_shape=[4, 0])
    (draft / "model.safetensors").unlink()
    cases = [
        ("/no/such/target", DRAFT, "target", "does not exist", "give a folder"),
        (DRAFT, DRAFT, "target", f"{DRAFT} is a LongSpec draft", ""),
        (tmp_path, DRAFT, "target", "cannot read the config", "give the target's folder"),
        (window, DRAFT, "target", "sliding-window", "attends to the whole context"),
        (TARGET, "/no/such/draft", "draft", "does not exist", "give a draft's folder"),
        (TARGET, TARGET, "draft", "not a LongSpec draft", "give a LongSpec draft's folder"),
        (TARGET, draft, "draft", "holds no *.safetensors", ""),
        (other, DRAFT, "draft and target", "vocab_size: the draft has 4096, the target 5000",
         "use a draft trained for this target"),
        (TARGET, level, "draft and target", "tree_shape: level 2 is 0", "at least 1 node"),
    ]  # fmt: skip
    for target, wrong, topic, said, fix in cases:
        checks = diagnose(str(target), str(wrong))
        assert problems(checks) == [topic], (said, checks)
        assert said in found(checks, topic).found and fix in found(checks, topic).fix, checks
        assert checks[-1].topic == topic  # nothing is told about what cannot be served


def test_a_target_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_longspec.runtime import supported

    monkeypatch.setattr(supported, "TESTED", ("qwen3",))
    refused = found(diagnose(str(TARGET), str(DRAFT)), "target")
    assert refused.state == "problem" and refused.fix.endswith("VLLM_LONGSPEC_ANY_TARGET=1")
    monkeypatch.setenv("VLLM_LONGSPEC_ANY_TARGET", "1")
    checks = diagnose(str(TARGET), str(DRAFT))
    assert found(checks, "target").state == "warning"
    assert found(checks, "draft and target").state == "OK"


def test_the_target_that_the_draft_names(tmp_path: Path) -> None:
    assert found(diagnose(draft=str(DRAFT)), "target").fix == "give --target"
    convert(str(DRAFT), str(TARGET), tmp_path / "mine")
    checks = diagnose(draft=str(tmp_path / "mine"))
    assert problems(checks) == [] and str(TARGET) in found(checks, "target").found
    assert found(checks, "draft and target").state == "OK"
    recorded = json.loads((tmp_path / "mine/config.json").read_text())["speculators_config"]
    recorded["verifier"]["architectures"] = ["Qwen2ForCausalLM"]
    edit_config(tmp_path / "mine", speculators_config=recorded)
    fit = found(diagnose(draft=str(tmp_path / "mine")), "draft and target")
    assert fit.state == "warning" and "Qwen2ForCausalLM, not LlamaForCausalLM" in fit.found


@pytest.mark.parametrize("name, known", [("NVIDIA H200", True), ("NVIDIA RTX 6000", False)])
def test_trees_and_cost_on_a_gpu(
    name: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the shape of Llama-3-8B, whose tree follows the batch size."""
    target, draft = target_config("llama3-8b"), draft_config("llama3-8b")
    target.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    write_sparse(tmp_path / "draft/model.safetensors", expected_tensors(draft), "BF16")
    device = SimpleNamespace(
        is_cuda=lambda: True, is_cpu=lambda: False, get_device_name=lambda: name,
        supports_fp8=lambda: known,
    )  # fmt: skip
    monkeypatch.setattr(options_module, "current_platform", device)
    checks = diagnose(str(tmp_path / "target"), str(tmp_path / "draft"))
    gpu, shape = budget.gpu_named(name), cost_shape(draft, target, 1, "fp8" if known else None)
    budgets = budget.node_budgets(gpu, shape, MAX_BATCH)
    copied = f"in FP8 and {128256 * 4096 / 2**20:.1f} MiB for a copy of 128,256 rows of the head"
    assert (copied in found(checks, "memory").found) == known
    lines = found(checks, "tree").found.splitlines()
    served = [b for b in budgets if b.first_batch <= 128]
    assert len(lines) == len(served) > 1
    for line, b in zip(lines, served, strict=True):
        assert line.startswith(f"{b.first_batch}-{min(b.last_batch, 128)} requests: ")
        assert (f"{b.default.m} nodes" if b.default else "plain decoding") in line
    said = found(checks, "expected cost").found
    first = budgets[0].default
    assert first is not None
    cycle = budget.cycle_seconds(gpu, shape, 1, first.tree_shape, first.m)
    assert f"R = {cycle / budget.plain_seconds(gpu, shape, 1):.2f}" in said
    assert ("rates are assumed" in said) != known


def test_a_table_of_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a target and a GPU that is named; without a draft for one with the whole vocabulary."""
    target = target_config("llama3-8b")
    target.save_pretrained(tmp_path)
    monkeypatch.setattr(doctor, "diagnose", lambda *_: [Check("target", "OK", "supported")])
    result = CliRunner().invoke(
        cli.app, ["doctor", "--target", str(tmp_path), "--gpu", "H100"], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    gpu = budget.gpu_named("H100")
    shape = cost_shape(draft_config("llama3-8b"), target, 1, "fp8")
    budgets = budget.node_budgets(gpu, shape, 32)
    _, rest = result.output.split("expected milliseconds on H100")
    rows = [line.split() for line in rest.splitlines() if line.count(".") == 6]
    assert len(rows) == sum(
        len(b.plans) for n in (1, 4, 16, 32) for b in budgets if b.first_batch <= n <= b.last_batch
    )
    assert sum(cell.startswith("*") for row in rows for cell in row) == 4
    plan = budgets[0].plans[0]
    assert plan == budget.Plan((4, 4), 5)
    expected = ["1", "4x2", "5"]
    for context in (2048, 32768):
        plain = budget.plain_seconds(gpu, shape, 1, context)
        cycle = budget.cycle_seconds(gpu, shape, 1, plan.tree_shape, plan.m, context)
        expected += [f"{plain * 1e3:.2f}", f"{cycle * 1e3:.2f}", f"{cycle / plain:.2f}"]
    assert rows[0] == expected
    assert "assumed" not in result.output


def test_no_table_of_costs() -> None:
    """Without a GPU, present or named; for what cannot be served."""
    fine = [Check("target", "OK", "supported")]
    assert doctor.cost_table(str(TARGET), None, None, fine) is None
    assert doctor.cost_table(None, None, "H100", fine) is None
    wrong = [Check("target", "problem", "of another kind", "use another")]
    assert doctor.cost_table(str(TARGET), None, "H100", wrong) is None
    unknown = doctor.cost_table(None, str(DRAFT), "RTX 6000", fine)
    assert unknown is None  # the draft does not name its target
    unknown = doctor.cost_table(str(TARGET), str(DRAFT), "RTX 6000", fine)
    assert unknown is not None and "rates are assumed" in str(unknown.title)


def test_costs_where_no_tree_pays() -> None:
    config = target_config("llama3-8b")
    slow = replace(budget.H200, level_seconds=1.0)
    costs = doctor.expected_costs(config, draft_config("llama3-8b"), slow, in_fp8=False)
    assert [(cost.batch, cost.plan) for cost in costs] == [(b, None) for b in (1, 4, 16, 32)]
    cells = doctor.cost_cells(costs[0])
    assert cells[0] == "none pays" and len(cells) == 8


@pytest.mark.parametrize(
    "bad, code",
    [
        ([], 0),
        ([Check("b", "warning", "slow", "wait")], 0),
        ([Check("b", "problem", "broken", "mend it")], 1),
    ],
)
def test_command(bad: list[Check], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda *_: [Check("a", "OK", "[1, 2]"), *bad])
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == code
    assert "[1, 2]" in result.output
    assert all(f"fix: {check.fix}" in result.output for check in bad)
    assert f"{code} problem(s)" in result.output
