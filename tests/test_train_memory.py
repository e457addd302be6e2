"""The memory that a run says it needs, beside what torch's tensors take; runs that only say it."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TARGET, load_script
from live_bytes import LiveBytes
from safetensors import safe_open
from safetensors.torch import save_file
from test_train_targets import TARGETS, config_of
from training import (
    data,  # noqa: F401
    on_the_cpu_with_an_own_cache,  # noqa: F401
    one_stage,
    run,
    same,
    weights,
    write_recipe,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from vllm_longspec.bench.shapes import draft_config, target_config
from vllm_longspec.config import draft_config_for
from vllm_longspec.draft.checkpoint import served_folder
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train import attention, loss, memory, plan
from vllm_longspec.train import recipe as recipes
from vllm_longspec.train.dry_run import is_untrained
from vllm_longspec.train.loop import trainable
from vllm_longspec.train.memory import FLOAT
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.objective import draft_loss
from vllm_longspec.train.packing import make_batch, pack
from vllm_longspec.train.sharding import empty_target
from vllm_longspec.train.target import run_target
from vllm_longspec.train.together import Together

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TWO = Together(0, 2)


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", TARGETS)
def test_weights_of_a_target(name: str) -> None:
    config = config_of(name)
    empty = empty_target(config, torch.bfloat16)
    assert all(p.is_meta for p in empty.parameters())
    real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    counted = memory.memory_of(empty, draft_config_for(config), GPU, 1, False, 8)
    assert counted.layers == size_of(real.model.layers.parameters())
    assert counted.layers + counted.shared == size_of(real.parameters())
    trimmed = draft_config_for(config, draft_vocab_size=10)
    assert memory.shared_bytes(empty, trimmed) - counted.shared == 10 * 48 * 2


def test_weights_gradients_and_optimiser_of_a_draft() -> None:
    config = draft_config_for(config_of("qwen3"))
    layer = DraftLayer(config)
    optimizer = torch.optim.AdamW(trainable(layer))
    for parameter in trainable(layer):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    gradients = [p.grad for p in trainable(layer)]
    every = size_of(layer.parameters()) + size_of(moments) + size_of(gradients)
    assert memory.draft_bytes(config, half=False) == every
    half = sum(p.numel() for p in trainable(layer)) * 2
    assert memory.draft_bytes(config, half=True) == every + half


DENSE = LlamaConfig(
    hidden_size=64, intermediate_size=224, num_attention_heads=4, num_key_value_heads=1,
    num_hidden_layers=2, vocab_size=512,
)  # fmt: skip
EXPERTS = Qwen3MoeConfig(
    hidden_size=32, intermediate_size=96, moe_intermediate_size=24, num_experts=16,
    num_experts_per_tok=8, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_hidden_layers=2, vocab_size=500,
)  # fmt: skip


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("learn_from", ["text", "target"])
@pytest.mark.parametrize(("config", "max_logits"), [(DENSE, 1 << 15), (EXPERTS, 1 << 17)])
def test_activations_of_a_step(
    config: PreTrainedConfig, max_logits: int, learn_from: str, half: bool, monkeypatch
) -> None:
    """At most what is said, and at least three quarters of it. On a GPU the kernels are others;
    what they want is given here to those of a CPU."""
    monkeypatch.setattr(loss, "MAX_LOGITS", max_logits)
    monkeypatch.setattr(memory, "MAX_LOGITS", max_logits)
    if half:
        monkeypatch.setitem(attention.BACKENDS, "torch", with_repeated_heads)
    tokens = 512
    target = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if half else None)
    target.eval().requires_grad_(False)
    layer = DraftLayer(draft_config_for(config, window=tokens)).train()
    batch = make_batch(
        torch.arange(tokens).remainder(500).numpy(), [pack(torch.tensor([tokens]).numpy(), tokens)]
    )
    head = target.get_output_embeddings().weight

    def step() -> None:
        state = run_target(target, batch.tokens, batch.positions, batch.lengths)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = draft_loss(layer, head, state, batch, 2, learn_from)
        out.backward()

    step()
    for parameter in layer.parameters():
        parameter.grad = None
    with LiveBytes([*target.parameters(), *layer.parameters()]) as live:
        step()
    said = memory.activation_bytes(config, layer.config, tokens, half, learn_from == "target")
    # Weights as they are rounded, and their gradients as far as there are some by then.
    count = sum(p.numel() for p in trainable(layer))
    assert 0.75 * said < live.most < said + count * (FLOAT + 2 * half)


def with_repeated_heads(qkv, window, lengths):
    return attention._torch(attention._repeat_heads(qkv), window, lengths)


def test_a_step_that_was_measured() -> None:
    """The 8B shape on an H200, as docs/training.md has it: torch's reserve, which has fragments."""
    page = (ROOT / "docs/training.md").read_text()
    (measured,) = re.findall(r"15,150 tokens/s, peak memory ([\d.]+) GiB", page)
    target = empty_target(target_config("llama3-8b"), torch.bfloat16)
    said = memory.memory_of(target, draft_config("llama3-8b"), GPU, 1, False, 32768).total
    assert said / memory.GIB == pytest.approx(float(measured), rel=0.05)


def test_the_table_is_what_is_computed() -> None:
    script = load_script(ROOT / "scripts/memory_table.py")
    page = script.PAGE.read_text()
    assert page == script.page_with_table(page)
    assert script.PICTURE.read_text() == script.picture()


def nano(tmp_path: Path, data: Path, **changes) -> recipes.Recipe:
    return recipes.load_recipe(write_recipe(tmp_path, data), **changes)


def test_sharded_where_it_does_not_fit(tmp_path: Path, data: Path, monkeypatch) -> None:
    config = AutoConfig.from_pretrained(TARGET)
    draft = draft_config_for(config)
    target = empty_target(config, torch.float32)
    decided = nano(tmp_path, data)
    whole, parts = (
        memory.run_memory(decided, target, draft, CPU, 2, sharded) for sharded in (False, True)
    )
    assert parts.layers == whole.layers / 2 and parts.shared == whole.shared
    monkeypatch.setattr(memory, "WHOLE_LAYERS", 0)  # the tiny target has few layers
    room = int(whole.total / (1 - memory.MARGIN)) + 2
    for there, recipe, together, sharded, said in (
        (room, decided, TWO, False, "of each process"),
        (room - 2000, decided, TWO, True, "one of 2 parts"),
        (room // 2, decided, TWO, True, "this may not fit: more GPUs"),
        (room - 2000, decided, Together(), False, "this may not fit: more GPUs"),
        (room, nano(tmp_path, data, shard_target=True), TWO, True, "one of 2 parts"),
        (room - 2000, nano(tmp_path, data, shard_target=False), TWO, False, "this may not fit"),
        (room, nano(tmp_path, data, shard_target=True), Together(), False, "there is one process"),
    ):
        monkeypatch.setattr(plan, "device_room", lambda _, there=there: there)
        made = plan.plan_memory(recipe, config, draft, CPU, together)
        assert made.sharded == sharded and said in "\n".join(made.lines), made
    config.quantization_config = {"quant_method": "fp8"}
    monkeypatch.setattr(plan, "device_room", lambda _: room // 2)
    made = plan.plan_memory(decided, config, draft, CPU, TWO)
    assert not made.sharded and "the target is quantised (fp8); it is counted as" in made.lines[-2]
    with pytest.raises(LongSpecError, match=r"^shard_target: .* is quantised \(fp8\), and only"):
        plan.plan_memory(nano(tmp_path, data, shard_target=True), config, draft, CPU, TWO)


def test_sharding_is_no_part_of_what_a_run_is(tmp_path: Path, data: Path) -> None:
    assert recipes.identity(nano(tmp_path, data)) == recipes.identity(
        nano(tmp_path, data, shard_target=True)
    )


def test_a_dry_run(tmp_path: Path, data: Path) -> None:
    """Says what a run takes and leaves a draft to serve, which the run replaces; no other."""
    folder, options = tmp_path / "draft", ("--steps", 2, "--log-with", "tensorboard")
    for _ in range(2):
        dry = one_stage(data, folder, *options, "--dry-run")
        assert dry.exit_code == 0, dry.output
    assert "stage train: 2 steps of 4 x 128 tokens, at most 1,024" in dry.output
    for said in ("target's layers", "draft, its gradients, AdamW", "activations of 512 tokens",
                 "on 1, 2, 4, 8 GPUs", "MiB of disk at most in"):  # fmt: skip
        assert said in dry.output, dry.output
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert is_untrained(folder) and served_folder(str(folder), None, None, False) == folder
    untrained = weights(folder)
    trained = one_stage(data, folder, *options)
    assert trained.exit_code == 0, trained.output
    assert not is_untrained(folder) and not same(untrained, weights(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = one_stage(data, folder, *options, "--dry-run")
    assert again.exit_code == 0 and "holds this run already; no draft is written" in again.output
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_beside_other_things(tmp_path: Path, data: Path) -> None:
    """The mark is in the weights: others in their place are another's."""
    folder = tmp_path / "draft"
    path = write_recipe(tmp_path, data, draft_vocab_size=50)
    assert run("--config", path, "--dry-run").exit_code == 0
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert stored.get_tensor("draft_token_ids").tolist() == list(range(50))
    kept = weights(folder)
    (folder / "notes.txt").write_text("mine")
    for flags in (("--dry-run",), ()):
        done = run("--config", path, *flags)
        assert done.exit_code == 2 and "holds notes.txt, which this command did not" in done.stderr
    (folder / "notes.txt").unlink()
    (folder / "config.json").unlink()  # a dry run that was killed while it wrote
    assert is_untrained(folder)
    assert run("--config", path, "--dry-run").exit_code == 0
    assert same(weights(folder), kept) and is_untrained(folder)
    save_file(weights(folder), folder / "model.safetensors")
    for flags in (("--dry-run",), ()):
        done = run("--config", path, *flags)
        assert done.exit_code == 2 and "which this command did not make" in done.stderr
    assert json.loads((folder / "config.json").read_text())["model_type"] == "longspec"
