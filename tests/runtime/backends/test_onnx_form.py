"""Forms of a bundle's graphs for ONNX Runtime on a GPU: written whole, checked before they are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from motionrt.export.engines.build import Options
from motionrt.export.engines.onnx_forms import build_forms
from motionrt.runtime.backends.onnx_form import OnnxForm, find_form, form_folder
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, EngineError, InputError
from motionrt.runtime.files import sealed, sha256_of

ROOT = Path(__file__).resolve().parents[3]
Run = Callable[..., tuple[int, str, str]]
GRAPHS = ("text", "request")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bundle with two forms. Shared: copy it before changing it."""
    path = tmp_path_factory.mktemp("forms") / "bundle"
    shutil.copytree(ROOT / "demo" / "bundle", path)
    made = list(build_forms(path, Options((), "onnxruntime", "float16", GRAPHS)))
    assert [item.form.graph for item in made] == list(GRAPHS) and not any(item.cached for item in made)
    return path


@pytest.fixture
def path(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def feed(bundle: Bundle, name: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        port.name: rng.integers(0, 20, [d.opt for d in port.dims]) if port.dtype == "int64"
        else np.asarray(rng.standard_normal([d.max for d in port.dims]), np.float32)
        for port in bundle.graph(name).inputs
    }  # fmt: skip


def test_a_form_computes_the_graph_at_every_size_with_float32_ports(built: Path) -> None:
    bundle, backend = Bundle.open(built), OnnxRuntimeBackend(1, precision="float16")
    for name in GRAPHS:
        given = feed(bundle, name)
        want = OnnxRuntimeBackend(1).load(bundle, name)(given)
        got = backend.load(bundle, name)(given)
        errors = {key: float(np.abs(got[key] - value).max() / np.abs(value).max()) for key, value in want.items()}
        assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}
        assert 0 < max(errors.values()) < 1e-2, (name, errors)
    assert backend.precision == "float16" and OnnxRuntimeBackend(1).precision == "float32"


def test_one_that_is_up_to_date_is_left_alone_and_a_damaged_one_is_made_again(path: Path) -> None:
    options = Options((), "onnxruntime", "float16", GRAPHS)
    assert [item.cached for item in build_forms(path, options)] == [True, True]
    file = form_folder(path, "float16") / "text.onnx"
    good = file.read_bytes()
    file.write_bytes(good[:-3])
    message = r"form of graph 'text' in .* is damaged: SHA-256 of text.onnx .*motionrt build .*--graphs text"
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeBackend(1, precision="float16").load(Bundle.open(path), "text")
    assert [item.cached for item in build_forms(path, options)] == [False, True]
    assert file.read_bytes() == good, "the same bytes from the same build"


def test_a_form_of_other_weights_or_another_version_is_refused(path: Path) -> None:
    sidecar = form_folder(path, "float16") / "text.form"
    record = json.loads(sidecar.read_text())
    for change, message in (
        ({"weights_sha256": "0" * 64}, "was built from weights digest 000000000000"),
        ({"onnx_sha256": "1" * 64}, "was built from ONNX digest 111111111111"),
        ({"motionrt": "0.0.1"}, "was built from MotionRT version 0.0.1"),
        ({"format": 9}, "format is 9; this version reads format 1"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; allowed: float16, bfloat16, int8"),
        ({"files": {"../text.onnx": "0" * 64}}, "it must name its own files"),
        ({"more": 1}, "unknown field `more`"),
    ):
        sidecar.write_text(json.dumps(sealed({**record, **change})))
        with pytest.raises(EngineError, match=message):
            find_form(path, Bundle.open(path).graph("text"), "float16")
    sidecar.write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        OnnxForm.read(sidecar)


def test_what_is_not_there_is_said_with_the_command_that_makes_it(built: Path, run: Run) -> None:
    bundle = Bundle.open(built)
    with pytest.raises(EngineError, match="has no float16 form of graph 'step' .*--flavor onnxruntime --dtype float16"):
        OnnxRuntimeBackend(1, precision="float16").load(bundle, "step")
    assert find_form(built, bundle.graph("step"), None) is None  # a GPU that was told nothing takes the bundle's own graph
    assert find_form(built, bundle.graph("text"), None) is not None
    with pytest.raises(InputError, match="'bfloat16', for which ONNX Runtime has no kernels on the CPU. Use float32"):
        OnnxRuntimeBackend(1, precision="bfloat16")
    for arguments, message in (
        (("--dtype", "float32"), "--flavor onnxruntime takes float16 or bfloat16: float32 is the bundle"),
        (("--target", "sm_89"), "--target and --profile are for engines"),
        (("--graphs", "nothing"), "--graphs names 'nothing'"),
    ):
        status, _, err = run("build", built, "--flavor", "onnxruntime", *arguments)
        assert status == 2 and message in err, err
    status, _, err = run("build", built)
    assert status == 2 and "no target was given" in err


def test_a_form_that_onnxruntime_cannot_load_says_what_to_do(path: Path) -> None:
    folder = form_folder(path, "float16")
    (folder / "text.onnx").write_bytes(b"no graph")
    record = json.loads((folder / "text.form").read_text())
    record["files"]["text.onnx"] = sha256_of(folder / "text.onnx")
    (folder / "text.form").write_text(json.dumps(sealed(record)))
    with pytest.raises(BackendError, match="cannot load graph 'text' .*Use --precision float32"):
        OnnxRuntimeBackend(1, precision="float16").load(Bundle.open(path), "text")


def test_verify_reads_forms(path: Path, run: Run) -> None:
    status, out, _ = run("verify", path)
    assert status == 0 and "forms 2" in out
    file = form_folder(path, "float16") / "request.onnx"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    status, _, err = run("verify", path)
    assert status == 2 and "form of graph 'request'" in err and "damaged" in err
