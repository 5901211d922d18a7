"""The kernel benchmarks run by path, as scripts do: on a CPU they check, time what can be timed, and say what was not run."""

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
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **environment})


def test_bench_kernel_checks_then_appends_two_rows(tmp_path: Path) -> None:
    sizes = ("--length", "70", "--heads", "3", "--rounds", "10")
    done = run("questions/bench_kernel.py", *sizes, "--results", str(tmp_path), "--note", "test")
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "bench_kernel.jsonl").read_text().splitlines())}
    assert set(rows) == {"released", "folded"}
    for row in rows.values():
        assert row["n"] == 10 and row["note"] == "test" and row["shape"] == [1, 70, 192]
        assert row["error_to_fp64"] < 1e-5
    value, low, high = rows["released"]["over_folded"]
    assert 0 < low <= high and value > 0


def test_gpu_kernel_checks_the_torch_forms_and_says_not_run_without_a_gpu(tmp_path: Path) -> None:
    done = run("gpu/gpu_kernel.py", "--cpu-check", "--results", str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    *checked, last = done.stdout.splitlines()
    assert last == "kernel stages not run: no CUDA device"
    assert [line.split(":")[0] for line in checked] == ["released", "folded", "folded_rounded_scores"]
    assert not (tmp_path / "results").exists()


def test_bench_kernel_has_the_augmented_attention_as_a_case(tmp_path: Path) -> None:
    sizes = ("--case", "augmented", "--grid", "4x6", "--width", "8", "--rounds", "10")
    done = run("questions/bench_kernel.py", *sizes, "--results", str(tmp_path), "--note", "test")
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in map(json.loads, (tmp_path / "bench_kernel.jsonl").read_text().splitlines())}
    assert set(rows) == {"released", "gathered"} and rows["released"]["flops"] > rows["gathered"]["flops"]
    for row in rows.values():
        assert row["n"] == 10 and row["note"] == "test" and row["shape"] == [2, 24, 16, 64]
        assert row["error_to_fp64"] < 1e-5
    value, low, high = rows["released"]["over_gathered"]
    assert 0 < low <= high and value > 0


def test_gpu_augmented_checks_the_torch_forms_and_says_not_run_without_a_gpu(tmp_path: Path) -> None:
    done = run("gpu/gpu_augmented.py", "--cpu-check", "--results", str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    *checked, last = done.stdout.splitlines()
    assert last == "augmented kernel stages not run: no CUDA device"
    assert [line.split(":")[0] for line in checked] == ["released", "gathered"]
    assert not (tmp_path / "results").exists()


@pytest.mark.gpu
def test_gpu_augmented_writes_rows_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run("gpu/gpu_augmented.py", "--shapes", "motion_i2v 5x8", "--rounds", "3", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {row["backend"] for row in map(json.loads, (tmp_path / "gpu_augmented.jsonl").read_text().splitlines())}
    assert {"kernel", "kernel_alone", "gathered_alone", "projections", "copy"} <= rows


@pytest.mark.gpu
def test_gpu_kernel_writes_rows_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    done = run("gpu/gpu_kernel.py", "--shapes", "dynamicrafter 1280", "--rounds", "3", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = {row["backend"] for row in map(json.loads, (tmp_path / "gpu_kernel.jsonl").read_text().splitlines())}
    assert {"kernel", "kernel_padded", "kernel_packed", "score_gemm", "copy"} <= rows
