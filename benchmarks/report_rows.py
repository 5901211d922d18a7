"""Rows as benchmarks/report.py reads them: which count, and the table and the line of provenance that any of them gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from report_text import error, number, ratio, table


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
    def on_gpu(self) -> bool:
        """Whether a GPU did the work; a row of the processor's work may name a GPU that was there too."""
        return bool(self.get("gpu")) and self.get("device") not in (None, "cpu")


@dataclass
class Report:
    """The rows of a folder, and the figures drawn so far: file name -> SVG."""

    folder: Path
    figures: dict[str, str] = field(default_factory=dict)

    def rows(self, question: str, *, gpu: bool = False) -> list[Row]:
        """All rows of `question`, of the processor's work or of a GPU's, oldest first."""
        path = self.folder / f"{question}.jsonl"
        if not path.exists():
            return []
        read = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return [row for number, line in read if (row := Row(path.name, number, json.loads(line))).on_gpu == gpu]

    def figure(self, name: str, svg: str, alt: str) -> str:
        """Keep a figure, and return the line that shows it."""
        self.figures[f"{name}.svg"] = svg
        return f"![{alt}](../benchmarks/results/{name}.svg)"


def groups(rows: Iterable[Row], *keys: str) -> dict[str, list[Row]]:
    """By the values of `keys`, the rows of the newest run of each; within a run the last row of a kind counts.

    Rows from before runs were numbered are all of one run. A kind is everything that a table has lines for.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join(str(row.get(key)) for key in keys if row.get(key) not in (None, "")), []).append(row)
    kind = ("what", "model", "backend", "graph", "k", "axis", "value", "flavor", "frames", "reduced", "loading")
    return {
        name: list({tuple(str(row.get(key)) for key in kind): row for row in every if _run(row) == _run(every[-1])}.values())
        for name, every in found.items()
    }


def _run(row: Row) -> Any:
    return row.get("run")


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
