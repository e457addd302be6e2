"""Runs that stop, go on, are watched; and as several processes."""

import json
import os
import re
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import PartialState
from helpers import TARGET
from training import (
    as_process,
    data,  # noqa: F401
    free_port,
    on_the_cpu_with_an_own_cache,  # noqa: F401
    one_stage,
    run,
    same,
    spawned,
    weights,
    write_recipe,
)

from vllm_longspec.config import draft_config_for
from vllm_longspec.errors import LongSpecError
from vllm_longspec.train import checkpoint, held_out, loop, progress, trackers, watch
from vllm_longspec.train import recipe as recipes
from vllm_longspec.train.model import DraftLayer
from vllm_longspec.train.objective import chain_acceptance
from vllm_longspec.train.packing import pack
from vllm_longspec.train.stop import Stop, stop_signals
from vllm_longspec.train.target import load_target
from vllm_longspec.train.together import Together


def done(recipe: recipes.Recipe) -> tuple[list[str], str | None, int]:
    there = checkpoint.done(recipe)
    return there.finished, there.running, there.steps


def test_ctrl_c_keeps_what_was_done(tmp_path: Path, data: Path, monkeypatch, capfd) -> None:
    recipe = recipes.load_recipe(write_recipe(tmp_path, data))
    real, count = loop.train_step, []

    def train_step(*arguments):
        count.append(0)
        if len(count) == 2:
            os.kill(os.getpid(), 2)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert not loop.train(recipe)
    assert len(count) == 2
    assert done(recipe) == ([], "short", 2)
    assert re.search(
        r"finishing the step, about \d+ s, then a ch.*; once more", capfd.readouterr().err
    )


def test_another_recipe_keeps_out_of_a_run(tmp_path: Path, data: Path) -> None:
    path = write_recipe(tmp_path, data)
    recipe = recipes.load_recipe(path)
    recipe.output.mkdir()
    for again in (recipe, recipes.load_recipe(path, checkpoint_every_minutes=7)):
        with ExitStack() as held:
            checkpoint.start_run(again, held)
    done = run("--config", path, "--window", 7)
    assert done.exit_code == 2
    assert "of another recipe: window is None there and 7 here; give another folder" in done.stderr
    content = yaml.safe_load(path.read_text())
    for number, field, value, sentence in (
        (0, "learning_rate", 0.5, r"stages\.short\.learning_rate is 0\.004 there and 0\.5 here"),
        (0, "steps", 5, r"stages\.short\.steps is 4 there and 5 here"),  # not the last stage
        (1, "steps", 2, r"stages\.long\.steps is 3 there and 2 here"),
        (1, "name", "other", "stages is 'short long' there and 'short other' here"),
    ):
        stages = [dict(stage) for stage in content["stages"]]
        stages[number][field] = value
        with pytest.raises(LongSpecError, match=sentence):
            checkpoint.check_folder(recipes.Recipe(**content | {"stages": stages}))
    (recipe.output / "recipe.yaml").write_bytes(b"\x00\xff: [")
    with pytest.raises(LongSpecError, match=r"recipe\.yaml is not the record of a run"):
        checkpoint.check_folder(recipe)


def test_more_steps_for_a_finished_run(tmp_path: Path, data: Path) -> None:
    """AdamW goes on, too; without its checkpoint it says that it starts anew."""
    common = ("--learning-rate", 4e-3, "--log-with", "tensorboard")
    assert one_stage(data, tmp_path / "a", "--steps", 2, *common).exit_code == 0
    first = weights(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoint")
    for name, anew in (("a", False), ("b", True)):
        more = one_stage(data, tmp_path / name, "--steps", 4, *common)
        assert more.exit_code == 0 and "going on at step 2" in more.output, more.output
        assert ("AdamW starts anew" in more.output) == anew
        rows = [json.loads(line) for line in (tmp_path / name / progress.LOG_FILE).open()]
        assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3]
        assert not same(first, weights(tmp_path / name))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    again = one_stage(data, tmp_path / "a", "--steps", 4, *common)
    assert "nothing to do" in again.output
    fewer = one_stage(data, tmp_path / "a", "--steps", 3, *common)
    assert fewer.exit_code == 2 and "stages.train.steps is 4 there and 3 here" in fewer.stderr


def train_as(rank: int, port: int, whole: recipes.Recipe, sharded: recipes.Recipe) -> None:
    """The second run is judged after each step, and one of its processes is asked to stop."""
    as_process(rank, 2, port)
    assert loop.train(whole)
    state = PartialState()
    assert (state.num_processes, state.backend) == (2, "gloo")
    held_out.LEAST_SECONDS, held_out.SHARE = 0, 100
    steps, real = [], loop.train_step

    def train_step(*arguments):
        steps.append(0)
        if rank == 1 and len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    loop.train_step = train_step
    assert not loop.train(sharded) and len(steps) == 6
    assert loop.train(sharded) and len(steps) == 7
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path, data: Path) -> None:
    """In float32, on two CPU processes; each reads half of every step, and the norm that is clipped
    is that of both. In the second run half of the target is with each."""
    names = ("one", "two", "sharded")
    for name in names:
        (tmp_path / name).mkdir()
    one, *others = (
        recipes.load_recipe(
            write_recipe(
                tmp_path / name, data, gradient_clipping=0.1, shard_target=name == "sharded"
            )
        )
        for name in names
    )
    assert loop.train(one)
    port = free_port()
    assert spawned(*((train_as, rank, port, *others) for rank in range(2))) == [0, 0]
    first, one, two = (
        weights(tmp_path / name / "draft/stages" / stage)
        for name, stage in (("one", "short"), ("one", "long"), ("two", "long"))
    )
    for name in one:
        moved = (one[name] - first[name]).abs().mean()
        # AdamW turns the rounding of gradients near zero into whole steps, of a few weights. Those
        # of the keys' bias are all near zero: softmax knows it by the rotation between keys only.
        share = 5e-3 if name == "self_attn.k_proj.bias" else 1e-3
        assert (one[name] - two[name]).abs().mean() <= share * moved, name
    assert same(two, weights(tmp_path / "sharded/draft/stages/long"))
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "draft" / progress.LOG_FILE).open()]
        for name in names
    }
    losses, judged = (
        {name: [row[key] for row in rows[name] if key in row] for name in names}
        for key in ("loss", "agreement")
    )
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-4)
    assert losses["two"] == losses["sharded"]
    # After each stage; and after each step but a stage's last and the one that was stopped at.
    assert [len(judged[name]) for name in names] == [2, 2, 6]
    assert [judged["sharded"][number] for number in (3, 5)] == judged["two"]
    assert judged["one"][0] == pytest.approx(judged["two"][0], abs=0.02)


def test_a_full_disk_ends_no_run(tmp_path: Path, data: Path, monkeypatch, capsys) -> None:
    """The checkpoints in between may fail; the one at Ctrl-C may not, and says why."""
    recipe = recipes.load_recipe(write_recipe(tmp_path, data, checkpoint_every_minutes=0))
    real = checkpoint.save_checkpoint
    full = LongSpecError("output: disk cannot be written (No space left on device)")

    def save_checkpoint(layer, optimizer, folder, stage, steps) -> None:
        if stage == "short":
            raise full
        real(layer, optimizer, folder, stage, steps)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    assert loop.train(recipe)
    assert capsys.readouterr().out.count("No space left on device); going on without") == 3
    monkeypatch.setattr(loop.Watch, "batch_done", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    again = recipe.model_copy(update={"output": tmp_path / "again"})
    with pytest.raises(LongSpecError, match="No space left"):
        loop.train(again)


def test_watched_by_time(tmp_path: Path, data: Path, monkeypatch, capsys) -> None:
    """Lines within a step and judgements between steps, as time goes by."""
    monkeypatch.setattr(watch, "LOG_SECONDS", 0)
    monkeypatch.setattr(held_out, "LEAST_SECONDS", 0)
    monkeypatch.setattr(held_out, "SHARE", 100)
    content = yaml.safe_load(write_recipe(tmp_path, data).read_text())
    content["stages"] = [content["stages"][0] | {"sequences_per_batch": 2}]
    assert loop.train(recipes.Recipe(**content))
    said = capsys.readouterr().out
    line = r"short: step 1 of 4, batch 1 of 2, loss \d\.\d+, [\d,]+ tokens/s, 0:00:\d+ left"
    assert re.search(line, said), said
    rows = [json.loads(line) for line in (tmp_path / "draft" / progress.LOG_FILE).open()]
    assert [row["step"] for row in rows if "agreement" in row] == [0, 1, 2, 3]
    assert said.count("tokens a verification as a chain of 5 at T=0") == 4


def test_judged_for_a_small_share_of_the_time() -> None:
    rows = pack(np.asarray([100] * 4), 64)
    target = load_target(TARGET, torch.device("cpu"))
    tokens = np.zeros(400, np.int32)
    judge = held_out.HeldOut(target, tokens, rows, None, target.device, Together())
    assert not judge.due(29, 1e9) and judge.due(30, 1e9)
    assert not judge.due(40, 3 * 400 / 1.3) and judge.due(44, 3 * 400 / 1.3)
    judge.seconds, judge.last, judge.judged_at = 3.0, 3.0, 100.0
    assert not judge.due(199, 1e9) and judge.due(201, 1e9)
    layer = DraftLayer(draft_config_for(target.config)).train()
    assert judge.judge(layer, lambda: True) is None and layer.training


def test_signals_where_nothing_is_finished_first() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals(Stop()):
        os.kill(os.getpid(), signal.SIGTERM)
    stop = Stop(finishing=lambda: "")
    with pytest.raises(KeyboardInterrupt), stop_signals(stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)


def test_numbers_for_trackers() -> None:
    assert trackers.numbers({"stage": "a", "step": 3, "loss": 2.0, "agreement": [0.5, 0.25]}) == {
        "loss": 2.0, "agreement/shift 1": 0.5, "agreement/shift 2": 0.25,
    }  # fmt: skip
    assert chain_acceptance([0.5, 0.5]) == 1.75
