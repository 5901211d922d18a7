"""The benchmarks run by path, as scripts do: parity first, rows kept, and a plain word where a device is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark as a user does, by its path in the folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_bench_step_checks_then_appends_one_row_for_each_candidate(tmp_path: Path) -> None:
    # Inductor would take minutes: test_bench_adapter.py has the compiled rival
    few = ("--compile-mode", "none", "--rounds", "3", "--warmups", "1")
    done = run("questions/bench_step.py", *few, "--results", str(tmp_path), "--note", "test")
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "bench_step.jsonl").read_text().splitlines())}
    assert set(rows) == {"plain", "rewritten", "eager"}
    for row in rows.values():
        assert row["n"] == 3 and row["note"] == "test"
        assert row["error"]["max_abs_difference"] <= row["error"]["allowed"]
        assert row["max_abs_difference_after_all_steps"] <= 1e-4
    for name in ("plain", "eager"):
        assert rows[name]["over_rewritten"] > 0, "of three rounds there is no interval"
        assert f"{name} / rewritten" in done.stdout


def test_bench_step_of_a_missing_bundle_writes_no_row(tmp_path: Path) -> None:
    done = run("questions/bench_step.py", "--bundle", str(tmp_path / "none"), "--results", str(tmp_path / "results"))
    assert done.returncode != 0 and "none" in done.stderr
    assert not (tmp_path / "results").exists()


def test_gpu_suite_says_not_run_without_a_gpu(tmp_path: Path) -> None:
    done = run("gpu/gpu_suite.py", "--results", str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (0, "not run: no CUDA device\n"), done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.gpu
def test_gpu_suite_writes_rows_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run("gpu/gpu_suite.py", "--rounds", "3", "--results", str(tmp_path), "--stages", "torch_programs")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "gpu_demo.jsonl").read_text().splitlines()) == 6, "two for each precision"
