"""Which clips a prompt finds, from the rows of bench_retrieval and bench_words, for docs/memory.md."""

from __future__ import annotations

from collections.abc import Sequence

from motionrt.benchmarks import harness
from motionrt.benchmarks.report import text
from motionrt.benchmarks.report.rows import Report, Row, by_run, groups, times

WAYS = ("vectors", "words", "reciprocal rank", "both", "both, agreement")


def found(report: Report) -> list[str]:
    """Tables of the newest run: which share is right, the end-point errors, what probabilities are worth, and the cost."""
    parts: list[str] = []
    runs = by_run(report.rows("bench_retrieval"))
    if runs:
        rows = max(runs, key=lambda rows: str(rows[0].run))
        parts += ["Share of the first four clips that move as asked; in brackets, whether the first one does. *noted*: how"]
        parts += ["often a result says that clips which move unlike the others stayed behind:", ""]
        parts += [*_right(rows), "", "End-point error of the video, px:", "", *_errors(rows), ""]
        parts += ["What the probability of the first clip is worth, over all of these prompts:", "", *_bins(rows), ""]
        parts += [text.source(rows), ""]
    for rows in groups(report.rows("bench_words"), "clips").values():
        parts += [f"Of {rows[0].get('clips'):,} clips:", "", *times(rows, "vectors", first="backend"), ""]
        known = "; ".join(f"{row.get('backend')} {row.get('known'):.0%}" for row in rows)
        parts += [f"A name that the prompt has is in a caption found: {known}.", "", text.source(rows), ""]
    return parts + report.unclean("bench_retrieval", "memory") + report.unclean("bench_words", "clips")


def _right(rows: Sequence[Row]) -> list[str]:
    body = []
    for name, some in _by(rows, "right_of_4"):
        cells = {row.get("way"): f"{row.get('right_of_4')[0]:.0%} ({row.get('right_at_1')[0]:.0%})" for row in some}
        noted = next((f"{row.get('noted'):.0%}" for row in some if row.get("noted") is not None), "-")
        body.append([*name, *(cells.get(way, "-") for way in WAYS), noted, f"{some[0].get('n')}"])
    return text.table(["memory", "prompts", *WAYS, "noted", "n"], body)


def _errors(rows: Sequence[Row]) -> list[str]:
    body = []
    for name, some in _by(rows, "epe_px"):
        cells = {row.get("way"): harness.said(row.get("epe_px"), "{:.2f}") for row in some}
        body.append([*name, *(cells.get(way, "-") for way in (WAYS[0], WAYS[-1])), f"{some[0].get('n')}"])
    return text.table(["memory", "prompts", WAYS[0], WAYS[-1], "n"], body)


def _bins(rows: Sequence[Row]) -> list[str]:
    body = [
        [str(row.get("memory")), f"{low:.0%} to {high:.0%}", f"{mean:.0%}", f"{right:.0%}", f"{count:.0f}"]
        for row in rows for low, high, count, mean, right in row.get("bins") or ()
    ]  # fmt: skip
    return text.table(["memory", "probability", "mean", "right", "n"], body)


def _by(rows: Sequence[Row], key: str) -> list[tuple[tuple[str, str], list[Row]]]:
    """Rows that have `key`, by memory and prompts."""
    made: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.get(key) is not None:
            made.setdefault((str(row.get("memory")), str(row.get("prompts"))), []).append(row)
    return list(made.items())
