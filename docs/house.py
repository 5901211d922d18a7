"""The run side in one picture: who knows whom, drawn from the table that tests/test_house.py holds the imports to."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "tests/test_house.py"
WIDTH, ROW, BOX, TALL = 720, 62, 84, 28


def may_know() -> dict[str, set[str]]:
    """{folder: those that it may import}, as the test has it."""
    for node in ast.parse(TABLE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MAY_KNOW":
            return {name: set(others.split()) for name, others in ast.literal_eval(node.value).items()}
    raise SystemExit(f"{TABLE} has no table MAY_KNOW")


def direct(table: dict[str, set[str]]) -> dict[str, set[str]]:
    """What a folder knows but through no other that it knows: the lines of the picture."""
    below: dict[str, set[str]] = {}
    for name in TopologicalSorter(table).static_order():
        below[name] = table[name].union(*(below[other] for other in table[name]))
    return {name: {one for one in others if not any(one in below[other] for other in others)} for name, others in table.items()}


def places(table: dict[str, set[str]]) -> dict[str, tuple[float, float]]:
    """The middle of each box: a row above all that it knows, and over the mean of that where there is room."""
    row: dict[str, int] = {}
    for name in TopologicalSorter(table).static_order():
        row[name] = 1 + max((row[other] for other in table[name]), default=-1)
    last, at = max(row.values()), dict[str, tuple[float, float]]()
    for level in range(last + 1):
        names = [name for name in table if row[name] == level]
        over = {name: sum(at[other][0] for other in table[name]) / max(1, len(table[name])) for name in names}
        for index, name in enumerate(sorted(names, key=lambda name: over[name])):
            at[name] = WIDTH * (index + 0.5) / len(names), (last - level + 0.5) * ROW
    return at


def line(start: tuple[float, float], end: tuple[float, float], boxes: list[tuple[float, float]]) -> str:
    """The path from one box down to another: straight, or bent as little as keeps it off the others."""
    (x, y), (u, v) = (start[0], start[1] + TALL / 2), (end[0], end[1] - TALL / 2)
    for bend in sorted(range(-300, 301, 10), key=abs):
        middle = (x + u) / 2 + bend
        curve = [(t := step / 40, (1 - t) ** 2 * x + 2 * t * (1 - t) * middle + t**2 * u) for step in range(1, 40)]
        if not any(abs(a - p) < BOX / 2 + 2 and abs(y + t * (v - y) - q) < TALL / 2 for t, a in curve for p, q in boxes):
            break
    return f'<path d="M{x:.0f} {y:.0f} Q{middle:.0f} {(y + v) / 2:.0f} {u:.0f} {v:.0f}"/>'


def picture() -> str:
    """The picture as SVG, in the colours of the page around it."""
    table = may_know()
    lines, at = direct(table), places(direct(table))
    drawn = [
        line(at[name], at[other], [place for one, place in at.items() if one not in (name, other)])
        for name in table for other in sorted(lines[name])
    ]  # fmt: skip
    boxes = [
        f'<rect x="{x - BOX / 2:.0f}" y="{y - TALL / 2:.0f}" width="{BOX}" height="{TALL}" rx="4"/>'
        f'<text x="{x:.0f}" y="{y + 4:.0f}">{name}</text>'
        for name, (x, y) in at.items()
    ]
    height = max(y for _, y in at.values()) + ROW / 2
    head = f'<svg class="house" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="Folders, each above what it imports">'
    return head + "".join(drawn + boxes) + "</svg>"
