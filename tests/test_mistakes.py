"""Each mistake through the real command: `vllm serve` ends at once with one sentence."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRAFT, TARGET
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the sentences are the same; dtype float32 is for CPUs"
)


def serve(target: Path, *arguments: str) -> tuple[int, str, float]:
    """Exit status, what it printed, seconds."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target), "--port",
               "0", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Drafts and targets with something wrong, by what it is."""
    root = tmp_path_factory.mktemp("wrong")

    def copy(name: str, source: Path = DRAFT, **changes: Any) -> Path:
        folder = Path(shutil.copytree(source, root / name))
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    def served_as(name: str, config: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(DRAFT, root / name))
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    theirs = json.loads((TARGET / "config.json").read_text())
    ours = json.loads((DRAFT / "config.json").read_text())
    verifier = {"name_or_path": str(TARGET), "architectures": ["LlamaForCausalLM"]}
    made = {
        "without a record": served_as("unrecorded", {
            key: value for key, value in ours.items()
            if key not in ("speculators_config", "speculators_model_type")
        }),
        "recorded": served_as("recorded", ours | {
            "speculators_model_type": "longspec",
            "speculators_config": {
                "algorithm": "longspec", "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 31}],
                "verifier": verifier,
            },
            "transformer_layer_config": {"model_type": "llama"},
        }),
        "published": served_as("published", theirs | {"architectures": ["LlamaGlideDecoderLayer"]}),
        "copy": served_as("copy", theirs),
        "hidden": copy("hidden", hidden_size=512),
        "heads": copy("heads", num_key_value_heads=4),
        "vocabulary": copy("vocabulary", vocab_size=5000),
        "tensors": copy("tensors"),
        "level": copy("level", tree_shape=[4, 0, 4]),
        "mla": copy(
            "mla", TARGET, model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"],
            q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=32, qk_nope_head_dim=32,
            v_head_dim=64,
        ),
        "window": copy(
            "window", TARGET, model_type="mistral", architectures=["MistralForCausalLM"],
            sliding_window=128,
        ),
    }  # fmt: skip
    weights = load_file(made["tensors"] / "model.safetensors")
    weights["fc.weight"] = weights.pop("self_attn.q_proj.weight")
    save_file(weights, made["tensors"] / "model.safetensors")
    return made


def tree(**options: Any) -> list[str]:
    return ["--speculative-config", json.dumps(options)]


# name: draft, further arguments, what the sentence holds
MISTAKES: dict[str, tuple[str | Path, list[str], tuple[str, ...]]] = {
    "no such draft": ("/no/such/draft", [], ("--speculative-model", "/no/such/draft", "exist")),
    "tensors": ("tensors", [], ("lacks self_attn.q_proj.weight", "fc.weight")),
    "zero level": (DRAFT, tree(tree_shape=[4, 0, 4]), ("tree_shape", "at least 1")),
    "too many nodes": (
        DRAFT, tree(tree_shape=[2, 2], num_speculative_tokens=9),
        ("num_speculative_tokens", "9", "4"),
    ),
    "hidden size": ("hidden", [], ("hidden_size", "512", "256")),
    "head shape": ("heads", [], ("num_key_value_heads", "4")),
    "vocabulary": ("vocabulary", [], ("vocab_size", "5000", "4096")),
    "empty tree": (DRAFT, tree(tree_shape=[]), ("tree_shape",)),
    "negative level": (DRAFT, tree(tree_shape="4 -1"), ("tree_shape", "-1")),
    "level in the draft": ("level", [], ("tree_shape", "at least 1")),
    "no nodes": (DRAFT, tree(num_speculative_tokens=0), ("num_speculative_tokens", "0")),
    "not a draft": (TARGET, [], ("is not a LongSpec draft", "vllm-longspec train")),
    "pipeline": (DRAFT, ["--pipeline-parallel-size", "2"], ("pipeline_parallel_size", "1")),
    "kv cache": (DRAFT, ["--kv-cache-dtype", "fp8"], ("kv_cache_dtype", "auto")),
    "unknown option": (DRAFT, tree(top_k=4), ("top_k is not an option",)),
    "given twice": (DRAFT, tree(model="other"), ("--speculative-model", "give one of the two")),
    "swapped": (TARGET, ["--model", "without a record"], ("swap the two", "vllm serve")),
    "alone": ("", ["--model", "without a record"], ("is a LongSpec draft", "vllm serve TARGET")),
    "swapped, recorded": (TARGET, ["--model", "recorded"], ("swap the two", "vllm serve")),
    "swapped, published": (TARGET, ["--model", "published"], ("swap the two", "vllm serve")),
    "swapped, target's config": (TARGET, ["--model", "copy"], ("swap the two", "vllm serve")),
    "alone, published": ("", ["--model", "published"], ("is a LongSpec draft", "served with")),
    "alone, target's config": ("", ["--model", "copy"], ("is a LongSpec draft", "served with")),
    "MLA": (DRAFT, ["--model", "mla"], ("model: ", "MLA")),
    "sliding window": (DRAFT, ["--model", "window"], ("model: ", "sliding-window")),
}  # fmt: skip
# A start takes twenty seconds; "zero level" goes the way of "too many nodes" (and test_config.py).
CHOSEN = ("no such draft", "tensors", "too many nodes", "swapped", "alone")


@pytest.mark.parametrize(
    "names",
    [CHOSEN, pytest.param([n for n in MISTAKES if n not in CHOSEN], marks=pytest.mark.full)],
    ids=len,
)
def test_one_sentence_and_out(folders: dict[str, Path], names: list[str]) -> None:
    def run(name: str) -> tuple[int, str, float]:
        draft, arguments, _ = MISTAKES[name]
        target = TARGET
        if arguments[:1] == ["--model"]:
            target, arguments = folders[arguments[1]], []
        draft = folders.get(str(draft), draft)  # type: ignore[arg-type]
        beside = ["--speculative-model", str(draft)] if draft else []
        return serve(target, *beside, *arguments)

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(names, pool.map(run, names), strict=True))
    for name, (status, printed, seconds) in results.items():
        said = [line for line in printed.splitlines() if "vllm-longspec: " in line]
        assert status != 0, (name, printed[-2000:])
        assert len(said) == 1, (name, printed[-3000:])
        for part in MISTAKES[name][2]:
            assert part in said[0], (name, said[0])
        assert "Traceback" not in printed and "Application startup" not in printed, printed
        print(f"{name}: exit status {status} after {seconds:.0f} s: {said[0]}")


def test_the_flag_needs_a_value() -> None:
    status, printed, _ = serve(TARGET, "--speculative-model")
    assert status == 2 and "--speculative-model" in printed and "Traceback" not in printed
