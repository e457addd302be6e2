"""The pages name what is there: options, refusals, files, commands. `make docs` checks links."""

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, load_script

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def commands_hook() -> Any:
    return load_script(DOCS / "commands.py")


def test_every_serving_option_and_config_field_is_described() -> None:
    from vllm_longspec.config import LongSpecConfig
    from vllm_longspec.runtime.options import FLAGS, OPTIONS

    page = (DOCS / "options.md").read_text()
    fields = [name for name in LongSpecConfig.__annotations__ if name != "model_type"]
    for name in ("--speculative-model", *OPTIONS, *(flag for flag, *_ in FLAGS), *fields):
        assert f"`{name}`" in page, name


def test_every_refusal_is_described() -> None:
    """What `switches.py` refuses: tests/test_supported.py."""
    from vllm_longspec.runtime import supported

    page = (DOCS / "compatibility.md").read_text()
    refused = set(re.findall(r'"(\w+): LongSpec', inspect.getsource(supported)))
    assert {"model", "kv_cache_dtype"} <= refused
    assert [name for name in sorted(refused) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "examples/README.md"],
                         ids=lambda page: f"{page.parent.name}/{page.name}")  # fmt: skip
def test_files_that_a_page_names_exist(page: Path) -> None:
    """`like/this.py`, from the root or from the package."""
    folders = "attention|bench|commands|docker|docs|draft|eval|examples|patches|runtime|scripts|"
    folders += "tests|train|tree|vllm_longspec"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()))
    missing = [
        path for path in sorted(named)
        if not any((base / path).exists() for base in (ROOT, ROOT / "vllm_longspec"))
    ]  # fmt: skip
    assert missing == []


def test_pages_name_commands_and_options_that_exist() -> None:
    """`vllm-longspec` lines of all pages, up to where they are cut off."""
    hook = commands_hook()
    import typer

    from vllm_longspec.cli import app

    known = {
        name.removeprefix("vllm-longspec "): {
            flag for option in command.params for flag in (*option.opts, *option.secondary_opts)
        }
        for name, command in hook.leaf_commands(typer.main.get_command(app), "vllm-longspec")
    }
    assert {"train", "eval acceptance", "bench e2e"} <= set(known)
    calls = 0
    for page in (*PAGES, ROOT / "README.md", ROOT / "examples/README.md"):
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^ {4}vllm-longspec (.*)$", text, re.MULTILINE):
            words = line.split("#")[0].split()
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in known), None)
            assert name is not None, f"{page.name}: {line}"
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            assert flags <= known[name] | {"--help"}, f"{page.name}: {line}"
            calls += 1
    assert calls > 5


def test_commands_are_listed_with_their_defaults() -> None:
    listed = commands_hook().on_page_markdown("before\n<!-- commands -->\nafter")
    assert listed.startswith("before\n") and listed.endswith("\nafter")
    assert "### `vllm-longspec bench cycle`" in listed
    assert "| `--context` | `4096` `32768` `100000` | Tokens of context; repeatable. |" in listed
    assert "| `--steps` | 3000 | Optimiser steps. |" in listed
    assert re.search(r"\| `--output` \| required \| Folder for e2e.json", listed)
    rows = [line for line in listed.splitlines() if line.startswith("| `--")]
    assert all(line.count(" | ") >= 2 and not line.endswith("|  |") for line in rows)


def test_the_picture_is_of_the_tree_that_the_oracle_grows() -> None:
    """tree.json holds a tree: levels of the default shape, the most probable nodes kept."""
    from vllm_longspec.config import DEFAULT_TREE_SHAPE

    tree = json.loads((DOCS / "images/tree.json").read_text())
    parents, depths, kept = tree["parents"], tree["depths"], set(tree["kept"])
    assert [depths.count(d) for d in range(6)] == [1, *DEFAULT_TREE_SHAPE]
    assert all(depths[node] == depths[parents[node]] + 1 for node in range(1, len(parents)))
    assert len(kept) == 32 and all(parents[node] in kept for node in kept - {0})
    path = [0, *tree["accepted"]]
    assert [parents[node] for node in path[1:]] == path[:-1] and set(path) <= kept


def test_compose_serves_a_draft_with_a_gpu_and_a_health_check() -> None:
    service = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["longspec"]
    assert service["command"][1] == "--speculative-model"
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"] and device["driver"] == "nvidia"
    assert service["healthcheck"]["test"][-1].endswith(":8000/health")
    build = service["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve().exists()


def test_docker_copies_what_its_ignore_file_lets_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources == allowed and all((ROOT / source).exists() for source in sources)


def test_the_site_loads_nothing_from_a_network() -> None:
    """Fonts, search from disk, drawings: what themes and plugins else take from a CDN."""
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config and "- offline" in config
    own = re.findall(r"(?:polyfills|extra_css): \[(.+?)\]", config)
    assert "javascripts/iframe-worker.js" in own
    assert [name for name in own if not (DOCS / name).is_file()] == []
    fetched = re.compile(r"```mermaid|!\[[^\]]*\]\(http|<script|<iframe")
    assert [page.name for page in PAGES if fetched.search(page.read_text())] == []


def test_troubleshooting_quotes_what_is_printed() -> None:
    """The sentences before each answer, apart from what `…` stands for, are in the package."""
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^(`.*`)\n:   ", page, re.MULTILINE)
    fragments = {
        fragment.strip(" .;,:()")
        for line in quoted for sentence in re.findall(r"`([^`]+)`", line)
        for fragment in sentence.split("…")
    }  # fmt: skip
    said = "\n".join(strings_of(path) for path in (ROOT / "vllm_longspec").rglob("*.py"))
    assert len(quoted) > 30
    assert [fragment for fragment in sorted(fragments) if fragment not in said] == []


def strings_of(path: Path) -> str:
    """The string constants of a file, those that are written in parts as one."""
    tree = ast.parse(path.read_text())
    return "\n".join(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
