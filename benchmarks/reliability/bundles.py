"""Bundles to damage: the demo's, asked for a video and for what `motionrt verify` says."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from motionrt.benchmarks.harness import ROOT, helper_module
from motionrt.benchmarks.reliability.damage import Subject, digest
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.files import STAMPS
from motionrt.runtime.pipeline import MotionPipeline

DEMO, MEMORY, STILL = ROOT / "demo/bundle", ROOT / "demo/memory", ROOT / "demo/inputs/red_star.png"
PROMPT = "a red star moves in a circle"
SETTLED = 2.1  # seconds after which a file's stamp is trusted


def command(*arguments: object) -> str:
    """What `motionrt` prints; MotionRTError with what it prints on standard error if its status is 2."""
    from motionrt.runtime.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code or 0
    if status == 2:
        raise MotionRTError(err.getvalue())
    if status:
        raise RuntimeError(f"exit status {status}: {err.getvalue()}")
    return out.getvalue()


def copied(folder: Path) -> Path:
    """A copy of the demo's bundle."""
    return Path(shutil.copytree(DEMO, folder / "bundle", ignore=shutil.ignore_patterns(STAMPS, "engines")))


def frames(bundle: Path, backend: Callable[[], Any]) -> int:
    """The frames of a request of one step, as a digest."""
    with MotionPipeline.from_bundle(bundle, MEMORY, backend=backend()) as pipeline:
        return digest(pipeline(STILL, PROMPT, steps=1, solver="ddim").frames.tobytes())


def plain() -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(1)


def files_of(*patterns: str) -> Callable[[Path], Subject]:
    """The files of a bundle that fit a pattern."""

    def make(folder: Path) -> Subject:
        bundle = copied(folder)
        found = sorted(file for pattern in patterns for file in bundle.glob(pattern))
        assert found, patterns
        return Subject(found, {"frames": lambda: frames(bundle, plain), "verify": lambda: command("verify", bundle)})

    return make


def programs(folder: Path) -> Subject:
    """Torch programs, run by torch."""
    bundle = copied(folder)

    def torch() -> Any:
        from motionrt.runtime.backends.torch_backend import TorchBackend

        return TorchBackend("cpu", fallback=plain())

    return Subject(
        sorted(bundle.glob("programs/*.pt2")),
        {"frames": lambda: frames(bundle, torch), "verify": lambda: command("verify", bundle)},
    )


def stamps(folder: Path) -> Subject:
    """`.stamps.json`, by which files are known without being read."""
    bundle = copied(folder)
    time.sleep(SETTLED)
    Bundle.open(bundle)
    return Subject([bundle / STAMPS], {"frames": lambda: frames(bundle, plain), "verify": lambda: command("verify", bundle)})


def engines(folder: Path) -> Subject:
    """Engines and their sidecars, on a TensorRT and a GPU that are not there (tests/helpers/fake_engine.py)."""
    from motionrt.runtime.backends.tensorrt.backend import TensorRTBackend
    from motionrt.runtime.backends.tensorrt.device_memory import Cuda

    fake, bundle = helper_module("fake_engine"), copied(folder)
    for name in Bundle.open(bundle).graphs:
        fake.write_engine(bundle, name)

    def backend() -> Any:
        driver = fake.FakeDriver()
        libraries = {"rtx": fake.FakeTensorRT(driver)}
        return TensorRTBackend("cuda", cuda=Cuda(0, driver), libraries=libraries)

    return Subject(
        sorted(bundle.glob("engines/*/*")),
        {"frames": lambda: frames(bundle, backend), "verify": lambda: command("verify", bundle)},
    )


def forms(folder: Path) -> Subject:
    """Graphs in float16 for ONNX Runtime, as `motionrt build --flavor onnxruntime` writes them."""
    from motionrt.export.engines.build import Options
    from motionrt.export.engines.onnx_forms import build_forms

    bundle = copied(folder)
    for _ in build_forms(bundle, Options(targets=(), flavor="onnxruntime", dtype="float16"), lambda event: None):
        pass
    backend = lambda: OnnxRuntimeBackend(1, precision="float16")  # noqa: E731
    return Subject(
        sorted(bundle.glob("engines/*/*")),
        {"frames": lambda: frames(bundle, backend), "verify": lambda: command("verify", bundle)},
    )


KINDS: dict[str, Callable[[Path], Subject]] = {
    "bundle.json": files_of("bundle.json"),
    "graphs": files_of("graphs/*.onnx"),
    "weights": files_of("graphs/*.safetensors"),
    "schedule tables": files_of("rows.safetensors"),
    "tokenizers": files_of("tokenizers/*.json"),
    "torch programs": programs,
    "stamps of a bundle": stamps,
    "engines and sidecars": engines,
    "graphs in float16": forms,
}
