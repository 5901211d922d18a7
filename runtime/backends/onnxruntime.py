"""ONNX Runtime behind the seam: on the CPU, or on a GPU, where what a request computed is bound to the next run's inputs.

Ownership: ONNX Runtime allocates the outputs of every run anew, so nothing writes into what was returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from motionrt.runtime.backends.kinds import GPU_BUILD, ONNXRUNTIME, PROVIDERS
from motionrt.runtime.backends.machine import check_threads
from motionrt.runtime.backends.onnx_form import OnnxForm, find_form, quantised_form
from motionrt.runtime.backends.onnx_weights import package_weights
from motionrt.runtime.backends.seam import ROOM, Array, Checked, DeviceValue, Executor, check_ports, first_line, out_of_memory
from motionrt.runtime.bundle.bundle import Bundle, Port
from motionrt.runtime.dtypes import DTYPES, PORTS, QUANTISED
from motionrt.runtime.errors import BackendError, InputError

_NO_FALLBACK = "session.disable_cpu_ep_fallback"
# Each graph has threads of its own. Unless told not to, they look for more work for a while after a call, and take the
# processors from those of the next graph.
_QUIET = ("session.force_spinning_stop", "1")
# What stands between QuantizeLinear and DequantizeLinear is computed as it is written. What ONNX Runtime would fuse it to adds
# in 16 bits on x86 without VNNI, which two products of 8 bits leave. Such graphs are for others, and run here to be measured.
AS_WRITTEN = ("session.disable_quant_qdq", "1")


class OnnxRuntimeBackend:
    """ONNX Runtime. threads: threads within an operator, no more than this process has cores; None takes every core.

    device: "cpu", "cuda" (its CUDA provider) or "tensorrt" (its TensorRT provider, and CUDA for what that leaves). ONNX
    Runtime goes to the CPU without a word where a provider cannot be loaded: that is refused. So is a graph of which some
    nodes have no kernel on the GPU, unless `allow_cpu`. precision: "float32" runs the bundle's own graphs, "float16" and
    "bfloat16" their forms that `motionrt build --flavor onnxruntime` wrote (onnx_form.py), "int8" (on the CPU) the forms of the
    graphs that have one and the other graphs as they are; None is float32 on the CPU, and on a GPU the form of each graph that
    there is in float16 or bfloat16. Raises `InputError` for bad arguments, `BackendError` where this ONNX Runtime
    has no such provider.
    """

    parallel_load = True  # `load` may be called from several threads at once

    def __init__(
        self, threads: int | None = None, device: str = "cpu", *, allow_cpu: bool = False, precision: str | None = None
    ) -> None:
        threads = check_threads(threads)
        base, self._index = ONNXRUNTIME.parse(device)
        self.threads, self.device, self.allow_cpu = threads, device, allow_cpu
        self._wanted = PROVIDERS[base]
        if precision == "bfloat16" and base == "cpu":
            raise InputError(
                "precision is 'bfloat16', for which ONNX Runtime has no kernels on the CPU. Use float32: the weights of a "
                "bundle in bfloat16 are widened exactly."
            )
        if precision in QUANTISED and (precision != "int8" or base != "cpu"):
            raise InputError(
                f"precision is '{precision}' on {base}; ONNX Runtime computes in int8 on the CPU alone, and not in fp8. Use "
                "--precision float16, or the backend tensorrt."
            )
        self._asked = "float32" if precision is None and base == "cpu" else precision
        self.precision = precision or "float32"  # where it was left open: of the graph that was loaded last
        self.label = f"{ONNXRUNTIME.name} {self._wanted[0]}" + (f" {device}" if device != base else "")
        if precision in QUANTISED:
            self.label += f" {precision}"
        if device != "cpu":
            self._providers(_onnxruntime())

    def form(self, bundle: Bundle, name: str) -> OnnxForm | None:
        """The checked form that graph `name` runs in, None: as it is in the bundle. Raises `EngineError`."""
        if self._asked == "float32":
            return None
        if self._asked in QUANTISED:
            return quantised_form(bundle, name, self._asked)
        return find_form(bundle.path, bundle.graph(name), self._asked)

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Load graph `name` of `bundle`.

        Raises `BackendError` if ONNX Runtime, its provider or a package that holds weights is missing, or the graph cannot
        be loaded; `BundleError` if the graph's inputs and outputs are not those that bundle.json declares.
        """
        onnxruntime = _onnxruntime()
        spec = bundle.graph(name)
        form = self.form(bundle, name)
        path = bundle.graph_path(name) if form is None else form.path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # nothing but the end of the process: errors come back as exceptions
        options.inter_op_num_threads = 1
        options.add_session_config_entry(*AS_WRITTEN)
        options.add_session_config_entry(*_QUIET)
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
            if out_of_memory(error):
                raise BackendError(f"too little memory to load graph '{name}'. {ROOM}.") from None
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
        check_ports(spec, *([port.name for port in ports] for ports in (session.get_inputs(), session.get_outputs())))
        outputs = [port.name for port in spec.outputs]
        if self.device == "cpu":
            return Checked(spec, OrtExecutor(session, outputs))
        return Checked(spec, BoundExecutor(session, outputs, OrtDevice("cuda", self._index)))

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


class OrtExecutor(Executor):
    """A session on the CPU."""

    library = "ONNX Runtime"

    def __init__(self, session: Any, outputs: Sequence[str]) -> None:
        self.session, self.outputs = session, list(outputs)

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`."""
        return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))


@dataclass(frozen=True)
class OrtDevice:
    """A device by ONNX Runtime's name and number, such as "cuda", 0."""

    kind: str
    index: int

    def upload(self, array: Array) -> Any:
        """A C-contiguous host array as an `OrtValue` there."""
        return _onnxruntime().OrtValue.ortvalue_from_numpy(array, self.kind, self.index)


class BoundExecutor(OrtExecutor):
    """A session on a device: its inputs and outputs are bound there instead of copied."""

    device: OrtDevice

    def __init__(self, session: Any, outputs: Sequence[str], device: OrtDevice) -> None:
        super().__init__(session, outputs)
        self.device = device

    def place(self, port: Port, array: Array) -> OrtArray:
        """See `Executor`. The array is copied: what is on the device must not change with the caller's."""
        return OrtArray(self.device, host=array.copy())

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`."""
        binding = self.session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, OrtArray):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_cpu_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self.device.kind, self.device.index)
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: OrtArray(self.device, value=value) for name, value in values}


_NAMES = {DTYPES[name].ort: name for name in PORTS}


class OrtArray(DeviceValue):
    """An array on the device, or one that goes there when a graph first reads it.

    Rows of a table become values of their own, each once: ONNX Runtime cannot bind a part of a value.
    """

    def __init__(self, device: OrtDevice, host: Array | None = None, value: Any = None) -> None:
        assert host is not None or value is not None
        self.device: OrtDevice = device
        self._host, self._value = host, value
        self._rows: dict[tuple[int, int], OrtArray] = {}  # by first row and how many; -1: that row without its axis
        self.shape = host.shape if host is not None else tuple(value.shape())
        self.dtype = host.dtype if host is not None else np.dtype(_NAMES[value.data_type()])

    @property
    def value(self) -> Any:
        """The `OrtValue` on the device."""
        if self._value is None:
            assert self._host is not None
            self._value = self.device.upload(self._host)
        return self._value

    def __getitem__(self, index: Any) -> OrtArray:
        if self._host is None:
            self._host = self._value.numpy()
        if isinstance(index, int | np.integer):
            key = int(index), -1
        elif isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            key = start, max(stop - start, 0)
        else:
            return OrtArray(self.device, np.ascontiguousarray(self._host[index]))
        if key not in self._rows:
            self._rows[key] = OrtArray(self.device, np.array(self._host[index]))
        return self._rows[key]

    def to_host(self) -> Array:
        """See `DeviceValue`."""
        host: Array = self._value.numpy() if self._host is None else self._host.copy()
        return host


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if out_of_memory(error):
            raise BackendError(f"too little memory to load ONNX Runtime ({first_line(error)}). Free some.") from None
        raise ONNXRUNTIME.missing() from None
    return onnxruntime
