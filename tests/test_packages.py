"""What is imported is declared, in the extra that an error names; the package has its data."""

import ast
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from helpers import ROOT

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


def test_the_wheel_has_every_file() -> None:
    """Python files where their folders are packages, others where a pattern says so."""
    package = ROOT / "vllm_longspec"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["vllm_longspec"]
    data = {path for pattern in patterns for path in package.glob(pattern)}
    assert data >= set((package / "recipes").iterdir()) and data
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            is_code = path.suffix == ".py" and (path.parent / "__init__.py").exists()
            assert is_code or path in data, path
