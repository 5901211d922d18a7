"""What a search costs, from the rows of bench_memory: an SVG beside them, and the table of docs/memory.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 720, 420, 70, 40
SERIES = {
    "memory p50": ("memory", "p50_ms", "#1b7f4b", ""), "memory p99": ("memory", "p99_ms", "#1b7f4b", "5,4"),
    "LanceDB HNSW + refine p50": ("lance_hnsw", "p50_ms", "#3558b8", ""),
    "LanceDB flat p50": ("lance_flat", "p50_ms", "#b8442f", ""),
}  # fmt: skip


def draw(rows_file: Path, embedding: int = 384) -> Path:
    """Write `bench_memory.svg` beside the rows and return its path; the newest row of each size counts."""
    newest = {(name, clips): row for (clips, size, name), row in newest_rows(rows_file).items() if size == embedding}
    if not newest:
        raise ValueError(f"{rows_file} has no rows of {embedding}-d embeddings; run bench_memory first")
    points = {
        label: sorted((clips, row[key]) for (name, clips), row in newest.items() if name == backend)
        for label, (backend, key, _, _) in SERIES.items()
    }
    xs = [math.log10(x) for line in points.values() for x, _ in line]
    ys = [math.log10(y) for line in points.values() for _, y in line]
    low, high = (math.floor(min(xs)), math.floor(min(ys))), (math.ceil(max(xs) + 1e-9), math.ceil(max(ys) + 1e-9))
    across, down = WIDTH - LEFT - 190, HEIGHT - TOP - 50

    def place(x: float, y: float) -> tuple[float, float]:
        right = (math.log10(x) - low[0]) / (high[0] - low[0])
        up = (math.log10(y) - low[1]) / (high[1] - low[1])
        return round(LEFT + right * across, 1), round(TOP + (1 - up) * down, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">One search, 9 clips with tokens, one thread: ms against clips'
        f" ({embedding}-d)</text>",
    ]
    for power in range(low[0], high[0] + 1):
        x, y = place(10**power, 10 ** low[1])
        parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{10**power:,}</text>')
    for power in range(low[1], high[1] + 1):
        x, y = place(10 ** low[0], 10.0**power)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{LEFT + across}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g} ms</text>')
    for label, (_, _, colour, dash) in SERIES.items():
        if not points[label]:
            continue
        corners = [place(*point) for point in points[label]]
        path = " ".join(f"{x},{y}" for x, y in corners)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in corners]
        parts.append(f'<text x="{corners[-1][0] + 8}" y="{corners[-1][1] + 4}" fill="{colour}">{label}</text>')
    target = rows_file.with_suffix(".svg")
    target.write_text("\n".join([*parts, "</svg>", ""]))
    return target


def newest_rows(rows_file: Path) -> dict[tuple[int, int, str], dict[str, Any]]:
    """By clips, embedding size and backend, the newest rows with the default tokens; the memory's own come from its reader."""
    newest: dict[tuple[int, int, str], dict[str, Any]] = {}
    for row in map(json.loads, rows_file.read_text(encoding="utf-8").splitlines()):
        own = row["what"] == "search"
        if own == (row["backend"] == "memory") and row["tokens"] == [8, 64] and row["dtype"] == "float16":
            newest[row["clips"], row["embedding"], row["backend"]] = row
    return newest


def table(rows_file: Path) -> str:
    """The table of docs/memory.md, one line for each size."""
    newest = newest_rows(rows_file)
    lines = [
        "| clips | recall@9 | p50 | p99 | open | LanceDB flat | LanceDB HNSW | 1,000 more | process | index | bytes a clip |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def rival(row: dict[str, Any] | None) -> str:
        return "not run" if row is None else "{:.0f}x [{:.0f}, {:.0f}]".format(*row["over_memory"])

    for (clips, size, backend), row in sorted(newest.items(), key=lambda item: (item[0][1], item[0][0])):
        if backend == "memory":
            cells = [
                f"{clips:,} x {size}", f"{row['recall']:.4f}", f"{row['p50_ms']:.2f} ms", f"{row['p99_ms']:.2f} ms",
                f"{row['open_ms']:.1f} ms", rival(newest.get((clips, size, "lance_flat"))),
                rival(newest.get((clips, size, "lance_hnsw"))), f"{row['adding']['add_s']:.1f} s",
                "{pss_anon_mib:.0f} + {pss_file_mib:.0f} MiB".format(**row["process_more"]), f"{row['index_s']:.0f} s",
                f"{row['db_bytes_per_clip']:.0f} + {row['index_bytes_per_clip']:.0f} index",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def into_docs(text: str, page: Path) -> None:
    """Replace what stands between the page's `cost` marks."""
    mark, end = "<!-- cost: written by benchmarks/bench_memory.py --plot -->\n", "<!-- end of cost -->"
    before, rest = page.read_text(encoding="utf-8").split(mark, 1)
    page.write_text(f"{before}{mark}{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
