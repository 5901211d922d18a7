"""Figures of the shipped demos: intervals, benchmarks/results/NAME.json, and the README's tables. Without PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]


def interval(values: NDArray[np.float64], resamples: int = 2000) -> list[float]:
    """Mean and its 95 % percentile bootstrap interval over targets."""
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return [round(float(value), 4) for value in (values.mean(), low, high)]


def keep(
    system: str, bundle: Path, count: int, metrics: Sequence[str], rows: Sequence[Mapping[str, object]], table: str
) -> None:
    """Write the rows of `demo/SYSTEM/measure.py`, taken of `bundle` on `count` targets, and `table` into the README."""
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    result = {
        "command": " ".join([f"python demo/{system}/measure.py", *sys.argv[1:]]),
        "checkpoint": manifest["provenance"]["checkpoint"],
        "targets": count,
        "metrics": metrics,
        "interval": "mean, low, high: 95 % percentile bootstrap over targets",
        "rows": rows,
    }
    path = ROOT / "benchmarks" / "results" / f"demo_{system}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    into_readme(system, f"demo/{system}/measure.py", table)


def into_readme(name: str, script: str, table: str) -> None:
    """Replace what stands between the README's marks of `name`, which `script` writes."""
    readme, mark, end = ROOT / "README.md", f"<!-- {name}: written by {script} -->\n", f"<!-- end of {name} -->"
    before, rest = readme.read_text(encoding="utf-8").split(mark, 1)
    readme.write_text(f"{before}{mark}{table}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
