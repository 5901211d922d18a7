"""The adapter as full TensorRT would see it: its library cannot be had here, so the calls it makes are those of a stand-in.

That RTX, whose Python interface is the same, takes those calls, tests/export/engines/test_build.py shows with the real library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from motionrt.export.engines import from_onnx as engine_from_onnx
from motionrt.export.engines.from_onnx import BuildFailure, build, logger_class, typed_network

Make = Callable[..., ModuleType]


class Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def tensor(name: str, *dims: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, dtype=SimpleNamespace(name="HALF"), shape=dims)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Install a `tensorrt` of some version, and work in an empty folder. What was called is in its `calls`."""
    monkeypatch.chdir(tmp_path)

    def install(version: str = "11.4.0", *, engine: bytes | None = b"engine", parses: bool = True, **parts: Any) -> ModuleType:
        trt: Any = ModuleType("tensorrt")
        calls: list[str] = []
        trt.calls, trt.__version__, trt.ILogger = calls, version, Logger
        network = SimpleNamespace(
            num_layers=0,
            num_inputs=1,
            num_outputs=1,
            get_input=lambda i: tensor("x", -1, 8),
            get_output=lambda i: tensor("y", 4, 8),
        )

        class Config:
            """Full TensorRT has no `num_compute_capabilities`: to ask for it is an error."""

            progress_monitor = None

            def add_optimization_profile(self, profile: Any) -> int:
                calls.append(f"profile {profile.shapes}")
                return 0

        class Builder:
            def __init__(self, log: Any) -> None:
                self.log = log

            def create_network(self, flags: int) -> Any:
                calls.append(f"network {flags}")
                return network

            def create_builder_config(self) -> Config:
                return Config()

            def create_optimization_profile(self) -> Any:
                profile = SimpleNamespace(shapes={})
                profile.set_shape = lambda name, *sides: profile.shapes.update({name: sides})
                return profile

            def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
                assert (config.progress_monitor is not None) == hasattr(trt, "IProgressMonitor")
                if engine is None:
                    self.log.log(Logger.ERROR, "[optimizer] Could not find any implementation for node x.")
                    self.log.log(Logger.ERROR, "[optimizer] Could not find any implementation for node x.")
                    self.log.log(Logger.INTERNAL_ERROR, "Out of memory on device.")
                self.log.log(Logger.WARNING, "be careful")
                self.log.log(Logger.INFO, "Total Activation Memory: 77 bytes")
                return engine

        class OnnxParser:
            num_errors = 0 if parses else 1

            def __init__(self, network: Any, log: Any) -> None:
                self.log = log

            def supports_operator(self, name: str) -> bool:
                return name != "Attention" or not version.startswith("10.0")

            def parse_from_file(self, path: str) -> bool:
                calls.append(f"parse {path}")
                return parses

            def get_error(self, index: int) -> Any:
                return SimpleNamespace(desc=lambda: "node 3 (Foo): not today")

        trt.Builder, trt.OnnxParser = Builder, OnnxParser
        for name, part in parts.items():
            setattr(trt, name, part)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        return trt

    return install


def job(**changes: Any) -> dict[str, Any]:
    profile = {"x": {"min": [1, 8], "opt": [2, 8], "max": [4, 8]}}
    return {
        "flavor": "tensorrt", "targets": ["sm_90"], "dtype": "float16", "profiles": [profile], "operators": ["MatMul"],
        "onnx": "graph.onnx", "once": True, "full": False, "dtypes": {"HALF": "float16", "FLOAT": "float32"}, **changes,
    }  # fmt: skip


FLAGS = SimpleNamespace(STRONGLY_TYPED=1)


@pytest.mark.parametrize(
    ("version", "parts", "network"),
    [
        ("10.13.3", {"NetworkDefinitionCreationFlag": FLAGS, "IProgressMonitor": object}, "network 2"),
        ("10.0.1", {"NetworkDefinitionCreationFlag": FLAGS}, "network 2"),
        ("11.4.0", {"NetworkDefinitionCreationFlag": SimpleNamespace(), "IProgressMonitor": object}, "network 0"),
    ],
    ids=["10", "10 without progress", "11 without the flag"],
)
def test_build_makes_the_calls_of_each_version(make: Make, version: str, parts: dict[str, Any], network: str) -> None:
    trt = make(version, **parts)
    result = build(job())
    assert trt.calls == [network, "parse graph.onnx", "profile {'x': ((1, 8), (2, 8), (4, 8))}"]
    assert Path("engine").read_bytes() == b"engine" and result["engine_bytes"] == 6
    assert result["library"] == version and result["warnings"] == ["be careful"] and result["figures"] == {"device_bytes": 77}
    assert result["inputs"] == [{"name": "x", "dtype": "float16", "dims": [-1, 8]}]


def test_build_raises_what_the_logger_said_when_the_builder_returns_none(make: Make) -> None:
    make(engine=None)
    with pytest.raises(BuildFailure) as failed:
        build(job())
    assert str(failed.value) == "[optimizer] Could not find any implementation for node x.\nOut of memory on device."
    assert not Path("engine").exists()


def test_build_raises_what_the_parser_said(make: Make) -> None:
    trt = make(parses=False)
    with pytest.raises(BuildFailure, match=r"^node 3 \(Foo\): not today$"):
        build(job())
    assert trt.calls == ["network 0", "parse graph.onnx"]


def test_build_asks_for_operators_before_it_parses(make: Make) -> None:
    trt = make("10.0.1")
    with pytest.raises(BuildFailure, match="no importer for the operators Attention"):
        build(job(operators=["Attention", "MatMul"]))
    assert trt.calls == ["network 0"]


def test_logger_that_heard_nothing_says_so(make: Make) -> None:
    assert logger_class(make())().text() == "the builder gave no reason"


def test_typed_network_sets_the_flag_as_a_bit(make: Make) -> None:
    trt = make(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=3))
    typed_network(trt, trt.Builder(None))
    assert trt.calls == ["network 8"]


def test_main_reports_a_failure_and_its_errno(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(job: dict[str, Any]) -> dict[str, Any]:
        raise OSError(28, "No space left on device", "engine")

    monkeypatch.setattr(engine_from_onnx, "build", full)
    monkeypatch.setattr(engine_from_onnx, "fix_addresses", lambda: True)
    monkeypatch.setattr(engine_from_onnx, "die_with_parent", lambda: None)
    Path("job.json").write_text('{"site": "."}')
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert engine_from_onnx.main() == 3
    assert capsys.readouterr().out == '{"error": "engine: No space left on device", "errno": 28}\n'
