"""What approximations cost and gain, from the rows of bench_quality and bench_loop, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from motionrt.benchmarks.report import text
from motionrt.benchmarks.report.plots import lines
from motionrt.benchmarks.report.rows import Report, Row, groups
from motionrt.runtime.calibrate import EQUAL


def quality(report: Report) -> list[str]:
    """A table for each number of steps, and one figure: how near videos are to the exact ones, by runs of the network."""
    parts: list[str] = []
    found: dict[str, dict[str, list[Row]]] = {}
    for rows in groups(report.rows("bench_quality"), "steps", "split").values():
        for row in rows:
            found.setdefault(str(row.get("steps")), {}).setdefault(str(row.get("what")), []).append(row)
    series = dict[str, list[tuple[float, float]]]()
    for steps, recipes in found.items():
        splits = [str(row.get("split")) for row in next(iter(recipes.values()))]
        figures = [f"{what}, {split}" for what in ("dB", "EPE px") for split in splits]
        body = [
            [
                name, f"{rows[0].get('network_runs')} of {steps}",
                *(f"{row.get('db_mean'):.1f} (lowest {row.get('db_lowest'):.1f})" for row in rows),
                *(_change(row, "epe") for row in rows),
            ]
            for name, rows in recipes.items()
        ]  # fmt: skip
        every = [row for rows in recipes.values() for row in rows]
        table = text.table(["recipe", "runs of the network", *figures], body)
        parts += [f"### {steps} steps", "", *table, "", text.source(every), ""]
        for name, rows in recipes.items():
            if rows[0].get("db_mean") < EQUAL:
                line = series.setdefault(f"{name.partition(', ')[0]}, {steps} steps", [])
                line.append((rows[0].get("network_runs"), rows[0].get("db_mean")))
    if series:
        title = "Demo: dB to the exact video against runs of the network"
        every = [row for recipes in found.values() for rows in recipes.values() for row in rows]
        svg = lines(title, series, across="runs of the network", up="dB, mean of the seen split")
        parts += [report.figure("approximations", svg, title), "", text.source(every), ""]
    return parts + report.unclean("bench_quality", "model")


def _change(row: Row, error: str) -> str:
    return "{:.2f} ({:+.3f} [{:+.3f}, {:+.3f}])".format(row.get(f"{error}_px")[0], *row.get(f"{error}_change_px"))


def precision(report: Report) -> list[str]:
    """A table for each of the other demos and what says there how things move."""
    parts: list[str] = []
    for name, rows in groups(report.rows("bench_precision"), "model", "way").items():
        body = [
            [
                str(row.get("what")), f"{row.get('db_mean'):.1f} (lowest {row.get('db_lowest'):.1f})",
                _change(row, "path"),
                *("{:.2f} [{:.2f}, {:.2f}]".format(*row.get(key)) for key in ("colour", "shape")), str(row.get("targets")),
            ]
            for row in rows
        ]  # fmt: skip
        head = ["computed in", "dB", "path px", "colour", "shape", "n"]
        parts += [f"### {name}", "", *text.table(head, body), "", text.source(rows), ""]
    return parts + report.unclean("bench_precision", "model")


def loop(report: Report) -> list[str]:
    """Whole loops in turns: ours by recipe, and diffusers compiled."""
    parts: list[str] = []
    for rows in groups(report.rows("bench_loop"), "model", "steps").values():
        first, over = rows[0], _over(rows)
        parts += [f"### {first.get('model')}, {first.get('steps')} steps, {first.get('threads')} threads", ""]
        head = ["recipe", "runs of the network", "p50 ms", "p95", "n", *(f"x {name.replace('_', ' ')}" for name in over)]
        body = [
            [
                row.label(), str(row.get("network_runs")), *(text.number(row.get(key)) for key in ("p50_ms", "p95_ms", "n")),
                *(text.ratio(row.get(f"over_{name}")) for name in over),
            ]
            for row in rows
        ]  # fmt: skip
        parts += [*text.table(head, body), "", text.source(rows), ""]
    return parts + report.unclean("bench_loop", "model", "steps")


def _over(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(key.removeprefix("over_") for row in rows for key in row.data if key.startswith("over_"))
    return sorted(names, key=lambda name: name != "exact")
