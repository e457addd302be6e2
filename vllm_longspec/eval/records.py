"""Records of a data set's file, checked; a bad one is named by file, line and field."""

import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_longspec.config import LongSpecError


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line that is not empty; the file plain or .xz.

    Raises LongSpecError for a missing file and for a line that is no JSON object.
    """
    if not path.is_file():
        raise LongSpecError(f"data: {path} is not a file; give JSON lines, plain or .xz")
    opened = lzma.open(path, "rt") if path.suffix == ".xz" else path.open()
    with opened as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise LongSpecError(
                    f"data: {where} is not JSON ({error.msg}); fix or remove it"
                ) from None
            if not isinstance(record, dict):
                raise LongSpecError(f"data: {where} is no JSON object; fix or remove it")
            yield where, record


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each row. Raises LongSpecError where pyarrow is missing or cannot read it."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise LongSpecError(
            f"data: reading {path} needs pyarrow; pip install pyarrow, or give JSON lines"
        ) from None
    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise LongSpecError(f"data: {path} is not parquet ({error}); fetch it again") from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number} of {path}", row


def string_field(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise LongSpecError(f'data: {where} has no text under "{field}"; fix or remove it')
    return value


def whole_number_field(record: Mapping[str, Any], field: str, where: str) -> int:
    value = record.get(field)
    if not isinstance(value, int):
        raise LongSpecError(f'data: {where} has no whole number under "{field}"; fix or remove it')
    return value
