"""A backend that tells what it is asked for, around ONNX Runtime: for tests that count, refuse or change what graphs do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.seam import Checked, Executor
from motionrt.runtime.bundle.bundle import Bundle

Outputs = dict[str, Any]


class Watching:
    """`on_load(name)` before a graph is loaded; `on_run(name, inputs, run)` in place of running it, `run` being how."""

    label, precision, parallel_load = "watching", "float32", False

    def __init__(
        self, on_run: Callable[[str, Mapping[str, Any], Callable[..., Outputs]], Outputs] | None = None,
        on_load: Callable[[str], object] = lambda name: None,
    ) -> None:  # fmt: skip
        self.on_load, self.on_run, self.inner = on_load, on_run, OnnxRuntimeBackend(1)

    def load(self, bundle: Bundle, name: str) -> Checked:
        self.on_load(name)
        graph = self.inner.load(bundle, name)
        return Checked(bundle.graph(name), _Watched(self, name, graph.run))


class _Watched(Executor):
    library = "watching"

    def __init__(self, backend: Watching, name: str, run: Callable[..., Outputs]) -> None:
        self.backend, self.name, self.inner = backend, name, run

    def execute(self, inputs: Mapping[str, Any]) -> Outputs:
        on_run = self.backend.on_run
        return self.inner(inputs) if on_run is None else on_run(self.name, inputs, self.inner)
