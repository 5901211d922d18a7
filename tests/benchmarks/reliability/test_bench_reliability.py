"""docs/reliability.md is what the rows of whole runs say; a run that found something bad ends with status 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from motionrt.benchmarks.reliability import bench_reliability as bench
from motionrt.benchmarks.reliability import hostile, kills, subjects
from motionrt.benchmarks.report.rows import Report

MACHINE = {"date": "2026-11-21T23:00:00+00:00", "commit": "abc", "processor": "CPU X", "gpu": None, "command": "make it"}


def row(run: str, part: str, kind: str, **outcomes: int) -> dict[str, Any]:
    tries = {"tries": sum(outcomes.values()), "outcomes": outcomes, "seconds": 60.0}
    return {**MACHINE, "run": run, "what": part, "kind": kind, **tries}


def test_docs_hold_the_tables_of_the_rows() -> None:
    text = bench.DOCS.read_text(encoding="utf-8")
    assert text.count(bench.MARK) == 1
    assert text.split(bench.MARK)[1].strip() == bench.tables(Report(bench.harness.RESULTS)), "run `make report`"


def test_tables_are_of_the_newest_run_of_each_part(tmp_path: Path) -> None:
    memory = {"rss_mib": [300, 310], "grew_mib": 10, "open_files": [7, 8]}
    rows = [
        row("1", "damage", "index.json", error=5, wrong=1),
        row("2", "damage", "index.json", error=1200, same=34),
        row("2", "damage", "still bmp", **{"other pixels": 2}),
        row("2", "soak", "requests", same=3, aborted=2) | memory,
        row("3", "kills", "memory add", killed=2) | {"commit": "abc+changes"},
    ]
    (tmp_path / "bench_reliability.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = bench.tables(Report(tmp_path))
    assert "1,236 tries in 2 minutes: 0 wrong, 0 raw, 0 crash, 0 hang." in text
    assert "| index.json | 1,234 | 1,200 | 34 | 0 |" in text and "| still bmp | 2 | 0 | 0 | 2 |" in text
    assert "300, 310; the most of the last fifth is 10 above" in text
    assert "Open files: 7 at the beginning, 8 at the end." in text
    assert text.count("Not run: `") == 2, "what has no row, or none of a clean commit"


def test_a_whole_run_is_what_was_promised() -> None:
    assert sum(subjects.plan().values()) >= 10_000 and sum(kills.KILLS.values()) >= 200
    assert len(hostile.names()) * bench.NUMBERS * hostile.CALLS >= 1000


def test_rows_status_and_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []

    def measured(part: str, kind: str, count: int, first: int) -> dict[str, Any]:
        asked.append((kind, count, first))
        return {"what": part, "kind": kind, "tries": 1, "outcomes": {"raw": 1}, "seconds": 0.0, "bad": ["17: raw"]}

    monkeypatch.setattr(bench, "_measure", measured)
    monkeypatch.setattr(bench.harness, "RESULTS", tmp_path / "results")
    some = ["--part", "damage", "kills", "--only", "index.json", "export", "--first", "17", "--tries", "1"]
    assert bench.main(some) == 1 and asked == [("index.json", 1, 17), ("export", 1, 17)]
    assert not (tmp_path / "results").exists(), "rows are of whole runs"
    bench.main([*some, "--results", str(tmp_path / "mine")])
    bench.main(["--part", "kills"])
    assert len((tmp_path / "mine" / "bench_reliability.jsonl").read_text().splitlines()) == 2
    lines = (tmp_path / "results" / "bench_reliability.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == list(kills.KILLS)
