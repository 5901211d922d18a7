"""The TensorRT backend over a GPU that is not there (helpers/fake_engine.py): what it computes, copies, keeps and refuses."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from by_path import load_by_path
from numpy.typing import NDArray

from motionrt.runtime.backends.machine import find_gpus
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.backends.seam import Checked, fetch
from motionrt.runtime.backends.tensorrt.backend import TensorRTBackend
from motionrt.runtime.backends.tensorrt.device_memory import Cuda, DeviceArray, Pool, load_driver
from motionrt.runtime.backends.tensorrt.graph import TensorRTExecutor
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, BackendWarning, EngineError, InputError
from motionrt.runtime.files import sealed
from motionrt.runtime.pipeline import MotionPipeline

DEMO = Path(__file__).resolve().parents[3] / "demo"
ONE = {"batch": (1, 1, 1), "T": (1, 4, 50), "L": (1, 8, 16), "K": (1, 4, 8)}
GRAPHS = ("text_query", "text", "appearance", "cama", "encode", "request", "schedule", "step", "decode")
Make = Callable[..., TensorRTBackend]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The module tests/helpers/fake_engine.py."""
    return load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/fake_engine.py")


@pytest.fixture
def driver(gpu: ModuleType) -> Any:
    return gpu.FakeDriver()


@pytest.fixture
def make(gpu: ModuleType, driver: Any) -> Make:
    """A backend on the fake GPU; `flavor` is the TensorRT that is installed."""

    def build(flavor: str = "rtx", **options: Any) -> TensorRTBackend:
        libraries = {flavor: gpu.FakeTensorRT(driver)}
        return TensorRTBackend(cuda=Cuda(0, driver), libraries=libraries, **options)

    return build


@pytest.fixture
def path(fake_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fake_bundle, tmp_path / "bundle"))


@pytest.fixture
def write(gpu: ModuleType, path: Path) -> Callable[..., Any]:
    """Write engines of some graphs into the bundle `path`."""

    def engines(*graphs: str, flavor: str = "rtx", profiles: Any = (ONE,), **options: Any) -> None:
        for graph in graphs:
            gpu.write_engine(path, graph, flavor, profiles=profiles, **options)

    return engines


def inputs_of(path: Path, graph: str, seed: int = 0, **sizes: int) -> dict[str, NDArray[Any]]:
    rng, values = np.random.default_rng(seed), {}
    for port in Bundle.open(path).graph(graph).inputs:
        shape = tuple(sizes.get(dim.name, dim.opt) for dim in port.dims)
        value = rng.standard_normal(shape) if port.dtype == "float32" else rng.integers(0, 9, shape)
        values[port.name] = np.asarray(value, port.dtype)
    return values


def place(graph: Checked, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: graph.put(name, value) for name, value in values.items()}


def wanted(path: Path, graph: str, inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return OnnxRuntimeBackend(1).load(Bundle.open(path), graph)(inputs)


@pytest.mark.parametrize("flavor", ["rtx", "tensorrt"])
def test_pipeline_gives_what_onnxruntime_gives(
    make: Make, write: Any, path: Path, fake_memory: Path, still: Any, flavor: str, driver: Any
) -> None:
    write(*GRAPHS, flavor=flavor)
    options: dict[str, Any] = {"seed": 3, "steps": 6, "solver": "dpm"}
    with MotionPipeline.from_bundle(path, fake_memory, threads=1) as reference:
        expected = reference(still, "a red ball", **options)
    with MotionPipeline.from_bundle(path, fake_memory, backend=make(flavor)) as pipeline:
        pipeline.warm()
        driver.moved.update(up=0, down=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = pipeline(still, "a red ball", **options)
    np.testing.assert_array_equal(got.frames, expected.frames)
    assert got.backend == "tensorrt Fake GPU sm_89" and got.choice is None
    assert expected.backend == "onnxruntime CPUExecutionProvider"

    def size(graph: str, port: str) -> int:
        return 4 * int(np.prod(pipeline.bundle.port(graph, port).shape))

    # down: the query's embedding and the frames, nothing else
    assert driver.moved["down"] == size("text_query", "embedding") + size("decode", "video")
    # up: the image for two graphs, the references' tokens, what the loop starts from, its noise, the zeros of both, and a few
    # ids and numbers; neither what the request computed nor the schedule's tables, which were made there
    latents = size("step", "latents")
    noisy = int((pipeline.bundle.schedule("video", "dpm", 6).rows[:, -1] != 0).sum())
    tokens = sum(4 * array.size for found in got.references for array in found.record.values())
    expected_up = 2 * size("encode", "image") + tokens + (3 + noisy) * latents
    assert expected_up <= driver.moved["up"] < expected_up + latents


def test_graph_keeps_the_device_seam(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("step")
    graph = make().load(Bundle.open(path), "step")
    inputs = inputs_of(path, "step")
    placed = place(graph, inputs)
    assert place(graph, placed) == placed, "placing twice changes nothing"
    before = dict(driver.moved)
    results = graph.run(placed)
    assert driver.moved == before, "nothing crossed the bus"
    for name, value in wanted(path, "step", inputs).items():
        assert isinstance(results[name], DeviceArray)
        np.testing.assert_array_equal(fetch(results[name]), value)
        np.testing.assert_array_equal(graph(inputs)[name], value)
    with pytest.raises(InputError, match="`noise` has 1 NaN"):
        graph.put("noise", np.full((1, 2, 4, 4, 4), np.nan, np.float32)[..., :1][:, :1, :1, :1])


@pytest.mark.parametrize("flavor", ["rtx", "tensorrt"])
def test_results_belong_to_the_caller(make: Make, write: Any, path: Path, flavor: str) -> None:
    """Two requests that take turns: each keeps its own, whatever ran in between; results feed the next step."""
    write("step", flavor=flavor)
    graph = make(flavor).load(Bundle.open(path), "step")
    requests = [inputs_of(path, "step", seed) for seed in (1, 2)]
    states = [place(graph, request) for request in requests]
    hosts = [dict(request) for request in requests]
    kept = []
    for _ in range(3):
        for state, host in zip(states, hosts, strict=True):
            results, expected = graph.run(state), wanted(path, "step", host)
            state.update(latents=results["next_latents"], previous_x0=results["x0"])
            host.update(latents=expected["next_latents"], previous_x0=expected["x0"])
            kept += [(results[name], expected[name]) for name in expected]
    for value, expectation in kept:
        np.testing.assert_array_equal(np.asarray(value), expectation)


def test_a_buffer_knows_whose_value_it_holds(make: Make, write: Any, path: Path) -> None:
    """A value of the device, then a host array, then the first again: what is skipped is only what is there."""
    write("step")
    graph = make().load(Bundle.open(path), "step")
    first, second = (inputs_of(path, "step", seed) for seed in (1, 2))
    placed = place(graph, first)
    for inputs, given in ((first, placed), (second, second), (first, placed), (first, placed), (second, second)):
        np.testing.assert_array_equal(np.asarray(graph.run(given)["x0"]), wanted(path, "step", inputs)["x0"])


def test_concurrent_threads_have_their_own(make: Make, write: Any, path: Path) -> None:
    write("step")
    graph = make().load(Bundle.open(path), "step")
    faults: list[str] = []

    def work(seed: int) -> None:
        inputs = inputs_of(path, "step", seed)
        expected = wanted(path, "step", inputs)
        for _ in range(5):
            got = graph(inputs)
            faults.extend(name for name in expected if not np.array_equal(got[name], expected[name]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_eight_bits_are_taken_when_asked_for_and_other_graphs_as_they_were_built(make: Make, write: Any, path: Path) -> None:
    write("step", "request")
    write("step", dtype="int8", network="float16", products=24)
    bundle = Bundle.open(path)
    assert make().find(bundle, "step").dtype == "float16"
    asked = make(precision="int8")
    assert asked.label.endswith(" int8")
    assert asked.find(bundle, "step").dtype == "int8" and asked.find(bundle, "request").dtype == "float16"
    asked.load(bundle, "request")
    assert asked.precision == "int8"
    assert make(engines="rtx-sm_89+sm_120-int8").find(bundle, "step").dtype == "int8"
    for name in ("step", "request"):
        message = f"no engine of graph '{name}' in fp8. .*--target sm_89 --precision fp8 --calibrate MEMORY"
        with pytest.raises(EngineError, match=message):
            make(precision="fp8").find(bundle, name)


def test_memory_is_asked_for_once(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("step", "schedule")
    backend = make()
    step, schedule = (backend.load(Bundle.open(path), name) for name in ("step", "schedule"))
    inputs = inputs_of(path, "step")
    step(inputs)
    schedule(inputs_of(path, "schedule"))
    before = driver.calls["cuMemAlloc"]
    for seed in range(5):
        step(inputs_of(path, "step", seed))
        schedule(inputs_of(path, "schedule", seed))
    assert driver.calls["cuMemAlloc"] == before
    schedule(inputs_of(path, "schedule", T=7))  # another shape has buffers of its own
    assert driver.calls["cuMemAlloc"] > before


def test_pool_keeps_names_shapes_and_dtypes_apart(driver: Any) -> None:
    pool = Pool(Cuda(0, driver))
    keys: list[tuple[str, tuple[int, ...], str]] = [
        ("a", (2, 3), "float32"), ("b", (2, 3), "float32"), ("a", (3, 2), "float32"), ("a", (2, 3), "int32"),
    ]  # fmt: skip
    addresses = [pool.take(*key).address for key in keys]  # each goes back at once
    assert len(set(addresses)) == len(keys) == pool.allocated
    assert [pool.take(*key).address for key in keys] == addresses and pool.allocated == len(keys)
    held = pool.take(*keys[0])
    assert pool.take(*keys[0]).address != held.address, "what is held is not given again"
    row, whole = held[1], held.address
    del held
    assert pool.take(*keys[0]).address != whole, "a row keeps the whole alive"
    assert np.asarray(row).shape == (3,)
    del row, pool
    gc.collect()
    assert not driver.live, "nothing is left when nobody holds anything"


def test_device_array_reads_as_tables_do(driver: Any) -> None:
    cuda = Cuda(0, driver)
    table = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    value = Pool(cuda).take("table", table.shape, "float32")
    with cuda.active():
        cuda.upload(value.address, table)
        cuda.synchronize()
    assert len(value) == 4 and value.ndim == 3 and len(list(value)) == 4
    for index in (0, 3, -1, np.int64(2), slice(1, 3), slice(None), (slice(None), None)):
        np.testing.assert_array_equal(np.asarray(value[index]), table[index])
    np.testing.assert_array_equal(fetch(value[:, None][2]), table[:, None][2])
    for index in (4, -5):
        with pytest.raises(IndexError):
            value[index]
    for wrong in (slice(0, 4, 2), "x", (0, 1)):
        with pytest.raises(TypeError, match="takes a row number"):
            value[wrong]


def test_scratch_memory_is_shared_and_grows(make: Make, write: Any, path: Path, gpu: ModuleType, driver: Any) -> None:
    write("step", "schedule", flavor="tensorrt")
    backend = make("tensorrt")
    step = backend.load(Bundle.open(path), "step")
    first = backend.arena.address
    assert backend.arena.size == gpu.SCRATCH * len("step")
    inputs = inputs_of(path, "step")
    expected = wanted(path, "step", inputs)
    step(inputs)
    launches = driver.calls["cuGraphLaunch"]
    schedule = backend.load(Bundle.open(path), "schedule")  # asks for more: the captured step must not use what is gone
    assert backend.arena.size == gpu.SCRATCH * len("schedule") and first not in driver.live
    captures = driver.calls["cuStreamBeginCapture"]
    np.testing.assert_array_equal(step(inputs)["x0"], expected["x0"])
    assert driver.calls["cuStreamBeginCapture"] == captures + 1
    schedule(inputs_of(path, "schedule"))
    np.testing.assert_array_equal(step(inputs)["x0"], expected["x0"])
    assert driver.calls["cuGraphLaunch"] > launches
    contexts = backend.library("tensorrt").module.contexts
    assert {context.scratch for context in contexts} == {(backend.arena.address, backend.arena.size)}


def test_tensorrt_captures_the_loop_only(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("step", "schedule", flavor="tensorrt")
    backend = make("tensorrt")
    backend.load(Bundle.open(path), "schedule")(inputs_of(path, "schedule"))
    assert "cuStreamBeginCapture" not in driver.calls
    step = backend.load(Bundle.open(path), "step")
    for seed in range(3):
        inputs = inputs_of(path, "step", seed)
        np.testing.assert_array_equal(step(inputs)["x0"], wanted(path, "step", inputs)["x0"])
    assert driver.calls["cuStreamBeginCapture"] == 1 and driver.calls["cuGraphLaunch"] == 3


def test_a_failed_capture_is_said_and_runs_without(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("step", flavor="tensorrt")
    driver.fails.add("cuGraphInstantiate")
    with pytest.warns(BackendWarning, match="graph 'step': CUDA graph capture failed .*illegal address.*; running without"):
        step = make("tensorrt").load(Bundle.open(path), "step")
    inputs = inputs_of(path, "step")
    np.testing.assert_array_equal(step(inputs)["x0"], wanted(path, "step", inputs)["x0"])
    assert "cuGraphLaunch" not in driver.calls


def test_rtx_captures_itself_and_keeps_its_compilation(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("step", "schedule")
    backend = make()
    step, _ = (backend.load(Bundle.open(path), name) for name in ("step", "schedule"))
    assert isinstance(step.executor, TensorRTExecutor)
    assert [config.cuda_graph_strategy for config in backend.library("rtx").module.configs] == ["whole", "disabled"]
    assert "cuStreamBeginCapture" not in driver.calls
    assert step.executor.cache is not None
    kept = step.executor.cache.path
    assert kept.read_bytes() == b"compiled" and "Fake_GPU_CUDA_13.2" in kept.name
    assert kept.parent == step.executor.file.folder and not list(kept.parent.glob("*.partial"))
    written = kept.stat().st_mtime_ns
    again = make()
    again.load(Bundle.open(path), "step")
    assert again.library("rtx").module.configs[0].cache.content == b"compiled"
    assert kept.stat().st_mtime_ns == written, "an unchanged cache is not written again"


def test_a_refused_or_unwritable_runtime_cache_is_no_error(
    make: Make, write: Any, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write("step")
    caplog.set_level(logging.INFO, "motionrt")
    graph = make().load(Bundle.open(path), "step")
    assert isinstance(graph.executor, TensorRTExecutor) and graph.executor.cache is not None
    kept = graph.executor.cache.path
    kept.write_bytes(b"of another driver")
    make().load(Bundle.open(path), "step")
    assert "refuses the runtime cache" in caplog.text and kept.read_bytes() == b"compiled"
    kept.unlink()
    kept.mkdir()
    (kept / "in the way").touch()
    make().load(Bundle.open(path), "step")
    assert "was not kept: cannot write" in caplog.text


def test_many_shapes_keep_only_so_many_buffers(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("schedule")
    graph = make().load(Bundle.open(path), "schedule")
    for steps in range(1, 30):
        inputs = inputs_of(path, "schedule", T=steps)
        np.testing.assert_array_equal(graph(inputs)["modulation"], wanted(path, "schedule", inputs)["modulation"])
    assert isinstance(graph.executor, TensorRTExecutor) and len(graph.executor._bound) == 8


FAILURES = {
    "execute_async_v3": "execute_async_v3 returned False: the reason in execute_async_v3",
    "set_tensor_address": "binding `\\w+`: the reason",
    "set_input_shape": r"setting `timestep` to \[3\]: the reason",
    "infer_shapes": "the shapes of timestep are not known",
    "get_tensor_shape": r"the shape of output `modulation` is \[-1\], which depends on values",
    "create_execution_context": "create_execution_context gave nothing: the reason",
    "set_optimization_profile_async": "choosing profile 1: the reason",
}


@pytest.mark.parametrize("call", FAILURES)
def test_what_tensorrt_refuses_is_said(make: Make, write: Any, path: Path, call: str) -> None:
    write("schedule", profiles=[{"T": (4, 4, 4)}, {"T": (1, 3, 3)}])
    backend = make()
    graph = backend.load(Bundle.open(path), "schedule")
    backend.library("rtx").module.fails.add(call)
    with pytest.raises(BackendError, match=f"TensorRT-RTX failed in graph 'schedule': {FAILURES[call]}") as caught:
        graph(inputs_of(path, "schedule", T=3))
    assert "\n" not in str(caught.value)
    backend.library("rtx").module.fails.clear()
    inputs = inputs_of(path, "schedule", T=3)
    np.testing.assert_array_equal(graph(inputs)["modulation"], wanted(path, "schedule", inputs)["modulation"])


def test_a_gpu_that_fails_or_is_full_is_said(make: Make, write: Any, path: Path, driver: Any) -> None:
    write("schedule")
    graph = make().load(Bundle.open(path), "schedule")
    driver.fails.add("cuStreamSynchronize")
    with pytest.raises(BackendError, match="failed in graph 'schedule': CUDA failed in cuStreamSynchronize: ILLEGAL_ADDRESS"):
        graph(inputs_of(path, "schedule"))
    driver.fails.clear()
    driver.limit = 0
    with pytest.raises(BackendError, match="cuMemAlloc: OUT_OF_MEMORY: out of memory. Free memory on the GPU"):
        graph(inputs_of(path, "schedule", T=9))


def test_profiles_are_chosen_and_shapes_outside_are_refused(make: Make, write: Any, path: Path) -> None:
    write("schedule", profiles=[{"T": (4, 4, 4)}, {"T": (8, 9, 10)}])
    backend = make()
    graph = backend.load(Bundle.open(path), "schedule")
    for steps, profile in ((4, 0), (9, 1)):
        graph(inputs_of(path, "schedule", T=steps))
        assert backend.library("rtx").module.contexts[-1].profile == profile
    with pytest.raises(InputError, match=r"schedule input `timestep` is \[5\]; this engine accepts .*\[4\].*motionrt build"):
        graph(inputs_of(path, "schedule", T=5))
    with pytest.raises(InputError, match="this bundle accepts"):
        graph(inputs_of(path, "schedule", T=51))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i.pop("noise"), "step: missing inputs: noise"),
        (lambda i: i.update(noise=i["noise"].astype(np.float64)), "`noise` is float64; this bundle accepts float32"),
        (lambda i: i.update(guidance=2.0), "`guidance` is float, not an array"),
        (lambda i: i.update(latents=i["latents"][..., :3]), r"`latents` is \[1, 2, 4, 4, 3\]"),
        (lambda i: i["noise"].__setitem__(0, np.nan), "`noise` has 128 NaN"),
    ],
)
def test_run_refuses_an_input(make: Make, write: Any, path: Path, change: Callable[[Any], object], message: str) -> None:
    write("step")
    backend = make()
    graph = backend.load(Bundle.open(path), "step")
    inputs = inputs_of(path, "step")
    change(inputs)
    executed = backend.library("rtx").module.contexts[0].executed
    for way in (graph, graph.run):
        with pytest.raises(InputError, match=message):
            way(inputs)
    assert backend.library("rtx").module.contexts[0].executed == executed, "refused before anything ran"


def _edit(path: Path, **changes: Any) -> None:
    (sidecar,) = path.glob("engines/*/step.json")
    record = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(sealed({**record, **changes})))


def _damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    (engine,) = path.glob("engines/*/step-*.engine")
    engine.write_bytes(change(engine.read_bytes()))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: _damage(p, lambda data: data[:-3]), "has .* bytes; its sidecar says"),
    "flipped": (lambda p: _damage(p, lambda data: data[:-1] + b"!"), "is damaged: SHA-256"),
    "foreign": (lambda p: _edit(p, onnx_sha256="1" * 64), "was built from ONNX digest 111111111111; this bundle"),
    "older": (lambda p: _edit(p, library="1.6.0.9"), "was built with TensorRT-RTX 1.6.0.9; 1.7.1.116 is installed here"),
    "newer format": (lambda p: _edit(p, format=2), "format is 2; this version reads format 1"),
    "other GPU": (lambda p: _edit(p, targets=["sm_120"]), "was built for sm_120; this machine is sm_89"),
    "no sidecar": (lambda p: next(p.glob("engines/*/step.json")).write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_engine_that_does_not_fit_is_refused_unread(
    make: Make, write: Any, path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("step")
    break_it, message = BAD[case]
    break_it(path)
    backend = make()
    with pytest.raises(EngineError, match=message) as caught:
        backend.load(Bundle.open(path), "step")
    assert "uild" in str(caught.value) and "\n" not in str(caught.value)
    assert backend.library("rtx").module.deserialized == 0
    write("step")  # built again
    backend.load(Bundle.open(path), "step")


def test_what_tensorrt_says_of_an_engine_is_passed_on(make: Make, write: Any, path: Path) -> None:
    write("step")
    backend = make()
    backend.library("rtx").module.fails.add("deserialize_cuda_engine")
    with pytest.raises(
        EngineError, match="engine 'step' .* is refused by TensorRT-RTX 1.7.1.116: the reason in des.* Rebuild: `motion"
    ):
        backend.load(Bundle.open(path), "step")


@pytest.mark.parametrize("wrong", ["name", "mode", "dtype", "missing"])
def test_an_engine_with_other_tensors_is_refused(make: Make, write: Any, path: Path, gpu: ModuleType, wrong: str) -> None:
    write("step")

    def ports(spec: Any) -> dict[str, Any]:
        real = dict(gpu.real_ports(spec))
        mode, kind = real.pop("noise")
        if wrong != "missing":
            real["nois" if wrong == "name" else "noise"] = (
                mode if wrong != "mode" else gpu.FakeTensorRT.TensorIOMode.OUTPUT,
                kind if wrong != "dtype" else "BF16",
            )
        return real

    backend = make()
    backend.library("rtx").module.ports = ports
    said = {"mode": "an output of float32", "dtype": "an input of bfloat16"}.get(wrong, "nothing")
    with pytest.raises(EngineError, match=f"has for `noise?` ({said}|an input of float32); the bundle declares"):
        backend.load(Bundle.open(path), "step")


def test_which_engine_is_taken(make: Make, write: Any, path: Path, gpu: ModuleType, driver: Any) -> None:
    bundle = Bundle.open(path)
    write("step", dtype="bfloat16", targets=("sm_89",))
    write("step", dtype="float32", targets=("sm_89",))
    write("step", dtype="float16", targets=("sm_120",))
    write("step", dtype="float16", flavor="tensorrt", targets=("sm_89",))
    assert make().find(bundle, "step").folder.name == "rtx-sm_89-bfloat16"
    assert make("tensorrt").find(bundle, "step").folder.name == "tensorrt-sm_89-float16"
    assert make(engines="rtx-sm_89-float32").find(bundle, "step").folder.name == "rtx-sm_89-float32"
    both = {"rtx": gpu.FakeTensorRT(driver), "tensorrt": gpu.FakeTensorRT(driver)}
    assert TensorRTBackend(cuda=Cuda(0, driver), libraries=both).find(bundle, "step").flavor == "tensorrt"
    with pytest.raises(EngineError, match="was built for sm_120; this machine is sm_89.*--target sm_89"):
        make(engines="rtx-sm_120-float16").find(bundle, "step")
    with pytest.raises(EngineError, match=r"pip install motionrt\[tensorrt\]"):
        make(engines="tensorrt-sm_89-float16").find(bundle, "step")
    driver.capability = (9, 0)
    with pytest.raises(
        EngineError, match=r"this machine is sm_90.*\(3 other engines of it do not fit either: see `motionrt doc"
    ):
        make().find(bundle, "step")
    with pytest.raises(EngineError, match="no engine of graph 'text'.*--target sm_90`, or allow ONNX Runtime"):
        make().find(bundle, "text")
    with pytest.raises(EngineError, match="no engine of graph 'text' in engines/x"):
        make(engines="x").find(bundle, "text")


def test_of_engines_that_do_not_fit_the_nearest_is_told(make: Make, write: Any, path: Path) -> None:
    write("step", dtype="float16", targets=("sm_120",))
    write("step", dtype="float32", targets=("sm_89",))
    (engine,) = path.glob("engines/rtx-sm_89-float32/step-*.engine")
    engine.write_bytes(b"short")
    with pytest.raises(EngineError, match=r"float32 has 5 bytes; its sidecar says .*\(1 other engines of it do not fit either"):
        make().find(Bundle.open(path), "step")


def test_a_fallback_is_said_where_an_engine_does_not_fit(make: Make, write: Any, path: Path) -> None:
    write("step", "schedule", profiles=[{"T": (4, 4, 4), "batch": (1, 1, 1)}])
    _edit(path, targets=["sm_120"])
    bundle = Bundle.open(path)
    backend = make(fallback=OnnxRuntimeBackend(1))
    with pytest.warns(BackendWarning, match="graph 'step' runs in onnxruntime CPU.*built for sm_120; this machine is sm_89"):
        backend.load(bundle, "step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.load(bundle, "text")  # there is none: what the user asked for
        schedule = backend.load(bundle, "schedule")
        schedule(inputs_of(path, "schedule", T=4))
    inputs = inputs_of(path, "schedule", T=6)
    with pytest.warns(BackendWarning, match=r"'schedule' runs outside its engine .*`timestep` is \[6\]"):
        got = schedule(inputs)
    np.testing.assert_array_equal(got["modulation"], wanted(path, "schedule", inputs)["modulation"])
    assert backend.used["text"].startswith("onnxruntime") and "rtx-sm_89+sm_120-float16" in backend.used["schedule"]


def test_pipeline_runs_partly_on_engines(make: Make, write: Any, path: Path, fake_memory: Path, still: Any) -> None:
    """Values of the GPU go to the graphs that have no engine by way of the host, and the other way round."""
    write("step", "encode", "text", "schedule")
    with MotionPipeline.from_bundle(path, fake_memory, threads=1) as reference:
        expected = reference(still, "a red ball", steps=4)
    with MotionPipeline.from_bundle(path, fake_memory, backend=make(fallback=OnnxRuntimeBackend(1))) as pipeline:
        got = pipeline(still, "a red ball", steps=4)
        job = pipeline.start(pipeline.request(still, "a red ball", steps=4))
        job.keep = True
        for _ in job:
            pass
        assert isinstance(job.values["image_latents"], DeviceArray) and isinstance(job.values["context"], np.ndarray)
    np.testing.assert_array_equal(got.frames, expected.frames)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"device": "cpu"}, InputError, "device is 'cpu'; the backend tensorrt runs on cuda"),
        ({"engines": "../other"}, InputError, "must be the name of one folder"),
        ({"engines": "*"}, InputError, "must be the name of one folder"),
    ],
    ids=str,
)
def test_backend_refuses(make: Make, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


def test_cuda_refuses_a_gpu_that_is_not_there(driver: Any) -> None:
    with pytest.raises(BackendError, match="device is cuda:1; this machine has 1 GPUs"):
        Cuda(1, driver)


def test_without_a_gpu_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motionrt.runtime.backends.tensorrt.backend.installed", lambda: ["rtx"])
    with pytest.raises(BackendError, match="needs (an NVIDIA GPU|cuda-python)") as caught:
        if not isinstance(find_gpus(), str):
            pytest.skip("there is a GPU")
        open_backend(RunOptions("tensorrt"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("motionrt.runtime.backends.tensorrt.backend.installed", list)
    with pytest.raises(BackendError, match=r"backend 'tensorrt' needs TensorRT: `pip install motionrt\[rtx\]`"):
        open_backend(RunOptions("tensorrt"))


def test_without_cuda_python_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r"need cuda-python: `pip install motionrt\[rtx\]`"):
        load_driver()


def test_open_backend_refuses_engines_for_another_backend() -> None:
    with pytest.raises(InputError, match="engines is 'x', which the backend onnxruntime does not use"):
        open_backend(RunOptions(engines="x"))
