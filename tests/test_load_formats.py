"""A target's weights in each `load_format` that is accepted; the draft is read from its folder
whatever the target's is."""

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import close, inspect_here, write_draft, write_target
from helpers import DRAFT, TARGET, Engine, Output, assert_same, text_prompt
from processes import own_process
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig

from vllm_longspec.draft.longspec import draft_load_config
from vllm_longspec.runtime.supported import LOAD_FORMATS

needs_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="float32 equality is for CPUs; test_gpu.py is for GPUs"
)
# No weights are read; test_gpu.py starts engines with it.
DUMMY = "dummy"
LENGTHS = (30, 150)
# Of formats that are not in a safetensors file of the usual name and tensors.
OTHER_FILES = {
    "pt": "model.pt", "npcache": "model.bin", "mistral": "consolidated.safetensors",
}  # fmt: skip
# Mistral's names of a Llama's tensors.
MISTRAL_NAMES = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "model.layers": "layers",
}  # fmt: skip


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with own_process() as pool:
        yield pool


@needs_cpu
@pytest.mark.full
@pytest.mark.parametrize("load_format", [name for name in LOAD_FORMATS if name != DUMMY])
def test_outputs_are_plain_ones(
    process: ProcessPoolExecutor, load_format: str, tmp_path: Path
) -> None:
    plain, got, accepted = process.submit(outputs_of, tmp_path, load_format).result()
    assert_same(plain, got, [[0] * length for length in LENGTHS])
    # The draft is what it is with any other format; that of `mistral` is random.
    assert accepted > 20 or load_format == "mistral"


def test_of_the_draft() -> None:
    target = LoadConfig(
        load_format="sharded_state", model_loader_extra_config={"pattern": "x"},
        safetensors_load_strategy="torchao", download_dir="/somewhere",
    )  # fmt: skip
    draft = draft_load_config(target)
    assert (draft.load_format, draft.model_loader_extra_config) == ("auto", {})
    assert draft.safetensors_load_strategy is None and draft.download_dir == "/somewhere"
    assert target.load_format == "sharded_state"
    eager = LoadConfig(safetensors_load_strategy="eager")
    assert draft_load_config(eager).safetensors_load_strategy == "eager"
    dummy = LoadConfig(load_format=DUMMY)
    assert draft_load_config(dummy) is dummy


def outputs_of(folder: Path, load_format: str) -> tuple[list[Output], list[Output], int]:
    """Of plain vLLM and of LongSpec, and how many draft tokens were accepted; in a process of its
    own."""
    from vllm import SamplingParams

    target, draft = folder / "target", DRAFT
    if load_format == "mistral":
        target.mkdir()
        config = write_target(target, "mistral")
        draft = folder / "draft"
        write_draft(draft, config)
        inspect_here(config.architectures[0])
    else:
        shutil.copytree(TARGET, target)
    prompts = [text_prompt(i, length) for i, length in enumerate(LENGTHS)]
    params = [
        SamplingParams(temperature=0.8 * i, seed=i, max_tokens=24, ignore_eos=True)
        for i in range(len(prompts))
    ]
    sharded = load_format == "sharded_state"
    if not sharded:
        store(target, load_format)
    options: dict[str, Any] = {"model": str(target)}
    engine = Engine(**options, load_format="auto" if sharded else load_format)
    plain = engine.generate(prompts, params)
    if sharded:
        engine.llm.collective_rpc(save_shards, args=(target,))
    close(engine)
    engine = Engine({"method": "longspec", "model": str(draft)}, **options, load_format=load_format)
    got = engine.generate(prompts, params)
    accepted = engine.counters()["accepted_tokens"]
    close(engine)
    return plain, got, accepted


def store(folder: Path, load_format: str) -> None:
    """The weights in a folder in another format, and in no other."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if load_format not in OTHER_FILES:
        return
    path.unlink()
    if load_format in ("pt", "npcache"):
        # As numpy has them, which knows no bf16.
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        torch.save(tensors, folder / OTHER_FILES[load_format])
        return
    tensors = {mistral_name(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / OTHER_FILES[load_format])


def mistral_name(name: str) -> str:
    for theirs, mistral in MISTRAL_NAMES.items():
        name = name.replace(theirs, mistral)
    return name


def save_shards(worker: Any, folder: Path) -> None:
    """What vLLM saves as a sharded state: tensors as its modules hold them. On a CPU it cannot do
    so itself, where a module gives its weights away once they are packed."""
    path = folder / "model.safetensors"
    tensors = fused(load_file(path))
    for name, tensor in worker.model_runner.model.state_dict().items():
        if not name.endswith("weight"):
            tensors[name] = tensor
    path.unlink()
    save_file(tensors, folder / "model-rank-0-part-0.safetensors")


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out: dict[str, list[torch.Tensor]] = {}
    # Alphabetical but for q, k and v.
    for name in sorted(tensors, key=lambda name: name.replace(".q_proj", ".a_proj")):
        whole = re.sub(r"\.[qkv]_proj", ".qkv_proj", name)
        whole = re.sub(r"\.(gate|up)_proj", ".gate_up_proj", whole)
        # A tied head's is stored once, by the name that comes first.
        if name == "model.embed_tokens.weight" and "lm_head.weight" not in tensors:
            whole = "lm_head.weight"
        out.setdefault(whole, []).append(tensors[name])
    return {name: torch.cat(parts) for name, parts in out.items()}
