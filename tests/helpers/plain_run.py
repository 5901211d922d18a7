"""The plan of a bundle run plainly, one call after the other, as bundle.json says it: nothing of the run side but its parser.

    run = PlainRun(Bundle.open(path))
    values = run({"image": ..., "prompt.input_ids": ..., "motion_scale": ...}, draw)     # every value that the plan makes

Loaded by path: the tests are not a package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[str, Mapping[str, Array]], dict[str, Array]]
Ports = Mapping[str, tuple[str, tuple[int, ...]]]  # input -> dtype, and shape for one request
Draw = Callable[[str, int, tuple[int, ...]], Array]  # (node, 0 at the start and t + 1 in step t, shape) -> standard normal


def drawn(seed: int) -> Draw:
    """Numbers of a seed that are another for each node and step."""

    def draw(node: str, step: int, shape: tuple[int, ...]) -> Array:
        return np.random.default_rng([seed, step, *node.encode()]).standard_normal(shape).astype(np.float32)

    return draw


def ramp(size: int, before: int, after: int) -> Array:
    """Weights along an axis: rising over what is shared with the part before, falling over the next; sums of parts are 1."""
    weight = np.ones(size, np.float32)
    weight[:before] = (np.arange(before) + 0.5) / max(1, before)
    weight[size - after :] = 1 - (np.arange(after) + 0.5) / max(1, after)
    return weight


def run_loop(
    name: str, loop: Any, rows: Array, values: Mapping[str, Array], ports: Mapping[str, Ports],
    call: Call, draw: Draw, watch: Callable[[dict[str, Array]], None] = lambda outputs: None,
) -> dict[str, Array]:  # fmt: skip
    """A loop of the manifest over `rows [T, R]`; `ports`: graph -> input -> (dtype, shape for one request); `watch` sees what
    each step gives."""
    column = {key: rows[:, index] for index, key in enumerate(loop.columns)}

    def fed(port: str, dtype: str, part: slice) -> Array:
        stacked = np.stack([column[key][part] for key in loop.feeds[port]], axis=1)
        return (stacked[:, 0] if len(loop.feeds[port]) == 1 else stacked).astype(dtype)

    tables: dict[str, Array] = {}
    for graph in loop.tables:
        given = {**values, **tables}
        inputs = {p: fed(p, dtype, slice(None)) if p in loop.feeds else given[p] for p, (dtype, _) in ports[graph].items()}
        tables |= call(graph, inputs)
    kept: dict[str, Array] = {}
    for port, value in loop.start.items():
        shape = ports[loop.graphs[0]][port][1]
        made = {"noise": lambda shape: draw(name, 0, shape), "zeros": lambda shape: np.zeros(shape, np.float32)}
        kept[port] = made[value](shape) if value in made else values[value]
    whole = {key: np.zeros((1, *part.dims), np.float32) for key, part in loop.collect.items()}
    for step in range(len(rows)):
        graph, inputs = loop.graphs[int(column["graph"][step])], {}
        for port, (dtype, shape) in ports[graph].items():
            if port in kept:
                inputs[port] = kept[port]
            elif port in loop.feeds:
                inputs[port] = fed(port, dtype, slice(step, step + 1))
            elif port in tables:
                inputs[port] = tables[port][step : step + 1]
            elif port == "noise":
                inputs[port] = draw(name, step + 1, shape) if column[loop.noise][step] else np.zeros(shape, np.float32)
            elif port in loop.slices:
                part = loop.slices[port]
                starts = {axis: int(column[key][step]) for axis, key in part.axes.items()}
                place = tuple(slice(starts[a], starts[a] + n) if a in starts else slice(None) for a, n in enumerate(shape))
                inputs[port] = np.ascontiguousarray(values[part.value][place])
            else:
                inputs[port] = values[port]
        outputs = call(graph, inputs)
        watch(outputs)
        kept |= {port: outputs[output] for output, port in loop.carry.items() if output in outputs}
        for output, part in loop.collect.items():
            piece = outputs[output]
            for axis, pair in part.ramps.items():
                weight = ramp(piece.shape[axis], *(int(column[key][step]) for key in pair))
                piece = piece * weight.reshape([-1 if a == axis else 1 for a in range(piece.ndim)])
            starts = {axis: int(column[key][step]) for axis, key in part.axes.items()}
            place = tuple(slice(starts[a], starts[a] + n) if a in starts else slice(None) for a, n in enumerate(piece.shape))
            whole[output][place] += piece
    found = {value: kept[port] for port, value in loop.gives.items()}
    return found | {part.value: whole[output] for output, part in loop.collect.items()}


class PlainRun:
    """A bundle's graphs in ONNX Runtime, one thread, and its plan."""

    def __init__(self, bundle: Any) -> None:
        self.bundle = bundle
        self.sessions: dict[str, Any] = {}
        self.ports = {
            name: {port.name: (port.dtype, port.shape) for port in spec.inputs} for name, spec in bundle.graphs.items()
        }

    def call(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import onnxruntime

        if graph not in self.sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            path = str(self.bundle.graph_path(graph))
            self.sessions[graph] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [port.name for port in self.bundle.graph(graph).outputs]
        return dict(zip(names, self.sessions[graph].run(names, dict(inputs)), strict=True))

    def __call__(
        self, given: Mapping[str, Array], draw: Draw, *, schedules: Mapping[str, tuple[str, int]] | None = None,
        columns: Mapping[str, Any] | None = None, watch: Callable[[dict[str, Array]], None] = lambda outputs: None,
    ) -> dict[str, Array]:  # fmt: skip
        """All values. `schedules`: loop -> (name, steps); `columns`: input of the kind column -> a number, or one for each
        step; `watch` sees what each step of the loop `video` gives."""
        manifest, values = self.bundle.manifest, dict(given)
        for node in manifest.nodes:
            loop = manifest.loops.get(node.graph)
            if loop is None:
                inputs = {}
                for port, (_, shape) in self.ports[node.graph].items():
                    inputs[port] = draw(node.graph, 0, shape) if port == "noise" else values[node.reads.get(port, port)]
                outputs = self.call(node.graph, inputs)
                values |= {node.writes.get(name, name): value for name, value in outputs.items()}
                continue
            rows = np.array(self.bundle.schedule(node.graph, *(schedules or {}).get(node.graph, ())).rows)
            for name, value in (columns or {}).items():
                if manifest.inputs[name].loop == node.graph:
                    rows[:, loop.columns.index(manifest.inputs[name].column)] = value
            seen = watch if node.graph == "video" else lambda outputs: None
            values |= run_loop(node.graph, loop, rows, values, self.ports, self.call, draw, seen)
        return values
