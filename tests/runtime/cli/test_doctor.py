"""`motionrt doctor`: what is found with nothing installed, with a GPU that is not there, and with engines of every kind."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from by_path import load_by_path

from motionrt.runtime.backends import kinds as backends
from motionrt.runtime.backends.machine import Gpu, find_gpus
from motionrt.runtime.cli import diagnosis as doctor

Run = Callable[..., tuple[int, str, str]]
ADA = Gpu("Fake GPU", "sm_89", 24 << 30, "580.65.06", "13.0")
HOPPER = Gpu("Other GPU", "sm_90", 80 << 30, "580.65.06", "13.0")
RTX = {"version": "1.7.1.116", "targets": ["sm_89", "sm_120"], "why": None}
GONE = {"version": None, "targets": None, "why": "not installed: `pip install motionrt[tensorrt]`"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend: these GPUs (or why there is none), TensorRT-RTX or not."""

    def pretend(gpus: list[Gpu] | str, rtx: dict[str, Any] = RTX) -> None:
        monkeypatch.setattr(doctor, "find_gpus", lambda: gpus)
        for module in (backends, doctor):
            monkeypatch.setattr(module, "tensorrt_facts", lambda flavor: rtx if flavor == "rtx" else GONE)
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "cuda" else real(name))

    return pretend


@pytest.fixture
def engines(fake_bundle: Path, tmp_path: Path) -> tuple[Path, ModuleType]:
    """A copy of the fake bundle, and what writes engines into it."""
    module = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/fake_engine.py")
    return Path(shutil.copytree(fake_bundle, tmp_path / "bundle")), module


def test_doctor_works_with_nothing_installed(run: Run, monkeypatch: pytest.MonkeyPatch, fake_bundle: Path) -> None:
    for name in ("onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "find_gpus", lambda: "no NVIDIA driver")
    status, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert status == 2 and found["gpus"] == []
    assert found["verdict"] == "no backend is usable here; no TensorRT: no NVIDIA driver"
    assert "pip install motionrt[cpu]" in found["backends"]["onnxruntime on cpu"]
    assert "pip install motionrt[rtx]" in found["tensorrt"]["rtx"]["why"]
    status, out, _ = run("doctor", fake_bundle)
    assert status == 2 and "nothing runs fake here: not installed: `pip install motionrt[cpu]`" in " ".join(out.split())


def test_doctor_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['onnxruntime'] = sys.modules['tensorrt_rtx'] = None\n"
        "from motionrt.runtime.cli.diagnosis import examine\nexamine()\n"
        "print([n for n in ('torch', 'transformers', 'diffusers', 'cuda.bindings') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_doctor_on_this_machine_agrees_with_what_runs(run: Run, fake_bundle: Path) -> None:
    status, out, _ = run("doctor", fake_bundle)
    assert status == 0
    text = " ".join(out.split())
    assert "what can run fake" in text and "fake runs here with" in text
    for graph in ("text_query", "step", "decode"):
        assert graph in text


def test_doctor_says_how_to_build_and_what_it_takes(machine: Any, fake_bundle: Path) -> None:
    machine([ADA])
    found = doctor.examine(fake_bundle)
    step = found["bundle"]["graphs"]["step"]
    assert step["tensorrt"] == f"no engine: `motionrt build {fake_bundle} --target sm_89`"
    size = (fake_bundle / "graphs" / "step.onnx").stat().st_size
    guess = step["predicted_build"]
    assert guess["memory_bytes"] == 220 * 2**20 + int(3.0 * (size // 2 + 6 * 2**20)) and 1 < guess["seconds"] < 2
    assert "not with tensorrt: step: no engine: `motionrt build" in found["verdict"]


def test_doctor_knows_which_engines_run(machine: Any, engines: tuple[Path, ModuleType]) -> None:
    path, fake = engines
    machine([ADA])
    for graph in ("step", "decode"):
        fake.write_engine(path, graph)
    found = doctor.examine(path)
    assert found["verdict"] == "fake runs here with tensorrt (2 of 11 graphs)"
    assert found["bundle"]["backends"]["tensorrt"] == {"why": None, "graphs": ["decode", "step"]} or set(
        found["bundle"]["backends"]["tensorrt"]["graphs"]
    ) == {"step", "decode"}
    assert found["bundle"]["graphs"]["step"]["engines"][0]["folder"] == "rtx-sm_89+sm_120-float16"
    (engine,) = path.glob("engines/*/step-*.engine")
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    assert "is damaged: SHA-256" in doctor.examine(path)["verdict"]
    (sidecar,) = path.glob("engines/*/step.json")
    sidecar.write_text("{}")
    assert "format is None" in doctor.examine(path)["verdict"]


@pytest.mark.parametrize(
    "gpus, rtx, said",
    [
        ([HOPPER], RTX, "was built for sm_89, sm_120; this machine is sm_90"),
        ([ADA], {**RTX, "version": "1.8.0.1"}, "was built with TensorRT-RTX 1.7.1.116; 1.8.0.1 is installed here"),
        ("no NVIDIA driver", RTX, "no NVIDIA driver"),
        ([ADA], {**GONE, "why": "not installed: `pip install motionrt[rtx]`"}, "TensorRT is not installed: `pip install mo"),
    ],
    ids=["other GPU", "other version", "no GPU", "not installed"],
)
def test_doctor_says_why_an_engine_does_not_run(
    machine: Any, engines: tuple[Path, ModuleType], gpus: Any, rtx: dict[str, Any], said: str
) -> None:
    path, fake = engines
    fake.write_engine(path, "step")
    machine(gpus, rtx)
    found = doctor.examine(path)
    assert said in found["verdict"] and found["verdict"].startswith("fake runs here with ")
    assert found["bundle"]["backends"]["tensorrt"]["graphs"] == []
    assert found["bundle"]["graphs"]["step"]["engines"][0]["why"] is not None


def test_doctor_says_what_rtx_does_not_build_for(machine: Any, fake_bundle: Path) -> None:
    machine([HOPPER])
    assert "TensorRT-RTX builds none for sm_90 (it does for sm_89, sm_120)" in doctor.examine(fake_bundle)["verdict"]


def test_doctor_names_a_bundle_that_cannot_be_opened(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("doctor", tmp_path / "none")
    assert status == 2 and "the bundle cannot be opened" in out and "is not a directory" in " ".join(out.split())


def test_doctor_says_what_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libnvinfer.so.11: cannot open shared object file\nand more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    why = backends.tensorrt_facts("tensorrt")["why"]
    assert why == "installed, but does not load: libnvinfer.so.11: cannot open shared object file"


class FakeLibcuda:
    """libcuda.so as ctypes sees it; `fails` names calls that return an error."""

    def __init__(self, count: int = 2, fails: tuple[str, ...] = ()) -> None:
        self.count, self.fails = count, fails

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 1 if name in self.fails else self.answer(name, *arguments)

    def answer(self, name: str, *arguments: Any) -> int:
        target = arguments[0]._obj if arguments and hasattr(arguments[0], "_obj") else None
        if name == "cuDeviceGetCount":
            target.value = self.count
        elif name == "cuDriverGetVersion":
            target.value = 12080
        elif name == "cuDeviceGet":
            target.value = arguments[1]
        elif name == "cuDeviceGetAttribute":
            target.value = {75: 12, 76: 0}[arguments[1]]
        elif name == "cuDeviceGetName":
            arguments[0].value = f"GPU {arguments[2].value}".encode()
        elif name == "cuDeviceTotalMem_v2":
            target.value = 3 << 33
        return 0


def test_find_gpus_reads_the_driver() -> None:
    found = find_gpus(FakeLibcuda())  # type: ignore[arg-type]
    assert isinstance(found, list)
    assert [(gpu.name, gpu.target, gpu.memory, gpu.cuda) for gpu in found] == [
        ("GPU 0", "sm_120", 3 << 33, "12.8"),
        ("GPU 1", "sm_120", 3 << 33, "12.8"),
    ]


@pytest.mark.parametrize(
    "library, why",
    [
        (FakeLibcuda(fails=("cuInit",)), "finds no GPU"),
        (FakeLibcuda(count=0), "sees no GPU"),
        (FakeLibcuda(fails=("cuDeviceGet",)), "does not give GPU 0"),
    ],
    ids=["init", "none", "get"],
)
def test_find_gpus_says_why_there_is_none(library: Any, why: str) -> None:
    assert why in str(find_gpus(library))


def test_find_gpus_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert str(find_gpus()).startswith("no NVIDIA driver (")


def test_onnxruntime_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    assert "installed, but does not load" in backends.onnxruntime_facts()["why"]
