"""`backend="auto"`: the fastest backend that really runs the bundle's step here, and a sentence that says why it was taken.

TensorRT where an engine fits, is whole and has run once; else torch, then ONNX Runtime, on the GPU; else ONNX Runtime on the
CPU, which is the same as without "auto". A candidate counts only after it has loaded (and so run) the step.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from motionrt.runtime.backend import Backend, Graph, OnnxRuntimeBackend
from motionrt.runtime.bundle import Bundle
from motionrt.runtime.errors import BackendError, InputError
from motionrt.runtime.machine import Gpu, find_gpus

log = logging.getLogger("motionrt")
STEP = "step"


@dataclass(frozen=True)
class Choice:
    """The `backend`, one sentence `why`, and the `graphs` that were loaded to find out."""

    backend: Backend
    why: str
    graphs: Mapping[str, Graph] = field(default_factory=dict)


def choose(bundle: Bundle, *, device: str | None = None, threads: int | None = None) -> Choice:
    """The backend for `bundle` on this machine. device: None, "cpu" (which ends the search), "cuda" or "cuda:1".

    With "cuda" the CPU is no answer: `BackendError` says what was tried.
    """
    if device is not None and device != "cpu" and not device.startswith("cuda"):
        raise InputError(f"device is {device!r}; with the backend auto it must be cpu, cuda, or not given.")
    refused: list[str] = []
    if device == "cpu":
        refused.append("the device cpu was asked for")
    else:
        gpus = find_gpus()
        if isinstance(gpus, str):
            refused.append(gpus)
        else:
            for name, attempt in _CANDIDATES.items():
                try:
                    backend, step = attempt(bundle, gpus, device or "cuda", threads)
                    return _done(backend, f"{name}: {getattr(backend, 'label', name)}", refused, step)
                except (BackendError, InputError) as error:
                    refused.append(f"{name}: {str(error).rstrip('.')}")
        if device is not None:
            raise BackendError(f"nothing runs this bundle on {device}: {'; '.join(refused)}. Use --device cpu, or none.")
    cpu = OnnxRuntimeBackend(threads)
    return _done(cpu, cpu.label, refused, None)


def _done(backend: Backend, what: str, refused: list[str], step: Graph | None) -> Choice:
    why = f"chose {what}" + (f", because not {'; not '.join(refused)}" if refused else "")
    log.info("%s", why)
    return Choice(backend, why, {} if step is None else {STEP: step})


def _tensorrt(bundle: Bundle, gpus: list[Gpu], device: str, threads: int | None) -> tuple[Backend, Graph]:
    from motionrt.runtime.tensorrt import TensorRTBackend

    engines = bundle.path / "engines"
    if not any(engines.glob(f"*/{STEP}.json")):
        raise BackendError(f"the bundle has no engine of its step (`motionrt build {bundle.path} --target {gpus[0].target}`)")
    backend = TensorRTBackend(device)
    step = backend.load(bundle, STEP)
    backend.fallback = OnnxRuntimeBackend(threads)  # only now: with one, `load` would not have refused the step
    return backend, step


def _torch(bundle: Bundle, gpus: list[Gpu], device: str, threads: int | None) -> tuple[Backend, Graph]:
    if STEP not in bundle.programs:
        raise BackendError("the bundle has no torch program of its step")
    if importlib.util.find_spec("torch") is None:
        raise BackendError("PyTorch is not installed (`pip install motionrt[torch]`)")
    from motionrt.runtime.torch_backend import TorchBackend

    backend = TorchBackend(device, threads=threads, fallback=OnnxRuntimeBackend(threads))
    return backend, backend.load(bundle, STEP)


def _onnxruntime(bundle: Bundle, gpus: list[Gpu], device: str, threads: int | None) -> tuple[Backend, Graph]:
    # Sizes of a graph are computed on the CPU by design, which the strict check cannot tell from a missing kernel; that the
    # provider itself is there is always checked.
    backend = OnnxRuntimeBackend(threads, device, allow_cpu=True)
    return backend, backend.load(bundle, STEP)


_CANDIDATES: dict[str, Callable[[Bundle, list[Gpu], str, int | None], tuple[Backend, Graph]]] = {
    "tensorrt": _tensorrt,
    "torch": _torch,
    "onnxruntime on the GPU": _onnxruntime,
}
