"""Which backend runs the graphs, where and how, as a user says it; and that backend, opened.

Each backend's module is imported only when it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from motionrt.runtime.arguments import flag, instance
from motionrt.runtime.backends.kinds import BACKENDS, ONNXRUNTIME, OPENVINO, TENSORRT, TORCH
from motionrt.runtime.backends.seam import Backend, Checked
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.dtypes import QUANTISED, WEIGHTS
from motionrt.runtime.errors import InputError, shown

JOINT = "+"  # between the devices of one request
EIGHT_BITS = {  # what a backend takes besides `WEIGHTS`
    ONNXRUNTIME.name: ("int8",), OPENVINO.name: ("int8",), TENSORRT.name: QUANTISED,
}  # fmt: skip


def _option(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class RunOptions:
    """Which backend runs the graphs, where and how. Every command that runs a graph has these options: name, type, default
    and help of each are those of the field (`with_run_options`).
    """

    backend: str = _option(
        ONNXRUNTIME.name,
        f"{', '.join(f'{kind.name} (needs {kind.needs})' for kind in BACKENDS.values())}, or auto: the fastest that runs here.",
    )
    device: str | None = _option(
        None,
        f"{'; '.join(f'{kind.name}: {kind.places}' for kind in BACKENDS.values())}. The first of them unless given; "
        "cuda:1 (gpu:1 of OpenVINO) is the second GPU. cuda:0+cuda:1: both for one request, of a bundle with split guidance.",
    )
    threads: int | None = _option(None, "Threads of the backend; all cores if not given.")
    allow_onnxruntime: bool = _option(
        False, "Run graphs that have no torch program, or no engine, in ONNX Runtime on the CPU; torch on a CPU always does."
    )
    allow_cpu: bool = _option(False, "ONNX Runtime on a GPU: run on the CPU what the GPU has no kernel for.")
    precision: str | None = _option(
        None,
        f"What is computed in: {', '.join(WEIGHTS)}, with float32 where numbers need it. Unless given: float32 on a CPU; on a "
        "GPU bfloat16 (torch), or what was built (tensorrt, onnxruntime). Where `motionrt build --precision` made them, also: "
        f"{', '.join(f'{kind} ({name})' for name, kinds in EIGHT_BITS.items() for kind in kinds)}.",
    )
    engines: str | None = _option(None, "Which engines, such as rtx-sm_89-float16; else the first that fits.")


class SideBySide:
    """Several devices for one request: the first of `backends` for everything, and `beside`, the others, for their share of the
    calls ahead of a step (`Loop.ahead`), which run at the same time."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.first, self.beside = backends[0], tuple(backends[1:])
        self.label = " + ".join(one.label for one in backends)
        self.precision, self.parallel_load = self.first.precision, self.first.parallel_load

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Graph `name` on the first device; `BackendError` or `BundleError` where that fails."""
        return self.first.load(bundle, name)


def open_backend(options: RunOptions = RunOptions()) -> Backend:
    """The backend that `options` ask for; with `allow_onnxruntime` the CPU's ONNX Runtime takes what it would refuse to load.

    Raises `InputError` for what does not exist and `BackendError` for a package or device that is not there.
    """
    instance("options", options, RunOptions, "RunOptions(...)")
    name, engines = options.backend, options.engines
    flag("allow_onnxruntime", options.allow_onnxruntime)
    flag("allow_cpu", options.allow_cpu)
    if not isinstance(name, str) or name not in BACKENDS:
        hint = " The choice 'auto' needs a bundle: MotionPipeline.from_bundle(..., backend='auto')." if name == "auto" else ""
        raise InputError(f"backend is {shown(name)}; it must be one of {', '.join(BACKENDS)}.{hint}")
    if engines is not None and name != TENSORRT.name:
        what = f"engines is {shown(engines)}, which the backend {name} does not use"
        raise InputError(f"{what}. Use the backend {TENSORRT.name}.")
    allowed = (*WEIGHTS, *EIGHT_BITS.get(name, ()))
    if options.precision is not None and options.precision not in allowed:
        raise InputError(f"precision is {shown(options.precision)}; it must be one of {', '.join(allowed)}.")
    kind = BACKENDS[name]
    if isinstance(options.device, str) and JOINT in options.device:
        return SideBySide([open_backend(replace(options, device=device)) for device in options.device.split(JOINT)])
    fallback = open_backend(RunOptions(threads=options.threads)) if options.allow_onnxruntime else None
    return _OPENS[name](kind.devices[0] if options.device is None else options.device, options, fallback)


def _open_onnxruntime(device: str, options: RunOptions, fallback: Backend | None) -> Backend:
    from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(options.threads, device, allow_cpu=options.allow_cpu, precision=options.precision)


def _open_openvino(device: str, options: RunOptions, fallback: Backend | None) -> Backend:
    from motionrt.runtime.backends.openvino.backend import OpenVinoBackend

    return OpenVinoBackend(options.threads, device, precision=options.precision)


def _open_torch(device: str, options: RunOptions, fallback: Backend | None) -> Backend:
    if importlib.util.find_spec("torch") is None:
        raise TORCH.missing()
    from motionrt.runtime.backends.torch_backend import TorchBackend  # imports torch: only when it is asked for

    if fallback is None and device == "cpu":  # exporters write programs of the loop; the rest runs beside it, on the same CPU
        fallback = open_backend(RunOptions(threads=options.threads))
    return TorchBackend(device, precision=options.precision, threads=options.threads, fallback=fallback)


def _open_tensorrt(device: str, options: RunOptions, fallback: Backend | None) -> Backend:
    from motionrt.runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(device, engines=options.engines, precision=options.precision, fallback=fallback)


_OPENS = {
    ONNXRUNTIME.name: _open_onnxruntime, OPENVINO.name: _open_openvino, TORCH.name: _open_torch, TENSORRT.name: _open_tensorrt,
}  # fmt: skip
