"""benchmarks/questions/bench_memory.py end to end at toy size. What the pages say of its rows: test_report.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_a_small_run_finds_what_exact_search_finds_and_keeps_its_rows(tmp_path: Path) -> None:
    arguments = ["--clips", "6000", "--embedding", "32", "--queries", "60", "--rival-queries", "5"]
    folders = ["--folder", str(tmp_path / "memories"), "--results", str(tmp_path / "results"), "--note", "test"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/questions/bench_memory.py"), *arguments, *folders],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "results" / "bench_memory.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (row["clips"], row["n"], row["index"], row["note"]) == (6000, 60, "current", "test")
    assert row["recall"] >= 0.99
    assert 0 < row["p50_ms"] <= row["p95_ms"] and row["adding"]["add_s"] > 0
    assert "p99_ms" not in row, "60 queries have no 99th percentile"
