"""A user's mistake in one sentence. Imports nothing, so that `--help` and typos cost nothing."""

from collections.abc import Collection


class LongSpecError(ValueError):
    """A user's mistake: one sentence that names the field and the fix."""


def reason(error: Exception) -> str:
    """What an error of a library says, short enough to be part of a sentence."""
    said = str(error).strip().splitlines()
    return short(said[0].rstrip(".")) if said else type(error).__name__


def short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Collection[object], most: int = 3) -> str:
    """For a sentence: "a, b, c and 12 more"."""
    more = len(names) - most
    shown = ", ".join(map(str, list(names)[:most]))
    return f"{shown} and {more} more" if more > 0 else shown
