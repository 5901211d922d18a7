"""`motionrt doctor`: what this machine has, what of a bundle can run on it and why not, and what engines would take.

Everything is looked up, nothing is run: no engine is deserialised and no graph loaded, so that a broken installation can be
asked as well. Packages that are not there are findings, not errors.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import motionrt
from motionrt.runtime.backends.kinds import BACKENDS, ONNXRUNTIME, OPENVINO, TENSORRT, TORCH, onnxruntime_facts, tensorrt_facts
from motionrt.runtime.backends.machine import Gpu, find_gpus
from motionrt.runtime.backends.tensorrt.engine_file import FLAVORS, EngineFile, Machine
from motionrt.runtime.backends.tensorrt.estimate import available_memory, estimate_from_bundle
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.footprint import WIDTH, converted, graph_sizes, plan_memory, roles, weights_of
from motionrt.runtime.errors import BundleError, EngineError

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "cuda-bindings", "tensorrt", "tensorrt-rtx", "usearch",
    "av",
)  # fmt: skip
DTYPE = "float16"  # what a build is predicted for


def examine(path: Path | None = None) -> dict[str, Any]:
    """The findings as plain JSON: machine, packages, backends, the bundle at `path` if one is given, and a `verdict`."""
    gpus = find_gpus()
    found: dict[str, Any] = {
        "motionrt": motionrt.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_available": available_memory(),
        "gpus": [] if isinstance(gpus, str) else [asdict(gpu) for gpu in gpus],
        "no_gpu": gpus if isinstance(gpus, str) else None,
        "packages": {name: _version(name) for name in PACKAGES},
        "tensorrt": {flavor: tensorrt_facts(flavor) for flavor in FLAVORS},
        "onnxruntime": onnxruntime_facts(),
        "backends": _backends(gpus),
    }
    found["bundle"] = None if path is None else _bundle(path, found)
    found["verdict"] = _verdict(found)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends(gpus: list[Gpu] | str) -> dict[str, str | None]:
    """Backend and device -> why it cannot run anything here, or None. The best one first, the CPU last."""
    pairs = [(kind, device) for kind in reversed(BACKENDS.values()) for device in reversed(kind.devices)]
    return {kind.on(device): kind.why_not(device, gpus) for kind, device in sorted(pairs, key=lambda pair: pair[1] == "cpu")}


def _bundle(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What of the bundle each backend can run, graph by graph, and what its engines would take."""
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return {"path": str(path), "why": str(error), "graphs": {}, "backends": {}}
    graphs = {name: _graph(bundle, name, found) for name in bundle.graphs}
    backends = {}
    for backend, why in found["backends"].items():
        kind = backend.split()[0]
        if why is None:
            # a backend that cannot run the loops is none
            why = next((f"{name}: {graphs[name][kind]}" for name in bundle.steps if graphs[name][kind]), None)
        backends[backend] = {"why": why, "graphs": [name for name in graphs if graphs[name][kind] is None] if not why else []}
    return {
        "path": str(path), "name": bundle.name, "why": None, "graphs": graphs, "backends": backends, "memory": _memory(bundle),
    }  # fmt: skip


def _memory(bundle: Bundle) -> dict[str, Any]:
    """The memory plan of a request by precision; {} for a bundle without a loop, or `why` it cannot be told."""
    if not bundle.steps:
        return {}
    try:
        sizes = graph_sizes(bundle)
    except BundleError as error:
        return {"why": str(error)}
    steps = max(bundle.schedule(name).steps for name, loop in bundle.manifest.loops.items() if loop.feeds)
    plans = [plan_memory(sizes, roles(bundle.manifest), steps=steps, dtype=dtype) for dtype in WIDTH]
    return {plan.dtype: asdict(plan) | {"lines": [str(fit) for fit in plan.fits]} for plan in plans}


def _graph(bundle: Bundle, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Why each kind of backend cannot run graph `name` (None: it can), its engines, and the prediction for a build."""
    spec = bundle.graph(name)
    size, missing = converted(weights_of(bundle, spec), "float32"), None
    if spec.data is not None or spec.weights is not None:  # else they are in the graph's own file
        size += bundle.graph_path(name).stat().st_size
    if spec.weights is not None:
        home = importlib.util.find_spec(spec.weights.package)
        if home is None or not home.submodule_search_locations:
            missing = f"its weights are in the package {spec.weights.package}, which is not installed"
    engines = [_engine(bundle, path, found) for path in sorted((bundle.path / "engines").glob(f"*/{name}.json"))]
    guess = estimate_from_bundle(size, DTYPE)
    return {
        ONNXRUNTIME.name: missing,
        OPENVINO.name: missing,
        TORCH.name: TORCH.lacks(bundle, name, ""),
        TENSORRT.name: _best(engines, bundle, name, found),
        "engines": engines,
        "predicted_build": {
            "dtype": DTYPE, "seconds": round(guess.seconds, 1), "memory_bytes": guess.memory, "disk_bytes": guess.disk,
        },
    }  # fmt: skip


def _engine(bundle: Bundle, path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    try:
        file = EngineFile.read(path)
    except EngineError as error:
        return {"folder": path.parent.name, "why": str(error)}
    facts: dict[str, Any] = {
        "folder": path.parent.name, "flavor": file.flavor, "library": file.library, "targets": list(file.targets),
        "kernel": file.kernel, "bytes": file.engine_bytes, "build_seconds": file.build_seconds, "why": None,
    }  # fmt: skip
    installed = found["tensorrt"][file.flavor]
    machine = None
    if found["gpus"] and installed["version"] is not None:
        machine = Machine(file.flavor, installed["version"], found["gpus"][0]["target"])
    try:
        file.check(bundle.graph(path.stem), machine)
    except EngineError as error:
        return facts | {"why": str(error)}
    why = found["no_gpu"] or (f"{FLAVORS[file.flavor]} is {installed['why']}" if machine is None else None)
    return facts | {"why": why and f"whole and of this bundle, but {why}"}


def _best(engines: list[dict[str, Any]], bundle: Bundle, name: str, found: Mapping[str, Any]) -> str | None:
    if any(engine["why"] is None for engine in engines):
        return None
    if engines:
        return str(engines[0]["why"])
    target = found["gpus"][0]["target"] if found["gpus"] else "sm_89"
    targets = found["tensorrt"]["rtx"]["targets"]
    if targets is not None and target not in targets:
        return f"no engine, and TensorRT-RTX builds none for {target} (it does for {', '.join(targets)})"
    return TENSORRT.lacks(bundle, name, target)


def _verdict(found: Mapping[str, Any]) -> str:
    """One line: what would run here, and what keeps the best from it."""
    bundle = found["bundle"]
    if bundle is None:
        able = [name for name, why in found["backends"].items() if why is None]
        best = found["backends"][TENSORRT.name]
        text = f"usable here: {', '.join(able)}" if able else "no backend is usable here"
        return text + (f"; no TensorRT: {best}" if best else "")
    if bundle["why"]:
        return f"the bundle cannot be opened: {bundle['why']}"
    able = [name for name, facts in bundle["backends"].items() if facts["why"] is None]
    if not able:
        return f"nothing runs {bundle['name']} here: {found['backends'][ONNXRUNTIME.on('cpu')] or 'see the graphs'}"
    count, of = len(bundle["backends"][able[0]]["graphs"]), len(bundle["graphs"])
    text = f"{bundle['name']} runs here with {able[0]}" + (f" ({count} of {of} graphs)" if count < of else "")
    best = bundle["backends"][TENSORRT.name]["why"]
    return text + (f"; not with tensorrt: {best}" if best else "")


def runs(found: Mapping[str, Any]) -> bool:
    """Whether anything can run: the bundle if one was given, else any backend."""
    backends = found["backends"] if found["bundle"] is None else found["bundle"]["backends"]
    return any((facts if found["bundle"] is None else facts["why"]) is None for facts in backends.values())
