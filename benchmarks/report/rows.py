"""Rows as the pages read them: which count, what of them may be shown, and the table that any of them gives.

A row counts if it says of which run it is, and if every row of that run names a clean commit: else nobody could make it again.
Of a row that counts, a p99 or an interval is shown only if its n allows it. Tables and figures are each of one run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrt.benchmarks import harness
from motionrt.benchmarks.report.text import error, number, ratio, table, unclean


@dataclass(frozen=True)
class Row:
    """One line of a file of rows: where it stands, from 1, and what it says."""

    file: str
    line: int
    data: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def label(self, first: str = "backend") -> str:
        """What a line or a bar is called."""
        return " ".join(str(self.get(key)) for key in (first, "loading") if self.get(key))

    @property
    def run(self) -> Any:
        """When the process began that appended this row; None for the first rows, which did not keep it."""
        return self.get("run")

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU did the work; a row of the processor's work may name a GPU that was there too."""
        return bool(self.get("gpu")) and self.get("device") not in (None, "cpu")


@dataclass
class Report:
    """The rows of a folder, and the figures drawn so far: file name -> SVG."""

    folder: Path
    figures: dict[str, str] = field(default_factory=dict)

    def rows(self, question: str, *, gpu: bool = False) -> list[Row]:
        """The rows of `question` that count, of the processor's work or of a GPU's, oldest first."""
        clean = self._clean(question)
        return [row for row in self.lines(question) if row.on_gpu == gpu and row.run in clean]

    def unclean(self, question: str, *keys: str, gpu: bool = False) -> list[str]:
        """Lines for what has rows, but none that counts, by its `keys`: the commands that would make them."""
        every = [row for row in named(self.lines(question)) if row.on_gpu == gpu]
        shown = groups(named(self.rows(question, gpu=gpu)), *keys)
        missing: dict[str, list[str]] = {}
        for name, rows in groups(every, *keys).items():
            if name not in shown:
                what = ", ".join(f"{key} {rows[0].get(key)}" for key in keys if rows[0].get(key) not in (None, ""))
                for command in dict.fromkeys(str(row.get("command") or "") for row in rows):
                    missing.setdefault(command, []).append(what)
        return [*(unclean(command, names) for command, names in missing.items()), ""] if missing else []

    def lines(self, question: str) -> list[Row]:
        """All rows of `question`, whether they count or not."""
        path = self.folder / f"{question}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Row(path.name, place, allowed(json.loads(line))) for place, line in enumerate(lines, 1)]

    def _clean(self, question: str) -> set[str]:
        """The runs whose rows all name a clean commit."""
        every = self.lines(question)
        changed = {row.run for row in every if not row.get("commit") or "+" in row.get("commit")}
        return {row.run for row in every if row.run is not None} - changed

    def figure(self, name: str, svg: str, alt: str) -> str:
        """Keep a figure, and return the line that shows it."""
        self.figures[f"{name}.svg"] = svg
        return f"![{alt}](../benchmarks/results/{name}.svg)"


def groups(rows: Iterable[Row], *keys: str) -> dict[str, list[Row]]:
    """By the values of `keys`, the rows of the newest run of each; within a run the last row of a kind counts.

    A kind is everything that a table has lines for.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(str(row.get(key)) for key in keys if row.get(key) not in (None, "")), []).append(row)
    kind = ("what", "model", "backend", "graph", "k", "axis", "value", "flavor", "frames", "reduced", "loading")
    return {
        name: list({tuple(str(row.get(key)) for key in kind): row for row in every if row.run == every[-1].run}.values())
        for name, every in found.items()
    }


def by_run(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each run, in the order of their first rows: what one table may hold."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.run, []).append(row)
    return list(found.values())


def allowed(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a row may say of n times: no p99 of a few, and of a ratio of few rounds its value without the interval."""
    few = harness.too_few(data)
    less = {key: None if key == "p99_ms" else data[key][0] for key in few}
    return {**data, **less}


def ordered(rows: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """By backend, those of `order` first."""
    return sorted(rows, key=lambda row: order.index(row.get("backend")) if row.get("backend") in order else len(order))


RATES = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "tflops": "TFLOP/s"}


def times(rows: Sequence[Row], *over: str, first: str = "backend") -> list[str]:
    """The table of a timing: percentiles and how many, the ratios `over` that any row has, how far it is from the reference."""
    over = tuple(name for name in over if any(row.get(f"over_{name}") is not None for row in rows))
    rates = [key for key in RATES if any(row.get(key) is not None for row in rows)]
    head = [first, "p50 ms", "p95", "p99", "n", *(f"x {name}" for name in over), *(RATES[key] for key in rates), "difference"]
    body = [
        [
            row.label(first), *(number(row.get(key)) for key in ("p50_ms", "p95_ms", "p99_ms", "n")),
            *(ratio(row.get(f"over_{name}")) for name in over), *(number(row.get(key)) for key in rates),
            error(row.get("error")),
        ]
        for row in rows
    ]  # fmt: skip
    return table(head, body)


def named(rows: Iterable[Row]) -> list[Row]:
    """Rows with a model; the first ones only say what they measured: "demo step"."""
    return [
        row if row.get("model") else Row(row.file, row.line, {**row.data, "model": str(row.get("what", "?")).split(" ")[0]})
        for row in rows
    ]
