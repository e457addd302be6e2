"""Where commands may write: nothing that they did not make is overwritten.

Every command that writes asks here first, before it does any work; `tests/test_output.py` runs them
all into folders that hold something else.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_longspec.errors import LongSpecError, reason
from vllm_longspec.writing import UNFINISHED

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# What a plot of ours says of itself, in its first bytes.
PLOT_METADATA = {".png": {"Software": "vllm-longspec"}, ".svg": {"Creator": "vllm-longspec"}}
MARK = b"vllm-longspec"
LEAST_ROOM = 1 << 20  # bytes, for tables and results


def claim_folder(
    folder: Path,
    names: Collection[str] = (),
    inputs: Iterable[str | Path | None] = (),
    option: str = "output",
    room: int = LEAST_ROOM,
) -> None:
    """Raises LongSpecError unless a command may write into `folder`: it is absent, empty or holds
    nothing but what is called as in `names` (or was left unfinished), lies in no model's folder,
    and can be written. A command whose files are called as anybody's has no names.

    `inputs`: models that the command reads, as the user named them. `room`: bytes it needs.
    """
    with unreadable(folder, option):
        if folder.exists() and not folder.is_dir():
            raise LongSpecError(f"{option}: {folder} is a file; name a folder")
        check_place(folder, inputs, option)
        foreign = sorted(path for path in contents(folder) if not is_named(path, names))
    if foreign:
        raise LongSpecError(
            f"{option}: {folder} holds {foreign[0].name}, which this command did not make; name a "
            "new or an empty folder"
        )
    check_room(folder, room, option)


def claim_file(
    path: Path,
    keys: Collection[str] | None = None,
    inputs: Iterable[str | Path | None] = (),
    option: str = "output",
) -> None:
    """The same for a single file, whose folder is made. A file that is there has to be empty or
    the command's own: JSON whose first record has these `keys`; None: a plot with our mark."""
    with unreadable(path, option):
        if path.is_dir():
            raise LongSpecError(f"{option}: {path} is a folder; name a file")
        check_place(path, inputs, option)
        first = beginning(path)
        if first and not (MARK in first if keys is None else has_record(path, keys)):
            raise LongSpecError(
                f"{option}: {path} is there, and this command did not make it; name another file"
            )
        if path.is_file() or not path.exists():
            check_room(path, LEAST_ROOM, option)
        path.parent.mkdir(parents=True, exist_ok=True)


def check_place(path: Path, inputs: Iterable[str | Path | None], option: str) -> None:
    """Raises LongSpecError where nothing is to be written, whatever is there."""
    if path.is_symlink() and not path.exists():
        raise LongSpecError(f"{option}: {path} is a link to nothing; name another place")
    if path.exists() and not (path.is_file() or path.is_dir()):
        return  # a pipe or a device
    resolved = path.resolve()
    models = [Path(name).resolve() for name in inputs if name is not None and Path(name).is_dir()]
    for place in (resolved, *resolved.parents):
        config, read = is_model_config(place / "config.json"), place in models
        weights = (config or read) and holds_weights(place)
        if (read and (config or weights)) or (place != resolved and config and weights):
            raise LongSpecError(f"{option}: {path} is in a model's folder ({place}); name another")
    if why := cannot_write(resolved):
        raise LongSpecError(f"{option}: {path} cannot be written ({why}); name another place")


@contextmanager
def unreadable(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise LongSpecError(
            f"{option}: {path} cannot be used ({reason(error)}); name another place"
        ) from error


def check_room(path: Path, needed: int, option: str = "output") -> None:
    """Raises LongSpecError where `needed` bytes do not fit."""
    with unreadable(path, option):
        free = shutil.disk_usage(nearest(path.resolve())).free
    if free < needed:
        raise LongSpecError(
            f"{option}: {path} needs {size(needed)}, and {size(free)} are free there; make room or "
            "name another place"
        )


def size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def nearest(path: Path) -> Path:
    """`path`, or the first folder above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def cannot_write(path: Path) -> str:
    """Why `path`, or a file in it, cannot be written; empty if it can. Tried, since a superuser's
    rights say nothing of the file system."""
    there = nearest(path)
    try:
        if there.is_file():
            if there != path:
                return f"{there} is a file"
            there.open("ab").close()
            there = there.parent  # where it is written beside
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        return error.strerror or reason(error)
    return ""


def contents(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def beginning(path: Path) -> bytes:
    """Of a file that could lose something: not of a pipe or a device."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(4096)


def is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def is_named(path: Path, names: Collection[str]) -> bool:
    """A link is nobody's own: what is written through it lands elsewhere."""
    return not path.is_symlink() and (path.name in names or path.name.startswith(UNFINISHED))


def is_model_config(path: Path) -> bool:
    """Whatever cannot be read may be one."""
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(stored, dict) or bool({"architectures", "model_type"} & stored.keys())


def holds_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in WEIGHTS)


def has_record(path: Path, keys: Collection[str]) -> bool:
    """Whether a file is JSON, or JSON lines, whose first record has these keys."""
    try:
        with path.open("rb") as file:  # of lines, the last of which may be cut within a character
            line = file.readline()
        try:
            records = json.loads(line)
        except ValueError:
            records = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    first = records[0] if isinstance(records, list) and records else records
    return isinstance(first, dict) and set(keys) <= set(first)
