"""Equality with plain vLLM for tiny random models of many architectures; float32, on a CPU."""

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    NEW_TOKENS_RANDOM,
    ON_A_GPU,
    outputs_of,
    refusal_of,
    served_as,
    slides,
)
from helpers import ROOT, Output, assert_same, load_script
from processes import own_process

from vllm_longspec.train.target import MODEL_TYPES

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)

# In `make test`: experts beside dense layers. The others take half a minute each.
CHOSEN = ("glm4_moe",)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with own_process() as pool:
        yield pool


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CHOSEN else pytest.mark.full)
        for name in ARCHITECTURES
    ],
)
def test_outputs_are_plain_ones(process: ProcessPoolExecutor, name: str, tmp_path: Path) -> None:
    made = process.submit(outputs_of, tmp_path, name).result()
    first = [Output(output.tokens[:NEW_TOKENS_RANDOM], "") for output in made.plain]
    print(
        f"{name}: {[len(set(output.tokens)) for output in made.plain]} different tokens; "
        f"random draft: {made.accepted_of_random} accepted; right draft: "
        f"{made.accepted_of_right} in {made.drafts_of_right} drafts; {made.cached} cached"
    )
    assert_same(first, made.random, made.prompts)
    assert_same(made.plain, made.right, made.prompts)
    # Not one token for ever, which would be right whatever was read.
    assert all(len(set(output.tokens)) > 2 for output in made.plain)
    assert made.accepted_of_right > 2 * made.drafts_of_right  # of a depth of 3
    # Where layers slide plain vLLM finds less too.
    assert made.cached >= (288 if slides(name) else 400)


@pytest.mark.full
def test_a_target_whose_config_misleads(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    said = process.submit(refusal_of, tmp_path, "falcon").result()
    assert said.startswith("model: the target's last layer has 1 key-value heads of 32 numbers")


def test_the_table_of_targets() -> None:
    """`docs/compatibility.md` and what is refused untested go by what is tested here."""
    from vllm_longspec.runtime.supported import TESTED

    script = load_script(ROOT / "scripts/targets_table.py")
    page = script.PAGE.read_text()
    assert page == script.page_with_table(page), "run scripts/targets_table.py"
    assert set(TESTED) == {served_as(name) for name in ARCHITECTURES}
    assert {*MODEL_TYPES, *ON_A_GPU} <= set(TESTED) and set(CHOSEN) <= set(ARCHITECTURES)
    unnamed = re.findall(r"^\| `(\w+)` \| \|", page, re.MULTILINE)
    assert unnamed == [], "say in the table what these are"
