"""OpenVINO as a backend: the same numbers as ONNX Runtime, nothing shared with the caller, and what it refuses."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

if importlib.util.find_spec("openvino") is None or importlib.util.find_spec("onnx") is None:
    pytest.skip("needs OpenVINO and onnx: pip install motionrt[openvino]", allow_module_level=True)

from float64_graph import in_float64

from motionrt.runtime.backends.kinds import OPENVINO
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.backends.openvino import backend as opened
from motionrt.runtime.backends.openvino import proof
from motionrt.runtime.backends.openvino.backend import OpenVinoBackend, OpenVinoExecutor
from motionrt.runtime.backends.openvino.graph import read_source
from motionrt.runtime.backends.openvino.library import load_library, said
from motionrt.runtime.backends.openvino.proof import EXACT, ROUNDED
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec
from motionrt.runtime.cli.diagnosis import examine
from motionrt.runtime.errors import BackendError, BackendWarning, BundleError, EngineError, InputError
from motionrt.runtime.pipeline import MotionPipeline

ROOT = Path(__file__).resolve().parents[3]
SLOW_TO_WIDEN = ("encode", "decode")  # convolutions take minutes in NumPy
Arrays = dict[str, NDArray[Any]]


def feed(spec: GraphSpec, sizes: Mapping[str, int] | None = None, seed: int = 0) -> Arrays:
    """Inputs of a graph, at the sizes that it is tuned for unless others are given by name."""
    rng, inputs = np.random.default_rng(seed), Arrays()
    for port in spec.inputs:
        shape = tuple((sizes or {}).get(dim.name, dim.opt) for dim in port.dims)
        whole = rng.integers(1, 2 if "mask" in port.name else 9, shape)
        inputs[port.name] = np.asarray(rng.standard_normal(shape) if port.dtype == "float32" else whole, port.dtype)
    return inputs


def relative(got: NDArray[Any], want: NDArray[Any]) -> float:
    """The relative L2 difference."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / max(float(np.linalg.norm(want.astype(np.float64))), 1e-30))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's bundle, for caches to lie in. Shared."""
    return Path(shutil.copytree(ROOT / "demo" / "bundle", tmp_path_factory.mktemp("openvino") / "bundle"))


@pytest.fixture
def bundle(fake_bundle: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(fake_bundle, tmp_path / "bundle"))


def able(precision: str) -> bool:
    """Whether this machine's processor computes in it."""
    _, name = opened.PRECISIONS[precision]
    return name in load_library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


needs_bf16 = pytest.mark.skipif("not able('bfloat16')", reason="this processor has no bfloat16")

# --- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"batch": 1, "K": 1, "T": 1, "L": 1}, {"batch": 2, "K": 7, "T": 3, "L": 16}], ids=str)
def test_every_graph_runs_within_its_declared_sizes(bundle: Bundle, sizes: dict[str, int]) -> None:
    backend = OpenVinoBackend(1)
    for name, spec in bundle.graphs.items():
        inputs = feed(spec, sizes)
        got, want = backend.load(bundle, name)(inputs), OnnxRuntimeBackend(1).load(bundle, name)(inputs)
        assert list(got) == [port.name for port in spec.outputs]
        for port in spec.outputs:
            assert (got[port.name].shape, got[port.name].dtype) == (want[port.name].shape, port.dtype), (name, port.name)
            np.testing.assert_allclose(got[port.name], want[port.name], rtol=1e-5, atol=1e-5, err_msg=f"{name} {port.name}")


def test_every_graph_of_the_demo_is_as_exact_as_in_onnxruntime(demo: Path) -> None:
    bundle, backend = Bundle.open(demo), OpenVinoBackend(1)
    assert backend.label == "openvino CPU float32" and backend.precision == "float32"
    for name, spec in bundle.graphs.items():
        inputs = feed(spec)
        got, theirs = backend.load(bundle, name)(inputs), OnnxRuntimeBackend(1).load(bundle, name)(inputs)
        if spec.weights is not None or name in SLOW_TO_WIDEN:
            assert all(relative(got[port], theirs[port]) < 2e-6 for port in theirs), name
            continue
        for port, want in in_float64(bundle.graph_path(name), inputs).items():
            error, allowed = (float(np.abs(value[port] - want).max()) for value in (got, theirs))
            assert error <= 2 * allowed + 1e-6, (name, port, error, allowed)


@needs_bf16
def test_bfloat16_is_rounded_and_no_more_than_that(demo: Path) -> None:
    """What was measured on one step: 6e-3 of x0. A graph that were computed in float32 in truth would be off by 1e-6."""
    bundle, backend = Bundle.open(demo), OpenVinoBackend(1, precision="bfloat16")
    assert backend.label == "openvino CPU bfloat16"
    for name in ("text", "motion", "cama", "schedule", "step", "step_plain"):
        inputs = feed(bundle.graph(name))
        got, want = backend.load(bundle, name)(inputs), OnnxRuntimeBackend(1).load(bundle, name)(inputs)
        errors = {port: relative(got[port], want[port]) for port in want}
        least, most = (1e-4, 1.5e-2) if bundle.in_loop(name) else (0, 2e-6)
        assert all(least <= error < most for error in errors.values()), (name, errors)


def test_weights_beside_a_graph_and_in_a_package_are_read(large_bundle: tuple[Path, Path, Path]) -> None:
    bundle = Bundle.open(large_bundle[0])
    for name in ("decode", "text_query"):
        inputs = feed(bundle.graph(name))
        want = OnnxRuntimeBackend(1).load(bundle, name)(inputs)
        for port, value in OpenVinoBackend(1).load(bundle, name)(inputs).items():
            np.testing.assert_allclose(value, want[port], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_weights_are_widened_exactly(tmp_path: Path, dtype: str) -> None:
    """As an exporter writes them: in the checkpoint's dtype, beside the graph, with a cast where they are read."""
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    weights, x = rng.standard_normal((96, 64)).astype(kind), rng.standard_normal((5, 96)).astype(np.float32)
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT), helper.make_node("MatMul", ["x", "wide"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [5, 96]), ("y", [5, 64]))]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    place = {"all_tensors_to_one_file": True, "location": "g.weights", "size_threshold": 0}
    onnx.save_model(model, tmp_path / "g.onnx", save_as_external_data=True, **place)
    source = read_source(tmp_path / "g.onnx", "g")
    got = OpenVinoExecutor(OpenVinoBackend(1).compile(source, "float32"), source).execute({"x": x})["y"]
    np.testing.assert_allclose(got, x.astype(np.float64) @ weights.astype(np.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["dtype", "shape", "name"])
def test_other_weights_in_a_package_are_refused(
    large_bundle: tuple[Path, Path, Path], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import save_file

    path, _, inside = large_bundle
    value = np.zeros((20, 8), np.float16 if change == "dtype" else np.float32)
    save_file({"w_other" if change == "name" else "w_query": value[:-1] if change == "shape" else value}, inside)
    monkeypatch.setattr(opened, "package_file", lambda spec, bundle: inside)  # as if the digest fitted
    with pytest.raises(BundleError, match="graph 'text_query' needs 'w_query'.*Export the bundle again"):
        OpenVinoBackend(1).load(Bundle.open(path), "text_query")


# --- what OpenVINO gets wrong --------------------------------------------------------------------------------------------


def test_a_graph_that_openvino_computes_wrongly_runs_in_onnxruntime(tmp_path: Path) -> None:
    """A real one. Where OpenVINO computes it right there is no warning, and this test goes."""
    bundle = Bundle.open(shutil.copytree(ROOT / "demo/motionclone/bundle", tmp_path / "bundle"))
    inputs = feed(bundle.graph("extract"))
    want = OnnxRuntimeBackend(1).load(bundle, "extract")(inputs)
    graph = OpenVinoBackend(1).load(bundle, "extract")
    with pytest.warns(BackendWarning, match="OpenVINO computes graph 'extract' wrongly .*: it runs in ONNX Runtime instead"):
        first = graph(inputs)
    for port, value in want.items():
        np.testing.assert_array_equal(first[port], value)
        np.testing.assert_array_equal(graph(inputs)[port], value)
    assert graph.executor.library == "ONNX Runtime"
    with pytest.warns(BackendWarning, match="'extract' wrongly"):  # known from then on
        assert OpenVinoBackend(1).load(bundle, "extract").executor.library == "ONNX Runtime"


@pytest.mark.parametrize("precision, most", [("float32", EXACT), pytest.param("bfloat16", ROUNDED, marks=needs_bf16)])
def test_a_graph_is_compared_once_and_the_finding_kept(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, precision: str, most: float
) -> None:
    asked: list[float] = []
    inputs = feed(bundle.graph("step"))

    def found(got: Any, want: Any) -> float:
        asked.append(real(got, want))
        return 0.9 * most

    real = proof.distance
    monkeypatch.setattr(proof, "distance", found)
    for _ in range(3):
        graph = OpenVinoBackend(1, precision=precision).load(bundle, "step")
        assert graph(inputs) and graph(inputs) and graph.executor.library == "OpenVINO"
    assert len(asked) == 2 and max(asked) < most, "as it was compiled, and from the cache"
    files = sorted((bundle.path / "engines/openvino-cache").glob("step-*.proof"))
    assert [file.name.endswith(".cached.proof") for file in files] == [True, False]
    for file in files:
        file.write_text(f"{1.1 * most}\n")
        with pytest.warns(BackendWarning, match="computes graph 'step' wrongly"):
            assert OpenVinoBackend(1, precision=precision).load(bundle, "step").executor.library == "ONNX Runtime"
        file.write_text(f"{0.9 * most}\n")


def test_a_large_graph_or_one_without_onnxruntime_is_not_compared(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Any:
        raise BackendError("backend 'onnxruntime' needs ONNX Runtime")

    monkeypatch.setattr(OnnxRuntimeBackend, "load", refused)
    graph = OpenVinoBackend(1).load(bundle, "text")
    assert graph(feed(bundle.graph("text"))) and graph.executor.library == "OpenVINO"
    assert list((bundle.path / "engines/openvino-cache").glob("*.proof")) == []
    monkeypatch.setattr(opened, "LARGEST", 10)
    assert isinstance(OpenVinoBackend(1).load(bundle, "step").executor, OpenVinoExecutor)


def test_distance_sees_what_is_not_finite() -> None:
    one, nan = np.ones(3), np.array([1, np.nan, 1])
    assert proof.distance({"y": nan}, {"y": one}) == np.inf
    assert proof.distance({"y": one}, {"y": nan}) == 0
    assert proof.distance({"y": 2 * one, "x": one}, {"y": one, "x": one}) == pytest.approx(1)


# --- ownership ----------------------------------------------------------------------------------------------------------


def test_results_are_the_callers_for_good_and_inputs_are_left_alone(bundle: Bundle) -> None:
    graph, spec = OpenVinoBackend(1).load(bundle, "motion"), bundle.graph("motion")
    video = feed(spec, {"K": 4})["video"]
    before, first = video.copy(), graph({"video": video})["motion"]
    kept = first.copy()
    np.testing.assert_array_equal(graph({"video": np.asfortranarray(video)})["motion"], kept)
    graph({"video": video[::-1]})
    video[:] = 7  # the caller's own array, which no result may look at
    np.testing.assert_array_equal(first, kept)
    before.setflags(write=False)
    np.testing.assert_array_equal(graph({"video": before})["motion"], kept)


def test_calls_from_several_threads_take_turns(bundle: Bundle) -> None:
    graph, spec = OpenVinoBackend(1).load(bundle, "step"), bundle.graph("step")
    inputs = [feed(spec, seed=seed) for seed in range(4)]
    want = [graph(values) for values in inputs]
    wrong = list[int]()

    def work(number: int) -> None:
        for _ in range(20):
            got = graph(inputs[number])
            if any((got[port] != want[number][port]).any() for port in got):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["openvino", "onnx"])
def test_a_package_that_is_not_there_is_named_with_its_extra(
    bundle: Bundle, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "openvino":
        monkeypatch.setattr(opened, "load_library", lambda: (_ for _ in ()).throw(ImportError(module)))
    with pytest.raises(BackendError, match=r"backend 'openvino' needs OpenVINO: `pip install motionrt\[openvino\]`"):
        OpenVinoBackend(1).load(bundle, "step")


@pytest.mark.parametrize("device", ["cuda", "cpu:1", "CPU", ""])
def test_a_device_that_openvino_has_not_is_refused(device: str) -> None:
    with pytest.raises(InputError, match="the backend openvino runs on cpu, gpu or npu"):
        OpenVinoBackend(1, device)


@pytest.mark.parametrize("device", ["gpu", "gpu:1", "npu"])
def test_a_device_that_is_not_here_is_said_with_those_that_are(device: str) -> None:
    if OPENVINO.probe(device.split(":")[0]) is None:
        pytest.skip(f"this machine has a {device}")
    with pytest.raises(BackendError, match=f"device is '{device}'; OpenVINO 20.* finds CPU here. Use --device cpu"):
        OpenVinoBackend(1, device)
    assert "OpenVINO finds no" in str(OPENVINO.probe(device.split(":")[0]))


def test_a_precision_that_is_none_is_refused_and_one_that_the_device_lacks_is_said(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="precision is 'int4'; it must be one of float32, bfloat16, float16, int8"):
        OpenVinoBackend(1, precision="int4")
    with pytest.raises(InputError, match="precision is 'int8'.* float32, float16, bfloat16"):
        open_backend(RunOptions("torch", precision="int8"))
    if not able("float16"):
        with pytest.raises(BackendError, match="precision is 'float16'; OpenVINO computes in float32.* on .*Use one of these"):
            open_backend(RunOptions("openvino", precision="float16"))


def test_int8_without_any_form_says_how_to_build_one(bundle: Bundle) -> None:
    said = "has no int8 form of graph 'step' for openvino.*--flavor openvino --precision int8 --calibrate"
    with pytest.raises(EngineError, match=said):
        OpenVinoBackend(1, precision="int8").load(bundle, "step")


def test_int8_runs_forms_where_there_are_and_the_rest_beside_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A form is any graph with the same ports: here that of the bundle itself, with its digests."""
    form = SimpleNamespace(path=bundle.graph_path("step"), files={"step.onnx": bundle.graph("step").sha256})
    made = {("step", "int8", "openvino"): form}
    monkeypatch.setattr(opened, "quantised_form", lambda _, *asked: made.get(asked))
    backend = OpenVinoBackend(1, precision="int8")
    rest = "bfloat16" if able("bfloat16") else "float32"
    assert backend.label == f"openvino CPU int8, the rest {rest}" and backend.precision == "int8"
    for name in ("step", "text"):
        inputs = feed(bundle.graph(name))
        want = OnnxRuntimeBackend(1).load(bundle, name)(inputs)
        got = backend.load(bundle, name)(inputs)
        assert all(relative(got[port], want[port]) < 3e-2 for port in want)


def test_a_product_between_quantised_values_is_computed_in_int8(tmp_path: Path) -> None:
    """Signed, with no zero points, a scale for each column of the weights, which use 7 bits: what forms hold."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((4, 64)).astype(np.float32), rng.integers(-64, 65, (64, 32)).astype(np.int8)
    scale, scales = np.float32(0.02), rng.uniform(0.001, 0.01, 32).astype(np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "scales"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [4, 64]), ("y", [4, 32]))]
    held = {"scale": scale, "zero": np.int8(0), "w": weights, "scales": scales}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "g.onnx")
    source, backend = read_source(tmp_path / "g.onnx", "g"), OpenVinoBackend(1, precision="int8")
    compiled = backend.compile(source, "float32")
    got = OpenVinoExecutor(compiled, source).execute({"x": x})["y"]
    whole = np.clip(np.rint(x / scale), -128, 127).astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_allclose(got, whole * (scale * scales.astype(np.float64)), rtol=1e-4, atol=1e-4)
    kinds = {op.get_rt_info()["layerType"].astype(str): op for op in compiled.get_runtime_model().get_ops()}
    assert kinds["FullyConnected"].get_rt_info()["runtimePrecision"].astype(str) == "i8"


def test_a_graph_of_other_ports_than_declared_is_refused(edit_bundle: Callable[..., Path]) -> None:
    def change(manifest: dict[str, Any]) -> None:  # a file of another graph, whole
        graphs = manifest["graphs"]
        graphs["decode"].update(file=graphs["encode"]["file"], sha256=graphs["encode"]["sha256"])

    with pytest.raises(BundleError, match=r"graph 'decode' has inputs \['image'\].*bundle.json declares \['latents'\]"):
        OpenVinoBackend(1).load(Bundle.open(edit_bundle(change)), "decode")


@pytest.mark.parametrize(
    "text, message",
    [
        ("Exception from src/core.cpp:84:\nCheck 'x' failed at a.cpp:1:\nNo kernel for Foo\n", r"'step' \(No kernel for Foo\)"),
        ("std::bad_alloc", "too little memory to load graph 'step'. Free some"),
    ],
    ids=["failed", "memory"],
)
def test_a_graph_that_does_not_compile_is_one_line(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    def fails(self: Any, *arguments: Any) -> Any:
        raise RuntimeError(text)

    monkeypatch.setattr(OpenVinoBackend, "compile", fails)
    with pytest.raises(BackendError, match=message) as caught:
        OpenVinoBackend(1).load(bundle, "step")
    assert "\n" not in str(caught.value)


def test_what_fails_inside_a_run_is_said_in_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = OpenVinoBackend(1).load(bundle, "step")
    for text, message in (
        ("Exception from x.cpp:1:\nCheck 'y' failed at z:\nshapes differ", "OpenVINO failed in graph 'step'.*shapes differ"),
        ("std::bad_alloc", "too little memory to run graph 'step'"),
    ):

        def fails(*arguments: Any, text: str = text, **options: Any) -> Any:
            raise RuntimeError(text)

        executor: Any = graph.executor
        monkeypatch.setattr(executor.ours, "_request", SimpleNamespace(infer=fails))
        with pytest.raises(BackendError, match=message) as caught:
            graph(feed(bundle.graph("step")))
        assert "\n" not in str(caught.value)
    assert said(RuntimeError("")) == "RuntimeError"


# --- where a user meets it ----------------------------------------------------------------------------------------------


def test_doctor_lists_it_by_device(fake_bundle: Path) -> None:
    found = examine(fake_bundle)
    assert found["backends"]["openvino on cpu"] is None and found["packages"]["openvino"].startswith("20")
    assert set(found["bundle"]["backends"]["openvino on cpu"]["graphs"]) == set(Bundle.open(fake_bundle).graphs)


def test_generate_and_a_pipeline_take_it_by_name(
    run: Callable[..., tuple[int, str, str]], bundle: Bundle, fake_memory: Path, still: NDArray[np.uint8], tmp_path: Path
) -> None:
    from PIL import Image

    Image.fromarray(still).save(tmp_path / "still.png")
    common = ["generate", "-b", bundle.path, "-m", fake_memory, "-p", "a red ball", "-i", tmp_path / "still.png"]
    status, _, err = run(*common, "-o", tmp_path / "out.mp4", "--backend", "openvino", "--threads", 1)
    assert status == 0 and (tmp_path / "out.mp4").stat().st_size > 0, err
    with MotionPipeline.from_bundle(bundle.path, fake_memory, backend="openvino", threads=1) as ours:
        got = ours(still, "a red ball", seed=4)
    with MotionPipeline.from_bundle(bundle.path, fake_memory, threads=1) as theirs:
        want = theirs(still, "a red ball", seed=4)
    assert got.backend == "openvino CPU float32"
    assert np.abs(got.frames.astype(int) - want.frames).max() <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:OpenVINO computes graph .* wrongly")
@pytest.mark.parametrize("system, inputs", [
    ("", {"image": "red_star.png", "prompt": "a red star bounces in place"}),
    ("motionclone", {"prompt": "a red ball moves to the right"}),
    ("motion_i2v", {"image": "red_star.png", "prompt": "a red star moves to the right"}),
])  # fmt: skip
def test_a_video_of_each_demo_is_the_same_in_float32_and_close_in_bfloat16(
    system: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    from PIL import Image

    if "image" in inputs:
        inputs = inputs | {"image": np.asarray(Image.open(ROOT / "demo/inputs" / inputs["image"]).convert("RGB"))}
    place, frames = ROOT / "demo" / system, {}
    bundle = shutil.copytree(place / "bundle", tmp_path / "bundle")
    for backend, precision in (("onnxruntime", None), ("openvino", None), ("openvino", "bfloat16")):
        if precision is not None and not able(precision):
            continue
        with MotionPipeline.from_bundle(bundle, place / "memory", backend=backend, precision=precision, threads=1) as pipeline:
            frames[backend, precision] = pipeline(**inputs, seed=3).frames.astype(float)
    want = frames.pop(("onnxruntime", None))
    assert np.abs(frames.pop(("openvino", None)) - want).max() <= 1
    for rounded in frames.values():
        decibels = 10 * np.log10(255**2 / max(float(np.square(rounded - want).mean()), 1e-9))
        assert decibels > 45, decibels  # measured: 55.0, 54.9, 59.5
