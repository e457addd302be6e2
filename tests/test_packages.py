"""What is imported is declared, in the extra that an error names; what is built has every file."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import ROOT

import vllm_longspec
from vllm_longspec.commands import EXTRAS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRA = PROJECT["project"]["optional-dependencies"]
DISTRIBUTIONS = packages_distributions()
TESTS = [ROOT / "tests", ROOT / "scripts", ROOT / "docs", *(ROOT / "examples").glob("*.py")]


def names(requirements: Iterable[str]) -> set[str]:
    """Of distributions, as packages_distributions and pip compare them."""
    ends = " <>=!~[;"
    cut = (requirement[: next((i for i, c in enumerate(requirement) if c in ends), None)]
           for requirement in requirements)  # fmt: skip
    return {name.lower().replace("_", "-") for name in cut}


BASE = names(PROJECT["project"]["dependencies"])
EVERY = BASE | names(requirement for extra in EXTRA.values() for requirement in extra)


def files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def imported(path: Path) -> Iterator[str]:
    """Packages, those among them that functions import."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def third_party(places: Iterable[Path]) -> dict[str, Path]:
    """By the name that is imported, a file that does so."""
    paths = [path for place in places for path in files(place)]
    own = {
        "vllm_longspec",
        *(path.stem for path in paths if path.is_relative_to(ROOT / "tests")),
        *(path.stem for folder in ("scripts", "examples", "docs") for path in files(ROOT / folder)),
    }
    known = own | sys.stdlib_module_names
    return {name: path for path in paths for name in imported(path) if name not in known}


def declared(package: str, where: set[str]) -> bool:
    """A package that is not installed has to be called as its distribution."""
    return bool(names(DISTRIBUTIONS.get(package, [package])) & where)


def test_what_the_package_imports_is_declared() -> None:
    """In the dependencies, or in the extra that commands name where it is missing."""
    found = third_party([ROOT / "vllm_longspec"])
    assert {"torch", "numpy", "huggingface_hub", "prometheus_client", "triton"} <= found.keys()
    for package, path in found.items():
        extra = EXTRAS.get(package)
        where = BASE if extra is None else names(EXTRA[extra])
        # On a CPU vLLM and Triton are others.
        where = where | names(EXTRA["cpu"]) if extra == "cuda" else where
        assert declared(package, where), f"{path} imports {package}; the extra is {extra}"


def test_what_tests_and_examples_import_is_declared() -> None:
    for package, path in third_party(TESTS).items():
        assert declared(package, EVERY), f"{path} imports {package}"


def test_extras_that_are_named_have_the_package() -> None:
    for package, extra in EXTRAS.items():
        assert declared(package, names(EXTRA[extra])) or package in ("vllm", "triton"), package
    assert names(EXTRA["eval"]) <= names(EXTRA["train"])  # both read data


def test_no_test_waits_for_a_package() -> None:
    """A skip is for a GPU, or for the want of one."""
    for path in files(ROOT / "tests"):
        if path != Path(__file__):
            assert "importorskip" not in path.read_text(), path


WHEEL = "vllm_longspec-7.8.9-py3-none-any.whl"
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "vllm_longspec").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}


def build(folder: Path, *options: str) -> dict[str, Path]:
    """What `python -m build` makes of the sources in a folder, by name."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", *options],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path for path in (folder / "dist").iterdir()}


def copy_sources(folder: Path) -> Path:
    """Of the repository, without git and without the larger files."""
    junk = shutil.ignore_patterns(
        ".venv", ".git", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis", ".gpu",
        "__pycache__", "*.safetensors", "*.svg", "*.png",
    )  # fmt: skip
    return shutil.copytree(ROOT, folder, ignore=junk)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheel and sdist of a tagged commit; the wheel is built from the sdist."""
    folder = copy_sources(tmp_path_factory.mktemp("tagged") / "sources")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"], ["tag", "v7.8.9"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return build(folder)


def test_wheel_and_sdist_hold_the_package_and_no_more(built: dict[str, Path]) -> None:
    assert built.keys() == {"vllm_longspec-7.8.9.tar.gz", WHEEL}
    assert {"vllm_longspec/py.typed", "vllm_longspec/recipes/nano.yaml"} <= PACKAGE
    wheel = set(ZipFile(built[WHEEL]).namelist())
    about = {name for name in wheel if name.startswith("vllm_longspec-7.8.9.dist-info/")}
    assert wheel - about == PACKAGE
    assert "vllm_longspec-7.8.9.dist-info/licenses/LICENSE" in about
    with tarfile.open(built["vllm_longspec-7.8.9.tar.gz"]) as files:
        sdist = {entry.name.partition("/")[2] for entry in files if entry.isfile()}
    assert {name for name in sdist if not name.startswith("vllm_longspec.egg-info/")} == PACKAGE | {
        "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"
    }  # fmt: skip


def test_the_wheel_is_found_by_vllm(built: dict[str, Path], tmp_path: Path) -> None:
    """Installed into an environment of its own, beside the dependencies of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "new"], check=True)
    python = tmp_path / "new/bin/python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    install = ["install", "--quiet", "--no-index", "--no-deps", built[WHEEL]]
    subprocess.run([*pip, *install], check=True, env=OUTSIDE)
    (site,) = (tmp_path / "new").glob("lib/python3*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(here))
    done = subprocess.run(
        [tmp_path / "new/bin/vllm-longspec", "doctor"],
        cwd=tmp_path, env=OUTSIDE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for topic, found in (("vllm-longspec", "7.8.9"), ("plugin", "")):
        assert re.search(rf"^ *{topic} +OK +{found}", done.stdout, re.MULTILINE), done.stdout


def test_it_builds_without_git(tmp_path: Path) -> None:
    """An archive of the sources, an image: the version is not known."""
    made = build(copy_sources(tmp_path / "sources"), "--wheel")
    assert made.keys() == {"vllm_longspec-0.0-py3-none-any.whl"}


def test_the_version_of_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install keeps the commit that it was installed at, which is not said."""
    for installed, release in [
        ("1.2.3", "1.2.3"),
        ("1.2.4.dev5+g0123abc", "1.2.4"),
        ("1.2.4.dev0+d20270131", "1.2.4"),
        ("1.3.0rc1", "1.3.0rc1"),
    ]:
        monkeypatch.setattr(vllm_longspec, "version", lambda _, installed=installed: installed)
        assert vllm_longspec.release(installed) == release
        assert vllm_longspec._version() == f"{release}+source"
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(vllm_longspec, "__file__", "/site-packages/vllm_longspec/__init__.py")
            assert vllm_longspec._version() == installed

    def missing(_: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(vllm_longspec, "version", missing)  # a tree on PYTHONPATH
    assert vllm_longspec._version() == "0+source"
