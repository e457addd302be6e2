"""A draft that proposes only frequent tokens: which it keeps, its checkpoint, what vLLM returns."""

import json
import lzma
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET, assert_same, documents, longspec, text_prompt, tokenizer
from processes import EngineProcess
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from vllm_longspec.cli import app
from vllm_longspec.config import LongSpecConfig, resolve_tree
from vllm_longspec.draft.checkpoint import TOKEN_IDS, check_checkpoint, read_tensor
from vllm_longspec.draft.trim import trim_head
from vllm_longspec.errors import LongSpecError

TEXTS = ["def main():\n    return 1\n", "import os\n", "def main():\n    pass\n"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl.xz"
    with lzma.open(path, "wt") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    return path


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano draft with 1024 of 4096 tokens."""
    folder = tmp_path_factory.mktemp("trimmed")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(text[:20_000]) + "\n" for text in documents()[:40]))
    trim_head(DRAFT, str(TARGET), data, 1024, folder / "draft")
    return folder / "draft"


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["trim-head", *map(str, arguments)], terminal_width=200)
    return result.exit_code, result.output


def test_keeps_the_most_frequent(corpus: Path, tmp_path: Path) -> None:
    counts = Counter(token for text in TEXTS for token in tokenizer()(text)["input_ids"])
    output = tmp_path / "draft"
    size = len(counts) // 2
    code, printed = run(
        "--draft", DRAFT, "--target", TARGET, "--data", corpus, "--output", output,
        "--draft-vocab-size", size,
    )  # fmt: skip
    assert code == 0, printed
    expected = sorted(sorted(counts, key=lambda token: (-counts[token], token))[:size])
    assert read_tensor(output, TOKEN_IDS).tolist() == expected
    share = sum(counts[token] for token in expected) / counts.total()
    assert f"{share:.2%} of the {counts.total()} in" in " ".join(printed.split())

    config = AutoConfig.from_pretrained(output)
    assert isinstance(config, LongSpecConfig) and config.draft_vocab_size == size
    check_checkpoint(output, config)
    before, after = (load_file(folder / "model.safetensors") for folder in (DRAFT, output))
    assert after.keys() - before.keys() == {TOKEN_IDS}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_fills_up_with_the_lowest_ids(corpus: Path, tmp_path: Path) -> None:
    used = {token for text in TEXTS for token in tokenizer()(text)["input_ids"]}
    size = len(used) + 10
    ids = trim_head(DRAFT, str(TARGET), corpus, size, tmp_path / "draft").tolist()
    unused = [token for token in range(len(ids) * 2) if token not in used]
    assert ids == sorted(used | set(unused[:10]))
    again = trim_head(tmp_path / "draft", str(TARGET), corpus, 4096, tmp_path / "all")
    assert again.tolist() == list(range(4096))


def test_wrong_inputs(corpus: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    given = {
        "draft": DRAFT, "target": TARGET, "data": corpus, "output": tmp_path / "out",
        "draft-vocab-size": 64,
    }  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"draft": tmp_path}, "draft: "),
        ({"draft": TARGET}, f"draft: {TARGET} is not a LongSpec draft"),
        ({"target": tmp_path}, "target: the tokenizer"),
        ({"data": tmp_path / "none"}, "data: "),
        ({"data": empty}, "data: holds no text"),
        ({"draft-vocab-size": 4097}, "draft_vocab_size: 4097"),
        ({"output": DRAFT}, "output: "),
    ]
    for changes, sentence in wrong:
        arguments = [x for key, value in (given | changes).items() for x in (f"--{key}", value)]
        code, printed = run(*arguments)
        assert code == 2 and f"vllm-longspec: {sentence}" in printed, (changes, printed)
        assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("ids", "size", "sentence"),
    [
        (None, 4, "draft_token_ids: the checkpoint lacks"),
        ([1, 2, 3], None, "draft_vocab_size: config.json lacks it"),
        ([1, 2, 3], 4, "draft_token_ids: is [3] of int64, but draft_vocab_size makes it [4]"),
        ([1.0, 2.0], 2, "draft_token_ids: is [2] of float32"),
        ([1, 1, 2], 3, "draft_token_ids: are not strictly increasing"),
        ([3, 2], 2, "draft_token_ids: are not strictly increasing"),
        ([-1, 2], 2, "draft_token_ids: are not strictly increasing"),
        ([1, 4096], 2, "draft_token_ids: are not strictly increasing token ids below"),
        ([1, 2], 0, "draft_vocab_size: 0 is not between 1 and"),
        ([1, 2], 5000, "draft_vocab_size: 5000 is not between 1 and"),
    ],
)
def test_wrong_checkpoints(tmp_path: Path, ids: Any, size: int | None, sentence: str) -> None:
    folder = Path(shutil.copytree(DRAFT, tmp_path / "draft"))
    if ids is not None:
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {TOKEN_IDS: torch.tensor(ids)}, folder / "model.safetensors")
    config = LongSpecConfig.from_pretrained(folder, draft_vocab_size=size)
    with pytest.raises(LongSpecError) as error:
        check_checkpoint(folder, config)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_trees_are_those_of_the_kept_tokens() -> None:
    draft = LongSpecConfig(vocab_size=4096, draft_vocab_size=16)
    with pytest.raises(LongSpecError, match="level 1 has 17 nodes"):
        resolve_tree([17], draft_config=draft)
    assert resolve_tree([16], draft_config=draft).num_nodes == 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="float32 equality is for CPUs")
def test_same_outputs(trimmed: Path) -> None:
    from vllm import SamplingParams

    prompts = [text_prompt(i, length) for i, length in ((1, 40), (4, 300), (9, 700))]
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=32, ignore_eos=True)
        for i in range(3)
        for t in (0.0, 0.8)
    ]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    plain = EngineProcess()
    expected = plain.generate(prompts, params)
    plain.close()
    engine = EngineProcess(longspec(model=str(trimmed)))
    got = engine.generate(prompts, params)
    counters = engine.counters()
    engine.close()
    assert_same(expected, got, prompts)
    acceptance = 1 + counters["accepted_tokens"] / counters["drafts"]
    print(f"mean acceptance length with a quarter of the vocabulary: {acceptance:.2f}")
    assert acceptance > 1.5
