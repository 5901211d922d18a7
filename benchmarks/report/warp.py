"""What Motion-I2V's warp costs in its forms, from the rows of bench_warp, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from motionrt.benchmarks.report import text
from motionrt.benchmarks.report.rows import Report, Row, groups, ordered, times

ORDER = ("released", "gathered", "ours", "unfused", "plain")
COUNTED: Mapping[str, str] = {
    "written_bytes": "GB written", "live_bytes": "GB alive", "keys_values_bytes": "GB of keys and values",
    "weight_bytes": "GB of weights",
}  # fmt: skip


def warp(report: Report) -> list[str]:
    """Times in turns, with what ONNX Runtime's nodes write and the operators that take longest; and what is counted."""
    parts: list[str] = []
    for name, found in groups(report.rows("bench_warp"), "what").items():
        rows = ordered(found, ORDER)
        parts += [f"### {name}", "", *(_timed(rows) if any(row.get("p50_ms") for row in rows) else _counted(rows))]
        parts += ["", text.source(rows), ""]
    return parts + report.unclean("bench_warp", "what")


def _timed(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            str(row.get("backend")), text.number(row.get("node_bytes") / 1e9), text.number(row.get("flops") / 1e9),
            ", ".join(f"{operator} {text.number(taken)}" for operator, taken in list(row.get("operators_ms").items())[:5]),
        ]
        for row in rows
    ]  # fmt: skip
    return [*times(rows, "ours"), "", *text.table(["backend", "GB that nodes write", "GFLOP", "ms by operator"], body)]


def _counted(rows: Sequence[Row]) -> list[str]:
    head = ["form", "TFLOP", "on top of plain, a branch", *COUNTED.values()]
    return text.table(
        head,
        [
            [
                str(row.get("backend")), f"{row.get('flops') / 1e12:.3f}", f"{row.get('tflop_over_plain'):+.4f}",
                *(f"{row.get(key) / 1e9:.3f}" for key in COUNTED),
            ]
            for row in rows
        ],
    )  # fmt: skip
