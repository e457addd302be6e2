"""The commands, a file for each group; `vllm_longspec/cli.py` puts them together. They know what
options are called and whom to call, not how anything is done.

What is heavy to import is imported within `mistakes_in_a_sentence`, after what can be checked
without it.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from vllm_longspec.errors import LongSpecError, reason

INTERRUPTED = 130
# Of packages that may be missing, the extra that has them.
EXTRAS = {
    "accelerate": "train", "datasets": "train", "yaml": "train", "tensorboard": "train",
    "matplotlib": "eval", "openai": "eval", "pyarrow": "eval", "vllm": "cuda", "triton": "cuda",
}  # fmt: skip
# Of a disk or of rights, whatever was being written: a user's to mend.
OF_THE_SYSTEM = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG,
    errno.ENAMETOOLONG,
)  # fmt: skip

# What every command that reads text says of --data; `vllm_longspec/records.py` reads it.
DATA = (
    "JSON lines (.xz, .gz, .bz2, .zst too), .parquet, hf:DATASET, hf:DATASET/FILE or "
    "hf:DATASET:SPLIT; a record is a text, or has text, prompt and completion, or messages."
)


def fail(message: str, status: int = 2) -> None:
    print(f"vllm-longspec: {message}", file=sys.stderr)
    raise typer.Exit(status)


@contextmanager
def mistakes_in_a_sentence() -> Iterator[None]:
    """Ends the command with one sentence for a mistake, a missing extra, a library that does not
    fit, a full or closed disk and Ctrl-C; anything else is a fault of ours and keeps its
    traceback."""
    try:
        yield
    except LongSpecError as error:
        fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        # What transformers says of a library that it imports where it is there.
        if error.name is None and isinstance(error.__cause__, Exception):
            fail(
                f"transformers cannot be imported ({reason(error.__cause__)}); install what this "
                "names for the installed torch, or uninstall it"
            )
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        fail(f"{package} is not installed; pip install 'vllm-longspec[{EXTRAS[package]}]'")
    except KeyboardInterrupt:
        fail("stopped at once; what was saved before is kept", INTERRUPTED)
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or reason(error)}; make room, or name a place that is open")
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # whose package may not be imported yet
            raise
        fail(f"a safetensors file is not whole or cannot be written ({reason(error)})")


def kv_cache(gib: float | None) -> dict[str, Any]:
    """vLLM's engine arguments for a KV cache of this size; None: all memory that is free.

    With a size given, other programs may hold the rest of the memory: vLLM wants its usual share of
    the whole to be free when an engine starts, and asks for a twentieth then.
    """
    if gib is None:
        return {}
    return {"kv_cache_memory_bytes": int(gib * 2**30), "gpu_memory_utilization": 0.05}
