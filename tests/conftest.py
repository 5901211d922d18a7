"""Fixtures that several tests of the runtime share. Helpers are loaded by path: the tests are not a package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from by_path import load_by_path
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CAPTIONS = (
    "a red ball moves right",
    "a blue ball moves left",
    "the star moves up",
    "the circle moves down",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first: at the end one of two processes would run them alone. They export what users do, with
    torch programs; others, which need none, find those graphs then (`shared_graphs`)."""
    first = ["test_matrix.py", "test_models_page.py", "test_readme.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    """The module tests/helpers/fake_bundle.py."""
    pytest.importorskip("onnx")  # a run-time environment has no onnx to write graphs with
    return load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/fake_bundle.py")


@pytest.fixture(scope="session")
def watching() -> ModuleType:
    """The module tests/helpers/watching.py."""
    return load_by_path(HERE / "helpers" / "watching.py")


@pytest.fixture(scope="session")
def fake_bundle(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid bundle with every graph. Shared: copy it before changing it."""
    path: Path = fake.write_bundle(tmp_path_factory.mktemp("fake") / "bundle")
    return path


@pytest.fixture(scope="session")
def guided(fake: ModuleType) -> ModuleType:
    """The module tests/helpers/guided.py."""
    return load_by_path(HERE / "helpers" / "guided.py")


@pytest.fixture(scope="session")
def guided_bundle(guided: ModuleType, fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of words and clips, with no picture to begin with: guided by a reference, or plain. Shared."""
    path: Path = guided.write_bundle(fake, tmp_path_factory.mktemp("guided") / "bundle")
    return path


@pytest.fixture(scope="session")
def split_bundle(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake bundle with a call for each branch of guidance. Shared."""
    system = load_by_path(HERE / "helpers" / "split_system.py")
    path: Path = system.write_bundle(fake, tmp_path_factory.mktemp("split") / "bundle")
    return path


@pytest.fixture(scope="session")
def drawn_bundle(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that moves a picture as is drawn on it: drags, a brush, a field. Shared."""
    system = load_by_path(HERE / "helpers" / "drawn_system.py")
    path: Path = system.write_bundle(fake, tmp_path_factory.mktemp("drawn") / "bundle")
    return path


@pytest.fixture(scope="session")
def recalling_bundle(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`drawn_bundle` with a memory of motion fields, and a choice of what one that is found is for. Shared."""
    system = load_by_path(HERE / "helpers" / "drawn_system.py")
    path: Path = system.write_bundle(fake, tmp_path_factory.mktemp("recalling") / "bundle", recalls=True)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit status, standard output, standard error)."""

    from motionrt.runtime.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture
def edit_bundle(fake_bundle: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Copy the fake bundle and change its bundle.json with a function: `edit_bundle(lambda m: m.update(format=2))`."""

    def edit(change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(fake_bundle, path)
        manifest = json.loads((path / "bundle.json").read_text())
        change(manifest)
        (path / "bundle.json").write_text(json.dumps(manifest))
        return path

    return edit


@pytest.fixture
def large_bundle(
    edit_bundle: Callable[..., Path], fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path, Path]:
    """A bundle with weights outside its graphs; the files that hold them: beside `decode`, and `text_query`'s in a package."""
    bundle, package = edit_bundle(), tmp_path / "site/fake_minilm"
    package.mkdir(parents=True)
    beside = fake.move_weights(bundle, "decode", "w_decode", fake.constants()["w_decode"])
    inside = fake.move_weights(bundle, "text_query", "w_query", fake.constants()["w_query"], package)
    monkeypatch.syspath_prepend(str(package.parent))
    return bundle, beside, inside


@pytest.fixture(scope="session")
def fake_clips(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four small mp4 files by caption, each of another brightness course."""
    from motionrt.runtime.media.video import write_video

    folder = tmp_path_factory.mktemp("clips")
    clips = {}
    for index, caption in enumerate(CAPTIONS):
        course = np.linspace(40 * index, 255 - 50 * index, fake.FRAMES).astype(np.uint8)
        frames = np.broadcast_to(course[:, None, None, None], (fake.FRAMES, 32, 32, 3))
        clips[caption] = folder / f"clip{index}.mp4"
        write_video(clips[caption], np.ascontiguousarray(frames), fake.FPS)
    return clips


@pytest.fixture(scope="session")
def fake_memory(fake_bundle: Path, fake_clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A motion memory of the four clips, made for the fake bundle."""
    return _filled(tmp_path_factory.mktemp("memory") / "memory", fake_bundle, fake_clips)


@pytest.fixture(scope="session")
def guided_memory(guided_bundle: Path, fake_clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A motion memory of the four clips, made for the guided bundle."""
    return _filled(tmp_path_factory.mktemp("guided-memory") / "memory", guided_bundle, fake_clips)


def _filled(path: Path, bundle_path: Path, clips: dict[str, Path]) -> Path:
    """The motion memory `path`, made of the clips by their captions."""
    from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.indexing.clips import ClipEncoders, index_clips
    from motionrt.runtime.memory.memory import MotionMemory

    bundle = Bundle.open(bundle_path)
    with MotionMemory.for_bundle(path, bundle) as memory:
        encoders = ClipEncoders.from_bundle(bundle, OnnxRuntimeBackend(1))
        report = index_clips(memory, encoders, [(file, caption, None) for caption, file in clips.items()])
    assert not report.failed, report.failed
    return path


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/helpers/fake_engine.py, and its GPU and TensorRT in place of the real ones: every TensorRTBackend runs on them."""
    from motionrt.runtime.backends import auto as choose
    from motionrt.runtime.backends import kinds as backends
    from motionrt.runtime.backends.machine import Gpu
    from motionrt.runtime.backends.tensorrt import backend as tensorrt
    from motionrt.runtime.backends.tensorrt.device_memory import Cuda

    module = load_by_path(Path(__file__).resolve().parents[1] / "tests/helpers/fake_engine.py")
    driver, real = module.FakeDriver(), tensorrt.TensorRTBackend
    library = module.FakeTensorRT(driver)

    def build(device: str, **options: Any) -> Any:
        return real(device, cuda=Cuda(0, driver), libraries={"rtx": library}, **options)

    module.library = library  # type: ignore[attr-defined]
    monkeypatch.setattr(tensorrt, "TensorRTBackend", build)
    monkeypatch.setattr(choose, "find_gpus", lambda: [Gpu("Fake GPU", "sm_89", 24 << 30, "580.65.06", "13.0")])
    monkeypatch.setattr(backends, "tensorrt_facts", lambda flavor: {"why": None})
    return module


@pytest.fixture
def still(fake: ModuleType) -> NDArray[np.uint8]:
    """An input image, uint8 [h, w, 3], not of the bundle's size."""
    picture: NDArray[np.uint8] = np.random.default_rng(1).integers(0, 256, (20, 30, 3), np.uint8)
    return picture


@pytest.fixture(scope="session")
def counts() -> ModuleType:
    """The module benchmarks/counts.py; it imports nothing heavy by itself."""
    from motionrt.benchmarks import counts

    return counts


@pytest.fixture(scope="session")
def tiny_partitions(counts: ModuleType) -> Callable[[str], tuple[Any, Any]]:
    """By name (such as "svd tiny"): the partition of a released structure at small widths, and its
    unconditional tokens, torch [1, M, D]. Each is made once: tracing takes seconds."""
    import torch

    made: dict[str, tuple[Any, Any]] = {}

    def get(model: str) -> tuple[Any, Any]:
        if model not in made:
            tokens = torch.randn(1, *counts.MOTION, generator=torch.Generator().manual_seed(0))
            made[model] = counts.tiny_partition(model, tokens), tokens
        return made[model]

    return get


@pytest.fixture(scope="session")
def compiled_kernels(
    counts: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[dict[str, Any]], Path]]:
    """{kernel: (reports, folder of artefacts)} of kernels/aot.py, compiled once for all targets, the kernels side by side.

    Processes of their own: Triton aborts where an option is wrong. Empty caches, or nothing would be compiled.
    """
    running, folders = {}, {}
    for layout, targets in counts.KERNELS.items():
        folder = folders[layout] = tmp_path_factory.mktemp(layout)
        command = [sys.executable, str(ROOT / "kernels" / "aot.py"), "--json", *counts.ASKED[layout]]
        running[layout] = subprocess.Popen(
            [*command, "--targets", ",".join(map(str, targets)), "--out", str(folder / "out")],
            env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
    found = {}
    for layout, process in running.items():
        out, err = process.communicate(timeout=550)
        assert process.returncode == 0, f"{layout}: {err[-2000:]}"
        found[layout] = [json.loads(line) for line in out.splitlines()], folders[layout] / "out"
    return found
