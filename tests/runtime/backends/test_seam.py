"""The one checked graph over an executor that is not there: what it lets through, what it moves, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.backends.seam import Checked, DeviceValue, Executor, fetch
from motionrt.runtime.bundle.bundle import Dim, GraphSpec, Port
from motionrt.runtime.errors import BackendError, EngineError, InputError

BATCH = Dim("B", 1, 1, 4)
SPEC = GraphSpec(
    "g",
    "g.onnx",
    "",
    (Port("x", "float32", (BATCH, Dim("", 3, 3, 3))), Port("ids", "int64", (BATCH,)), Port("scale", "float32", ())),
    (Port("y", "float32", (BATCH, Dim("", 3, 3, 3))),),
)


class Far(DeviceValue):
    """An array on a device that only counts what is fetched from it."""

    def __init__(self, device: str, host: NDArray[Any]) -> None:
        self.device, self.host, self.fetched = device, host, 0
        self.shape, self.dtype = host.shape, host.dtype

    def __getitem__(self, index: Any) -> Far:
        return Far(str(self.device), np.asarray(self.host[index]))

    def to_host(self) -> NDArray[Any]:
        self.fetched += 1
        return self.host.copy()


class Product(Executor):
    """scale * x, on a device or the host; keeps what it was given."""

    library = "Product"

    def __init__(self, device: str | None = None, fails: Exception | None = None) -> None:
        self.device, self.fails = device, fails
        self.given: list[dict[str, Any]] = []

    def place(self, port: Port, array: NDArray[Any]) -> Any:
        return array if self.device is None else Far(str(self.device), array.copy())

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.given.append(dict(inputs))
        if self.fails is not None:
            raise self.fails
        hosts = {name: value.host if isinstance(value, Far) else value for name, value in inputs.items()}
        result = hosts["scale"] * hosts["x"]
        return {"y": result if self.device is None else Far(str(self.device), result)}


def feed(batch: int = 1) -> dict[str, Any]:
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    return {"scale": np.array(2, np.float32), "ids": np.zeros(batch, np.int64), "x": x}


@pytest.mark.parametrize(
    "fault",
    [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("BFCArena: Failed to allocate memory for requested buffer"),
     RuntimeError("CUDA out of memory"), RuntimeError("can't start new thread")],
    ids=repr,
)  # fmt: skip
def test_too_little_memory_is_said_with_what_helps(fault: Exception) -> None:
    with pytest.raises(BackendError, match="too little memory to run graph 'g'. Free some, .*--low-memory"):
        Checked(SPEC, Product(fails=fault)).run(feed())


def test_values_that_a_request_made_too_large_are_said() -> None:
    """Nobody gave these latents: what is to be changed is a number of the request."""
    with pytest.raises(InputError, match="If you did not give them, numbers of the request are too large .* guidance"):
        Checked(SPEC, Product()).run(feed() | {"x": np.full((1, 3), np.inf, np.float32)})


def test_on_the_host_a_value_is_the_array_itself() -> None:
    graph = Checked(SPEC, Product())
    x = feed()["x"]
    assert graph.put("x", x) is x and graph.put("x", graph.put("x", x)) is x and fetch(x) is x
    flipped = np.asfortranarray(np.ones((4, 3), np.float32))
    assert graph.put("x", flipped).flags.c_contiguous
    assert graph.put("scale", np.float32(2)).shape == (), "a number stays one"
    table = np.ones((7, 2, 3), np.float32)
    assert graph.put("x", table) is table, "more rows than the port: each is fed in its turn"


@pytest.mark.parametrize(
    "port, value, message",
    [
        ("z", np.zeros(3, np.float32), "g has no input `z`; this graph takes x, ids, scale"),
        ("x", np.zeros((1, 3)), r"g input `x` is float64; this bundle accepts float32 \[B 1-4, 3\]. Convert it with .astype"),
        ("ids", np.zeros(1, np.int32), "`ids` is int32; this bundle accepts int64"),
        ("x", np.full((9, 1, 3), np.inf, np.float32), "`x` has 27 NaN or infinite values of 27"),
        ("x", Far("elsewhere", np.full((1, 3), np.nan, np.float32)), "`x` has 3 NaN"),
    ],
)
def test_put_refuses(port: str, value: Any, message: str) -> None:
    for device in (None, "gpu"):
        with pytest.raises(InputError, match=message):
            Checked(SPEC, Product(device)).put(port, value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i.pop("x"), "g: missing inputs: x; unknown: none; this graph takes x, ids, scale"),
        (lambda i: i.update(z=i["x"]), "missing inputs: none; unknown: z"),
        (lambda i: i.update(x=[[0.0, 1.0, 2.0]]), "`x` is list, not an array"),
        (lambda i: i.update(scale=2.0), "`scale` is float, not an array"),
        (lambda i: i.update(x=i["x"].astype(">f4")), "`x` is >f4; this bundle accepts float32"),
        (lambda i: i.update(scale=np.ones(1, np.float32)), r"`scale` is \[1\]; this bundle accepts float32 \[\]"),
        (lambda i: i.update(x=np.ones((5, 3), np.float32)), r"`x` is \[5, 3\]; .*Change the array, or export"),
        (lambda i: i.update(ids=np.zeros(2, np.int64)), "`ids` has B = 2 but `x` has B = 1; they must be equal"),
        (lambda i: i.update(scale=np.array(np.nan, np.float32)), "`scale` has 1 NaN or infinite values of 1"),
        (lambda i: i.update(x=Far("elsewhere", np.full((1, 3), np.nan, np.float32))), "`x` has 3 NaN"),
        (lambda i: i.update(x=Far("gpu", np.ones((1, 4), np.float32))), r"`x` is \[1, 4\]"),
        (lambda i: i.update(x=Far("gpu", np.ones((1, 3)))), "`x` is float64"),
    ],
)
@pytest.mark.parametrize("device", [None, "gpu"])
def test_run_refuses_before_anything_is_computed(device: str | None, change: Callable[[Any], object], message: str) -> None:
    executor, inputs = Product(device), feed()
    change(inputs)
    for way in (Checked(SPEC, executor), Checked(SPEC, executor).run):
        with pytest.raises(InputError, match=message):
            way(inputs)
    assert not executor.given


def test_an_executor_gets_its_ports_in_order_contiguous_and_on_its_device() -> None:
    executor = Product("gpu")
    graph = Checked(SPEC, executor)
    inputs = feed(2)
    flipped = inputs["x"][::-1]
    here, elsewhere = graph.put("ids", inputs["ids"]), Far("another", np.array(3, np.float32))
    assert graph.put("ids", here) is here and graph.put("scale", elsewhere) is not elsewhere
    result = graph.run({"scale": elsewhere, "ids": here, "x": flipped})["y"]
    assert isinstance(result, Far) and result.fetched == 0, "it stays where it was computed"
    np.testing.assert_array_equal(fetch(result), 3 * flipped)
    (given,) = executor.given
    assert list(given) == ["x", "ids", "scale"]
    assert given["ids"] is here and here.fetched == 0
    assert given["x"].flags.c_contiguous and type(given["scale"]) is np.ndarray and given["scale"].shape == ()


def test_results_of_one_backend_are_taken_by_another() -> None:
    far, near = Checked(SPEC, Product("gpu")), Checked(SPEC, Product())
    inputs = feed()
    once = far.run(inputs)["y"]
    np.testing.assert_array_equal(near.run({**inputs, "x": once})["y"], 4 * inputs["x"])
    np.testing.assert_array_equal(far({**inputs, "x": near.run(inputs)["y"]})["y"], 4 * inputs["x"])


def test_rows_of_tables_are_fed() -> None:
    """A row of a host table [T] is a NumPy scalar, which is as good as an array of no dimensions."""
    scales = np.arange(1, 4, dtype=np.float32)
    for device in (None, "gpu"):
        graph, inputs = Checked(SPEC, Product(device)), feed()
        table = graph.put("scale", scales)
        assert len(table) == 3 and len(table[1:]) == 2
        for row, scale in zip(table, scales, strict=True):
            np.testing.assert_array_equal(graph({**inputs, "scale": row})["y"], scale * inputs["x"])


@pytest.mark.parametrize(
    "fails, raised, message",
    [
        (ZeroDivisionError("by\nzero"), BackendError, "Product failed in graph 'g': ZeroDivisionError: by$"),
        (ValueError(), BackendError, "Product failed in graph 'g': ValueError:"),
        (EngineError("as it was said"), EngineError, "^as it was said$"),
    ],
    ids=repr,
)
def test_what_fails_inside_is_said(fails: Exception, raised: type[Exception], message: str) -> None:
    with pytest.raises(raised, match=message):
        Checked(SPEC, Product(fails=fails)).run(feed())


def test_a_device_value_reads_as_an_array() -> None:
    value = Far("gpu", np.arange(6, dtype=np.float32).reshape(2, 3))
    assert value.ndim == 2 and len(value) == 2 and [row.shape for row in value] == [(3,), (3,)]
    np.testing.assert_array_equal(np.asarray(value, np.float64), value.host)
    with pytest.raises(TypeError, match="no length"):
        len(value[0][0])
