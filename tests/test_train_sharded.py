"""A target sharded over two processes gives what a whole one gives, bit for bit."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_train_targets import config_of
from training import as_process, free_port, on_the_cpu_with_an_own_cache, spawned  # noqa: F401
from transformers import AutoModelForCausalLM

from vllm_longspec.bench.train_step import train_step_report
from vllm_longspec.config import draft_config_for
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train.held_out import HeldOut
from vllm_longspec.train.memory import memory_of
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.packing import pack
from vllm_longspec.train.sharding import decoder_layers, empty_target, load_sharded_target
from vllm_longspec.train.target import load_target, run_target
from vllm_longspec.train.together import Together, processes_of

CPU = torch.device("cpu")
# Experts, whose number two does not divide; windows and tied embeddings; a buffer with weights.
NAMES = {"qwen3_moe": {"num_experts": 5}, "gemma3": {"tie_word_embeddings": True}, "glm4_moe": {}}


def own(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def in_one_of_two(rank: int, port: int, folder: Path) -> None:
    as_process(rank, 2, port)
    together = processes_of(Accelerator())
    for name in NAMES:
        compare_with_whole(folder / name, together)
    judge(folder / "gemma3", together)
    with pytest.raises(LongSpecError, match=r"broken cannot be loaded \("):
        load_sharded_target(folder / "broken", CPU, together)
    said: list[str] = []
    with pytest.raises(LongSpecError, match="full"):
        together.on_main(partial(fail_on_main, said))
    assert together.main_first(lambda: said.append("then") or rank) == rank
    assert said == (["main", "then"] if rank == 0 else ["then"])
    train_step_report("tiny", 20, 2, False, folder / "step.json", shard_target=True)
    target = load_sharded_target(folder / "gemma3", CPU, together)
    if rank == 1:  # the other is gone: an error, and no waiting
        with pytest.raises(RuntimeError):
            run_target(target, torch.zeros(1, 9, dtype=torch.int64), torch.arange(9)[None])
        with pytest.raises(RuntimeError):
            together.any(False)


def fail_on_main(said: list[str]) -> None:
    said.append("main")
    raise LongSpecError("full")


def compare_with_whole(folder: Path, together: Together) -> None:
    whole = load_target(folder, CPU)
    target = load_sharded_target(folder, CPU, together)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (target, whole))
        assert {name: x.dtype for name, x in ours.items()} == {
            name: x.dtype for name, x in theirs.items()
        }
    generator = torch.Generator().manual_seed(together.rank)  # other text on each
    for _ in range(2):
        tokens = torch.randint(97, (1, 40), generator=generator)
        positions = torch.cat([torch.arange(13), torch.arange(3000, 3027)])[None]
        ours, theirs = (run_target(t, tokens, positions, (13, 27)) for t in (target, whole))
        for part in ("embeddings", "key", "value", "hidden"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part)), (folder.name, part)
    assert torch.equal(target.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    empty = empty_target(whole.config, torch.float32)
    said = memory_of(empty, draft_config_for(whole.config), CPU, 2, True, 8)
    in_layers = sum(own(p).untyped_storage().nbytes() for p in decoder_layers(target).parameters())
    every = sum(own(p).untyped_storage().nbytes() for p in target.parameters())
    assert (said.layers, said.shared) == (in_layers, every - in_layers)
    if hasattr(target.model, "reset_iter_state"):  # nothing is kept from batch to batch
        assert not target.model._get_fsdp_state()._comm_ctx.post_forward_order


def judge(folder: Path, together: Together) -> None:
    """Three rows on two processes; stopped by one of them."""
    whole = load_target(folder, CPU)
    target = load_sharded_target(folder, CPU, together)
    rows = pack(np.asarray([40, 20, 19, 33]), 40)
    assert len(rows) == 3
    tokens = np.arange(112, dtype=np.int32) % 97
    torch.manual_seed(0)
    layer = DraftLayer(draft_config_for(whole.config))
    alone, both = (
        HeldOut(model, tokens, rows, None, CPU, processes).judge(layer, lambda: False)
        for model, processes in ((whole, Together()), (target, together))
    )
    assert alone == both
    held_out = HeldOut(target, tokens, rows, None, CPU, together)
    assert held_out.judge(layer, lambda: together.rank == 1) is None


def test_sharded_targets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, changes in NAMES.items():
        target = AutoModelForCausalLM.from_config(config_of(name, **changes))
        for parameter in target.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        target.save_pretrained(tmp_path / name)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text((tmp_path / "gemma3/config.json").read_text())
    (tmp_path / "broken/model.safetensors").write_bytes(b"cut off")
    port = free_port()
    assert spawned(*((in_one_of_two, rank, port, tmp_path) for rank in range(2))) == [0, 0]
    result = json.loads((tmp_path / "step.json").read_text())
    assert (result["processes"], result["sharded"]) == (2, True)
    assert result["tokens_per_second"] == pytest.approx(2 * 40 / result["seconds_per_step"])
    assert 8 < result["loss"] < 10 and result["computed_memory_gib"] > 0.1


def test_alone() -> None:
    together = Together()
    assert together.any(True, False) == [True, False] and together.sum(2, 3) == [2, 3]
    together.fail(None)
    assert together.main_first(lambda: 3) == 3
    with pytest.raises(LongSpecError, match="why"):
        together.fail(LongSpecError("why"))
