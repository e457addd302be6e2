"""Targets with quantised weights on a CPU, by what vLLM's build for CPUs computes there;
`test_gpu_quantised.py` has the others."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers import Output, assert_same, spacings_of_a_difference
from quantised import LENGTHS, NEW_TOKENS, outputs_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's products are others on a GPU: test_gpu_quantised.py"
)

# Format, dtype, whether the head is quantised too. The first computes what is compared exactly.
EXACT = ("compressed-tensors int4", "float32", False)
CASES = (
    EXACT,
    ("compressed-tensors int8", "float32", False),
    ("compressed-tensors int8", "bfloat16", False),
    ("compressed-tensors fp8", "float32", False),
    ("gptq", "bfloat16", True),
    ("gptq", "bfloat16", False),
    ("awq", "bfloat16", False),
    ("fp8_per_channel", "bfloat16", False),
)
# In `make test`: a product that is vLLM's own on every CPU, weights and inputs rounded.
CHOSEN = (CASES[1],)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in CHOSEN else pytest.mark.full) for case in CASES],
    ids=lambda case: " ".join(map(str, case)),
)
def test_outputs_are_plain_ones(
    process: ProcessPoolExecutor, case: tuple[str, str, bool], tmp_path: Path
) -> None:
    """Weights alone quantised, in float32: token for token. Where inputs are rounded to 8 bits or
    all is in bf16, a sum in another order ends in another step of these: greedy outputs are
    compared up to near-ties, as wide as plain vLLM's own where it computes the same text at once,
    and seeded ones are not."""
    name, dtype, head = case
    made = process.submit(outputs_of, tmp_path, name, dtype, head).result()
    greedy = slice(0, None, 2)
    if case == EXACT:
        assert_same(made.plain, made.got, [[0] * length for length in LENGTHS])
    half = NEW_TOKENS // 2
    own, ours = [], []
    for plain, again, got in zip(
        made.plain[greedy], made.again[greedy], made.got[greedy], strict=True
    ):
        rest = Output(plain.tokens[half:], "", plain.logprobs[half:])
        own += spacings_of_a_difference(rest, again)
        ours += spacings_of_a_difference(plain, got)
    print(f"{name}: plain's own {own}, LongSpec's {ours}; {made.accepted} in {made.drafts} drafts")
    assert max(ours, default=0) <= max([4, *own])
    assert all(len(set(output.tokens)) > 2 for output in made.plain)
    assert made.accepted > 0.5 * made.drafts
    # The target's config is not the draft's, and a quantised head is not copied.
    assert made.methods == {"UnquantizedLinearMethod"} and not made.reads_own_head
