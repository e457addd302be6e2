"""Every option of every command with wrong values of its type: one sentence, before any work.

Commands, options and types are typer's own tree, so that a new option is walked without a word
here. What a command would do with right values is replaced by `Reached`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import typer
from helpers import DRAFT, ROOT, TARGET
from test_output import commands
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.commands import mistakes_in_a_sentence
from vllm_longspec.commands.train import Tracker
from vllm_longspec.errors import LongSpecError
from vllm_longspec.writing import whole_file, whole_folder, write_text

WRONG: dict[type, tuple[str, ...]] = {
    int: ("-1", "0", "text", "1.5", ""),
    float: ("-1", "nan", "inf", "text", ""),
    str: ("nonsense", "", "/no/such/place"),
    Tracker: ("nonsense", "", "3"),
}
READ = ("/no/such/place", "folder", "binary", "empty", "cut.jsonl.xz", "/proc/self/mem", "")
WRITTEN = ("/proc/new", "binary", "folder-with-file", "model", "binary/below", "")
# Options of which one of these values is right.
RIGHT: dict[tuple[str, str], set[str]] = {
    ("train", "seed"): {"0"},
    ("regenerate", "seed"): {"0"},
    ("bench cycle", "draft_vocab_size"): {"0"},
    ("bench throughput", "draft_vocab_size"): {"0"},
    ("bench startup", "draft_vocab_size"): {"0"},
    ("eval longbench", "min_prompt_tokens"): {"0"},
}
ARGUMENTS = {("recipes", "name")}  # that are no options
OTHERWISE = {"doctor"}  # has a table of problems and exit status 1


class Reached(Exception):  # noqa: N818
    """The work itself."""


def kind(hint: Any) -> type:
    """Of `X | None` and `list[X]`: X."""
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    return kind(inner[0]) if inner else hint


# Of each command, the options' kinds.
COMMANDS = {
    name: {option: kind(hint) for option, hint in get_type_hints(callback).items()
           if option != "return"}
    for name, callback in commands(app)
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walk")
    text = "def walk(self, tree):\n    return [node for node in tree if node.depth]\n" * 60
    lines = [json.dumps({"text": text[i:], "kind": "code"}) + "\n" for i in range(12)]
    (root / "text.jsonl").write_text("".join(lines))
    (root / "cut.jsonl.xz").write_bytes(b"\xfd7zXZ\x00\x00\x04cut off")
    (root / "binary").write_bytes(bytes(range(256)) * 16)
    (root / "empty").write_bytes(b"")
    (root / "folder").mkdir()
    (root / "folder-with-file").mkdir()
    (root / "folder-with-file/notes.txt").write_text("mine")
    (root / "data").mkdir()
    record = {"context": text, "input": "", "id": 61, "problem": "1 + 1?"}
    for name in ("lcc", "aime"):
        (root / f"data/{name}.jsonl").write_text(json.dumps(record) + "\n")
    (root / "model").symlink_to(TARGET)
    return root


def right_arguments(name: str, root: Path, outputs: Path) -> dict[str, str]:
    """Of a command, options with which it would reach its work."""
    pair = {"target": str(TARGET), "draft": str(DRAFT)}
    text, out = {"data": str(root / "text.jsonl")}, {"output": str(outputs / "out")}
    short = {"context": "64", "max_tokens": "8", "num_prompts": "2"}
    own: dict[str, dict[str, str]] = {
        "train": {"target": str(TARGET), **text, "steps": "1", "sequence_length": "64",
                  "sequences_per_step": "2", "sequences_per_batch": "2"},
        "regenerate": {"url": "http://127.0.0.1:9", **text},
        "trim-head": pair | text | {"draft_vocab_size": "100"},
        "convert": pair,
        "bench inflate": pair | {"shape": "tiny", "draft_output": str(outputs / "draft")},
        "bench cycle": {"shape": "tiny"},
        "bench throughput": {"shape": "tiny"},
        "bench startup": {"shape": "tiny"},
        "bench e2e": pair | text | short,
        "bench train-step": {"shape": "tiny", "sequence_length": "64"},
        "eval acceptance": pair | text | short,
        "eval longbench": pair | {"data": str(root / "data"), "task": "lcc"},
        "eval aime": pair | {"data": str(root / "data")},
        "eval replay": pair | text | short | {"plot": str(outputs / "plot.png")},
        "recipes": {"name": "nano"},
    }  # fmt: skip
    return out | own[name]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replaced by `Reached`; the network is cut."""
    import huggingface_hub.constants

    from vllm_longspec.bench import cycle, inflate, train_step
    from vllm_longspec.commands import recipes
    from vllm_longspec.draft import convert, trim
    from vllm_longspec.eval import benchmark, replay
    from vllm_longspec.train import loop, regenerate

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    vllm = ModuleType("vllm")
    vllm.LLM = reached  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for module, name in (
        (loop, "load_target"), (replay, "load_target"), (inflate, "_save_shards"),
        (train_step, "DraftLayer"), (benchmark, "measure_in_engines"), (convert, "save_file"),
        (trim, "save_file"), (regenerate, "answered"), (recipes, "write_text"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(cycle.Engine, "start", reached)
    monkeypatch.setattr(benchmark, "engine_context_length", lambda *_: 32_768)
    monkeypatch.setattr(benchmark, "environment", dict)
    monkeypatch.setattr(regenerate, "served_model", lambda _: ("target", None))


def invoke(name: str, arguments: dict[str, str]) -> Any:
    flags = [
        x for key, value in arguments.items()
        for x in ([value] if (name, key) in ARGUMENTS else [f"--{key.replace('_', '-')}", value])
    ]  # fmt: skip
    return CliRunner().invoke(app, [*name.split(), *flags])


def wrong_values(option: str, of: type, root: Path) -> Iterator[str]:
    if of is Path or option == "data":
        for place in WRITTEN if option in ("output", "draft_output", "plot") else READ:
            yield str(root / place) if place and not place.startswith("/") else place
    elif of is not bool:
        yield from WRONG[of]


def test_every_command_is_walked(places: Path, tmp_path: Path) -> None:
    for name in COMMANDS.keys() - OTHERWISE:
        assert right_arguments(name, places, tmp_path)
    assert OTHERWISE <= COMMANDS.keys()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in OTHERWISE])
def test_one_sentence(name: str, places: Path, tmp_path: Path, work: None) -> None:
    right = right_arguments(name, places, tmp_path)
    done = invoke(name, right)
    assert isinstance(done.exception, Reached), (done.output, done.exception)
    wrong = []
    for option, of in COMMANDS[name].items():
        for value in wrong_values(option, of, places):
            arguments = right | {option: value}
            if option == "config":
                arguments = {k: arguments[k] for k in ("config", "target", "data", "output")}
            done = invoke(name, arguments)
            if value in RIGHT.get((name, option), ()):
                fine = isinstance(done.exception, Reached)
            else:
                said = [
                    line
                    for line in done.stderr.strip().splitlines()
                    if not line.startswith("data: ")
                ]  # of lines that were skipped
                sentence = len(said) == 1 and said[0].startswith("vllm-longspec: ")
                told = sentence or done.stderr.startswith("Usage: ")
                fine = told and done.exit_code == 2 and isinstance(done.exception, SystemExit)
            if not fine:
                wrong.append(f"--{option} {value!r}: {done.output!r} {done.exception!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["recipes"], ["trian"], ["train", "--stepz", "3"],
                  ["eval", "replay", "--help"], ["bench", "cycle", "--batch", "-1"],
                  ["eval", "replay", "--target", "x", "--draft", "/none", "--data", "/none"],
                  ["train", "--target", "x", "--output", "y", "--data", "/none"]], ids=" ".join,
)  # fmt: skip
def test_light(arguments: list[str]) -> None:
    """Nothing heavy is imported for a word of help or a typo."""
    program = (
        "import sys, time\nfrom vllm_longspec.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "print('\\n', heavy or 'light', time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    word, seconds = done.stdout.split()[-2:]
    assert word == "light" and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert float(seconds) < 2  # 0.5 on an idle machine


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "vllm_longspec.train.loop", raising=False)
    monkeypatch.delattr("vllm_longspec.train.loop", raising=False)
    arguments = {"target": str(TARGET), "data": __file__, "output": str(tmp_path / "out")}
    done = invoke("train", arguments)
    assert done.exit_code == 2
    assert "accelerate is not installed; pip install 'vllm-longspec[train]'" in done.stderr


def test_a_library_that_does_not_fit_torch_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), mistakes_in_a_sentence():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'.") from error
    said = capsys.readouterr().err
    assert "transformers cannot be imported (operator torchvision::nms does not exist); " in said


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("cycle", "throughput", "startup"):
        done = invoke(f"bench {name}", {"output": str(tmp_path / "out")})
        assert done.exit_code == 2 and "llama3-8b is measured on a CUDA GPU" in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before work where it can be seen; while writing, what was there stays."""
    with pytest.raises(LongSpecError, match=r"full cannot be written \(No space left on device\)"):
        write_text(Path("/dev/full"), "x" * 100_000)
    file = tmp_path / "result.json"
    file.write_text("old")
    with pytest.raises(LongSpecError), whole_file(file) as beside:
        beside.write_text("new")
        raise OSError(28, "No space left on device")
    assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]
    with pytest.raises(LongSpecError), whole_folder(tmp_path / "new") as folder:
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")
    assert [*tmp_path.iterdir()] == [file]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    done = invoke("convert", right_arguments("convert", tmp_path, tmp_path))
    assert done.exit_code == 2 and "needs 1.0 MiB, and 0.0 MiB are free there" in done.stderr


def test_the_mode_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        done = invoke("convert", right_arguments("convert", tmp_path, tmp_path))
    finally:
        os.umask(before)
    assert done.exit_code == 0, done.output
    written = [tmp_path / "file", *(tmp_path / "out").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}
    assert sorted(path.name for path in written[1:]) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
