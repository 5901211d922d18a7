"""`backend="auto"`: the fastest backend that really runs the bundle here, and a sentence that says why it was taken.

On an NVIDIA GPU the backends are tried from the end of their list: TensorRT, torch, ONNX Runtime. A candidate counts only after
it has loaded (and so run) the graphs that are asked for. Else it is the CPU: ONNX Runtime, which is the same as without "auto",
or where OpenVINO is installed too the one that runs these graphs faster, in float32 both, as a few calls of each say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from motionrt.runtime.arguments import instance, listed
from motionrt.runtime.backends.kinds import BACKENDS, ONNXRUNTIME, OPENVINO, TENSORRT, BackendKind
from motionrt.runtime.backends.machine import Gpu, find_gpus
from motionrt.runtime.backends.open import JOINT, RunOptions, open_backend
from motionrt.runtime.backends.seam import Backend, Checked
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec
from motionrt.runtime.errors import BackendError, InputError, shown

log = logging.getLogger("motionrt")
ROUNDS, BUDGET = 3, 2.0  # calls of each graph that are timed; no further ones once so many seconds are gone


@dataclass(frozen=True)
class Choice:
    """The `backend`, one sentence `why`, and the `graphs` that were loaded to find out."""

    backend: Backend
    why: str
    graphs: Mapping[str, Checked] = field(default_factory=dict)


def backend_for(bundle: Bundle, options: RunOptions, graphs: Sequence[str] | None = None) -> Backend | Choice:
    """What `options` ask for: an open backend, or for "auto" what `choose` takes for `bundle` and `graphs`."""
    if options.backend != "auto":
        return open_backend(options)
    if options.engines is not None:
        raise InputError(f"engines is {options.engines!r}, and the choice was left to auto; name {TENSORRT.name} as backend.")
    return choose(bundle, device=options.device, threads=options.threads, precision=options.precision, graphs=graphs)


def choose(
    bundle: Bundle, *, device: str | None = None, threads: int | None = None, precision: str | None = None,
    graphs: Sequence[str] | None = None,
) -> Choice:  # fmt: skip
    """The backend for `bundle` on this machine. device: None, "cpu" (which ends the search), "cuda" or "cuda:1".

    precision: what is to be computed in; None leaves it to the backend, and is float32 on a CPU. graphs: those that a backend
    must run to be chosen, the steps of denoising loops if not given; others may go to ONNX Runtime where it has not got them.
    With "cuda" the CPU is no answer: `BackendError` says what was tried.
    """
    instance("the bundle", bundle, Bundle, "what Bundle.open gives")
    one = isinstance(device, str) and JOINT not in device and (device == "cpu" or device.startswith("cuda"))
    if device is not None and not one:
        raise InputError(f"device is {shown(device)}; with the backend auto it must be cpu, cuda, or not given.")
    graphs = bundle.steps if graphs is None else listed("graphs", graphs, "names of graphs")
    for name in graphs:
        bundle.graph(name)
    refused: list[str] = []
    if device == "cpu":
        refused.append("the device cpu was asked for")
    else:
        gpus = find_gpus()
        if isinstance(gpus, str):
            refused.append(gpus)
        else:
            # allow_cpu: sizes of a graph are computed on the CPU by design, which ONNX Runtime's strict check cannot tell from
            # a missing kernel; that its provider itself is there is always checked
            for kind in reversed([kind for kind in BACKENDS.values() if "cuda" in kind.devices]):
                name = kind.on("cuda")
                options = RunOptions(kind.name, device or "cuda", threads, allow_cpu=True, precision=precision)
                try:
                    backend, loaded = _try(kind, bundle, gpus, options, graphs)
                    return _done(backend, f"{name}: {backend.label}", refused, loaded)
                except (BackendError, InputError) as error:
                    refused.append(f"{name}: {str(error).rstrip('.')}")
        if device is not None:
            raise BackendError(f"nothing runs this bundle on {device}: {'; '.join(refused)}. Use --device cpu, or none.")
    return _on_the_cpu(bundle, RunOptions(threads=threads, precision=precision), graphs, refused)


def _on_the_cpu(bundle: Bundle, options: RunOptions, graphs: Sequence[str], refused: list[str]) -> Choice:
    """ONNX Runtime, or OpenVINO where that is installed, runs `graphs` and is faster; both are in memory meanwhile."""
    cpu = open_backend(options)
    if options.precision not in (None, "float32") or not graphs or OPENVINO.probe("cpu") is not None:
        return _done(cpu, cpu.label, refused, {})
    loaded = {name: cpu.load(bundle, name) for name in graphs}
    try:
        other: Any = open_backend(replace(options, backend=OPENVINO.name, precision="float32"))
        other.proves = False  # a proof wants the inputs of a request, and would be timed too
        theirs = {name: other.load(bundle, name) for name in graphs}
        ours, other_took = seconds_of([loaded, theirs])
    except BackendError as error:
        refused.append(f"{OPENVINO.name}: {str(error).rstrip('.')}")
        return _done(cpu, cpu.label, refused, loaded)
    told = [f"{backend.label} {1e3 * took:.3g} ms" for backend, took in ((cpu, ours), (other, other_took))]
    what = f"{{}} by the time of {', '.join(graphs)}: {' and '.join(told)}"
    if other_took < ours:
        other.proves = True
        return _done(other, what.format(other.label), refused, {})  # loaded again, from its cache
    return _done(cpu, what.format(cpu.label), refused, loaded)


def seconds_of(sides: Sequence[Mapping[str, Checked]]) -> list[float]:
    """How long each side takes to run its graphs once, at the sizes that the bundle is tuned for: the best of a few rounds in
    turns, or of one where a round takes long. Raises `BackendError` where a graph fails."""
    feeds = {name: _made_up(graph.spec) for name, graph in sides[0].items()}
    best, start = [float("inf")] * len(sides), time.perf_counter()
    for _ in range(ROUNDS):
        for index, graphs in enumerate(sides):
            begun = time.perf_counter()
            for name, graph in graphs.items():
                graph.run(feeds[name])
            best[index] = min(best[index], time.perf_counter() - begun)
        if time.perf_counter() - start > BUDGET:
            break
    return best


def _made_up(spec: GraphSpec) -> dict[str, Any]:
    """Inputs of any values: normal numbers, and 1 for each integer."""
    random, values = np.random.default_rng(0), dict[str, Any]()
    for port in spec.inputs:
        shape = tuple(dim.opt for dim in port.dims)
        values[port.name] = np.asarray(random.standard_normal(shape) if port.dtype == "float32" else np.ones(shape), port.dtype)
    return values


def _done(backend: Backend, what: str, refused: list[str], loaded: Mapping[str, Checked]) -> Choice:
    why = f"chose {what}" + (f", because not {'; not '.join(refused)}" if refused else "")
    log.info("%s", why)
    return Choice(backend, why, loaded)


def _try(
    kind: BackendKind, bundle: Bundle, gpus: list[Gpu], options: RunOptions, graphs: Sequence[str]
) -> tuple[Backend, dict[str, Checked]]:
    """A backend of `kind` that has loaded `graphs`; `BackendError` says why there is none."""
    for name in graphs:
        if lacking := kind.lacks(bundle, name, gpus[0].target):
            raise BackendError(f"{name}: {lacking}")
    if why := kind.why_not("cuda", gpus):
        raise BackendError(why)
    backend: Any = open_backend(options)
    loaded = {name: backend.load(bundle, name) for name in graphs}
    if kind is not ONNXRUNTIME:  # only now: with a fallback, `load` would not have refused a graph
        backend.fallback = open_backend(RunOptions(threads=options.threads))
    return backend, loaded
