"""OpenVINO behind the seam: a bundle's graphs on CPUs of Intel, AMD and Arm, and on GPUs and NPUs of Intel.

Only CPUs were tried; what is here for GPUs and NPUs has not been run. Values stay on the host for every device.

Ownership: a graph keeps one request with its memory, and results are copied out of it; inputs are read in place.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motionrt.runtime.backends.kinds import OPENVINO
from motionrt.runtime.backends.machine import check_threads
from motionrt.runtime.backends.onnx_form import OnnxForm, quantised_form
from motionrt.runtime.backends.onnx_weights import package_file
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.openvino.cache import cache_folder, compile_cached
from motionrt.runtime.backends.openvino.graph import Source, read_source
from motionrt.runtime.backends.openvino.library import load_library, said
from motionrt.runtime.backends.openvino.proof import EXACT, LARGEST, ROUNDED, ProvenExecutor
from motionrt.runtime.backends.seam import ROOM, Checked, Executor, check_ports, first_line, out_of_memory
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec
from motionrt.runtime.errors import BackendError, BundleError, InputError, shown

# OpenVINO sets the locale of the process to "C" while it writes and reads models, and then back to what it found: two threads
# at once leave "C", and from then on files of text are read as ASCII.
_compiling = threading.Lock()
# What each precision is called as a hint, and as something that a device can do.
PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16"), "int8": ("", "INT8")}


class OpenVinoBackend:
    """OpenVINO. threads: of the CPU, no more than this process has cores; None leaves it to OpenVINO.

    device: "cpu", "gpu", "gpu:1" or "npu". precision: "float32" is exact; "bfloat16" and "float16" are OpenVINO's hint for the
    steps of loops, the other graphs are computed in float32 where the device can, and so is a step in float16 that names
    weights as leaving its range (`GraphSpec.wide`); "int8" runs the forms in `engines/openvino-int8`, and steps that have none
    in bfloat16 where the device can. None is float32, or float16 on a device that has no float32. A graph that OpenVINO
    computes wrongly runs in ONNX Runtime, with a `BackendWarning` (proof.py). Raises `InputError` for bad arguments,
    `BackendError` where OpenVINO, the device or the precision on it is not there.
    """

    parallel_load = False  # they would take turns
    proves = True  # whether the first call of a graph is compared with ONNX Runtime

    def __init__(self, threads: int | None = None, device: str = "cpu", *, precision: str | None = None) -> None:
        self.threads = check_threads(threads)
        kind, number = OPENVINO.parse(device)
        if precision is not None and precision not in PRECISIONS:
            raise InputError(f"precision is {shown(precision)}; it must be one of {', '.join(PRECISIONS)}.")
        self._library = _library()
        self._core = self._library.Core()
        self.device = device
        self._place = kind.upper() + (f".{number}" if number else "")
        there = list(self._core.available_devices)
        if not any(self._place in (name, name.split(".")[0]) for name in there):
            raise BackendError(
                f"device is '{device}'; OpenVINO {self._version} finds {', '.join(there) or 'none'} here. Use --device cpu, or "
                "install the driver of the device."
            )
        able = list(self._core.get_property(self._place, "OPTIMIZATION_CAPABILITIES"))
        self._able = {name for name, (_, capability) in PRECISIONS.items() if capability in able}
        self.precision = precision or ("float32" if "float32" in self._able else "float16")
        if self.precision not in self._able:
            raise BackendError(
                f"precision is '{self.precision}'; OpenVINO computes in {', '.join(p for p in PRECISIONS if p in self._able)} "
                f"on {self._core.get_property(self._place, 'FULL_DEVICE_NAME')}. Use one of these."
            )
        self._rest = "bfloat16" if "bfloat16" in self._able else "float32"  # beside int8
        self.label = f"{OPENVINO.name} {self._place} {self.precision}"
        if self.precision == "int8":
            self.label += f", the rest {self._rest}"

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Load graph `name` of `bundle`: compiled, or what an earlier process compiled from it.

        Raises `BackendError` if a package that is needed is missing or the graph cannot be compiled; `BundleError` if the
        graph's inputs and outputs are not those that bundle.json declares; `EngineError` for int8 in a bundle without forms.
        """
        spec = bundle.graph(name)
        form = quantised_form(bundle, name, "int8", OPENVINO.name) if self.precision == "int8" else None
        path = bundle.graph_path(name) if form is None else form.path
        try:
            inside = None if spec.weights is None or form is not None else package_file(spec, bundle.path)
            source = read_source(path, name, inside)
            check_ports(spec, source.inputs, source.outputs)
            precision = self.computes_in(bundle, name)
            folder = self._folder(bundle.path, spec, form, precision)
            compiled = compile_cached(lambda place: self.compile(source, precision, place), folder, bundle.path)
        except ImportError:
            raise OPENVINO.missing() from None
        except (BackendError, BundleError):
            raise
        except Exception as error:  # its exceptions, and those of onnx, share no base but Exception
            if out_of_memory(error):
                raise BackendError(f"too little memory to load graph '{name}'. {ROOM}.") from None
            fix = "Use the backend onnxruntime, or export the bundle again" if form is None else "Use --precision bfloat16"
            raise BackendError(f"OpenVINO {self._version} cannot load graph '{name}' ({said(error)}). {fix}.") from None
        ours = OpenVinoExecutor(compiled, source)
        weights = bundle.path / (spec.data.file if spec.data is not None else spec.file)
        if not self.proves or form is not None or weights.stat().st_size > LARGEST:
            return Checked(spec, ours)
        allowed, other = EXACT if precision == "float32" else ROUNDED, OnnxRuntimeBackend(self.threads)
        fresh = folder.with_name(f"{folder.name}.proof")
        file = fresh.with_suffix(".cached.proof") if compiled.get_property("LOADED_FROM_CACHE") else fresh
        return Checked(spec, ProvenExecutor(name, ours, lambda: other.load(bundle, name).executor, file, allowed, fresh))

    @property
    def _version(self) -> str:
        return str(self._library.__version__).split("-")[0]

    def computes_in(self, bundle: Bundle, name: str) -> str:
        """The precision of what is no int8 in graph `name`: less than float32 only in the steps of loops, where the time goes.
        What runs once a request holds coordinates and indices, which OpenVINO would round too."""
        less = self._rest if self.precision == "int8" else self.precision
        wide = less == "float16" and bool(bundle.graph(name).wide)
        return "float32" if "float32" in self._able and (wide or not bundle.in_loop(name)) else less

    def compile(self, source: Source, precision: str, folder: Path | None = None) -> Any:
        """`source` as a compiled model of OpenVINO that computes in `precision`. folder: OpenVINO's cache."""
        hint = PRECISIONS[precision][0]
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if hint == "f32" and self.precision != "int8":
            settings["EXECUTION_MODE_HINT"] = "ACCURACY"  # nothing is rounded by choice of the library
        if self._place == "CPU":
            settings["ENABLE_CPU_PINNING"] = False  # several processes would bind their threads to the same cores
            if self.threads is not None:
                settings["INFERENCE_NUM_THREADS"] = self.threads
        if folder is not None:
            settings["CACHE_DIR"] = str(folder)
        with _compiling:
            return self._core.compile_model(self._core.read_model(source.model), self._place, settings)

    def _folder(self, bundle: Path, spec: GraphSpec, form: OnnxForm | None, precision: str) -> Path:
        from motionrt import __version__

        files = sorted(form.files.values()) if form is not None else []
        name = str(self._core.get_property(self._place, "FULL_DEVICE_NAME"))
        made_by = [__version__, str(self._library.__version__), self._place, name]
        return cache_folder(bundle, spec.name, [spec.sha256, spec.weights_sha256, *files, precision, *made_by])


class OpenVinoExecutor(Executor):
    """A compiled graph with one request: calls from several threads take turns."""

    library = "OpenVINO"

    def __init__(self, compiled: Any, source: Source) -> None:
        self.compiled, self.outputs = compiled, source.outputs
        self._maps = source.maps  # what was compiled may read weights in place
        self._reads = {name for port in compiled.inputs for name in port.get_names()}
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`."""
        feed = {name: value for name, value in inputs.items() if name in self._reads}  # one that nothing reads may be gone
        with self._lock:
            try:
                results = self._request.infer(feed, share_inputs=True, share_outputs=False)
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise RuntimeError(said(error)) from None
            return {name: results[index] for index, name in enumerate(self.outputs)}


def _library() -> Any:
    try:
        return load_library()
    except ImportError as error:
        if out_of_memory(error):
            raise BackendError(f"too little memory to load OpenVINO ({first_line(error)}). Free some.") from None
        raise OPENVINO.missing() from None
