"""benchmarks/gpu/gpu_engines.py without a GPU: it says why it does not run, and its measuring works on a fake one."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_path import load_by_path

from motionrt.benchmarks import harness
from motionrt.benchmarks.gpu import gpu_engines
from motionrt.runtime.backends.machine import find_gpus
from motionrt.runtime.backends.tensorrt.backend import TensorRTBackend
from motionrt.runtime.backends.tensorrt.device_memory import Cuda

ROOT = Path(__file__).resolve().parents[3]
GRAPHS = ("text_query", "text", "appearance", "cama", "encode", "request", "schedule", "step", "decode")


@pytest.fixture
def engines(fake_bundle: Path, tmp_path: Path) -> tuple[Path, TensorRTBackend, Any]:
    """The fake bundle with an engine of every graph, and a backend that runs them."""
    fake = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/fake_engine.py")
    path = Path(shutil.copytree(fake_bundle, tmp_path / "bundle"))
    for graph in GRAPHS:
        fake.write_engine(path, graph)
    driver = fake.FakeDriver()
    return path, TensorRTBackend(cuda=Cuda(0, driver), libraries={"rtx": fake.FakeTensorRT(driver)}), fake


def options(results: Path, **changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"rounds": 10, "warmups": 1, "dtype": "float16", "results": results, **changes})


def test_the_command_says_why_it_does_not_run() -> None:
    if not isinstance(find_gpus(), str):
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks/gpu/gpu_suite.py"), "--engines"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("engines: not run: no NVIDIA driver")


@pytest.mark.parametrize(
    "found, said",
    [
        ({"rtx": {"version": "1.7.1.116", "targets": ["sm_89"], "why": None}}, "TensorRT-RTX 1.7.1.116 has no target sm_90"),
        ({"rtx": {"version": None, "targets": None, "why": "not installed"}}, "TensorRT-RTX: not installed"),
        ({"rtx": {"version": "1.7", "targets": ["sm_90"], "why": None}}, "cuda-python is not installed"),
    ],
)
def test_missing_says_what(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], said: str) -> None:
    facts = {"no_gpu": None, "gpus": [{"target": "sm_90"}], "backends": {"tensorrt": "cuda-python is not installed"}}
    monkeypatch.setattr(gpu_engines, "examine", lambda: {**facts, "tensorrt": found})
    reason, target = gpu_engines.missing("rtx")
    assert said in reason and target == "sm_90"


def test_rows_are_kept_for_every_graph_and_a_request(
    engines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, backend, _ = engines
    facts = {name: {"engine": {"bytes": 1}} for name in (*GRAPHS, "motion")}
    assert gpu_engines.run(path, backend, facts, options(tmp_path)) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu_engines.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == [f"fake {name}, host to host" for name in GRAPHS] + ["fake request"]
    for row in rows[:-1]:
        assert row["n"] == 10 and row["p50_ms"] > 0 and row["resident"]["p50_ms"] > 0 and row["load_seconds"] > 0
        assert row["error"]["relative_l2"] <= 1e-6 and row["dtype"] == "float16" and row["backend"].startswith("tensorrt")
    assert rows[-1]["error"] == {"mean_grey_levels": 0.0, "max_grey_levels": 0, "to": "onnxruntime fp32"}
    assert "motion: not run: a request does not call it" in capsys.readouterr().out


def test_a_graph_that_differs_is_not_timed(
    engines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, backend, fake = engines

    class Wrong(fake.FakeEngine):  # type: ignore[misc, name-defined]
        def __init__(self, library: Any, bundle: str, graph: str) -> None:
            super().__init__(library, bundle, graph)
            compute = self.compute
            self.compute = lambda inputs: {name: np.asarray(1.1 * v, v.dtype) for name, v in compute(inputs).items()}

    monkeypatch.setattr(fake, "FakeEngine", Wrong)
    assert gpu_engines.run(path, backend, {"step": {}, "decode": {}}, options(tmp_path)) == 2
    said = capsys.readouterr().out
    assert "step: failed: it differs from ONNX Runtime by 0.1 (relative L2), allowed 0.02" in said
    assert "whole request: not run: a graph failed" in said
    assert not (tmp_path / "gpu_engines.jsonl").exists()


def test_an_engine_that_does_not_load_is_said(
    engines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, backend, _ = engines
    (engine,) = path.glob("engines/*/step-*.engine")
    engine.write_bytes(b"short")
    assert gpu_engines.run(path, backend, {"step": {}}, options(tmp_path)) == 1
    assert "step: failed: engine 'step' in" in capsys.readouterr().out


def test_parity_names_what_is_not_finite() -> None:
    good = {"x": np.ones(3, np.float32)}
    assert gpu_engines.error_of(good, good) == 0
    with pytest.raises(harness.ParityError, match="is not finite"):
        gpu_engines.error_of({"x": np.array([1, np.nan, 1], np.float32)}, good)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_8_bits_gain_is_two_rows_in_turns(
    engines: Any, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, half, fake = engines
    fake.write_engine(path, "step", dtype=precision, network="float16", products=24)
    driver = fake.FakeDriver()
    eight = TensorRTBackend(cuda=Cuda(0, driver), libraries={"rtx": fake.FakeTensorRT(driver)}, precision=precision)
    assert gpu_engines.gain(path, ["step"], eight, half, options(tmp_path, precision=precision)) == 0
    rows = [json.loads(line) for line in (tmp_path / "gpu_engines.jsonl").read_text().splitlines()]
    assert [(row["dtype"], row["n"]) for row in rows] == [(precision, 10), ("float16", 10)]
    assert rows[0]["what"] == f"fake step, {precision} in turns with float16"
    assert f"step: {precision} is " in capsys.readouterr().out
