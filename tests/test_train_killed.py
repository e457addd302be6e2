"""SIGKILL at any moment: a run ends with the weights of one that went through, and what a name
stands for is whole."""

import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TARGET, tokenizer
from training import (
    data,  # noqa: F401
    on_the_cpu_with_an_own_cache,  # noqa: F401
    run,
    same,
    spawned,
    weights,
    write_recipe,
)
from transformers import AutoConfig

from vllm_longspec.config import draft_config_for
from vllm_longspec.train import checkpoint, loop, progress, tokens
from vllm_longspec.train import recipe as recipes
from vllm_longspec.train.model import DraftLayer, load_draft
from vllm_longspec.train.tokens import cache_folder, token_ids
from vllm_longspec.writing import write_text

NUM_KILLS = 10
# What a run does, by the function that does it.
PHASES: dict[str, tuple[ModuleType, str]] = {
    "tokenising": (tokens, "_tokenise"),
    "step": (loop, "train_step"),
    "checkpoint": (checkpoint, "save_checkpoint"),
    "stage": (checkpoint, "save_stage"),
    "served": (checkpoint, "save_served"),
}
# In which phase a life ends; each life goes on where the one before ended.
ENDS = ("tokenising", "tokenising", "step", "checkpoint", "stage", "step", "checkpoint", "stage",
        "served", "served")  # fmt: skip
TIMES = ("tokens_per_second", "seconds_left")
# What changes a disk, as it is called below Python: `open` makes a file, or empties it.
CHANGES = {"open", "write", "tofile", "serialize_file", "truncate", "chmod", "mkdir", "rename",
           "replace", "unlink", "rmdir"}  # fmt: skip


def fork(function: Callable[..., Any], *arguments: Any) -> int:
    """The number of a process that does this."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_and_time(recipe: recipes.Recipe, seconds: Path) -> None:
    """How long each phase takes, its shortest time."""
    shortest: dict[str, float] = {}

    def timed(phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.monotonic()
            result = real(*arguments, **options)
            shortest[phase] = min(time.monotonic() - start, shortest.get(phase, 60.0))
            return result

        return call

    for phase, (module, name) in PHASES.items():
        setattr(module, name, timed(phase, getattr(module, name)))
    assert loop.train(recipe)
    seconds.write_text(json.dumps(shortest))


def train_and_tell(recipe: recipes.Recipe, phase: str, pipe: int) -> None:
    """Writes to the pipe when the phase begins."""
    module, name = PHASES[phase]
    real = getattr(module, name)

    def call(*arguments: Any, **options: Any) -> Any:
        os.write(pipe, b"x")
        return real(*arguments, **options)

    setattr(module, name, call)
    loop.train(recipe)


def is_killed(recipe: recipes.Recipe, phase: str, wait: float) -> bool:
    """So many seconds after the phase began; a run that has no such phase left ends."""
    receives, sends = os.pipe()
    pid = fork(train_and_tell, recipe, phase, sends)
    os.close(sends)
    if os.read(receives, 1):
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    os.close(receives)
    code = exit_code(pid)
    assert code in (0, -signal.SIGKILL), (phase, code)
    return code == -signal.SIGKILL


def kill_ten_times(whole: recipes.Recipe, killed: recipes.Recipe, folder: Path) -> None:
    """In a process of its own, which has imported everything and computed nothing: what it forks
    begins at once, and has no threads to miss."""
    import matplotlib.pyplot  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    seconds = folder / "seconds.json"
    assert exit_code(fork(train_and_time, whole, seconds)) == 0
    shortest = json.loads(seconds.read_text())
    shutil.rmtree(cache_folder())
    shares = np.random.default_rng(0).uniform(size=100).tolist()
    kills: list[str] = []
    for phase, share in zip(itertools.cycle(ENDS), shares, strict=False):
        wait = share * shortest[phase]
        if is_killed(killed, phase, wait):
            kills.append(f"{1e3 * wait:.0f} of {1e3 * shortest[phase]:.0f} ms into {phase}")
        else:  # a late kill before it met the end; another run takes the rest
            check_equal(whole, killed)
            shutil.rmtree(killed.output)
            shutil.rmtree(cache_folder())
        if len(kills) == NUM_KILLS:
            break
    assert len(kills) == NUM_KILLS, kills
    print("killed", ", ".join(kills))


def check_equal(whole: recipes.Recipe, killed: recipes.Recipe) -> None:
    """Every bit of all drafts, and the losses on the way to them."""
    for part in ("stages/short", "stages/long", "."):
        assert same(weights(whole.output / part), weights(killed.output / part)), part
    logs = [
        [
            {name: value for name, value in row.items() if name not in TIMES}
            for line in (recipe.output / progress.LOG_FILE).open()
            if "loss" in (row := json.loads(line))
        ]
        for recipe in (whole, killed)
    ]
    assert len(logs[0]) == 7 and logs[0] == logs[1]


def test_killed_at_ten_random_moments(tmp_path: Path, data: Path) -> None:
    """Moments of each phase; a checkpoint is written after each step."""
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        folder.mkdir()
    both = [
        recipes.load_recipe(write_recipe(folder, data, checkpoint_every_minutes=minutes))
        for folder, minutes in ((whole, 60), (killed, 0))
    ]
    assert spawned((kill_ten_times, *both, tmp_path)) == [0]
    there = checkpoint.done(both[1])
    begun = (both[1].output / recipes.FILE).is_file()
    ended = run("--config", killed / "recipe.yaml", *["--resume"] * begun)
    assert ended.exit_code == 0, ended.output
    for stage in there.finished:
        assert checkpoint.is_written(both[1]) or f"stage {stage}: finished before" in ended.output
    if there.running:
        assert f"going on at step {there.steps}" in ended.output
    check_equal(*both)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are brought to the disk: by name only, since a busy one takes its time and a
    process that is killed, unlike a machine that stops, has written what it wrote."""
    names: list[Path] = []
    link = Path("/proc/self/fd")
    monkeypatch.setattr(os, "fsync", lambda number: names.append((link / str(number)).readlink()))
    return names


def write_killed(number: int, write: Callable[[], Any]) -> bool:
    """Whether `write` was killed right after its call number `number` that may change the disk."""
    code = exit_code(fork(kill_after, number, write))
    assert code in (0, -signal.SIGKILL)
    return code == -signal.SIGKILL


def kill_after(number: int, write: Callable[[], Any]) -> None:
    calls = itertools.count(1)

    def watch(_: Any, event: str, function: Any) -> None:
        is_change = event == "c_return" and function.__name__ in CHANGES
        if is_change and not isinstance(function.__self__, str) and next(calls) == number:
            signal.raise_signal(signal.SIGKILL)

    sys.setprofile(watch)
    write()


def killed_after_each_change(
    start: Path, write: Callable[[Path], Any], check: Callable[[Path], Any]
) -> None:
    """`write` into copies of the folder `start`. What is left of each is checked, and what there is
    after `write` has had another try."""
    for number in itertools.count(1):
        folder, copy = (start.with_name(f"{start.name}-{number}{kind}") for kind in ("", "-copy"))
        shutil.copytree(start, folder)
        was_killed = write_killed(number, lambda folder=folder: write(folder))
        shutil.copytree(folder, copy)
        check(copy)
        write(folder)
        check(folder)
        assert not [path for path in folder.rglob("*") if path.suffix in (".new", ".old")]
        assert not list(folder.rglob(".unfinished*"))
        if not was_killed:
            assert number > 3
            return


def small_layer(seed: int) -> DraftLayer:
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(TARGET, hidden_size=32, head_dim=8, intermediate_size=64)
    return DraftLayer(draft_config_for(config))


def test_killed_while_a_checkpoint_is_replaced(tmp_path: Path, synced: list[Path]) -> None:
    """After each change of the disk on the way: the old one or the new one is whole."""
    layers = {steps: small_layer(steps) for steps in (3, 4)}
    optimizers = {}
    for steps, layer in layers.items():
        optimizers[steps] = torch.optim.AdamW(loop.trainable(layer))
        for parameter in loop.trainable(layer):
            parameter.grad = torch.full_like(parameter, steps)
        optimizers[steps].step()

    def write(folder: Path, steps: int = 4) -> None:
        path = folder / checkpoint.CHECKPOINT
        checkpoint.save_checkpoint(layers[steps], optimizers[steps], path, "short", steps)

    def check(folder: Path) -> None:
        stage, steps = checkpoint.load_progress(folder)
        assert stage == "short"
        found.add(steps)
        path = folder / checkpoint.CHECKPOINT
        layer = load_draft(path)
        assert same(layer.state_dict(), layers[steps].state_dict())
        optimizer = torch.optim.AdamW(loop.trainable(layer))
        assert checkpoint.load_optimizer(layer, optimizer, path)
        pairs = zip(loop.trainable(layer), loop.trainable(layers[steps]), strict=True)
        for ours, theirs in pairs:
            assert same(optimizer.state[ours], optimizers[steps].state[theirs])
        assert (path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()

    found: set[int] = set()
    write(tmp_path / "run", 3)
    killed_after_each_change(tmp_path / "run", write, check)
    assert found == {3, 4}
    unfinished = tmp_path / "run-1/checkpoint.new"
    names = ("config.json", "model.safetensors", "optimizer.safetensors", "progress.json")
    assert {unfinished / name for name in names} <= set(synced)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("before", [False, True])
def test_killed_while_the_served_draft_is_written(
    before: bool, tmp_path: Path, data: Path, synced: list[Path]
) -> None:
    """The first, or over an older one: the same command finds that it is still to be written, or it
    is there."""
    old, new = small_layer(1), small_layer(2)
    start = recipes.load_recipe(write_recipe(tmp_path, data))
    with ExitStack() as held:
        checkpoint.start_run(start, held)
    last = Path(checkpoint.STAGES) / start.stages[-1].name

    def of(folder: Path) -> recipes.Recipe:
        return start.model_copy(update={"output": folder})

    def check(folder: Path) -> None:
        with ExitStack() as held:
            checkpoint.start_run(of(folder), held)
        if "long" in checkpoint.done(of(folder)).finished and checkpoint.is_written(of(folder)):
            served.append(folder)
            expected = {k: v.to(torch.bfloat16) for k, v in new.state_dict().items()}
            assert same(weights(folder), expected)
            assert (folder / "config.json").is_file()

    def write(folder: Path) -> None:
        checkpoint.save_stage(new, folder / last, 3)
        checkpoint.save_served(new, of(folder))

    served: list[Path] = []
    checkpoint.save_stage(old, start.output / last, 2)
    if before:
        checkpoint.save_served(old, start)
    killed_after_each_change(start.output, write, check)
    assert len(served) > 10
    assert start.output.with_name("draft-1") / ".unfinished/model.safetensors" in synced


def test_killed_while_a_file_is_written(tmp_path: Path, synced: list[Path]) -> None:
    def check(folder: Path) -> None:
        found.add((folder / "a.json").read_text())

    found: set[str] = set()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/a.json").write_text("old")
    killed_after_each_change(
        tmp_path / "a", lambda folder: write_text(folder / "a.json", "new"), check
    )
    assert found == {"old", "new"}
    assert tmp_path / "a-1/.unfinished-a.json" in synced


def test_killed_while_it_tokenises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start, even with the same process number, tokenises; what was left is removed once
    nobody writes to it."""
    path = tmp_path / "a.jsonl"
    path.write_text('"one"\n{"text": "two three"}\n')
    expected = [token for text in ("one", "two three") for token in tokenizer()(text)["input_ids"]]

    def make(folder: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 7)
            made, lengths = token_ids((str(path),), tokenizer())
        assert made.tolist() == expected and len(lengths) == 2

    def left(folder: Path) -> list[Path]:
        return list((folder / "vllm-longspec/tokens").glob("*.*"))

    for number in itertools.count(1):
        folder = tmp_path / str(number)
        if not write_killed(number, lambda folder=folder: make(folder)):
            break
        make(folder)
        for leftover in left(folder):
            for part in (leftover, *leftover.iterdir()):
                os.utime(part, (0, 0))
            tokens.remove_leftovers(leftover.parent)
        assert not left(folder)
    assert number > 5
    unfinished = folder / "vllm-longspec/tokens/b.1"
    unfinished.mkdir()
    tokens.remove_leftovers(unfinished.parent)
    assert unfinished.is_dir()
