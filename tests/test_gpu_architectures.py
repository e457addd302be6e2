"""Tiny random targets of many architectures on a GPU: what is equal in float32 on a CPU
(`test_architectures.py`), here with compiled kernels in bf16.

Who runs it keeps what passed in `ON_A_GPU` (`architectures.py`), which the table in
`docs/compatibility.md` is made of.
"""

import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, write_draft, write_target
from gpu_compare import OPTIONS, compare
from safetensors.torch import load_file, save_file

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


def decide_experts(folder: Path) -> None:
    """Routers that leave nothing to near-ties: whether an expert is the second or the third best,
    bf16 decides anew at each batch size, and all that follows is another text. A softmax of large
    logits gives the third next to nothing; where experts are chosen with a bias, it chooses."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    biased = any(name.endswith("e_score_correction_bias") for name in tensors)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = 10.0 * torch.arange(tensor.numel()).view_as(tensor).to(tensor)
        elif not biased and re.search(r"\.(mlp|block_sparse_moe)\.(gate|router(\.layer)?)\.", name):
            tensors[name] = 20 * tensor
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_plain_ones(name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    config = write_target(target, name)
    write_draft(tmp_path / "draft", config)
    decide_experts(target)
    compare(name, tmp_path / "draft", model=str(target), **OPTIONS)
