"""The import contracts of pyproject.toml hold, and a breach of each is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(
        ROOT / "vllm_longspec", tmp_path / "vllm_longspec",
        ignore=shutil.ignore_patterns("__pycache__"),
    )  # fmt: skip
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(package: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"],
        cwd=package, env=os.environ | {"PYTHONPATH": str(package), "COLUMNS": "200"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_contracts_hold(package: Path) -> None:
    done = lint_imports(package)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "importer, imported, contract",
    [("tree.shape", "runtime.options", "Imports only go down"),
     ("train.loop", "runtime.options", "Training and measuring know of a draft")],
)  # fmt: skip
def test_a_breach_is_named(package: Path, importer: str, imported: str, contract: str) -> None:
    importer, imported = f"vllm_longspec.{importer}", f"vllm_longspec.{imported}"
    path = package.joinpath(*importer.split(".")).with_suffix(".py")
    path.write_text(f"{path.read_text()}\nimport {imported}\n")
    done = lint_imports(package)
    assert done.returncode != 0
    broken = done.stdout.partition("Broken contracts")[2]
    assert contract in broken, done.stdout + done.stderr
    assert f"{importer} -> {imported}" in broken, broken
