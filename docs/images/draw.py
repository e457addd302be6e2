"""Draws tree.svg (from tree.json), loop.svg and cache.svg, readable on light and on dark pages."""

import json
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TEXT, ROOT, KEPT, ACCEPTED, BONUS = "#77808d", "#4b5563", "#3a6cc8", "#1c8351", "#c0560e"
FIRST, SECOND = "#3a6cc8", "#7a52c7"
SANS = "font-family='system-ui, Helvetica, Arial, DejaVu Sans, sans-serif'"
MONO = "font-family='ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace'"


def label(
    x: float,
    y: float,
    text: str,
    size: int = 14,
    fill: str = TEXT,
    style: str = "",
    font: str = SANS,
) -> str:
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' fill='{fill}' {font} {style} "
        f"xml:space='preserve'>{escape(text)}</text>"
    )


def box(x: float, y: float, width: float, height: float, style: str, radius: float = 6) -> str:
    return f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='{radius}' {style}/>"


def line(points: str, colour: str = TEXT, width: float = 1.2, more: str = "") -> str:
    return f"<path d='{points}' fill='none' stroke='{colour}' stroke-width='{width}' {more}/>"


def picture(name: str, title: str, width: int, height: int, parts: list[str]) -> None:
    body = "\n".join(parts)
    (FOLDER / name).write_text(
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"role='img' aria-label='{escape(title)}'>\n<title>{escape(title)}</title>\n{body}\n"
        "</svg>\n"
    )


CENTRE = "text-anchor='middle'"
PILL, GAP, ROW, TOP = 84, 46, 26, 60


def visible(token: str) -> str:
    return token.replace("\n", "↵").replace(" ", "·")[:9]


def draw_tree() -> None:
    tree = json.loads((FOLDER / "tree.json").read_text())
    depths, kept = tree["depths"], set(tree["kept"])
    accepted = {0, *tree["accepted"]}
    middle = TOP + 8 * ROW
    x = {d: 8 + d * (PILL + GAP) for d in range(7)}
    y: dict[int, float] = {}
    for depth in range(6):
        level = [node for node, at in enumerate(depths) if at == depth]
        for i, node in enumerate(level):
            y[node] = middle + (i - (len(level) - 1) / 2) * ROW * (2.2 if depth == 1 else 1)
    last = tree["accepted"][-1]
    y[-1] = y[last]

    edges, pills = [], []
    for node in sorted(range(1, len(depths)), key=lambda i: (i in accepted, i in kept)):
        parent, depth = tree["parents"][node], depths[node]
        start, end = x[depth - 1] + PILL, x[depth]
        bend = (start + end) / 2
        curve = f"M{start} {y[parent]} C{bend} {y[parent]} {bend} {y[node]} {end} {y[node]}"
        if node in accepted:
            edges.append(line(curve, ACCEPTED, 3))
        elif node in kept:
            edges.append(line(curve, KEPT, 1.6))
        else:
            edges.append(line(curve, TEXT, 1, "opacity='.45' stroke-dasharray='3 3'"))
    edges.append(line(f"M{x[5] + PILL} {y[-1]} H{x[6]}", BONUS, 3))
    for node, depth in [*enumerate(depths), (-1, 6)]:
        text = tree["bonus"] if node == -1 else tree["text"][node]
        known = {-1: BONUS, 0: ROOT}
        colour = known.get(node) or (ACCEPTED if node in accepted else KEPT)
        dropped = node > 0 and node not in kept
        style = (
            f"fill='none' stroke='{TEXT}' stroke-dasharray='3 3' opacity='.6'"
            if dropped
            else f"fill='{colour}'"
        )
        pills.append(box(x[depth], y[node] - 10.5, PILL, 21, style, 10.5))
        pills.append(label(x[depth] + PILL / 2, y[node] + 4.5, visible(text), 13,
                           TEXT if dropped else "#fff", CENTRE, MONO))  # fmt: skip
    heads = ["root", *(f"level {d}" for d in range(1, 6)), "bonus"]
    counts = ["1", *(str(depths.count(d)) for d in range(1, 6)), "1"]
    titles = []
    for depth, (head, count) in enumerate(zip(heads, counts, strict=True)):
        at = x[depth] + PILL / 2
        titles.append(label(at, 18, head, 14, TEXT, f"{CENTRE} font-weight='600'"))
        titles.append(label(at, 35, f"{count} node" + "s" * (count != "1") if 0 < depth < 6
                            else ("newest token" if depth == 0 else "target's own"),
                            12, TEXT, CENTRE))  # fmt: skip
    bottom = TOP + 16.5 * ROW + 14
    legend = [
        (ACCEPTED, f"accepted: {len(accepted) - 1}"),
        (KEPT, f"verified: the {len(kept) - 1} most probable"),
        (None, f"grown, not verified: {len(depths) - len(kept)}"),
        (BONUS, "bonus: the target's next"),
    ]
    at = 16
    for colour, text in legend:
        fill = (
            f"fill='{colour}'" if colour else f"fill='none' stroke='{TEXT}' stroke-dasharray='3 3'"
        )
        titles.append(box(at, bottom - 11, 24, 13, fill, 6.5))
        titles.append(label(at + 32, bottom, text, 14))
        at += 50 + 7.4 * len(text)
    picture("tree.svg", "A tree of the nano draft: 68 nodes grown, 31 verified, 5 accepted",
            x[6] + PILL + 8, int(bottom + 14), [*edges, *pills, *titles])  # fmt: skip


CELL_WIDTH, CELL_HEIGHT = 15, 8
WIDE, HIGH = 16 * CELL_WIDTH, 32 * CELL_HEIGHT  # of the two blocks drawn large


def cells(x: float, y: float, places: list[tuple[int, int]], colour: str, opacity: float) -> str:
    path = "".join(
        f"M{x + column * CELL_WIDTH} {y + row * CELL_HEIGHT}"
        f"h{CELL_WIDTH - 2}v{CELL_HEIGHT - 2}h-{CELL_WIDTH - 2}z"
        for row, column in places
    )
    return f"<path d='{path}' fill='{colour}' opacity='{opacity:.2f}'/>"


def draw_cache() -> None:
    parts = [
        label(20, 24, "vLLM's pool of blocks, all of the same bytes", 16, TEXT, "font-weight='600'")
    ]
    owners = list("AAAaBBAAA.BBbAA.AAAAAAAA.CCCcA..AAAAAA.AAACAAAA.BAAAA...")
    colours = {"A": FIRST, "B": SECOND, "C": ACCEPTED}
    for i, owner in enumerate(owners):
        at_x, at_y = 20 + i % 28 * 27.5, 40 + i // 28 * 28
        if owner == ".":
            parts.append(box(at_x, at_y, 23, 23, f"fill='none' stroke='{TEXT}' opacity='.6'", 4))
            continue
        ring = owner.islower()
        colour = BONUS if ring else colours[owner]
        parts.append(box(at_x, at_y, 23, 23, f"fill='{colour}'", 4))
        parts.append(label(at_x + 11.5, at_y + 16, owner.upper(), 12, "#fff", CENTRE))
    at = 20
    for colour, text in (
        (FIRST, "target's keys and values of request A (long), "),
        (SECOND, "of B, "), (ACCEPTED, "of C"), (BONUS, "draft's ring: one block a request"),
    ):  # fmt: skip
        parts += [box(at, 108, 14, 14, f"fill='{colour}'", 3), label(at + 20, 120, text, 14)]
        at += 36 + 7.1 * len(text)

    left, right, top = 96, 516, 206
    head = "font-weight='600'"
    parts += [
        label(left, 166, "a block of the target", 16, TEXT, head),
        label(left, 186, "16 tokens of all 32 layers: 2 MiB for Llama-3-8B", 13),
        label(right, 166, "a block of the draft: the ring", 16, TEXT, head),
        label(right, 186, "512 tokens of one layer: the same 2 MiB", 13),
    ]
    rows, columns = 32, 16  # layers x tokens of the target's block; 512 slots of the ring
    upper = [(row, column) for row in range(rows - 1) for column in range(columns)]
    last = [(rows - 1, column) for column in range(columns)]
    parts += [cells(left, top, upper, FIRST, 0.4), cells(left, top, last, FIRST, 1)]
    bottom = top + HIGH
    parts += [
        label(left - 10, top + 10, "layer 1", 13, TEXT, "text-anchor='end'"),
        label(left - 10, bottom - 3, "layer 32", 13, TEXT, "text-anchor='end'"),
        label(left, bottom + 18, "16 tokens →", 13),
    ]
    newest = 11 * columns + 9
    for row in range(rows):  # the newest tokens first
        slots = [newest - row * columns - i for i in range(columns)]
        places = [divmod(slot % (rows * columns), columns) for slot in slots]
        parts.append(cells(right, top, places, BONUS, 1 - 0.75 * row / rows))
    row, column = divmod(newest, columns)
    x, y = right + column * CELL_WIDTH, top + row * CELL_HEIGHT
    frame = f"fill='none' stroke='{TEXT}' stroke-width='2'"
    parts.append(box(x - 2.5, y - 2.5, CELL_WIDTH + 3, CELL_HEIGHT + 3, frame, 3))
    parts += [
        label(right, bottom + 18, "slot = position mod 512; the newest", 13),
        label(right, bottom + 35, "token (framed) overwrites the oldest", 13),
    ]
    base = bottom + 62
    middle = (left + right + WIDE) / 2 - 95
    parts += [
        box(middle, base, 190, 46, f"fill='{ROOT}'", 8),
        label(middle + 95, base + 20, "draft layer", 15, "#fff", f"{CENTRE} {head}"),
        label(middle + 95, base + 37, "no other cache", 12, "#fff", CENTRE),
        line(f"M{left + 150} {bottom + 4} C{left + 150} {base + 20} {middle - 70} {base + 22} "
             f"{middle - 12} {base + 22}", FIRST, 2.4, "marker-end='url(#first)'"),
        line(f"M{right + 60} {bottom + 42} C{right + 60} {base + 20} {middle + 250} {base + 22} "
             f"{middle + 202} {base + 22}", BONUS, 2.4, "marker-end='url(#bonus)'"),
        label(left - 76, base + 44, "cross-attention: the last full", 13),
        label(left - 76, base + 60, "layer's row of every block", 13),
        label(right + 50, base + 44, "self-attention: this block,", 13),
        label(right + 50, base + 60, "at any length of context", 13),
    ]  # fmt: skip
    arrows = heads(first=FIRST, bonus=BONUS)
    picture("cache.svg", "Blocks of vLLM's pool, a block of the target and the draft's ring",
            806, base + 72, [arrows, *parts])  # fmt: skip


def heads(**colours: str) -> str:
    """Arrowheads, for `marker-end='url(#NAME)'`."""
    markers = "".join(
        f"<marker id='{name}' viewBox='0 0 8 8' refX='6' refY='4' markerWidth='5' markerHeight='5' "
        f"orient='auto'><path d='M0 0L8 4L0 8z' fill='{colour}'/></marker>"
        for name, colour in colours.items()
    )
    return f"<defs>{markers}</defs>"


def draw_loop() -> None:
    """One cycle: six steps, those of the draft and of the target framed."""
    wide, high, upper, lower = 168, 62, 52, 186
    columns = (24, 214, 428, 618)
    steps = [
        (0, upper, FIRST, "Grow a tree", "a forward a level"),
        (1, upper, FIRST, "Keep", "the most probable nodes"),
        (2, upper, ACCEPTED, "Verify", "hybrid tree attention"),
        (3, upper, ACCEPTED, "Sample", "a token at every node"),
        (3, lower, ROOT, "Acceptance walk", "while the token is a child"),
        (2, lower, ROOT, "Compact", "move the path's K and V"),
    ]
    parts = [heads(grey=TEXT)]
    for first, colour, title in (
        (0, FIRST, "draft: one layer"),
        (2, ACCEPTED, "target: one forward"),
    ):
        left, right = columns[first] - 14, columns[first + 1] + wide + 14
        parts += [
            box(left, 10, right - left, upper + high + 4, f"fill='none' stroke='{colour}'", 10),
            label((left + right) / 2, 34, title, 15, colour, f"{CENTRE} font-weight='600'"),
        ]
    for column, top, colour, name, detail in steps:
        x = columns[column]
        parts += [
            box(x, top, wide, high, f"fill='{colour}'", 8),
            label(x + wide / 2, top + 27, name, 15, "#fff", f"{CENTRE} font-weight='600'"),
            label(x + wide / 2, top + 46, detail, 12, "#fff", CENTRE),
        ]
    arrow = "marker-end='url(#grey)'"
    middle = upper + high / 2
    for column in range(3):
        start, end = columns[column] + wide + 3, columns[column + 1] - 5
        parts.append(line(f"M{start} {middle} H{end}", TEXT, 2, arrow))
    below = lower + high / 2
    parts += [
        line(f"M{columns[3] + wide / 2} {upper + high + 3} V{lower - 5}", TEXT, 2, arrow),
        line(f"M{columns[3] - 3} {below} H{columns[2] + wide + 5}", TEXT, 2, arrow),
        line(f"M{columns[2] - 3} {below} H{columns[0] + wide / 2} V{upper + high + 9}",
             TEXT, 2, arrow),
        label(columns[0] + wide / 2 + 16, below - 10, "accepted tokens and the bonus token", 14),
        label(columns[0] + wide / 2 + 16, below + 22, "no step waits for the host", 13),
    ]  # fmt: skip
    picture("loop.svg", "One cycle: grow, keep, verify, sample, acceptance walk, compact",
            810, lower + high + 10, parts)  # fmt: skip


if __name__ == "__main__":
    draw_tree()
    draw_loop()
    draw_cache()
