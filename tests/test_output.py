"""No command writes where something lies that it did not make; each says so before any work."""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
from helpers import DRAFT, ROOT, TARGET
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import claim_file, claim_folder
from vllm_longspec.train import checkpoint
from vllm_longspec.train.recipe import Recipe, Stage

sys.path.insert(0, str(ROOT / "examples"))
PROGRAMS = ("ablation", "train_your_own", "offline_batch")
# Of all commands, the options with a path that is read.
READ = {"target", "draft", "data", "config", "init", "held_out", "folder", "prompts"}
NO_DATA = ["--data", "/no/such/data"]
PAIR = ["--target", str(TARGET), "--draft", str(DRAFT)]
NO_TEXT = ["--data", __file__]
# Options that a command needs besides its outputs; what it would read next is not there, or no
# text, or fits no other option.
ARGUMENTS: dict[str, list[str]] = {
    "train": ["--target", str(TARGET), "--data", __file__],
    "recipes": ["nano"],
    "regenerate": ["--url", "http://127.0.0.1:9", *NO_DATA],
    "convert": ["--draft", __file__, "--target", str(TARGET)],
    "trim-head": [*PAIR, *NO_TEXT],
    "bench inflate": [*PAIR, "--shape", "tiny"],
    "bench cycle": ["--shape", "nonsense"],
    "bench throughput": ["--shape", "nonsense"],
    "bench startup": ["--shape", "nonsense"],
    "bench e2e": [*PAIR, *NO_TEXT],
    "bench train-step": ["--shape", "nonsense"],
    "eval acceptance": [*PAIR, *NO_TEXT],
    "eval longbench": PAIR,
    "eval aime": PAIR,
    "eval replay": [*PAIR, *NO_TEXT],
    "ablation": ["--target", str(TARGET), *NO_DATA, "--held-out", "/no/such/data"],
    "train_your_own": ["--target", str(TARGET)],
    "offline_batch": [*PAIR, "--prompts", "/no/such/data"],
}
ONE_FILE = {"bench train-step", "eval acceptance", "eval replay", "offline_batch",
            "recipes", "regenerate"}  # fmt: skip


def program(name: str) -> typer.Typer:
    alone = typer.Typer(pretty_exceptions_enable=False)
    alone.command()(importlib.import_module(name).main)
    return alone


def commands(app: typer.Typer, name: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in app.registered_commands:
        assert command.callback is not None
        own = command.name or command.callback.__name__.replace("_", "-")
        yield f"{name} {own}".strip(), command.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{name} {group.name}".strip())


def written() -> dict[str, list[str]]:
    """Of each command, the parameters that are a path and are not known as read."""
    every = dict(commands(app))
    every |= {name: importlib.import_module(name).main for name in PROGRAMS}
    found = {
        name: [parameter for parameter, kind in get_type_hints(callback).items()
               if "Path" in str(kind) and parameter not in READ]
        for name, callback in every.items()
    }  # fmt: skip
    return {name: options for name, options in found.items() if options}


def test_every_command_that_writes_is_here() -> None:
    assert set(written()) == set(ARGUMENTS)
    assert {option for options in written().values() for option in options} == {
        "output", "draft_output", "plot"
    }  # fmt: skip
    for path in (ROOT / "examples").glob("*.py"):
        writes = any(word in path.read_text() for word in ("write_text", "savefig", '"w"'))
        assert not writes or path.stem in PROGRAMS, path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and places around them where nothing may be written."""
    root = tmp_path_factory.mktemp("places")
    shutil.copytree(TARGET, root / "models/target")
    for task in ("gov_report", "qmsum", "multi_news", "lcc", "repobench-p"):
        (root / f"data/{task}.jsonl").parent.mkdir(exist_ok=True)
        (root / f"data/{task}.jsonl").write_text("{}\n")
    (root / "data/aime.jsonl").write_text("{}\n")
    (root / "link").symlink_to(root / "models/target")
    (root / "nowhere").symlink_to(root / "not there")
    (root / "file").write_text('{"some": "text"}')
    (root / "linked").mkdir()
    for name in ("e2e.json", "cycle.json", "throughput.json", "startup.json", "results.json",
                 "recipe.yaml"):  # fmt: skip
        (root / "linked" / name).symlink_to(root / "models/target/config.json")
    return root


FOLDERS = ("models/target", "models", "models/target/new", "link", "link/new", "nowhere", "file",
           "file/new", "linked", "/proc/new")  # fmt: skip
PATHS = ("models/target", "models/target/config.json", "models/target/model.safetensors",
         "models/target/new.json", "link/new.json", "nowhere", "file", "file/new.json",
         "/proc/new.json")  # fmt: skip


def snapshot(root: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refused_before_any_work(name: str, places: Path, tmp_path: Path) -> None:
    before = snapshot(places)
    arguments = [*name.split(), *ARGUMENTS[name]]
    if name in PROGRAMS:
        arguments = ARGUMENTS[name] + ([str(places / "data")] if name == "train_your_own" else [])
    if name in ("eval longbench", "eval aime"):
        arguments += ["--data", str(places / "data")]
    for option in written()[name]:
        for place in PATHS if name in ONE_FILE else FOLDERS:
            path = places / place
            if option == "plot" and path.suffix == ".json":
                path = path.with_suffix(".png")
            outputs = {other: str(tmp_path / other) for other in written()[name]
                       if other != "plot"} | {option: str(path)}  # fmt: skip
            flags = [x for k, v in outputs.items() for x in (f"--{k.replace('_', '-')}", v)]
            done = CliRunner().invoke(program(name) if name in PROGRAMS else app,
                                      [*arguments, *flags])  # fmt: skip
            assert done.exit_code == 2, (place, done.output, done.exception)
            (said,) = done.stderr.strip().splitlines()
            assert said.startswith(f"vllm-longspec: {option}: {path} "), (place, said)
            assert snapshot(places) == before, place
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_two_outputs_in_one_place(tmp_path: Path) -> None:
    arguments = ["bench", "inflate", *PAIR, "--shape", "tiny", "--output", str(tmp_path / "out")]
    for second in ("out", "out/draft", "."):
        both = [*arguments, "--draft-output", str(tmp_path / second)]
        done = CliRunner().invoke(app, both)
        assert done.exit_code == 2 and "overlap; name two folders" in done.stderr
    assert not list(tmp_path.iterdir())


def start(recipe: Recipe) -> None:
    with ExitStack() as held:
        checkpoint.start_run(recipe, held)


def test_two_runs_in_one_place(tmp_path: Path) -> None:
    recipe = Recipe(target=str(TARGET), output=tmp_path, data="x", stages=(
        Stage(name="train", steps=1, learning_rate=1, sequence_length=64, sequences_per_step=1),
    ))  # fmt: skip
    with ExitStack() as held:
        checkpoint.start_run(recipe, held)
        with pytest.raises(LongSpecError, match="another process writes to"):
            start(recipe)
    start(recipe)


def test_what_a_command_wrote_is_known_when_cut_within_a_character(tmp_path: Path) -> None:
    record = json.dumps({"key": "a", "made_by": {}, "text": "文本"}, ensure_ascii=False)
    lines = (record + "\n" + record).encode()
    path = tmp_path / "out.jsonl"
    for end in range(len(record.encode()) + 1, len(lines)):
        path.write_bytes(lines[:end])
        claim_file(path, ("key", "made_by"))
    path.write_text(json.dumps([{"key": "a", "made_by": {}}], indent=1))
    claim_file(path, ("key", "made_by"))
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(LongSpecError, match="this command did not make it"):
        claim_file(path, ("key", "made_by"))


def test_a_model_with_the_names_of_a_run(tmp_path: Path) -> None:
    recipe = Recipe(target=str(TARGET), output=tmp_path, data="x", stages=(
        Stage(name="train", steps=1, learning_rate=1, sequence_length=64, sequences_per_step=1),
    ))  # fmt: skip
    start(recipe)
    start(recipe)
    shutil.copyfile(TARGET / "model.safetensors", tmp_path / "model.safetensors")
    for kind, name in (("none", "model.safetensors"), (TARGET, "config.json")):
        if kind == TARGET:
            shutil.copyfile(TARGET / "config.json", tmp_path / "config.json")
        with pytest.raises(LongSpecError, match=f"holds {name}, which this command did not"):
            start(recipe)
    shutil.copyfile(DRAFT / "config.json", tmp_path / "config.json")
    start(recipe)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LongSpecError, match=r"holds notes\.txt"):
        start(recipe)


def test_own_results_may_be_made_again(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new")
    claim_folder(tmp_path)
    (tmp_path / "e2e.json").write_text("{}")
    claim_folder(tmp_path, ("e2e.json", "e2e.md"))
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(LongSpecError, match=r"holds other\.txt, which this command did not make"):
        claim_folder(tmp_path, ("e2e.json", "e2e.md"))
    file = tmp_path / "made/results.json"
    claim_file(file, ("a", "b"))
    for text in ("", '[{"a": 1, "b": 2, "c": 3}]', '{"b": 1, "a": 2}', '{"a": 1, "b": 2}\n{}\n'):
        file.write_text(text)
        claim_file(file, ("a", "b"))
    for text in ("{}", "[]", '[{"a": 1}]', "text", "[3]", '"ab"'):
        file.write_text(text)
        with pytest.raises(LongSpecError, match="did not make it; name another file"):
            claim_file(file, ("a", "b"))
    claim_file(Path("/dev/null"), ("a",))
