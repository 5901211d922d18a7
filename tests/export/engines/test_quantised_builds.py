"""`motionrt build --precision`: forms and engines in 8 bits of the demo's step, their scales and quality, and who runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from motionrt.export.engines.build import Options, build_engines
from motionrt.export.engines.calibration import Scales
from motionrt.export.engines.onnx_forms import build_forms
from motionrt.runtime.backends.onnx_form import OnnxForm, find_form, form_folder, quantised_form
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.calibrate import decibels
from motionrt.runtime.errors import EngineError, InputError
from motionrt.runtime.files import sealed
from motionrt.runtime.pipeline import MotionPipeline

ROOT = Path(__file__).resolve().parents[3]
MEMORY = ROOT / "demo" / "memory"
Run = Callable[..., tuple[int, str, str]]


def copy(to: Path) -> Path:
    return Path(shutil.copytree(ROOT / "demo" / "bundle", to / "bundle", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bundle with both int8 forms of its step, calibrated with 2 requests. Shared: copy it before changing it."""
    path = copy(tmp_path_factory.mktemp("quantised"))
    for flavor in ("onnxruntime", "openvino"):
        (made,) = build_forms(path, Options((), flavor, precision="int8", calibrate=MEMORY, requests=2))
        assert made.form.graph == "step" and made.form.products == 24 and not made.cached
    return path


@pytest.fixture
def path(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_int8_runs_the_step_in_its_form_and_all_else_as_it_is(built: Path) -> None:
    bundle = Bundle.open(built)
    backend = open_backend(RunOptions(threads=1, precision="int8"))
    assert isinstance(backend, OnnxRuntimeBackend) and backend.label.endswith(" int8") and backend.precision == "int8"
    assert backend.form(bundle, "request") is None and backend.form(bundle, "step") is not None
    with (
        MotionPipeline.from_bundle(built, MEMORY, threads=1) as exact,
        MotionPipeline.from_bundle(built, MEMORY, threads=1, precision="int8") as ours,
    ):
        picture = np.full((64, 64, 3), 200, np.uint8)
        picture[20:30, 20:30] = (200, 30, 30)
        want, got = (pipeline(picture, "a red star moves right", seed=1) for pipeline in (exact, ours))
    assert got.backend.endswith(" int8") and not want.backend.endswith(" int8")
    assert 40 < decibels(got.frames, want.frames) < 61, "near the exact frames, and not those themselves"


def test_quality_and_scales_are_written_beside_and_used_again(built: Path, path: Path) -> None:
    folders = [form_folder(built, "int8", flavor) for flavor in ("onnxruntime", "openvino")]
    dynamic, static = (OnnxForm.read(folder / "step.form") for folder in folders)
    assert dynamic.quality is not None and static.quality is not None
    assert dynamic.quality.db > 45 and static.quality.db > 40 and dynamic.quality.n == static.quality.n == 2
    scales = Scales.read(built / "engines" / "scales" / "step.scales")
    assert static.scales_sha256 == scales.sha256 and dynamic.scales_sha256 == ""
    assert len(scales.amax) == 24 and all(0 < scales.top[name] <= most for name, most in scales.amax.items())
    (again,) = build_forms(path, Options((), "openvino", precision="int8"))  # without a memory: with the scales that are there
    assert again.cached and again.form.quality == static.quality
    shutil.rmtree(form_folder(path, "int8", "openvino"))
    (anew,) = build_forms(path, Options((), "openvino", precision="int8"))
    assert anew.form.files == static.files and anew.form.quality is None, "the same bytes; nothing measured without a memory"


def test_find_form_has_a_flavor(built: Path) -> None:
    bundle = Bundle.open(built)
    step, request = bundle.graph("step"), bundle.graph("request")
    for flavor in ("onnxruntime", "openvino"):
        form = find_form(built, step, "int8", flavor)
        assert form is not None and form.flavor == flavor and form.path.parent.name == f"{flavor}-int8"
        assert quantised_form(bundle, "request", "int8", flavor) is None
        message = f"no int8 form of graph 'request' for {flavor}.*--flavor {flavor} --precision int8"
        with pytest.raises(EngineError, match=message):
            find_form(built, request, "int8", flavor)
    assert find_form(built, step, None) is None, "8 bits are not taken unasked"


def test_where_no_step_has_a_form_every_graph_says_what_to_build(tmp_path: Path) -> None:
    bundle = Bundle.open(copy(tmp_path))
    for name in ("step", "request"):
        message = "no int8 form of .*step.*`motionrt build .*--flavor onnxruntime --precision int8`"
        with pytest.raises(EngineError, match=message):
            OnnxRuntimeBackend(1, precision="int8").load(bundle, name)


def test_forms_of_other_content_are_refused(path: Path) -> None:
    sidecar = form_folder(path, "int8") / "step.form"
    record = json.loads(sidecar.read_text())
    for change, message in (
        ({"flavor": "openvino", "dtype": "float16"}, "dtype is 'float16'; allowed: int8"),
        ({"flavor": "elsewhere"}, "flavor is 'elsewhere'; allowed: onnxruntime, openvino"),
        ({"onnx_sha256": "1" * 64}, "ONNX digest 111111111111.*--flavor onnxruntime --precision int8 --graphs step"),
    ):
        sidecar.write_text(json.dumps(sealed({**record, **change})))
        with pytest.raises(EngineError, match=message):
            OnnxRuntimeBackend(1, precision="int8").load(Bundle.open(path), "step")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--flavor", "onnxruntime", "--precision", "fp8"), "--precision is 'fp8'; --flavor onnxruntime takes --precision int"),
        (("--flavor", "openvino"), "no --precision is given; --flavor openvino takes --precision int8"),
        (("--flavor", "openvino", "--precision", "int8"), "there are no scales of step .*Measure them: --calibrate MEMORY"),
        (("--flavor", "openvino", "--precision", "int8", "--dtype", "float16"), "it is float32: leave it away"),
        (("--flavor", "onnxruntime", "--precision", "int8", "--target", "sm_89"), "--target and --profile are for engines"),
        (("--flavor", "onnxruntime", "--precision", "int8", "--graphs", "schedule,nothing"), "--graphs names 'nothing'"),
        (("--flavor", "onnxruntime", "--precision", "int8", "--graphs", "encode"), "graph 'encode' cannot be in int8"),
        (("--flavor", "openvino", "--precision", "int8", "--least-db", 50), "--least-db is for --precision with --cal"),
        (("--target", "sm_89", "--precision", "int8", "--least-db", 50), "the quality of engines takes their GPU"),
        (("--calibrate", MEMORY), "--calibrate is for what is in 8 bits"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(str(part) for part in value[:5:2]),
)
def test_what_cannot_be_is_refused_before_any_work(
    arguments: tuple[object, ...], message: str, tmp_path: Path, run: Run
) -> None:
    path = copy(tmp_path)
    status, _, err = run("build", path, *arguments)
    assert status == 2, err
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(" ".join(err.split()))
    assert not list(path.glob("engines/*/*.onnx"))


def test_the_command_says_how_many_products_and_what_they_cost(path: Path, run: Run) -> None:
    status, out, err = run("build", path, "--flavor", "onnxruntime", "--precision", "int8")
    assert status == 0 and "step: 1.0 MiB in int8, 24 products; " in out, out + err
    assert "dB to float32 (n = 2); up to date" in out
    shutil.rmtree(path / "engines")
    status, out, _ = run("build", path, "--flavor", "onnxruntime", "--precision", "int8")
    assert status == 0 and "24 products; quality not measured (--calibrate MEMORY)" in out
    status, out, _ = run("verify", path)
    assert status == 0 and "forms 1" in out


@pytest.mark.slow
@pytest.mark.slow
def test_products_that_cost_most_are_left_out_until_the_quality_is_there(path: Path) -> None:
    full = OnnxForm.read(form_folder(path, "int8", "openvino") / "step.form")
    assert full.quality is not None
    least = full.quality.db + 1.5
    options = Options((), "openvino", precision="int8", calibrate=MEMORY, requests=2, least_db=least)
    (made,) = build_forms(path, options)
    form = made.form
    assert not made.cached and form.quality is not None and form.quality.db >= least
    assert 0 < len(form.left) < 24 and form.products == 24 - len(form.left)
    (again,) = build_forms(path, options)
    assert again.cached and again.form == form, "it is not looked for again"
    with pytest.raises(EngineError, match="no choice of products gives 70 dB in int8: with all of them it is .*that stays"):
        list(build_forms(path, replace(options, least_db=70.0)))
    assert OnnxForm.read(form_folder(path, "int8", "openvino") / "step.form").products == 24


def test_inspect_shows_what_was_built_and_its_quality(path: Path, run: Run) -> None:
    status, out, _ = run("inspect", path)
    assert status == 0 and "approximation int8 in step, for onnxruntime: " in out and "dB to float32 (n = 2)" in out
    (form_folder(path, "int8", "openvino") / "step.form").write_text("{")
    status, out, _ = run("inspect", path)
    assert status == 0 and "not of this bundle and version, or damaged (motionrt verify)" in " ".join(out.split())


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(InputError, match="precision is 'fp8'; it must be one of float32, float16, bfloat16, int8"):
        open_backend(RunOptions(precision="fp8"))
    with pytest.raises(InputError, match="precision is 'int8' on cuda; ONNX Runtime computes in int8 on the CPU alone"):
        OnnxRuntimeBackend(1, "cuda", precision="int8")
    with pytest.raises(InputError, match="precision is 'int8'; it must be one of float32, float16, bfloat16"):
        open_backend(RunOptions("torch", precision="int8"))


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_engine_of_the_step_builds_ahead_of_time(precision: str, dtype: str, path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX", exc_type=ImportError)
    options = Options(("sm_89", "sm_120"), dtype=dtype, precision=precision)
    (made,) = build_engines(path, options)
    file = made.file
    assert file.folder.name == f"rtx-sm_89+sm_120-{precision}" and (file.dtype, file.network) == (precision, dtype)
    assert file.products == 24 and file.attentions == 4 and not made.cached
    assert {(port.name, port.dtype) for port in file.outputs} == {
        (port.name, port.dtype) for port in Bundle.open(path).graph("step").outputs
    }
    assert f"--dtype {dtype} --precision {precision}" in file.rebuild_command()
    (again,) = build_engines(path, options)
    assert again.cached


@pytest.mark.slow
def test_eight_bits_of_weights_are_in_the_engine(path: Path) -> None:
    """1.2 million weights of products less one byte each; without a GPU that is all that shows of it."""
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX", exc_type=ImportError)
    half, eight = (
        next(iter(build_engines(path, Options(("sm_89",), graphs=("step",), precision=precision)))).figures["weight_bytes"]
        for precision in (None, "int8")
    )
    assert half - eight > 0.9 * 4 * 12 * 128 * 128


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("sm_86",), "fp8 needs sm_89 or newer; sm_86 has none. Use --precision int8 there."),
        (("sm_75", "sm_80"), "fp8 needs sm_89 or newer; sm_75, sm_80 has none"),
        (("sm_89", "sm_86"), "sm_86 has none. Use --precision int8 there, and an fp8 engine of its own for sm_89."),
    ],
    ids=["old", "older", "mixed"],
)
def test_fp8_is_refused_where_a_target_has_none(targets: tuple[str, ...], message: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX", exc_type=ImportError)
    path = copy(tmp_path)
    with pytest.raises(EngineError) as refused:
        list(build_engines(path, Options(targets, precision="fp8", calibrate=MEMORY)))
    assert message in str(refused.value) and not (path / "engines").exists()
    with pytest.raises(InputError, match="precision is 'int4'; allowed: int8, fp8"):
        list(build_engines(path, Options(("sm_89",), precision="int4")))
