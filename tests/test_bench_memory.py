"""benchmarks/bench_memory.py end to end at toy size, and the table of docs/memory.md against its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from motionrt.runtime.by_path import load_by_path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "bench_memory.jsonl"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return load_by_path(ROOT / "benchmarks" / "memory_plot.py")


def test_a_small_run_finds_what_exact_search_finds_and_keeps_its_rows(tmp_path: Path) -> None:
    arguments = ["--clips", "6000", "--embedding", "32", "--queries", "60", "--rival-queries", "5"]
    folders = ["--folder", str(tmp_path / "memories"), "--results", str(tmp_path / "results"), "--note", "test"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_memory.py"), *arguments, *folders],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "results" / "bench_memory.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (row["clips"], row["n"], row["index"], row["note"]) == (6000, 60, "current", "test")
    assert row["recall"] >= 0.99
    assert 0 < row["p50_ms"] <= row["p99_ms"] and row["adding"]["add_s"] > 0


def test_the_table_of_the_docs_is_made_of_the_committed_rows(plot: ModuleType) -> None:
    assert plot.table(ROWS) in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def test_the_plot_is_made_of_the_committed_rows(plot: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / ROWS.name
    copy.write_bytes(ROWS.read_bytes())
    assert plot.draw(copy).read_bytes() == ROWS.with_suffix(".svg").read_bytes()


def test_a_newer_row_replaces_an_older_one_and_rivals_that_were_not_run_are_called_so(plot: ModuleType, tmp_path: Path) -> None:
    base = {
        "what": "search", "backend": "memory", "clips": 10, "embedding": 384, "tokens": [8, 64], "dtype": "float16",
        "recall": 1.0, "p50_ms": 1.0, "p99_ms": 2.0, "open_ms": 3.0, "adding": {"add_s": 0.1}, "index_s": 1.0,
        "process_more": {"pss_anon_mib": 4.0, "pss_file_mib": 7.0}, "db_bytes_per_clip": 5.0, "index_bytes_per_clip": 6.0,
    }  # fmt: skip
    rows = [base, {**base, "p50_ms": 0.25}, {**base, "tokens": [25, 1024], "p50_ms": 9.0}, {**base, "what": "search in turns"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = plot.table(file).splitlines()
    assert len(lines) == 3
    assert "0.25 ms" in lines[2] and "| 4 + 7 MiB |" in lines[2] and lines[2].count("not run") == 2
