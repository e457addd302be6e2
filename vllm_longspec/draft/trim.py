"""Reduces a draft's vocabulary to the tokens that text like yours is made of.

Every level of a tree reads the head once; of a vocabulary of 128k tokens a quarter makes up nearly
all text. Which tokens the draft proposes never changes the output, only how much of it is accepted.
"""

import json
import shutil
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from vllm_longspec.config import num_drafted_tokens, read_tokenizer
from vllm_longspec.draft.checkpoint import (
    TOKEN_IDS,
    check_checkpoint,
    expected_tensors,
    read_draft_config,
    read_tensor,
    stored_tensors,
)
from vllm_longspec.errors import LongSpecError
from vllm_longspec.output import LEAST_ROOM, check_room, claim_folder
from vllm_longspec.records import DOCUMENTS_PER_CALL, SOURCES, read_documents
from vllm_longspec.writing import whole_folder

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def trim_head(
    draft: Path, target: str, data: Path | str, draft_vocab_size: int, output: Path
) -> torch.Tensor:  # [draft_vocab_size] int64, the tokens kept
    """Write the draft to `output` with the `draft_vocab_size` most frequent tokens of `data`.

    Raises LongSpecError for a draft, target, data or number that cannot be used.
    """
    claim_folder(output, inputs=(draft, target))
    config = read_draft_config(draft)
    check_checkpoint(draft, config)
    stored = json.loads((draft / "config.json").read_text())
    trimmed = stored | {"draft_vocab_size": draft_vocab_size}
    config.draft_vocab_size = draft_vocab_size
    num_drafted_tokens(config)
    tokenizer = read_tokenizer(target)

    console = Console()
    texts = (document.text for document in read_documents(data, tokenizer))
    counts = count_tokens(texts, tokenizer, config.vocab_size)
    ids = most_frequent(counts, draft_vocab_size)
    share = counts[ids].sum() / counts.sum()
    console.print(
        f"{draft_vocab_size:,} of {config.vocab_size:,} tokens cover {share:.2%} of the "
        f"{counts.sum():,} in {data}"
    )
    names = stored_tensors(draft).keys() & expected_tensors(config).keys()
    tensors = {name: read_tensor(draft, name) for name in names}
    tensors[TOKEN_IDS] = torch.from_numpy(ids)
    check_room(output, LEAST_ROOM + sum(tensor.nbytes for tensor in tensors.values()))
    with whole_folder(output) as unfinished:
        for path in draft.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
                shutil.copyfile(path, unfinished / path.name)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(trimmed, indent=2) + "\n")
    console.print(f"wrote {output}")
    return tensors[TOKEN_IDS]


def count_tokens(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> np.ndarray:  # [vocab_size] int64
    counts = np.zeros(vocab_size, dtype=np.int64)
    documents = iter(documents)
    for batch in track(
        iter(lambda: list(islice(documents, DOCUMENTS_PER_CALL)), []), "Counting", total=None
    ):
        ids = np.fromiter(
            chain.from_iterable(tokenizer(batch, add_special_tokens=False)["input_ids"]), np.int64
        )
        if ids.size and ids.max() >= vocab_size:
            raise LongSpecError(
                f"target: its tokenizer gives token {ids.max()}, but the draft's vocab_size is "
                f"{vocab_size}; give the target the draft was trained for"
            )
        counts += np.bincount(ids, minlength=vocab_size)
    if not counts.any():
        raise LongSpecError(f"data: holds no text; give {SOURCES}")
    return counts


def most_frequent(counts: np.ndarray, size: int) -> np.ndarray:  # [size] int64, increasing
    """Of equally frequent tokens, unused ones included, the lowest ids."""
    return np.sort(np.argsort(-counts, kind="stable")[:size])
