"""Token ids of the training text, made once and kept in the user's cache folder.

Stages, runs and processes that read the same data with the same tokenizer share them. They are one
flat file, since a step cuts pieces from anywhere in it without reading the rest; `datasets` would
keep a table of documents.

A token that is read but not learned (`train_on: answers`) is stored as `~token`, which is negative.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from vllm_longspec.errors import LongSpecError, listed
from vllm_longspec.records import (
    DOCUMENTS_PER_CALL,
    HUB,
    Document,
    Skipped,
    check_source,
    load_tables,
    read_documents,
)
from vllm_longspec.writing import on_disk, told

FORMAT = 5
DOCUMENTS_WITH_OFFSETS_PER_CALL = 32  # a token's offsets take 100 bytes
SKIPPED = "skipped.json"
UNTOUCHED = 24 * 3600.0  # seconds; a process that tokenises writes each few documents


def token_ids(
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    only_answers: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # [num_tokens] int32, [num_documents] int64 lengths
    """Of every document one after another; of the first only, when `max_tokens` are enough.

    With `only_answers` all that the user or the system says is stored as not to be learned. Raises
    LongSpecError for data that cannot be read or holds no text.
    """
    folder = cache_folder() / _key(sources, tokenizer, max_tokens, only_answers)
    there = folder.is_dir()  # before it is read: it may come, whole, from another process
    kept = _read(folder)
    if kept is not None:
        for source, count in kept[2].items():
            Skipped(source, count).close()
        return kept[:2]
    with told(cache_folder(), "XDG_CACHE_HOME"):
        if there:  # what a cleaner of old files left of it
            shutil.rmtree(folder, ignore_errors=True)
        _tokenise(folder, sources, tokenizer, max_tokens, only_answers)
    kept = _read(folder)
    assert kept is not None
    return kept[:2]


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, int]] | None:
    """None where it is not there or not whole."""
    try:
        skipped = json.loads((folder / SKIPPED).read_text())
        lengths = np.load(folder / "lengths.npy")
        tokens = np.memmap(folder / "tokens.bin", np.int32, mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return (tokens, lengths, skipped) if len(tokens) == lengths.sum() else None


def first_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What the tokenizer puts before every text, which targets that know it need: Gemma 3 270M
    loses 0.5 nats a token without."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-longspec" / "tokens"


def learned(tokens: np.ndarray) -> np.ndarray:
    """Of stored tokens, those that are to be learned."""
    return tokens[tokens >= 0]


def stored_ids(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[np.ndarray]:  # [num_tokens] int32
    """Each begins with what the tokenizer puts before a text, once: templates write it, too."""
    some = any(document.answers is not None for document in documents)
    made = tokenizer([d.text for d in documents], return_offsets_mapping=some)
    first = first_token(tokenizer)
    for number, document in enumerate(documents):
        ids = np.asarray(made["input_ids"][number], dtype=np.int32)
        if document.answers is not None:
            starts = np.asarray(made["offset_mapping"][number])[:, :1]
            begin, end = np.asarray(document.answers).T
            is_answer = ((begin <= starts) & (starts < end)).any(1)
            ids = np.where(is_answer, ids, ~ids)
        twice = first is not None and ids[1:2].tolist() in ([first], [~first])
        yield ids[1:] if twice else ids


def _key(
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    only_answers: bool,
) -> str:
    described: list[Any] = [FORMAT, max_tokens, only_answers, tokenizer.chat_template]
    described.append({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    for source in sources:
        if source.startswith(HUB):
            described.append([source, *(table._fingerprint for table in load_tables(source))])
            continue
        check_source(source)
        stat = Path(source).stat()
        described.append([str(Path(source).resolve()), stat.st_size, stat.st_mtime_ns])
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:32]


def _tokenise(
    folder: Path,
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    only_answers: bool,
) -> None:
    remove_leftovers(folder.parent)
    # Not by the process's number: in a container the next start has the same.
    unfinished = folder.with_name(f"{folder.name}.{uuid4().hex}")
    unfinished.mkdir(parents=True)
    at_once = DOCUMENTS_WITH_OFFSETS_PER_CALL if only_answers else DOCUMENTS_PER_CALL
    lengths: list[int] = []
    total = 0
    skipped = [Skipped(source) for source in sources]
    documents = (
        document
        for source, bad in zip(sources, skipped, strict=True)
        for document in read_documents(source, tokenizer, bad, only_answers)
    )
    try:
        with (unfinished / "tokens.bin").open("wb") as file:
            for batch in track(
                _batches(documents, at_once), "Tokenising", total=None, console=Console(stderr=True)
            ):
                for ids in stored_ids(batch, tokenizer):
                    ids.tofile(file)
                    lengths.append(len(ids))
                    total += len(ids)
                if max_tokens is not None and total >= max_tokens:
                    break
        np.save(unfinished / "lengths.npy", np.asarray(lengths, dtype=np.int64))
        (unfinished / SKIPPED).write_text(json.dumps({bad.source: bad.count for bad in skipped}))
        if total:
            on_disk(unfinished)
            unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # another run was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if not total:
        raise LongSpecError(f"data: {listed(sources)} gives no text; give JSON lines with text")


def remove_leftovers(cache: Path) -> None:
    """Of processes that were killed while they tokenised: what none has written to for a day."""
    for left in cache.glob("*.*"):
        with suppress(OSError):  # another process may remove it, too
            last = max(path.stat().st_mtime for path in (left, *left.iterdir()))
            if time.time() - last > UNTOUCHED:
                shutil.rmtree(left)


def _batches(documents: Iterator[Document], at_once: int) -> Iterator[list[Document]]:
    while batch := list(islice(documents, at_once)):
        yield batch
