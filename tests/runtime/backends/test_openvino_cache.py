"""What OpenVINO compiled, kept in the bundle: used again, never for another bundle, never damaged, never needed."""

from __future__ import annotations

import importlib.util
import json
import locale
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("openvino") is None or importlib.util.find_spec("onnx") is None:
    pytest.skip("needs OpenVINO and onnx: pip install motionrt[openvino]", allow_module_level=True)

from motionrt.runtime.backends.openvino.backend import OpenVinoBackend
from motionrt.runtime.backends.openvino.cache import LOSES, cache_folder, comes_back
from motionrt.runtime.backends.openvino.graph import read_source
from motionrt.runtime.backends.openvino.library import load_library
from motionrt.runtime.bundle.bundle import Bundle

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bundle(fake_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(fake_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of the demo's bundle. Shared."""
    return Bundle.open(shutil.copytree(ROOT / "demo" / "bundle", tmp_path_factory.mktemp("cache") / "bundle"))


def values(bundle: Bundle, name: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        port.name: np.asarray(rng.standard_normal([d.opt for d in port.dims]) if port.dtype == "float32" else 1, port.dtype)
        * np.ones([d.opt for d in port.dims], port.dtype)
        for port in bundle.graph(name).inputs
    }


def folders(bundle: Bundle) -> list[Path]:
    return sorted(path for path in (bundle.path / "engines/openvino-cache").glob("*") if path.is_dir())


def cached(graph: Any) -> bool:
    return bool(graph.executor.ours.compiled.get_property("LOADED_FROM_CACHE"))


def test_a_graph_is_compiled_once_and_gives_the_same_from_the_cache(bundle: Bundle) -> None:
    inputs = values(bundle, "text")
    first = OpenVinoBackend(1).load(bundle, "text")
    (folder,) = folders(bundle)
    assert not cached(first) and {file.suffix for file in folder.iterdir()} == {".blob", ".sha256"}
    again = OpenVinoBackend(1).load(bundle, "text")
    assert cached(again) and folders(bundle) == [folder]
    for port, value in first(inputs).items():
        np.testing.assert_array_equal(again(inputs)[port], value)


def test_another_graph_or_precision_finds_nothing(bundle: Bundle) -> None:
    """OpenVINO itself would take what was compiled in float32 for bfloat16, and the other way round."""
    spec, backend = bundle.graph("text"), OpenVinoBackend(1)
    backend.load(bundle, "text")
    if "bfloat16" in backend._able:
        backend.load(bundle, "step")
        assert not cached(OpenVinoBackend(1, precision="bfloat16").load(bundle, "step")) and len(folders(bundle)) == 3
    parts = [spec.sha256, spec.weights_sha256, "f32"]
    found = {cache_folder(bundle.path, "text", [*parts[:n], "0" * 64, *parts[n + 1 :]]) for n in range(3)}
    assert len(found | {cache_folder(bundle.path, "text", parts)}) == 4


def test_a_changed_bundle_is_compiled_again(bundle: Bundle, fake: Any) -> None:
    before = OpenVinoBackend(1).load(bundle, "decode")(values(bundle, "decode"))
    fake.move_weights(bundle.path, "decode", "w_decode", 2 * fake.constants()["w_decode"])
    changed = Bundle.open(bundle.path)
    graph = OpenVinoBackend(1).load(changed, "decode")
    assert not cached(graph) and len(folders(bundle)) == 2
    assert any((value != before[port]).any() for port, value in graph(values(bundle, "decode")).items())


@pytest.mark.parametrize("damage", ["a byte", "cut", "no digest", "no blob"])
def test_a_damaged_cache_is_made_again(bundle: Bundle, damage: str) -> None:
    """OpenVINO loads a file with a changed byte without a word."""
    want = OpenVinoBackend(1).load(bundle, "text")(values(bundle, "text"))
    (folder,) = folders(bundle)
    (blob,) = folder.glob("*.blob")
    data = bytearray(blob.read_bytes())
    if damage == "a byte":
        data[len(data) // 2] ^= 255
        blob.write_bytes(data)
    elif damage == "cut":
        blob.write_bytes(data[:-9])
    else:
        next(folder.glob("*.sha256" if damage == "no digest" else "*.blob")).unlink()
    graph = OpenVinoBackend(1).load(bundle, "text")
    assert not cached(graph) and cached(OpenVinoBackend(1).load(bundle, "text"))
    for port, value in graph(values(bundle, "text")).items():
        np.testing.assert_array_equal(value, want[port])


def test_a_bundle_that_cannot_be_written_has_no_cache(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    graph = OpenVinoBackend(1).load(bundle, "text")
    assert not cached(graph) and folders(bundle) == [] and graph(values(bundle, "text"))


def test_a_second_process_that_was_first_is_no_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(source: Any, target: Any) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", taken)
        assert OpenVinoBackend(1).load(bundle, "text")(values(bundle, "text"))
    assert folders(bundle) == [], "nothing half-made is left"


def test_loading_from_several_threads_leaves_the_locale(bundle: Bundle) -> None:
    """OpenVINO changes it for a moment; of two at once one would keep what the other had set."""
    before = locale.setlocale(locale.LC_ALL, None), locale.getpreferredencoding(False)
    backends = [OpenVinoBackend(1) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            shutil.rmtree(bundle.path / "engines", ignore_errors=True)
            list(pool.map(lambda backend: [backend.load(bundle, name) for name in ("text", "motion", "step")], backends))
            assert (locale.setlocale(locale.LC_ALL, None), locale.getpreferredencoding(False)) == before


def test_graphs_of_the_demo_come_back_from_the_cache_as_they_were(demo: Bundle) -> None:
    """All but those with a fused rotary embedding, which are compiled every time."""
    for name in ("text", "motion", "cama", "request", "schedule", "step"):
        inputs = values(demo, name)
        first, again = (OpenVinoBackend(1).load(demo, name) for _ in range(2))
        assert cached(again) == (name != "step"), name
        for port, value in first(inputs).items():
            np.testing.assert_array_equal(again(inputs)[port], value, err_msg=name)
    (folder,) = (folder for folder in folders(demo) if folder.name.startswith("step-"))
    assert [file.name for file in folder.iterdir()] == ["none"]


def test_openvino_still_loses_a_rotary_embedding(demo: Bundle) -> None:
    """Why `LOSES` is there. Where this fails, OpenVINO was mended: take the name out of it."""
    core, source = load_library().Core(), read_source(demo.graph_path("step"), "step")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(source.model), "CPU", settings)
    again = core.import_model(compiled.export_model().getvalue(), "CPU", settings)
    inputs = values(demo, "step")
    results = [model.create_infer_request().infer(inputs) for model in (compiled, again)]
    assert {"RoPE"} == LOSES and not comes_back(compiled)
    assert not np.allclose(results[0][1], results[1][1], atol=1e-3)


# --- nobody is told -----------------------------------------------------------------------------------------------------

WATCH = """
import json, sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith(
    ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib", "http", "subprocess.Popen", "os.posix_spawn")
) else None)
import numpy as np
from motionrt import MotionPipeline
with MotionPipeline.from_bundle(sys.argv[1], backend="openvino", threads=1) as pipeline:
    pipeline(np.zeros((16, 16, 3), np.uint8), "a", motion_scale=0)
loaded = sorted(name for name in sys.modules if name.startswith("openvino_telemetry"))
print(json.dumps([pipeline.backend.label, seen, loaded, "openvino_telemetry" in sys.modules]))
"""


def test_a_request_reports_to_nobody(bundle: Bundle, tmp_path: Path) -> None:
    """`import openvino` alone sends an event and writes an identifier into the home folder, where nothing holds it back."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTHONPATH")} | {"HOME": str(home)}
    command = [sys.executable, "-P", "-c", WATCH, str(bundle.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    label, seen, loaded, there = json.loads(done.stdout.splitlines()[-1])
    assert label == "openvino CPU float32" and seen == [] and loaded == [] and not there
    assert sorted(home.rglob("*")) == []


def test_a_telemetry_that_the_program_has_imported_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from motionrt.runtime.backends.openvino import library

    own = object()
    monkeypatch.setitem(sys.modules, "openvino_telemetry", own)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "openvino")
    seen = []
    monkeypatch.setattr(library.importlib, "import_module", lambda name: seen.append((name, sys.modules["openvino_telemetry"])))
    library.load_library()
    assert seen == [("openvino", None)] and sys.modules["openvino_telemetry"] is own
