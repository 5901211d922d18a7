"""The questions about the server, small: every way gives the same frames, and kills lose nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.benchmarks import harness
from motionrt.benchmarks.serving import bench_serve, bench_serve_soak, soak_load
from motionrt.benchmarks.serving.job_ways import Made


def rows(folder: Path, question: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{question}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_serve_measures_three_ways_to_the_same_frames(tmp_path: Path) -> None:
    small = ["--rounds", "3", "--warmups", "1", "--jobs", "4", "--blocks", "2", "--cancels", "3", "--loads", "0.5"]
    bench_serve.main([*small, "--results", str(tmp_path)])
    found = rows(tmp_path, "bench_serve")
    ways = ("direct", "queue", "http")
    kinds = [(row["what"], row["backend"]) for row in found]
    assert kinds == [
        *(("job", way) for way in ways), ("outside", "queue"), ("outside", "http"),
        *((what, way) for way in ways for what in ("wait", "total")), *(("cancel", way) for way in ways),
        ("rss", "server"), ("rss", "worker"),
    ]  # fmt: skip
    by = {(row["what"], row["backend"]): row for row in found}
    assert all(by["job", way]["error"]["max_abs_difference"] == 0 and by["job", way]["n"] == 3 for way in ways)
    assert all(0 < by["outside", way]["p50_ms"] < by["job", way]["p95_ms"] for way in ("queue", "http"))
    for way in ways:
        assert by["total", way]["n"] == 8 and by["wait", way]["p50_ms"] < by["total", way]["p50_ms"]
        assert by["total", way]["value"] == 0.5 and 0 < by["cancel", way]["p50_ms"]
    for name in ("server", "worker"):
        assert all(mib > 20 for _, mib in by["rss", name]["seconds_and_mib"])


def test_a_job_under_load_that_gives_other_frames_is_no_figure() -> None:
    class Wrong:
        def make(self, still: Path, fields: Any) -> Made:
            return Made(0.0, "f" * 64, 0.0)

    with pytest.raises(harness.ParityError, match="other frames"):
        bench_serve.open_loop(Wrong(), np.array([0.0, 0.01]), "0" * 64)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_short_soak_loses_nothing_and_says_what_was_done(tmp_path: Path) -> None:
    """Worker and server are killed and, where this process may mount a small disk, the disk is filled."""
    short = ["--seconds", "24", "--every", "2", "--quiet", "0.2", "--aborts", "20", "--results", str(tmp_path)]
    try:
        bench_serve_soak.main(short)
    except SystemExit as end:
        pytest.fail(f"{end}: {rows(tmp_path, 'bench_serve_soak')[-1]['said']}")
    (row,) = rows(tmp_path, "bench_serve_soak")
    assert row["lost"] == row["wrong"] == 0 and row["completed"] > 10 and row["kinds_of_request"] > 5
    assert row["worker_kills"] >= 2 and row["server_kills"] >= 1 and row.get("disk_fills", 0) >= row["full_disk"]
    assert row["quiet_wait"]["p95_ms"] < row["two_jobs_ms"]


def test_the_ledger_knows_what_is_lost_and_what_nobody_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    class Listing:
        def jobs(self) -> Any:
            yield from ({"id": name, "motionrt": {"frames_sha256": ["1"]}} for name in ("a", "changed", "stray"))

    ledger = soak_load.Ledger()
    ledger.kept["flood"] = {"a": ["1"], "changed": ["2"], "gone": []}
    assert soak_load.check_kept(ledger, {"flood": Listing()}) == 2  # type: ignore[dict-item]
    assert [sentence.split(" ")[0] for sentence in ledger.wrong] == ["changed", "gone", "stray"]
    with soak_load.outage(ledger, "disk", after=0.0):
        assert ledger.during(0.0, 1e12, "disk") and not ledger.during(0.0, 1e12, "server")
