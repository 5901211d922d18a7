"""Which products cost most in 8 bits: each alone, on calls of the loops that a request made.

What is compared is the relative L2 error of a graph's outputs, the largest of all calls and outputs. It ranks the products, and
says little of videos: how many of the worst are left out is decided by measured quality (onnx_forms.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from motionrt.export.engines.calibration import form_graph
from motionrt.export.engines.graph import save
from motionrt.export.engines.process import Event, Listener
from motionrt.export.engines.quantised import products
from motionrt.runtime.backends.onnxruntime import AS_WRITTEN, OnnxRuntimeBackend
from motionrt.runtime.backends.seam import fetch
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.calibrate import requests_of, some_clips
from motionrt.runtime.loop import Row
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline

CALLS = 3  # of each graph: the first of a loop, one in its middle, the last
Calls = list[dict[str, Any]]


def ranked(
    bundle: Bundle, memory: Path, requests: int, quantise: Mapping[str, Callable[[ir.Model, Collection[str]], int]],
    listen: Listener = lambda event: None,
) -> list[tuple[str, str]]:  # fmt: skip
    """(graph, weight) of every product that is taken, the one that costs most first.

    quantise: graph -> what puts its products into 8 bits, but for those of given weights.
    """
    found: list[tuple[float, str, str]] = []
    for name, calls in _recorded(bundle, memory, requests, list(quantise)).items():
        exact = _outputs(form_graph(bundle, name, "float32"), calls)
        weights = list(dict.fromkeys(product.weight for product in products(form_graph(bundle, name, "float32"))))
        for place, weight in enumerate(weights):
            listen(Event(name, "looking for what costs most", place, len(weights)))
            model = form_graph(bundle, name, "float32")
            quantise[name](model, set(weights) - {weight})
            found.append((_error(exact, _outputs(model, calls)), name, weight))
    return [(name, weight) for _, name, weight in sorted(found, key=lambda item: (-item[0], *item[1:]))]


def _recorded(bundle: Bundle, memory: Path, requests: int, names: Sequence[str]) -> dict[str, Calls]:
    """What graphs are given in `CALLS` calls of one request."""
    seen: dict[str, Calls] = {}
    with MotionMemory.open(memory, readonly=True) as opened:
        pipeline = MotionPipeline(bundle, OnnxRuntimeBackend(), opened)
        (request,) = requests_of(bundle, opened, some_clips(opened, requests)[:1])
        run = pipeline.run

        def watched(call: Any, placed: Any) -> Any:
            if call.graph in names:
                rows = {port: value.of(value.table) if isinstance(value, Row) else value for port, value in call.inputs.items()}
                seen.setdefault(call.graph, []).append({port: np.array(fetch(value)) for port, value in rows.items()})
            return run(call, placed)

        pipeline.run = watched  # type: ignore[method-assign]
        pipeline.result(pipeline.start(request))
    return {name: [calls[place] for place in sorted({0, len(calls) // 2, len(calls) - 1})] for name, calls in seen.items()}


def _outputs(model: ir.Model, calls: Calls) -> list[list[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*AS_WRITTEN)
    names = [str(value.name) for value in model.graph.outputs]
    with tempfile.TemporaryDirectory(prefix="motionrt-sensitivity-") as folder:
        save(model, Path(folder) / "graph.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/graph.onnx", options, providers=["CPUExecutionProvider"])
        return [session.run(names, call) for call in calls]


def _error(exact: list[list[Any]], ours: list[list[Any]]) -> float:
    pairs = [pair for want, got in zip(exact, ours, strict=True) for pair in zip(want, got, strict=True)]
    return max(float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30)) for want, got in pairs)
