"""The list of backends is the only one, every command that runs a graph has its options, and each keeps to its rules."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer.main
from by_path import load_by_path

from motionrt.runtime.backends import kinds as backends
from motionrt.runtime.backends.kinds import BACKENDS
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.cli.diagnosis import examine
from motionrt.runtime.cli.main import app
from motionrt.runtime.errors import BackendError, InputError, install
from motionrt.runtime.memory.memory import MotionMemory

ENCODERS = ("text_query", "motion", "appearance")
Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[3]


def options_of(*names: str) -> dict[str, Any]:
    """The options of a command, by name."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.parametrize("names", [("generate",), ("bench",), ("memory", "add"), ("memory", "search")], ids=" ".join)
def test_command_that_runs_a_graph_has_the_options_of_every_other(names: tuple[str, ...]) -> None:
    found = options_of(*names)
    for field in fields(RunOptions):
        option = found[field.name]
        assert (option.opts, option.help) == ([f"--{field.name.replace('_', '-')}"], field.metadata["help"])
        assert option.default == field.default and not option.secondary_opts


def test_demo_has_them_too() -> None:
    demo = load_by_path(ROOT / "demo" / "run.py")
    command: Any = typer.main.get_command(demo.app)
    assert {field.name for field in fields(RunOptions)} < {parameter.name for parameter in command.params}


def test_help_errors_and_doctor_name_every_backend() -> None:
    found = options_of("generate")
    for kind in BACKENDS.values():
        assert f"{kind.name} (needs {kind.needs})" in found["backend"].help
        assert f"{kind.name}: {kind.places}" in found["device"].help
    with pytest.raises(InputError, match=f"must be one of {', '.join(BACKENDS)}"):
        open_backend(RunOptions("none"))
    rows = list(examine()["backends"])
    assert sorted(rows) == sorted(kind.on(device) for kind in BACKENDS.values() for device in kind.devices)
    assert rows[0] == "tensorrt" and rows[-3:] == ["torch on cpu", "openvino on cpu", "onnxruntime on cpu"]


def test_installation_hints_are_written_once() -> None:
    files = [path for path in (ROOT / "runtime").rglob("*.py") if "pip install motionrt[" in path.read_text()]
    assert files == [], "use errors.install"
    assert install("rtx", "tensorrt") == "`pip install motionrt[rtx]` (or motionrt[tensorrt])"


@pytest.mark.parametrize("device", ["", "tpu", "cuda:", "cuda:x", "cuda:1:2", "CUDA", " cuda", 3, None], ids=repr)
@pytest.mark.parametrize("name", BACKENDS)
def test_parse_refuses_a_device(name: str, device: Any) -> None:
    kind = BACKENDS[name]
    with pytest.raises(InputError, match=f"the backend {name} runs on {kind.places}"):
        kind.parse(device)
    other = "gpu" if name == "openvino" else "cuda"
    assert kind.parse(other) == (other, 0) and kind.parse(f"{other}:12") == (other, 12)


def test_why_not_names_what_is_missing_first(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"version": None, "providers": [], "why": "not installed"}
    monkeypatch.setattr(backends, "onnxruntime_facts", lambda: {**nothing, "providers": ["CPUExecutionProvider"], "why": None})
    monkeypatch.setattr(backends, "tensorrt_facts", lambda flavor: nothing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = {kind.on(d): kind.why_not(d, []) for kind in BACKENDS.values() for d in kind.devices}
    assert said == {
        "onnxruntime on cpu": None,
        "onnxruntime on cuda": f"this onnxruntime has no CUDAExecutionProvider: {backends.GPU_BUILD}",
        "onnxruntime on tensorrt": f"this onnxruntime has no TensorrtExecutionProvider: {backends.GPU_BUILD}",
        "openvino on cpu": "not installed: `pip install motionrt[openvino]`",
        "openvino on gpu": "not installed: `pip install motionrt[openvino]`",
        "openvino on npu": "not installed: `pip install motionrt[openvino]`",
        "torch on cpu": "not installed: `pip install motionrt[torch]`",
        "torch on cuda": "not installed: `pip install motionrt[torch]`",
        "tensorrt": "TensorRT is not installed",
    }
    assert BACKENDS["torch"].why_not("cuda", "no driver") == "no driver"
    monkeypatch.setattr(backends, "tensorrt_facts", lambda flavor: {"why": None if flavor == "tensorrt" else "not installed"})
    assert "cuda-python is not installed" in str(BACKENDS["tensorrt"].why_not("cuda", []))


# --- memory commands on other backends --------------------------------------------------------------------------------


@pytest.fixture
def path(fake_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fake_bundle, tmp_path / "bundle"))


def tokens(memory: Path) -> list[np.ndarray[Any, Any]]:
    with MotionMemory.open(memory, readonly=True) as opened:
        return [clip.record[name] for clip in opened.get(opened.ids()) for name in ("motion", "appearance")]


def test_memory_commands_refuse_a_graph_without_an_engine(
    run: Run, path: Path, fake_clips: dict[str, Path], tmp_path: Path, fake_gpu: ModuleType
) -> None:
    clips = list(fake_clips.values())
    asked = ["-b", path, "--backend", "tensorrt"]
    run("memory", "create", tmp_path / "m", "-b", path)
    add = ["memory", "add", tmp_path / "m", *clips, "--caption", "a ball", *asked]
    status, _, err = run(*add)
    assert status == 2 and "no engine of graph 'text_query'" in err and "--allow-onnxruntime" in err
    status, out, err = run(*add, "--allow-onnxruntime", "--threads", 1)
    assert status == 0 and "4 added" in out, err
    search = ["memory", "search", tmp_path / "m", "a ball", "-k", 1, *asked]
    assert run(*search)[0] == 2 and run(*search, "--allow-onnxruntime")[0] == 0


def test_memory_commands_with_torch_on_a_cpu_run_the_encoders_beside_it(
    run: Run, path: Path, fake_clips: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    run("memory", "create", tmp_path / "m", "-b", path)
    add = ["memory", "add", tmp_path / "m", *fake_clips.values(), "--caption", "a ball", "-b", path, "--backend", "torch"]
    status, out, err = run(*add)
    assert status == 0 and "4 added" in out, err


@pytest.mark.parametrize("backend", ["tensorrt", "auto"])
def test_memory_commands_run_engines(
    run: Run, path: Path, fake_clips: dict[str, Path], tmp_path: Path, backend: str, fake_gpu: ModuleType
) -> None:
    """The same memory as of ONNX Runtime; with auto, because the engines that the command needs are there."""
    for name in ENCODERS:
        fake_gpu.write_engine(path, name)
    clips, asked = list(fake_clips.values()), ["-b", path, "--backend", backend]
    for memory, options in (("theirs", ["-b", path]), ("ours", asked)):
        run("memory", "create", tmp_path / memory, "-b", path)
        status, out, err = run("memory", "add", tmp_path / memory, *clips, "--caption", "a ball", *options)
        assert status == 0 and ("chose tensorrt: tensorrt Fake GPU" in out) == (options[-1] == "auto"), err
    assert fake_gpu.library.deserialized == len(ENCODERS)
    assert len(tokens(tmp_path / "ours")) == 2 * len(clips)
    for ours, theirs in zip(tokens(tmp_path / "ours"), tokens(tmp_path / "theirs"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for query in (["a ball"], ["--video", clips[0]]):
        assert run("memory", "search", tmp_path / "ours", *query, "-k", 1, *asked)[0] == 0
    assert fake_gpu.library.deserialized == len(ENCODERS) + 1 + 2, "the query's for a prompt, the record's for a video"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--backend", "jax"], "backend is 'jax'; it must be one of onnxruntime, openvino, torch, tensorrt"),
        (["--device", "tpu"], "the backend onnxruntime runs on cpu, cuda or tensorrt"),
        (["--threads", 0], "threads is 0"),
        (["--backend", "auto", "--engines", "x"], "name tensorrt as backend"),
        (["--engines", "x"], "Use the backend tensorrt"),
    ],
    ids=str,
)
def test_memory_add_refuses_options_in_one_line(
    run: Run, fake_bundle: Path, fake_memory: Path, fake_clips: dict[str, Path], options: list[object], message: str
) -> None:
    clip = next(iter(fake_clips.values()))
    status, _, err = run("memory", "add", fake_memory, clip, "--caption", "new", "-b", fake_bundle, *options)
    assert status == 2 and message in err and err.count("\n") == 1


def test_missing_library_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("torch", "tensorrt"):
        with pytest.raises(BackendError, match=f"backend '{name}' needs .*: `pip install motionrt"):
            open_backend(RunOptions(name))
