"""Targets with quantised weights on a CPU, by what vLLM's build for CPUs computes there;
`test_gpu_quantised.py` has the others."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import assert_same, spacings_of_a_difference
from processes import own_process
from quantised import LENGTHS, outputs_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's products are others on a GPU: test_gpu_quantised.py"
)

# Whose inputs are not rounded, so that what is computed does not depend on how it is summed.
EXACT = ("compressed-tensors int4", "gptq", "awq")
# Format, and whether the head is quantised too.
CASES = (
    *((name, False) for name in EXACT),
    ("gptq", True),
    ("compressed-tensors int8", False),
    ("compressed-tensors fp8", False),
    ("fp8_per_channel", False),
)
# In `make test`: the layers, and the head that the draft reads.
CHOSEN = (("gptq", True),)
NEAR_TIE = 4  # spacings of bf16


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with own_process() as pool:
        yield pool


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in CHOSEN else pytest.mark.full) for case in CASES],
    ids=lambda case: case[0] + " with its head" * case[1],
)
def test_outputs_are_plain_ones(
    process: ProcessPoolExecutor, case: tuple[str, bool], tmp_path: Path
) -> None:
    """Weights alone quantised: token for token, greedy and seeded. Where inputs are rounded to 8
    bits, a sum in another order may end in another step of these, which is far more than float32
    has: greedy outputs are compared up to near-ties."""
    name, head = case
    made = process.submit(outputs_of, tmp_path, name, head).result()
    greedy = slice(0, None, 2)
    pairs = zip(made.plain[greedy], made.got[greedy], strict=True)
    apart = [spacings for pair in pairs for spacings in spacings_of_a_difference(*pair)]
    print(f"{name}: {apart} spacings apart; {made.accepted} accepted in {made.drafts} drafts")
    if name in EXACT:
        assert_same(made.plain, made.got, [[0] * length for length in LENGTHS])
    assert max(apart, default=0) <= NEAR_TIE
    assert all(len(set(output.tokens)) > 2 for output in made.plain)
    assert made.accepted > made.drafts
    # The target's config is not the draft's, and a quantised head is not copied.
    assert made.methods == {"UnquantizedLinearMethod"} and not made.reads_own_head
