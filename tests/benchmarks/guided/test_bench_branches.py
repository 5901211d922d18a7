"""benchmarks/guided/bench_branches.py at toy size: three forms of a guided step, which must agree before they are timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from motionrt.benchmarks import harness
from motionrt.benchmarks.guided import bench_branches

pytestmark = pytest.mark.slow
ARGUMENTS = ["bench_branches.py", "--size", "toy", "--rounds", "2", "--warmups", "0", "--threads", "1", "--results"]


def test_every_form_of_a_guided_step_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, str(tmp_path)])
    bench_branches.main()
    rows = [json.loads(line) for line in (tmp_path / "bench_branches.jsonl").read_text().splitlines()]
    assert [row["backend"] for row in rows] == ["pair", "in turn", "side by side"]
    for row in rows:
        assert row["devices"] == ["cpu", "cpu"] and row["error"]["max_abs_difference"] <= row["error"]["allowed"] < 1e-2


def test_branches_that_are_mixed_up_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is timed: the two branches of the toy differ."""
    real = bench_branches.branches
    monkeypatch.setattr(bench_branches, "branches", lambda *given: tuple(reversed(real(*given))))
    monkeypatch.setattr(sys, "argv", [*ARGUMENTS, str(tmp_path)])
    with pytest.raises(harness.ParityError, match="in turn differs from pair"):
        bench_branches.main()
    assert not list(tmp_path.iterdir())
