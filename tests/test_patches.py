"""The patches for vLLM apply to the vLLM that is installed."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.mark.parametrize("patch", sorted((ROOT / "patches").glob("*.patch")), ids=lambda p: p.stem)
def test_it_applies_and_compiles(patch: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    site_packages = Path(spec.origin).parent.parent
    paths = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)
    assert len(paths) == 5
    for path in paths:
        copy = tmp_path / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (site_packages / path).exists():
            copy.write_text((site_packages / path).read_text())
    done = subprocess.run(
        ["git", "apply", str(patch)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path in paths:
        text = (tmp_path / path).read_text()
        compile(text, path, "exec")
        assert "SpeculativeMethod" in text or "get_speculative_method" in text
