"""Lines of a data set's file, checked; a bad one is named by file, line and field."""

import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_longspec.config import LongSpecError


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not empty; the file plain or .xz.

    Raises LongSpecError for a missing file and for a line that is no JSON object.
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
            except json.JSONDecodeError as error:
                raise LongSpecError(
                    f"data: line {number} of {path} is not JSON ({error.msg}); fix or remove it"
                ) from None
            if not isinstance(record, dict):
                raise LongSpecError(
                    f"data: line {number} of {path} is no JSON object; fix or remove it"
                )
            yield number, record


def string_field(record: Mapping[str, Any], field: str, path: Path, number: int) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise LongSpecError(
            f'data: line {number} of {path} has no text under "{field}"; fix or remove it'
        )
    return value
