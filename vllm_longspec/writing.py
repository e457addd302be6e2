"""How commands write: beside, then renamed, so that what has a name is always whole.

The mode of what is written is as the umask says; safetensors alone would leave its files to their
owner. A disk that fills meanwhile is told in a sentence, and what was there stays.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vllm_longspec.errors import LongSpecError, reason

UNFINISHED = ".unfinished"  # what the names of files and folders begin with until they are whole


@contextmanager
def whole_file(path: Path, option: str = "output") -> Iterator[Path]:
    """Where to write a file that takes `path`'s place at the end. Raises LongSpecError where the
    disk is full or the like."""
    if path.exists() and not path.is_file():  # a pipe or a device
        with told(path, option):
            yield path
        return
    resolved = path.resolve()
    beside = resolved.with_name(f"{UNFINISHED}-{resolved.name}")
    try:
        with told(path, option):
            yield beside
            on_disk(beside)
            set_modes(beside)
            beside.replace(resolved)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str, option: str = "output") -> None:
    with whole_file(path, option) as beside:
        beside.write_text(text)


def write_json(path: Path, value: Any, option: str = "output") -> None:
    write_text(path, json.dumps(value, indent=1) + "\n", option)


@contextmanager
def whole_folder(folder: Path, option: str = "output", last: str = "config.json") -> Iterator[Path]:
    """Where to write what `folder` holds at the end; a model's config.json, without which nothing
    reads it, comes `last`."""
    unfinished, new = folder / UNFINISHED, not folder.exists()
    try:
        with told(folder, option):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            on_disk(unfinished)
            set_modes(unfinished)
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Holds a file or a folder for this process. Raises LongSpecError where another one does; does
    nothing on file systems without locks."""
    handle = os.open(place, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LongSpecError(
                    f"output: another process writes to {place}; wait for it, or name another place"
                ) from error
        yield
    finally:
        os.close(handle)


@contextmanager
def told(path: Path, option: str = "output") -> Iterator[None]:
    """What keeps `path` from being written, as a LongSpecError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise LongSpecError(
            f"{option}: {path} cannot be written ({why}); make room or name another place"
        ) from error


def set_modes(path: Path) -> None:
    """Of a file, or of all files in a folder: what any program's new file would have."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files(path):
        file.chmod(0o666 & ~mask)


def on_disk(path: Path) -> None:
    """A file, or all files in a folder, before they are renamed: else a machine that stops may keep
    the new name and not the data."""
    for file in files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def files(path: Path) -> Iterator[Path]:
    """The path itself, or what is in a folder at any depth; no links."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            yield file
