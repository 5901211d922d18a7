"""benchmarks/questions/bench_checks.py end to end at toy size, and its switch; its tables: test_report.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motionrt.benchmarks import harness
from motionrt.benchmarks.questions import bench_checks, bench_memory
from motionrt.runtime.errors import MemoryStoreError
from motionrt.runtime.memory import store
from motionrt.runtime.memory.memory import MotionMemory

ROOT = Path(__file__).resolve().parents[3]


def test_a_small_run_keeps_a_row_for_each_side(tmp_path: Path) -> None:
    arguments = ["--clips", "300", "--embedding", "32", "--queries", "100", "--note", "test"]
    folders = ["--folder", str(tmp_path / "memories"), "--results", str(tmp_path / "results")]
    script = ROOT / "benchmarks/questions/bench_checks.py"
    done = subprocess.run([sys.executable, str(script), *arguments, *folders], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results" / "bench_checks.jsonl").read_text(encoding="utf-8").splitlines()
    checked, unchecked = map(json.loads, lines)
    assert (checked["backend"], unchecked["backend"]) == ("checked", "unchecked") and checked["run"] == unchecked["run"]
    for row in (checked, unchecked):
        assert (row["clips"], row["n"], row["note"]) == (300, 100, "test") and 0 < row["p50_ms"] <= row["p99_ms"]
    assert len(checked["over_unchecked"]) == 3 and "over_unchecked" not in unchecked


def test_the_switch_is_the_check_of_what_a_search_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_check", store._check)  # put back whatever happens
    bench_memory.build(tmp_path / "m", 20, 32, (8, 64), "float16", 1)
    query = np.ones(32, np.float32)
    with MotionMemory.open(tmp_path / "m", readonly=True) as memory:
        bench_checks.prove(memory, query)
        assert store._check is bench_checks.SIDES["checked"]
        monkeypatch.setattr(store, "zlib", SimpleNamespace(crc32=lambda *_: -1))  # as if every row were damaged
        bench_checks.switch(bench_checks.SIDES["unchecked"])
        assert len(memory.search(query, 3)) == 3
        bench_checks.switch(bench_checks.SIDES["checked"])
        with pytest.raises(MemoryStoreError, match="its checksum differs"):
            memory.search(query, 3)
    other: Any = SimpleNamespace(search=lambda *_: [SimpleNamespace(id=1)])
    with pytest.raises(harness.ParityError, match="clips that did not go through"):
        bench_checks.prove(other, query)
