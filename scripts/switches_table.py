"""Writes docs/compatibility.md's table of what is refused and docs/switches.md's of all else, from
vllm_longspec/runtime/switches.py. `make test` fails where a page is not what this writes."""

from collections.abc import Iterator
from pathlib import Path

from vllm_longspec.runtime.switches import KINDS, UNTRIED, Switches

ROOT = Path(__file__).resolve().parents[1]
REFUSED, ALL = ROOT / "docs/compatibility.md", ROOT / "docs/switches.md"
BEGIN, END = "<!-- {}: scripts/switches_table.py -->", "<!-- end of {} -->"


def pages() -> dict[Path, str]:
    refused, rest = REFUSED.read_text(), ALL.read_text()
    for kind, table in KINDS.items():
        refused = with_block(refused, f"refused {kind}", refused_rows(table))
        rest = with_block(rest, kind, rest_of(table))
    return {REFUSED: refused, ALL: rest}


def with_block(page: str, name: str, lines: Iterator[str]) -> str:
    before, rest = page.split(BEGIN.format(name))
    _, after = rest.split(END.format(name))
    return "\n".join([before + BEGIN.format(name), *lines, END.format(name) + after])


def refused_rows(table: Switches) -> Iterator[str]:
    yield "| | what is refused |\n|---|---|"
    reasons: dict[str, list[str]] = {}
    for name, sentence in table.refused.items():
        reasons.setdefault(reason_of(sentence), []).append(name)
    rows = [(names[0], listed(names), why) for why, names in reasons.items()]
    rows += [(name, f"`{name}`", what) for name, what in table.in_part.items()]
    for _, names, what in sorted(rows):
        yield f"| {names} | {what} |"


def reason_of(sentence: str) -> str:
    """Without what to do: a page has no value to correct."""
    said = sentence.partition("; ")[0]
    if said == UNTRIED.partition("; ")[0]:
        return "not tried"
    return "not supported" if said == "LongSpec does not support it" else said


def rest_of(table: Switches) -> Iterator[str]:
    yield "| works | shown by |\n|---|---|"
    shown: dict[str, list[str]] = {}
    for name, modules in table.works.items():
        said = f"`{name}` (in part)" if name in table.in_part else f"`{name}`"
        shown.setdefault(modules, []).append(said)
    for modules, names in sorted(shown.items()):
        tests = ", ".join(f"`tests/{module}`" for module in modules.split(", "))
        yield f"| {', '.join(names)} | {tests} |"
    yield "\n| does not matter | since |\n|---|---|"
    for why, names in table.no_matter.items():
        yield f"| {listed(names.split())} | {why} |"


def listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
