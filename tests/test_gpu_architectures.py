"""Tiny random targets of many architectures on a GPU: what is equal in float32 on a CPU
(`test_architectures.py`), here with compiled kernels in bf16.

Who runs it keeps what passed in `ON_A_GPU` (`architectures.py`), which the table in
`docs/compatibility.md` is made of.
"""

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, write_draft, write_target
from gpu_compare import OPTIONS, compare

from vllm_longspec.runtime.supported import ANY_TARGET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def any_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes here need not be refused as untested."""
    monkeypatch.setenv(ANY_TARGET, "1")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_plain_ones(name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    config = write_target(target, name)
    write_draft(tmp_path / "draft", config)
    compare(name, tmp_path / "draft", model=str(target), **OPTIONS)
