"""The backend seam: a graph is one callable, named arrays in, named arrays out. Here: ONNX Runtime, on the CPU or a GPU.

    Graph = (mapping of input name to array) -> dict of output name to array

A graph may also be a `DeviceGraph`, which can keep values where it computes: the loop then copies nothing per step.

Every call is checked against the interface that the bundle declares, so that a wrong array is a plain sentence and
not a message from inside an engine. Outputs belong to the caller: a backend never writes into what it has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backends.onnx_form import find_form
from motionrt.runtime.backends.onnx_weights import external_initializers, package_weights
from motionrt.runtime.backends.open import GPU_BUILD, ONNXRUNTIME
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec
from motionrt.runtime.errors import BackendError, BundleError, InputError

__all__ = [
    "PROVIDERS", "Array", "Backend", "DeviceGraph", "Graph", "OnnxRuntimeBackend", "call", "check_finite", "check_inputs",
    "check_ports", "describe", "external_initializers", "fetch", "first_line", "place",
]  # fmt: skip

Array = NDArray[Any]
Graph = Callable[[Mapping[str, Array]], dict[str, Array]]


class Backend(Protocol):
    """Anything that turns a graph of a bundle into a callable. `precision`: the dtype that it computes in, by name."""

    precision: str

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
        return {name: fetch(value) for name, value in arrays.items()}
    return {name: graph.put(name, value) for name, value in arrays.items()}


def call(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`graph` on host arrays or values of a device: results stay there where they are the caller's to keep, else on the host.

    They are where a graph says that it is `resident` (TensorRT): the next graph takes them without a way over the host.
    """
    if isinstance(graph, DeviceGraph) and getattr(graph, "resident", False):
        return graph.run(inputs)
    return graph({name: fetch(value) for name, value in inputs.items()})


def fetch(value: Any) -> Any:
    """A value of a device (`resident`) as a host array; anything else as it is."""
    return np.asarray(value) if getattr(value, "resident", False) else value


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
        raise InputError(f"{spec.name} input `{name}` has {bad} NaN or infinite values of {value.size}; all must be finite.")


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


PROVIDERS = {  # by device: the wanted one, and what may run what that leaves
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
_NO_FALLBACK = "session.disable_cpu_ep_fallback"


class OnnxRuntimeBackend:
    """ONNX Runtime. threads: threads within an operator; None lets ONNX Runtime take every core.

    device: "cpu", "cuda" (its CUDA provider) or "tensorrt" (its TensorRT provider, and CUDA for what that leaves). ONNX
    Runtime goes to the CPU without a word where a provider cannot be loaded: that is refused. So is a graph of which some
    nodes have no kernel on the GPU, unless `allow_cpu`. precision: "float32" runs the bundle's own graphs, "float16" and
    "bfloat16" their forms that `motionrt build --flavor onnxruntime` wrote (onnx_form.py); None is float32 on the CPU, and on
    a GPU the form of each graph that there is. Raises `InputError` for bad arguments, `BackendError` where this ONNX Runtime
    has no such provider.
    """

    parallel_load = True  # `load` may be called from several threads at once

    def __init__(
        self, threads: int | None = None, device: str = "cpu", *, allow_cpu: bool = False, precision: str | None = None
    ) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads is {threads!r}; it must be 1 or more, or None for every core.")
        base, self._index = ONNXRUNTIME.parse(device)
        self.threads, self.device, self.allow_cpu = threads, device, allow_cpu
        self._wanted = PROVIDERS[base]
        if precision == "bfloat16" and base == "cpu":
            raise InputError(
                "precision is 'bfloat16', for which ONNX Runtime has no kernels on the CPU. Use float32: the weights of a "
                "bundle in bfloat16 are widened exactly."
            )
        self._asked = "float32" if precision is None and base == "cpu" else precision
        self.precision = precision or "float32"  # where it was left open: of the graph that was loaded last
        self.label = f"{ONNXRUNTIME.name} {self._wanted[0]}" + (f" {device}" if device != base else "")
        if device != "cpu":
            self._providers(_onnxruntime())

    def load(self, bundle: Bundle, name: str) -> Graph:
        """Load graph `name` of `bundle`.

        Raises `BackendError` if ONNX Runtime, its provider or a package that holds weights is missing, or the graph cannot
        be loaded; `BundleError` if the graph's inputs and outputs are not those that bundle.json declares.
        """
        onnxruntime = _onnxruntime()
        spec = bundle.graph(name)
        form = find_form(bundle.path, spec, self._asked) if self._asked != "float32" else None
        path = bundle.graph_path(name) if form is None else form.path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: they come back as exceptions
        options.inter_op_num_threads = 1
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        providers = self._providers(onnxruntime)
        if self.device != "cpu" and not self.allow_cpu:
            options.add_session_config_entry(_NO_FALLBACK, "1")
        keep: dict[str, Array] = {}  # ONNX Runtime reads these arrays in place while it builds the session
        if spec.weights is not None and form is None:  # a form has all of its weights
            keep = package_weights(spec, path, bundle.path)
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in keep.values()]
            options.add_external_initializers(list(keep), values)
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its exceptions share no base but Exception
            if self.device != "cpu" and "CPU EP" in str(error):
                raise BackendError(
                    f"graph '{name}' has nodes for which ONNX Runtime's {self._wanted[0]} has no kernel, and the CPU was not "
                    "allowed for them. Allow it (--allow-cpu), or use another backend."
                ) from None
            fix = "Upgrade onnxruntime, or export the bundle again" if form is None else "Use --precision float32"
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load graph '{name}' ({first_line(error)}). {fix}."
            ) from None
        del keep
        if form is not None:
            self.precision = form.dtype
        if session.get_providers()[0] != self._wanted[0]:  # it is listed, but its own libraries could not be loaded
            raise BackendError(
                f"ONNX Runtime {onnxruntime.__version__} could not start {self._wanted[0]} for graph '{name}' and would have "
                f"run on {', '.join(session.get_providers())}. Install its CUDA and cuDNN, or use --device cpu."
            )
        outputs = [port.name for port in spec.outputs]
        declared = {port.name for port in spec.inputs}, set(outputs)
        found = {port.name for port in session.get_inputs()}, {port.name for port in session.get_outputs()}
        if declared != found:
            raise BundleError(
                f"graph '{name}' has inputs {sorted(found[0])} and outputs {sorted(found[1])}; bundle.json declares "
                f"{sorted(declared[0])} and {sorted(declared[1])}. Export the bundle again."
            )

        if self.device != "cpu":
            from motionrt.runtime.backends.onnx_device import OrtGraph

            return OrtGraph(spec, session, "cuda", self._index)

        def graph(inputs: Mapping[str, Array]) -> dict[str, Array]:
            check_inputs(spec, inputs)
            feed = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in inputs.items()}
            try:
                results = session.run(outputs, feed)
            except Exception as error:
                raise BackendError(f"ONNX Runtime failed in graph '{spec.name}': {first_line(error)}") from None
            return dict(zip(outputs, results, strict=True))

        return graph

    def _providers(self, onnxruntime: Any) -> list[Any]:
        """What the session is asked for; `BackendError` where this build of ONNX Runtime has not got it."""
        available = onnxruntime.get_available_providers()
        if self._wanted[0] not in available:
            raise BackendError(
                f"device is '{self.device}'; onnxruntime {onnxruntime.__version__} has {', '.join(available)}, not "
                f"{self._wanted[0]}. Use --device cpu, or {GPU_BUILD}."
            )
        if self.device == "cpu":
            return list(self._wanted)
        place = {"device_id": self._index}
        # TF32 would round fp32 products to 10 bits, and the results are those of the CPU
        settings = {"CUDAExecutionProvider": {**place, "use_tf32": "0"}, "TensorrtExecutionProvider": place}
        return [(name, settings[name]) for name in self._wanted if name in available]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ONNXRUNTIME.missing() from None
    return onnxruntime


def first_line(error: BaseException) -> str:
    """An exception's first line, for a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
