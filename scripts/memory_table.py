"""Writes the table of memory in docs/training.md and its picture, as `vllm-longspec train` computes
both. `make test` fails where they are not what this writes."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/training.md", ROOT / "docs/training/memory.svg"
BEGIN, END = "<!-- memory: scripts/memory_table.py -->", "<!-- end of memory -->"
NAMES = {
    "llama3-8b": "Llama-3-8B",
    "qwen3-32b": "Qwen3-32B",
    "llama3-70b": "Llama-3.3-70B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
}
GPUS = (1, 2, 4, 8)
LENGTHS = (16384, 32768)
ROOM = 78  # GiB, of an H100 with 80 GB
PARTS = {
    "target's layers": "#3a6cc8",
    "layers that are whole for a moment": "#8fb0e6",
    "embeddings, norm, head": "#7a52c7",
    "draft, gradients, AdamW": "#1c8351",
    "activations": "#c0560e",
}


@cache
def needed() -> dict[tuple[str, int, int], tuple[Any, bool]]:
    """By shape, tokens and GPUs: the memory, and whether it fits. The target is sharded where there
    are several GPUs and one cannot hold it."""
    import torch

    from vllm_longspec.bench.shapes import draft_config, target_config
    from vllm_longspec.train.memory import GIB, fits, memory_of
    from vllm_longspec.train.sharding import empty_target

    found = {}
    for shape in NAMES:
        target = empty_target(target_config(shape), torch.bfloat16)
        for length in LENGTHS:
            for count in GPUS:
                for sharded in (False, True)[: 1 + (count > 1)]:
                    memory = memory_of(
                        target, draft_config(shape), torch.device("cuda"), count, sharded, length
                    )
                    fit = fits(memory, ROOM * GIB)
                    found[shape, length, count] = memory, fit
                    if fit:
                        break
    return found


def page_with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    head = ["target", "weights", "tokens", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)]
    table = [head, ["---"] * len(head)]
    for shape, name in NAMES.items():
        whole = needed()[shape, LENGTHS[0], 1][0]
        for length in LENGTHS:
            cells = [cell(*needed()[shape, length, count]) for count in GPUS]
            table.append([name, gib(whole.layers + whole.shared), f"{length:,}", *cells])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"{before}{BEGIN}\n{lines}\n{END}{after}"


def cell(memory: Any, fit: bool) -> str:
    if not fit:
        return f"({gib(memory.total)})"
    return gib(memory.total) + " sharded" * (memory.whole_layers > 0)


def gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def picture() -> str:
    """Bars of the first length: a row for each target and number of GPUs."""
    sys.path.insert(0, str(ROOT / "docs/images"))
    from draw import TEXT, box, label

    left, scale, step, top = 210, 4.0, 20, 78  # pixels; of a GiB
    parts, y = [], top
    for number, (name, colour) in enumerate(PARTS.items()):
        x, line = (10, 230, 540)[number % 3], 18 + 24 * (number // 3)
        parts += [box(x, line - 11, 14, 12, f"fill='{colour}'", 2), label(x + 20, line, name, 13)]
    for shape, name in NAMES.items():
        parts.append(label(10, y + 13, name, 14))
        for count in GPUS:
            memory, _ = needed()[shape, LENGTHS[0], count]
            x = float(left)
            parts.append(label(left - 70, y + 13, f"{count} GPU{'s' * (count > 1)}", 13))
            held = (memory.layers, memory.whole_layers, memory.shared, memory.draft)
            for bytes_, colour in zip((*held, memory.activations), PARTS.values(), strict=True):
                width = round(bytes_ / 2**30 * scale, 1)
                if width:
                    parts.append(box(round(x, 1), y, width, 15, f"fill='{colour}'", 0))
                x += width
            parts.append(label(round(x, 1) + 6, y + 13, gib(memory.total), 12))
            y += step
        y += step // 2
    room, width, height = left + ROOM * scale, left + 190 * scale, y + 26
    parts += [
        f"<path d='M{room} {top - 8} V{y}' stroke='{TEXT}' stroke-dasharray='5 4'/>",
        label(room, y + 16, f"{ROOM} GiB", 13, style="text-anchor='middle'"),
    ]
    title = f"Memory of each GPU, computed, for one sequence of {LENGTHS[0]:,} tokens"
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height}' role='img' "
        f"aria-label='{title}'>\n<title>{title}</title>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
    PICTURE.write_text(picture())
