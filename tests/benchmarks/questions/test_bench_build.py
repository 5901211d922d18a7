"""The table of docs/engines.md is what the rows say, and the rows have every graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir", reason="the build side is not installed")
from motionrt.benchmarks.questions import bench_build

ROOT = Path(__file__).resolve().parents[3]


def test_docs_hold_the_table_of_the_rows() -> None:
    text = bench_build.DOCS.read_text(encoding="utf-8")
    assert text.count(bench_build.BEGIN) == text.count(bench_build.END) == 1
    shown = text.split(bench_build.BEGIN)[1].split(bench_build.END)[0].strip()
    assert shown == bench_build.table(bench_build.read_rows()), "run bench_build.py --table"


def test_rows_hold_every_graph() -> None:
    from motionrt.runtime.bundle.bundle import Bundle

    rows = {(row["model"], row["graph"]): row for row in bench_build.read_rows()}
    wanted = {("demo", name) for name in Bundle.open(ROOT / "demo/bundle").graphs}
    wanted |= {(model, name) for model in ("cogvideox-5b", "svd") for name in ("schedule", "request", "step")}
    assert rows.keys() == wanted
    for key, row in rows.items():
        assert row["build_seconds"] > 0 and row["engine_mib"] > 0 and row["peak_rss_mib"] > 50, key
        assert row["decomposed"] == 0 and row["targets"] == ["sm_89", "sm_120"], key


def row(**changes: Any) -> dict[str, Any]:
    return {
        "model": "demo", "graph": "step", "dtype": "float16", "onnx_mib": 1.0, "build_seconds": 2.0, "engine_mib": 3.0,
        "peak_rss_mib": 4.0, "network_layers": 50, "engine_layers": 1, "attentions": 4, "decomposed": 0, "motion_ops": 2,
        "targets": ["sm_89"], "library": "1", "cores": 2, "processor": "p", **changes,
    }  # fmt: skip


def test_table_shows_the_last_row_of_each_graph() -> None:
    rows = [row(), row(model="svd"), row(build_seconds=9.0), row(graph="text", motion_ops=0, attentions=2, decomposed=1)]
    lines = bench_build.table(rows).splitlines()
    assert "| demo step | float16 | 1.0 | 9.0 | 3.0 | 4 | 50 -> 1 | 4 fused, 2 motion, as its body |" in lines
    assert "| demo text | float16 | 1.0 | 2.0 | 3.0 | 4 | 50 -> 1 | 1 fused, 1 taken apart |" in lines
    assert sum(line.startswith("| demo step") for line in lines) == 1
    assert lines.index(next(x for x in lines if x.startswith("| svd"))) > 3, "models in their order"
