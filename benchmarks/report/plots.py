"""The two kinds of picture that benchmarks/report/report.py needs, as SVG text: bars on a common scale, and lines over an axis.

Plain text, so that a figure can be compared byte for byte with what the rows give, and no drawing library is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1b7f4b", "#3558b8", "#b8442f", "#7a4fa3", "#a87b12", "#3f8f9b", "#777777")
WIDTH = 720


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, how long, and, where one is known, the interval of its value; `note` is written behind it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


def _open(height: float, title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height:g}" fill="white"/>',
        f'<text x="12" y="22" font-size="14">{escape(title)}</text>',
    ]


def bars(title: str, items: Sequence[Bar]) -> str:
    """Horizontal bars from zero, negative ones to the left, with whiskers for intervals."""
    left, right, step, top = 190, 150, 26, 40
    ends = [end for bar in items for end in (bar.value, bar.low, bar.high) if end is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = (WIDTH - left - right) / ((high - low) or 1.0)

    def x(value: float) -> float:
        return round(left + (value - low) * scale, 1)

    parts = _open(top + step * len(items) + 12, title)
    for number, bar in enumerate(items):
        y = top + step * number
        begin, end = sorted((x(0), x(bar.value)))
        colour = COLOURS[0] if bar.value >= 0 else COLOURS[1]
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(bar.label)}</text>')
        parts.append(f'<rect x="{begin}" y="{y + 3}" width="{round(end - begin, 1)}" height="15" fill="{colour}"/>')
        reach = end
        if bar.low is not None and bar.high is not None:
            parts.append(f'<path d="M{x(bar.low)} {y + 10.5}H{x(bar.high)}" stroke="black" stroke-width="1.5"/>')
            reach = max(reach, x(bar.high))
        parts.append(f'<text x="{round(reach + 6, 1)}" y="{y + 14}">{escape(bar.note)}</text>')
    parts.append(f'<path d="M{x(0)} {top - 4}V{top + step * len(items)}" stroke="#555"/>')
    return "\n".join([*parts, "</svg>", ""])


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Places for grid lines: powers of ten, or about five round numbers from zero."""
    if log:
        return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9) + 1)]
    step = 10.0 ** math.floor(math.log10(high / 4))
    step *= next(times for times in (1, 2, 5, 10) if high / (step * times) <= 5)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def lines(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, across: str, up: str, log: bool = False,
    dashed: Sequence[str] = (),
) -> str:  # fmt: skip
    """A line with points for each of `series`, both axes from zero, or both logarithmic; those in `dashed` without points.

    ValueError where there is no point, or one that its axis cannot show.
    """
    points = [point for line in series.values() for point in line]
    if not points or min(min(point) for point in points) < 0 or (log and min(min(point) for point in points) <= 0):
        raise ValueError(f"{title}: nothing to draw, or values that the axes cannot show: {points[:3]}")
    left, top, right, height = 80, 40, 190, 380
    xs, ys = [x for x, _ in points], [y for _, y in points]
    grid_x, grid_y = _ticks(min(xs), max(xs) or 1.0, log), _ticks(min(ys), max(ys) or 1.0, log)

    def at(value: float, grid: Sequence[float]) -> float:
        if log:
            return (math.log10(value) - math.log10(grid[0])) / (math.log10(grid[-1]) - math.log10(grid[0]))
        return (value - grid[0]) / (grid[-1] - grid[0])

    def place(x: float, y: float) -> tuple[float, float]:
        down = height - top - 60
        return round(left + at(x, grid_x) * (WIDTH - left - right), 1), round(top + (1 - at(y, grid_y)) * down, 1)

    parts = _open(height, title)
    for value in grid_x:
        (x, low), (_, high) = place(value, grid_y[0]), place(value, grid_y[-1])
        parts.append(f'<path d="M{x} {low}V{high}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{low + 18}" text-anchor="middle">{value:,g}</text>')
    for value in grid_y:
        (low, y), (high, _) = place(grid_x[0], value), place(grid_x[-1], value)
        parts.append(f'<path d="M{low} {y}H{high}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:,g}</text>')
    parts.append(f'<text x="{left}" y="{height - 12}">{escape(across)}; {escape(up)}</text>')
    ends: list[float] = []
    for number, (label, line) in enumerate(series.items()):
        corners, colour = [place(*point) for point in sorted(line)], COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in corners)
        dash = ' stroke-dasharray="5,4"' if label in dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if label not in dashed:
            parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in corners]
        y = corners[-1][1]
        while any(abs(y - other) < 14 for other in ends):  # labels must not lie on each other
            y += 14
        ends.append(y)
        parts.append(f'<text x="{corners[-1][0] + 8}" y="{round(y + 4, 1)}" fill="{colour}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])
