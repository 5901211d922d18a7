"""`backend="auto"`: the order, that a candidate must have run, that the reason is told, and the CPU as without it."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.backends import auto as choosing
from motionrt.runtime.backends.auto import choose
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, InputError
from motionrt.runtime.pipeline import MotionPipeline

ENCODERS = ("text_query", "motion", "appearance")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def path(fake_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fake_bundle, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed; what it changes is in test_openvino_auto.py."""
    absent = replace(choosing.OPENVINO, probe=lambda device: "not installed")
    monkeypatch.setattr(choosing, "OPENVINO", absent)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))


def test_without_a_gpu_auto_is_the_default(
    fake_bundle: Path, fake_memory: Path, still: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(choosing, "find_gpus", lambda: "no NVIDIA driver")
    caplog.set_level(logging.INFO, "motionrt")
    results = []
    for backend in (None, "auto"):
        with MotionPipeline.from_bundle(fake_bundle, fake_memory, backend=backend, threads=1) as pipeline:
            results.append(pipeline(still, "a red ball", seed=4))
    default, auto = results
    assert default.frames.tobytes() == auto.frames.tobytes() and default.backend == auto.backend
    why = "chose onnxruntime CPUExecutionProvider, because not no NVIDIA driver"
    assert default.choice is None and auto.choice == why and why in caplog.text


def test_auto_takes_engines_that_run(
    fake_gpu: ModuleType, path: Path, fake_memory: Path, still: NDArray[np.uint8], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "motionrt")
    fake_gpu.write_engine(path, "step", profiles=[{"B": (1, 1, 1)}])
    with MotionPipeline.from_bundle(path, fake_memory, threads=1) as reference:
        expected = reference(still, "a red ball")
    with MotionPipeline.from_bundle(path, fake_memory, backend="auto", threads=1) as pipeline:
        got = pipeline(still, "a red ball")
        assert pipeline.graph("step") is pipeline.graph("step")
    assert fake_gpu.library.deserialized == 1, "what was loaded to find out is what runs"
    np.testing.assert_array_equal(got.frames, expected.frames)
    assert got.choice == "chose tensorrt: tensorrt Fake GPU sm_89" == caplog.messages[-1]


@pytest.mark.parametrize(
    "case, said",
    [
        ("none", "not tensorrt: step: no engine: `motionrt build"),
        ("damaged", "not tensorrt: engine 'step' .* is damaged"),
        ("refused", "not tensorrt: engine 'step' in .* is refused by TensorRT-RTX 1.7.1.116"),
        ("fails", "not tensorrt: TensorRT-RTX failed in graph 'step': execute_async_v3 returned False"),
    ],
)
@pytest.mark.usefixtures("no_torch")
def test_auto_goes_on_where_engines_do_not_run(fake_gpu: ModuleType, path: Path, case: str, said: str) -> None:
    if case != "none":
        file = fake_gpu.write_engine(path, "step", profiles=[{"B": (1, 1, 1)}])
    if case == "damaged":
        file.engine_path.write_bytes(file.engine_path.read_bytes()[:-1] + b"?")
    fake_gpu.library.fails = {"refused": {"deserialize_cuda_engine"}, "fails": {"execute_async_v3"}}.get(case, set())
    choice = choose(Bundle.open(path), threads=1)
    assert isinstance(choice.backend, OnnxRuntimeBackend) and choice.backend.device == "cpu"
    assert choice.why.startswith("chose onnxruntime CPUExecutionProvider, because ")
    import re

    assert re.search(said, choice.why), choice.why
    assert "not torch on cuda: step: the bundle has no torch program" in choice.why
    assert "not onnxruntime on cuda: this onnxruntime has no CUDAExecutionProvider: `pip install" in choice.why
    with pytest.raises(BackendError, match=f"nothing runs this bundle on cuda: .*{said.removeprefix('not ')}"):
        choose(Bundle.open(path), device="cuda")


@pytest.mark.usefixtures("no_torch")
def test_auto_runs_the_graphs_that_are_asked_for(fake_gpu: ModuleType, path: Path) -> None:
    """A bundle with engines of its encoders only is one to index clips with; its step is not even looked at."""
    for name in ENCODERS:
        fake_gpu.write_engine(path, name)
    choice = choose(Bundle.open(path), threads=1, graphs=ENCODERS)
    assert choice.why == "chose tensorrt: tensorrt Fake GPU sm_89" and set(choice.graphs) == set(ENCODERS)
    assert fake_gpu.library.deserialized == 3
    assert "not tensorrt: step: no engine" in choose(Bundle.open(path), threads=1).why


@pytest.mark.usefixtures("fake_gpu")
def test_auto_on_the_cpu_looks_no_further(path: Path) -> None:
    choice = choose(Bundle.open(path), device="cpu", threads=2)
    assert choice.why == "chose onnxruntime CPUExecutionProvider, because not the device cpu was asked for"
    with pytest.raises(InputError, match="device is 'tpu'; with the backend auto"):
        choose(Bundle.open(path), device="tpu")


def test_auto_keeps_to_the_precision_that_was_asked_for(fake_gpu: ModuleType, path: Path) -> None:
    fake_gpu.write_engine(path, "step", dtype="float16", profiles=[{"B": (1, 1, 1)}])
    bundle = Bundle.open(path)
    assert choose(bundle, precision="float16").backend.precision == "float16"
    other = choose(bundle, precision="float32")
    assert other.backend.precision == "float32" and "has no engine of graph 'step' in float32" in other.why
    with pytest.raises(InputError, match="'bfloat16', for which ONNX Runtime has no kernels on the CPU"):
        choose(bundle, device="cpu", precision="bfloat16")
    with pytest.raises(InputError, match="precision is for the default backend or one by name"):
        MotionPipeline.from_bundle(path, backend=OnnxRuntimeBackend(1), precision="float16")
    with MotionPipeline.from_bundle(path, precision="float32") as pipeline:
        assert pipeline.backend.precision == "float32"


def test_command_line_says_what_was_chosen(
    run: Run, path: Path, fake_memory: Path, still: NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(choosing, "find_gpus", lambda: "no NVIDIA driver")
    Image.fromarray(still).save(tmp_path / "still.png")
    common = ["generate", "-b", path, "-m", fake_memory, "-p", "a red ball", "-i", tmp_path / "still.png"]
    status, out, err = run(*common, "-o", tmp_path / "out.png", "--backend", "auto")
    assert status == 0 and "chose onnxruntime CPUExecutionProvider" in out, err
    for options, message in (
        (["--backend", "auto", "--engines", "rtx-sm_89-float16"], "the choice was left to auto"),
        (["--backend", "auto", "--device", "cuda"], "nothing runs this bundle on cuda: no NVIDIA driver"),
        (["--engines", "rtx-sm_89-float16"], "which the backend onnxruntime does not use"),
        (["--device", "cuda"], "not CUDAExecutionProvider. Use --device cpu"),
        (["--device", "tensorrt:1"], "not TensorrtExecutionProvider"),
    ):
        status, _, err = run(*common, "-o", tmp_path / "out.png", *options)
        assert status == 2 and message in err, err


class Session:
    """An ONNX Runtime session that says it went to the CPU, as the real one does where a provider cannot be loaded."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.asked = options["providers"]

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_onnxruntime_refuses_to_go_to_the_cpu_silently(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for device, provider in (("cuda", "CUDAExecutionProvider"), ("tensorrt:1", "TensorrtExecutionProvider")):
        for allowed in (False, True):  # parts of a graph may be allowed there, the whole never
            with pytest.raises(BackendError, match=f"could not start {provider} for graph 'step' and would have run on CPUE"):
                OnnxRuntimeBackend(1, device, allow_cpu=allowed).load(Bundle.open(fake_bundle), "step")


def test_onnxruntime_asks_for_no_fallback_and_explains(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session option is the real one's: a CPU-only ONNX Runtime refuses every graph under it."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    asked: dict[str, Any] = {}
    real = onnxruntime.InferenceSession

    def session(path: str, options: Any, providers: Any) -> Any:
        asked.update(providers=providers)
        return real(path, options, providers=[])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    backend = OnnxRuntimeBackend(1, "cuda:1")
    with pytest.raises(BackendError, match="for which ONNX Runtime's CUDAExecutionProvider has no kernel.*--allow-cpu"):
        backend.load(Bundle.open(fake_bundle), "step")
    assert asked["providers"] == [("CUDAExecutionProvider", {"device_id": 1, "use_tf32": "0"})]
    assert backend.label == "onnxruntime CUDAExecutionProvider cuda:1"


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", ""])
def test_onnxruntime_refuses_a_device(device: str) -> None:
    with pytest.raises(InputError, match="the backend onnxruntime runs on cpu, cuda or tensorrt"):
        OnnxRuntimeBackend(1, device)
