"""From any draft, published ones included, to this project's format with a model card."""

import json
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from vllm_longspec import SUPPORTED_VLLM, __version__
from vllm_longspec.config import (
    check_shape,
    draft_config_for,
    num_drafted_tokens,
    read_target_config,
    record_target,
    resolve_tree,
)
from vllm_longspec.draft.checkpoint import (
    check_checkpoint,
    check_shapes,
    fetch_draft,
    load_torch,
    read_draft,
    read_draft_config,
    whole_draft,
)
from vllm_longspec.errors import LongSpecError, listed
from vllm_longspec.output import LEAST_ROOM, check_room, claim_folder
from vllm_longspec.writing import whole_folder

TORCH_SUFFIXES = (".pth", ".pt", ".bin")

CARD = """\
# {title}

A [LongSpec](https://arxiv.org/abs/2502.17421) draft for `{target}`:
one decoder layer that proposes a tree of tokens, which the target then verifies. The output stays
the target's own.

## Serve

With vLLM {vllm} and vllm-longspec installed:

    vllm serve {target} --speculative-model {draft}

`vllm serve {draft}` alone serves the same target with it, with one tree for all batch sizes.

## Draft

| | |
|---|---|
| target | `{target}` |
| window of its self-attention | {window} tokens |
| tree, unless served with another | {tree} |
| tokens it proposes | {vocabulary} |
| parameters read | {parameters} |
| stored as | {dtype} |

## Provenance

Converted from `{source}` ({architecture}{commit}) by vllm-longspec {version};
no weight was changed.
"""


def convert(source: str, target: str, output: Path) -> None:
    """Write the draft `source`, a folder, a repository or a torch file, to `output` as a draft for
    `target`.

    Raises LongSpecError for a draft, target or folder that cannot be used.
    """
    claim_folder(output, inputs=(source, target))
    file = torch_file(source)
    folder = file.parent if file is not None else fetch_draft(source)
    if file is None:
        config = read_draft_config(folder)
        check_checkpoint(folder, config)
    target_config = read_target_config(target)
    if file is None:
        check_shape(config, target_config)
        tensors = read_draft(folder, config)
    else:
        config = draft_config_for(target_config)
        stored = load_torch(file, "cpu")
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        check_shapes(file, shapes, config, "the target")
        tensors = whole_draft(stored, config)
    record_target(config, target_config, target)
    check_room(output, LEAST_ROOM + sum(tensor.nbytes for tensor in tensors.values()))
    card = model_card(source, folder, target, config, tensors, output)
    with whole_folder(output) as unfinished:
        config.save_pretrained(unfinished)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        card.save(unfinished / "README.md")
    Console().print(f"wrote {output}")


def torch_file(source: str) -> Path | None:
    """What the authors' trainer writes: a torch file of tensors, without a config.json beside it.
    None for a draft of any other form."""
    path = Path(source)
    if path.is_file():
        if path.suffix not in TORCH_SUFFIXES:
            raise LongSpecError(
                f"draft: {path} is a file; give a draft's folder, or a torch file "
                f"({', '.join(TORCH_SUFFIXES)})"
            )
        return path
    if (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.pth"))
    if len(files) > 1:
        names = listed([file.name for file in files])
        raise LongSpecError(f"draft: {path} holds {names}; give one of these files")
    return files[0] if files else None


def model_card(
    source: str,
    folder: Path,
    target: str,
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    output: Path,
) -> ModelCard:
    """The card of the draft `source`, fetched to `folder` and written to `output`."""
    is_folder = Path(target).is_dir()
    data = ModelCardData(
        base_model=Path(target).resolve().name if is_folder else target,
        library_name="vllm-longspec",
        license=known_licence(folder),
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "longspec", "vllm", "speculators"],
    )
    tree = resolve_tree(draft_config=config)
    levels = " ".join(map(str, tree.tree_shape))
    nodes = f"{levels} nodes a level, {tree.num_speculative_tokens} verified"
    chosen = config.tree_shape is not None or config.num_speculative_tokens is not None
    unused = ("cross_attn.k_proj", "cross_attn.v_proj")
    weights = {name: x for name, x in tensors.items() if not name.startswith(unused)}
    # The hub client keeps a repository's files in a folder named for the commit.
    is_repository = not Path(source).exists()
    text = CARD.format(
        title=output.resolve().name,
        target=target,
        draft=output.resolve().name,
        window=config.window,
        tree=nodes if chosen else f"on a GPU by batch size, else {nodes}",
        vocabulary=f"{num_drafted_tokens(config):,} of {config.vocab_size:,}",
        parameters=f"{sum(x.numel() for x in weights.values()) / 1e6:,.1f} million",
        dtype=", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()})),
        source=source,
        architecture=class_name(folder),
        commit=f", commit {folder.name}" if is_repository else "",
        version=__version__,
        vllm=SUPPORTED_VLLM,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def class_name(folder: Path) -> str:
    """What the draft's own config calls it."""
    config = folder / "config.json"
    names = json.loads(config.read_text()).get("architectures") if config.is_file() else None
    return names[0] if names else "without a class name"


def known_licence(folder: Path) -> str | None:
    """What the card beside a draft says."""
    card = folder / "README.md"
    licence = ModelCard.load(card).data.license if card.is_file() else None
    return licence if isinstance(licence, str) else None
