"""`auto` on a CPU with OpenVINO beside ONNX Runtime: the faster one by the clock, in float32, and both times told."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("openvino") is None or importlib.util.find_spec("onnx") is None:
    pytest.skip("needs OpenVINO and onnx: pip install motionrt[openvino]", allow_module_level=True)

from motionrt.runtime.backends import auto as choosing
from motionrt.runtime.backends.auto import choose, seconds_of
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.openvino.backend import OpenVinoBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError


@pytest.fixture
def bundle(fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setattr(choosing, "find_gpus", lambda: "no NVIDIA driver")
    return Bundle.open(shutil.copytree(fake_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize("ours, theirs", [(0.25, 0.125), (0.125, 0.25), (0.125, 0.125)], ids=str)
def test_the_faster_is_taken_and_both_times_are_said(
    bundle: Bundle, ours: float, theirs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "seconds_of", lambda sides: [ours, theirs])
    choice = choose(bundle, threads=1)
    kind, name = (OpenVinoBackend, "openvino") if theirs < ours else (OnnxRuntimeBackend, "onnxruntime")
    assert isinstance(choice.backend, kind) and choice.why.startswith(f"chose {name} CPU")
    told = f"onnxruntime CPUExecutionProvider {1e3 * ours:.3g} ms and openvino CPU float32 {1e3 * theirs:.3g} ms"
    assert f"by the time of step: {told}, because not no NVIDIA driver" in choice.why
    backend: Any = choice.backend
    assert list(choice.graphs) == ([] if kind is OpenVinoBackend else ["step"])
    assert kind is OnnxRuntimeBackend or backend.proves, "what is timed is not compared, what runs is"


def test_a_few_calls_of_each_are_timed_in_turns(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [{"step": backend.load(bundle, "step")} for backend in (OnnxRuntimeBackend(1), OpenVinoBackend(1))]
    order: list[str] = []
    for side in sides:
        executor: Any = side["step"].executor
        run = executor.execute
        monkeypatch.setattr(
            executor, "execute", lambda inputs, run=run, who=executor.library: (order.append(who), run(inputs))[1]
        )
    assert all(0 < took < 5 for took in seconds_of(sides))
    assert order == ["ONNX Runtime", "OpenVINO"] * 3
    order.clear()
    monkeypatch.setattr(choosing, "BUDGET", 0)
    seconds_of(sides)
    assert order == ["ONNX Runtime", "OpenVINO"], "a large step runs once in each"


def test_where_openvino_fails_it_is_onnxruntime_and_the_reason(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, bundle: Bundle, name: str) -> Any:
        raise BackendError("too little memory to load graph 'step'.")

    monkeypatch.setattr(OpenVinoBackend, "load", fails)
    choice = choose(bundle, threads=1)
    assert isinstance(choice.backend, OnnxRuntimeBackend)
    assert choice.why.endswith("because not no NVIDIA driver; not openvino: too little memory to load graph 'step'")


def test_what_rounds_is_not_ranked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only float32 is compared: a precision that was asked for by name is ONNX Runtime's to take or refuse."""
    monkeypatch.setattr(choosing, "seconds_of", lambda sides: pytest.fail("nothing is to be timed"))
    assert isinstance(choose(bundle, precision="float16").backend, OnnxRuntimeBackend)
    assert isinstance(choose(bundle, graphs=[]).backend, OnnxRuntimeBackend)
