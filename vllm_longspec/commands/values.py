"""What an option's value has to be, said before anything is imported."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from vllm_longspec.errors import LongSpecError

DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")


def positive(value: Any) -> Any:
    """A float, a list of them, or None. NaN and infinity pass click's own ranges."""
    return checked(value, lambda x: math.isfinite(x) and x > 0, "a number above 0")


def not_negative(value: Any) -> Any:
    return checked(value, lambda x: math.isfinite(x) and x >= 0, "a number of at least 0")


def vllm_dtype(value: Any) -> Any:
    return checked(value, lambda x: x in DTYPES, f"one of {', '.join(DTYPES)}")


def one_of(*names: str) -> Callable[[Any], Any]:
    return lambda value: checked(value, lambda x: x in names, f"one of {', '.join(names)}")


def checked(value: Any, is_right: Callable[[Any], bool], wanted: str) -> Any:
    for one in value if isinstance(value, list | tuple) else [value]:
        if one is not None and not is_right(one):
            raise typer.BadParameter(f"{one} is not {wanted}")
    return value


def check_local(name: str | Path | None, option: str) -> None:
    """Raises LongSpecError for a model that is named like a folder and is none."""
    path = Path(name) if name is not None else None
    local = path is not None and (path.is_absolute() or str(name).startswith("."))
    if path is not None and local and not path.exists():
        raise LongSpecError(
            f"{option}: {name} does not exist; give a folder or a Hugging Face repository"
        )
