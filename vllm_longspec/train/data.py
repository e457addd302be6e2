"""Text files to fixed-length token sequences."""

import json
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from vllm_longspec.config import LongSpecError

DOCUMENTS_PER_CALL = 512


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a JSON-lines file, `.xz` or plain: each line a string or {"text": string}.

    Raises LongSpecError for a missing file and for a line that is neither, naming the line.
    """
    if not path.is_file():
        raise LongSpecError(f"data: {path} is not a file; give JSON lines, plain or .xz")
    opened = lzma.open(path, "rt") if path.suffix == ".xz" else path.open()
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            text = record.get("text") if isinstance(record, dict) else record
            if not isinstance(text, str):
                raise LongSpecError(
                    f'data: line {number} of {path} is neither a JSON string nor {{"text": ...}}'
                )
            yield text


def token_sequences(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_sequences: int | None = None,
) -> np.ndarray:  # [num_sequences, length] int32
    """Consecutive pieces of each document; no sequence spans two documents, tails are dropped."""
    pieces: list[np.ndarray] = []
    found = 0
    documents = iter(documents)
    for batch in track(
        iter(lambda: list(islice(documents, DOCUMENTS_PER_CALL)), []), "Tokenising", total=None
    ):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            whole = len(ids) // length
            pieces.append(np.asarray(ids[: whole * length], dtype=np.int32).reshape(-1, length))
            found += whole
        if max_sequences is not None and found >= max_sequences:
            break
    sequences = np.concatenate(pieces) if pieces else np.zeros((0, length), np.int32)
    if len(sequences) == 0:
        raise LongSpecError(f"data: no document is {length} tokens long; lower --sequence-length")
    return sequences[:max_sequences]
