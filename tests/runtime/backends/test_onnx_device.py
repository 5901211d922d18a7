"""ONNX Runtime behind the device seam, its values bound instead of copied; here they lie on the CPU, by the same calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from motionrt.runtime.backends.onnxruntime import BoundExecutor, OnnxRuntimeBackend, OrtArray, OrtDevice
from motionrt.runtime.backends.seam import Checked, fetch
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, InputError
from motionrt.runtime.pipeline import MotionPipeline


class Bound:
    """A backend whose graphs are bound, on the CPU."""

    label = "bound"

    def load(self, bundle: Bundle, name: str) -> Checked:
        session = onnxruntime.InferenceSession(str(bundle.graph_path(name)), providers=["CPUExecutionProvider"])
        spec = bundle.graph(name)
        return Checked(spec, BoundExecutor(session, [port.name for port in spec.outputs], OrtDevice("cpu", 0)))


def place(graph: Checked, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: graph.put(name, value) for name, value in values.items()}


def inputs_of(bundle: Bundle, graph: str, seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    shapes = {port.name: tuple(dim.opt for dim in port.dims) for port in bundle.graph(graph).inputs}
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def test_pipeline_gives_what_it_gives_unbound(fake_bundle: Path, fake_memory: Path, still: NDArray[np.uint8]) -> None:
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, threads=1) as reference:
        expected = reference(still, "a red ball", seed=2, solver="dpm", steps=5)
    with MotionPipeline.from_bundle(fake_bundle, fake_memory, backend=Bound()) as pipeline:
        got = pipeline(still, "a red ball", seed=2, solver="dpm", steps=5)
    np.testing.assert_array_equal(got.frames, expected.frames)


def test_results_belong_to_the_caller(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    graph = Bound().load(bundle, "step")
    kept = []
    for seed in (1, 2, 3):
        inputs = inputs_of(bundle, "step", seed)
        placed = place(graph, inputs)
        assert place(graph, placed) == placed
        kept.append((graph.run(placed), OnnxRuntimeBackend(1).load(bundle, "step")(inputs)))
        np.testing.assert_array_equal(graph(inputs)["x0"], kept[-1][1]["x0"])
    for results, expected in kept:
        for name, value in expected.items():
            assert isinstance(results[name], OrtArray)
            np.testing.assert_array_equal(fetch(results[name]), value)


def test_tables_give_rows(fake_bundle: Path) -> None:
    graph = Bound().load(Bundle.open(fake_bundle), "step")
    host = np.arange(12, dtype=np.float32).reshape(3, 4)
    on_device = OrtArray(OrtDevice("cpu", 0), value=OrtDevice("cpu", 0).upload(host))
    for table in (graph.put("modulation", host), on_device):
        assert len(table) == 3 and table.shape == (3, 4) and table.dtype == np.float32 and table[1] is table[1]
        assert table[1:2] is table[1:2] and table[1:2].shape == (1, 4), "a row is uploaded once, however often it is fed"
        with pytest.raises(IndexError):
            table[3]
        for index in (0, 2, slice(1, 3), (slice(None), None)):
            np.testing.assert_array_equal(fetch(table[index]), host[index])
            np.testing.assert_array_equal(table[index].value.numpy(), host[index])


def test_a_value_does_not_change_with_the_callers_array(fake_bundle: Path) -> None:
    graph = Bound().load(Bundle.open(fake_bundle), "step")
    host = np.zeros((1, 2, 4, 4, 4), np.float32)
    value = graph.put("noise", host)
    host += 1
    assert not np.asarray(value).any() and not value.value.numpy().any()


def test_run_refuses_an_input(fake_bundle: Path) -> None:
    bundle = Bundle.open(fake_bundle)
    graph, inputs = Bound().load(bundle, "step"), inputs_of(bundle, "step")
    for change, message in (
        ({"noise": inputs["noise"].astype(np.float64)}, "`noise` is float64"),
        ({"noise": np.full_like(inputs["noise"], np.nan)}, "`noise` has 128 NaN"),
        ({"extra": inputs["noise"]}, "unknown: extra"),
    ):
        for way in (graph, graph.run):
            with pytest.raises(InputError, match=message):
                way({**inputs, **change})
    with pytest.raises(InputError, match="`noise` has 128 NaN"):
        graph.put("noise", np.full_like(inputs["noise"], np.nan))
    graph.executor.device = OrtDevice("no such device", 0)
    with pytest.raises(BackendError, match="ONNX Runtime failed in graph 'step'"):
        graph.run(inputs)
