"""The guided step beside PyTorch's: candidates agree on a step that guides before anything is timed, and each has its row."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")

from motionrt.benchmarks import harness
from motionrt.benchmarks.guided import bench_guided


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_candidate_has_a_row_with_its_memory(tmp_path: Path) -> None:
    """As a script: inside pytest, which keeps what torch logs of a trace, its export takes twice as long."""
    few = ["--model", "guided-toy", "--compile-mode", "none", "--rounds", "2", "--warmups", "1"]
    command = [sys.executable, bench_guided.__file__, *few, "--work", tmp_path / "work", "--results", tmp_path / "rows"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "rows/bench_guided.jsonl").read_text().splitlines())}
    assert set(rows) == {"guided", "plain", "eager"}
    for row in rows.values():
        assert row["error"]["max_abs_difference"] <= row["error"]["allowed"]
        assert 0 < row["peak_bytes"] < 100e6, "of the step, and not of its libraries"
    assert rows["guided"]["guided_difference"] <= rows["guided"]["error"]["allowed"]
    assert rows["eager"]["over_guided"] > 0, "of two rounds there is no interval"
    assert "guidance moves the latents by" in done.stdout


@pytest.mark.parametrize(
    ("moved", "off", "sentence"),
    [(1.0, 1e-3, "guided steps differ from eager by"), (1e-4, 0.0, "guidance moves the latents by 0.0001: that says nothing")],
)
def test_nothing_is_timed_where_guided_steps_differ_or_do_not_guide(
    moved: float, off: float, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidate(name: str, model: Any, weight: float, options: Any) -> harness.Candidate:
        value = np.full(3, moved * (weight > 0) + off * (name == "guided"), np.float32)
        return lambda: {"next_latents": value}

    monkeypatch.setattr(bench_guided, "candidate", candidate)
    with pytest.raises(harness.ParityError, match=sentence):
        bench_guided.check(bench_guided.MODELS["guided-toy"], list(bench_guided.NAMES), argparse.Namespace())
