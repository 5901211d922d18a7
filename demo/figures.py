"""Figures of a shipped demo: benchmarks/results/NAME.json, and the README's table of them. Without PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    readme, end = ROOT / "README.md", f"<!-- end of {system} -->"
    mark = f"<!-- {system}: written by demo/{system}/measure.py -->\n"
    before, rest = readme.read_text(encoding="utf-8").split(mark, 1)
    readme.write_text(f"{before}{mark}{table}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
