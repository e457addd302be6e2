"""The recipes that come with the package: what they say, and the command that lists and copies
them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import TARGET
from safetensors.torch import load_file
from training import (
    data,  # noqa: F401
    on_the_cpu_with_an_own_cache,  # noqa: F401
    weights,
    write_recipe,
)
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

from vllm_longspec.chat import chat_answers, chat_text
from vllm_longspec.cli import app
from vllm_longspec.config import draft_config_for
from vllm_longspec.errors import LongSpecError
from vllm_longspec.eval.longbench import PAPER_TEMPLATES
from vllm_longspec.eval.paper import LENGTHS
from vllm_longspec.records import content_of
from vllm_longspec.train import checkpoint, loop
from vllm_longspec.train import recipe as recipes
from vllm_longspec.train.model import DraftLayer, init_weights
from vllm_longspec.train.shipped import shipped
from vllm_longspec.train.tokens import cache_folder, token_ids

ALL = {name: recipes.Recipe(**yaml.safe_load(text)) for name, text in shipped().items()}
OURS = {"nano", "small", "gemma3-270m"}
LLAMAS = {"vicuna-7b", "vicuna-13b", "longchat-7b", "longchat-13b", "llama3-8b"}
PAPERS = sorted(LLAMAS | {"qwq-32b"})
LONG = 32_768


def test_every_recipe_is_here() -> None:
    assert set(ALL) == OURS | set(PAPERS)
    for name, text in shipped().items():
        first = text.partition("\n")[0]
        assert first.startswith("# A draft for ") and first.endswith("."), name
        assert f" --config {name}" in text, name


@pytest.mark.parametrize("name", ALL)
def test_stages(name: str) -> None:
    """The paper's three stages, or the first two: anchor-offset indices first, then long text as it
    is."""
    stages = ALL[name].stages
    found = [(stage.name, stage.positions) for stage in stages]
    third = ("instructions" if name in LLAMAS else "reasoning", "natural")
    assert found == [("short", "anchor-offset"), ("long", "natural"), third][: len(found)]
    assert len(found) >= 2 and stages[0].sequence_length == 1024
    assert all(stage.max_shift == 4 for stage in stages)


@pytest.mark.parametrize("name", PAPERS)
def test_what_the_paper_s_authors_set(name: str) -> None:
    recipe = ALL[name]
    first, second, third = recipe.stages
    assert [stage.sequences_per_step for stage in recipe.stages] == [2048, 64, 256]
    assert [stage.learning_rate for stage in recipe.stages] == [5e-4, 5e-6, 5e-6]
    assert [stage.train_on for stage in recipe.stages] == ["text", "text", "answers"]
    assert {stage.learn_from for stage in recipe.stages} == {"text"}
    assert (recipe.betas, recipe.epsilon, recipe.gradient_clipping) == ((0.9, 0.95), 1e-6, 1.0)
    assert recipe.initial_weights == "normal" and recipe.window == 512
    # The Llama's length is 262,144, of which their evaluation takes less.
    length = {"llama3-8b": 262_144, "qwq-32b": LONG}.get(name) or LENGTHS[recipe.target]
    assert recipe.context_length == length
    assert second.sequence_length == third.sequence_length == min(LONG, length)
    assert recipes.has_room(first, recipe.context_length)
    assert "# What stays different from theirs:\n" in shipped()[name]


def tokenizer_of(recipe: recipes.Recipe) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = recipe.chat_template
    return tokenizer


@pytest.mark.parametrize("name", PAPERS)
def test_the_frame_is_the_authors_and_answers_are_learned(name: str) -> None:
    recipe = ALL[name]
    begin, end = ("<|im_start|>", "<|im_end|>") if name == "qwq-32b" else ("<s>", "</s>")
    content = content_of({"report": "A report.", "summary": " A summary."})
    assert isinstance(content, list)
    text, spans = chat_answers(content, tokenizer_of(recipe))
    asked = PAPER_TEMPLATES["gov_report"].format(context="A report.")
    asked = asked.replace("</s>", end).replace("<s>", begin)
    assert text == f"{asked} A summary.{end}\n"
    assert [text[a:b] for a, b in spans] == [f"{begin}assistant\nSummary: A summary.{end}\n"]
    turns = [{"role": "system", "content": "Be brief."}, *content, *content]
    several, spans = chat_answers(turns, tokenizer_of(recipe))
    assert several.count(f"{begin}system\nYou are a helpful assistant{end}\n") == 1
    assert "brief" not in several and len(spans) == 2
    assert chat_text(turns, tokenizer_of(recipe)) == several


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)], catch_exceptions=False)


def test_listed_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run().output.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert all(" A draft for " in line and len(line) < 110 for line in lines)
    assert run("nano").output == "wrote nano.yaml\n"
    assert run("nano", "--output", "new/mine.yaml").exit_code == 0
    assert Path("nano.yaml").read_text() == Path("new/mine.yaml").read_text() == shipped()["nano"]
    Path("nano.yaml").write_text("mine")
    for arguments, sentence in (
        (("nano",), "output: nano.yaml is there already; name another file"),
        (("nano", "--output", "new"), "output: new is a folder; name a file"),
        (("mano",), "name: 'mano' is none of gemma3-270m, llama3-8b, "),
        (("--output", "x.yaml"), "output: there is nothing to copy; name a recipe"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and sentence in done.stderr, done.output
    assert Path("nano.yaml").read_text() == "mine" and not Path("x.yaml").exists()


def test_train_takes_a_name_or_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "text.jsonl"
    source.write_text('"text"\n')
    named = recipes.load_recipe(Path("small"), data=[str(source)])
    assert named.stages == ALL["small"].stages and named.data == (str(source),)
    # A file comes first.
    Path("small").write_text(shipped()["nano"])
    assert recipes.load_recipe(Path("small"), data=[str(source)]).target == ALL["nano"].target
    with pytest.raises(LongSpecError, match=r"config: mano cannot be read; .* one of gemma3-270m"):
        recipes.load_recipe(Path("mano"))
    with pytest.raises(LongSpecError, match=r"data: long-text.jsonl is not a file; give"):
        recipes.load_recipe(Path("vicuna-7b"))


def test_adamw_is_as_the_recipe_says(tmp_path: Path, data: Path) -> None:
    """One step, whose clipped gradient the optimiser's state tells."""
    settings = {"betas": [0.5, 0.75], "epsilon": 1e-3, "gradient_clipping": 1e-2}
    stage = yaml.safe_load(write_recipe(tmp_path, data).read_text())["stages"][0] | {"steps": 1}
    recipe = recipes.load_recipe(
        write_recipe(tmp_path, data, stages=[stage], initial_weights="normal", **settings)
    )
    assert loop.train(recipe)
    moments = load_file(recipe.output / "checkpoint" / checkpoint.OPTIMIZER)
    gradients = {
        name.removesuffix("/exp_avg"): tensor / 0.5
        for name, tensor in moments.items()
        if name.endswith("/exp_avg")
    }
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-2), rtol=1e-3, atol=0)
    layer = DraftLayer(draft_config_for(AutoConfig.from_pretrained(TARGET)))
    init_weights(layer, torch.Generator().manual_seed(0), zero_outputs=False)
    assert layer.mlp.down_proj.weight.detach().std() == pytest.approx(0.02, rel=0.02)
    trained, rate = weights(recipe.output / "stages/short"), stage["learning_rate"]
    for name, before in layer.state_dict().items():
        if name in gradients:
            g = gradients[name]
            torch.testing.assert_close(moments[f"{name}/exp_avg_sq"], g * g / 4)
            expected = before * (1 - rate * loop.WEIGHT_DECAY) - rate * g / (g.abs() + 1e-3)
            torch.testing.assert_close(trained[name], expected, rtol=1e-4, atol=1e-6)


def test_a_run_begun_before_a_field_was_there_goes_on(tmp_path: Path, data: Path) -> None:
    path = write_recipe(tmp_path, data)
    recipe = recipes.load_recipe(path)
    with ExitStack() as held:
        checkpoint.start_run(recipe, held)
    record = recipe.output / recipes.FILE
    stored = yaml.safe_load(record.read_text())
    assert stored["betas"] == [0.9, 0.98] and stored["gradient_clipping"] is None
    for name in ("betas", "epsilon", "gradient_clipping", "initial_weights", "chat_template"):
        del stored[name]
    for stage in stored["stages"]:
        del stage["train_on"]
    record.write_text(yaml.safe_dump(stored))
    checkpoint.check_folder(recipe)
    for changes, sentence in (
        ({"betas": [0.9, 0.95]}, r"betas is \[0.9, 0.98\] there and \[0.9, 0.95\] here"),
        ({"gradient_clipping": 1}, r"gradient_clipping is None there and 1.0 here"),
        ({"epsilon": 1e-6}, r"epsilon is 1e-08 there and 1e-06 here"),
        ({"chat_template": "x"}, r"chat_template is None there and 'x' here"),
    ):
        with pytest.raises(LongSpecError, match=sentence):
            checkpoint.check_folder(recipes.load_recipe(write_recipe(tmp_path, data, **changes)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"betas": [0.9, 1.0]}, r"betas\.1"), ({"betas": [0.9]}, r"betas\.1"),
        ({"gradient_clipping": 0}, "gradient_clipping"), ({"epsilon": -1}, "epsilon"),
        ({"initial_weights": "zeros"}, "initial_weights"), ({"chat_template": 3}, "chat_template"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"checkpoint_every_minutes": float("nan")}, "checkpoint_every_minutes"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes(tmp_path: Path, data: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(LongSpecError, match=rf"^{field}: .* in .*recipe\.yaml"):
        recipes.load_recipe(write_recipe(tmp_path, data, **changes))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": "a.old"}, "name"), ({"name": "a.new"}, "name"), ({"seed": 2**70}, "seed"),
        ({"learning_rate": float("inf")}, "learning_rate"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_in_a_stage(
    tmp_path: Path, data: Path, changes: dict[str, Any], field: str
) -> None:
    path = write_recipe(tmp_path, data)
    written = yaml.safe_load(path.read_text())
    written["stages"][0] |= changes
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(LongSpecError, match=rf"^stages\.0\.{field}: .* in .*recipe\.yaml"):
        recipes.load_recipe(path)


@pytest.mark.parametrize("text", ["1: 2\n", "on: 2\n", "[" * 5000])
def test_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(LongSpecError, match=r"^config: .*recipe\.yaml is not"):
        recipes.load_recipe(path)


def test_a_diverged_layer_replaces_nothing(tmp_path: Path) -> None:
    layer = DraftLayer(draft_config_for(AutoConfig.from_pretrained(TARGET)))
    init_weights(layer, torch.Generator().manual_seed(0))
    checkpoint.save_stage(layer, tmp_path / "a", 3)
    kept = (tmp_path / "a/model.safetensors").read_bytes()
    with torch.no_grad():
        next(layer.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(LongSpecError, match="no numbers any more"):
        checkpoint.save_stage(layer, tmp_path / "a", 4)
    assert (tmp_path / "a/model.safetensors").read_bytes() == kept
    assert checkpoint.read_progress(tmp_path / "a") == ("a", 3)
    for damaged in ("", "[]", "{}"):
        (tmp_path / "a" / checkpoint.PROGRESS).write_text(damaged)
        with pytest.raises(LongSpecError, match="is damaged"):
            checkpoint.read_progress(tmp_path / "a")


def test_half_a_token_cache_is_made_again(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    expected = np.array(token_ids((str(data),), tokenizer)[0])
    (folder,) = cache_folder().iterdir()
    for name in ("tokens.bin", "lengths.npy", "skipped.json"):
        (folder / name).unlink()
        assert (token_ids((str(data),), tokenizer)[0] == expected).all()
    for cut in (b"", expected.tobytes()[:400]):
        (folder / "tokens.bin").write_bytes(cut)
        assert (token_ids((str(data),), tokenizer)[0] == expected).all()


def test_a_recipe_s_own_chat_template(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in the tokenizer's place wherever text is made of conversations."""
    asked = []

    def prepare_rows(*arguments: Any) -> None:
        asked.append(arguments[-1].get_chat_template())
        raise LongSpecError("enough")

    monkeypatch.setattr(loop, "prepare_rows", prepare_rows)
    template = ALL["llama3-8b"].chat_template
    for changes in ({}, {"chat_template": template}):
        with pytest.raises(LongSpecError, match="enough"):
            loop.train(recipes.load_recipe(write_recipe(tmp_path, data, **changes)))
    own = AutoTokenizer.from_pretrained(TARGET).get_chat_template()
    assert asked == [own, template] and own != template
