"""What a bundle keeps in a device's memory: weights, request state and activations, graph by graph, and what fits where.

    plan = plan_memory(graph_sizes(bundle), roles(bundle.manifest), steps=25, dtype="bfloat16")
    for fit in plan.fits: print(fit)

Arithmetic on the declared interface and the sizes of files; nothing is loaded. What it says is a plan, not a measurement:

- *weights*: the bytes of the tensors in each graph's file, converted to the dtype that is computed in.
- *request state*: what graphs of the plan hand to a denoising loop; *rows*: what its tables hold for every step.
- *activations*: the most bytes of values that live at once inside one call, in the order of the exported graph, nothing fused
  and attention as one operation; recorded by the exporter. A runtime that writes in place needs less, one that picks
  convolutions with a workspace more. Where a bundle does not record them, the ports alone are counted, and it is said.
- `RESERVE` stands for the driver's context and the libraries' own memory. It is an assumption.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import GraphSpec, Manifest, Port
from motionrt.runtime.dtypes import DTYPES, WEIGHTS
from motionrt.runtime.errors import BundleError

GIB = 2**30
DEVICES = (8, 16, 24, 80)  # GiB, as cards are sold
RESERVE = GIB // 2
WIDTH = {name: DTYPES[name].bytes for name in WEIGHTS}  # what may be converted into each other
_STORED = {DTYPES[name].safetensors: name for name in WEIGHTS}


@dataclass(frozen=True)
class Roles:
    """What serves a request: `when`: graph -> "before", "loop" or "after", in the plan's order; and the ports of the loop's
    graphs that are `state` of the request or `rows` of a schedule, `windows` of them at a time where not all are there at once.
    Other graphs (of indexing, or there to compare) are not counted.
    """

    when: Mapping[str, str]
    state: frozenset[str]
    rows: frozenset[str]
    windows: Mapping[str, int] = field(default_factory=dict)


def roles(manifest: Manifest) -> Roles:
    """The roles of a bundle's graphs."""
    when: dict[str, str] = {}
    state, rows, made, windows = set[str](), set[str](), set[str](), dict[str, int]()
    if manifest.memory is not None:
        when[manifest.memory.query] = "before"
    for node in manifest.nodes:
        loop = manifest.loops.get(node.graph)
        if loop is not None and loop.feeds:
            when |= dict.fromkeys(loop.tables, "before") | dict.fromkeys(loop.run, "loop")
            state |= manifest.reads(node) & made
            rows |= {port.name for table in loop.tables for port in manifest.graphs[table].outputs}
            windows |= {port.name: most for table, most in loop.windows.items() for port in manifest.graphs[table].outputs}
        else:
            kind = "after" if "loop" in when.values() else "before"
            when |= {graph: kind for graph in ((node.graph,) if loop is None else loop.graphs) if graph not in when}
        made |= manifest.gives(node)
    return Roles(when, frozenset(state), frozenset(rows), windows)


@dataclass(frozen=True)
class GraphSize:
    """One graph: bytes of weights by dtype ("other" is never converted), its ports as (name, dtype, shape) at the sizes it is
    tuned for, and the recorded bytes of activations, counted in the dtype `typed` that the graph was traced in."""

    name: str
    weights: Mapping[str, int]
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    activations: int | None = None
    typed: str = "float32"


@dataclass(frozen=True)
class GraphPlan:
    """Bytes of one graph in the planned dtype; `ports`: its inputs and outputs that are neither state nor tables."""

    name: str
    when: str
    weights: int
    activations: int | None
    ports: int

    @property
    def alone(self) -> int:
        """What it takes with no other graph beside it."""
        return self.weights + self.ports + (self.activations or 0)


@dataclass(frozen=True)
class Fit:
    """What a device of `gib` GiB takes. `spare`: bytes left in the arrangement that `verdict` names; negative: bytes short."""

    gib: int
    verdict: str
    spare: int

    def __str__(self) -> str:
        rest = f"{self.spare / GIB:.1f} GiB to spare" if self.spare >= 0 else f"{-self.spare / GIB:.1f} GiB short"
        return f"{self.gib} GB: {self.verdict}, {rest}"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: `resident` with all graphs loaded, `loop` with the loop alone, `largest` graph that runs alone; the state."""

    dtype: str
    graphs: tuple[GraphPlan, ...]
    request_state: int
    schedule_rows: int
    steps: int
    resident: int
    loop: int
    largest: int
    fits: tuple[Fit, ...]
    unrecorded: tuple[str, ...]


def graph_sizes(bundle: Bundle) -> tuple[GraphSize, ...]:
    """The sizes of a bundle's graphs from its manifest and the headers of its weight files."""
    return tuple(
        GraphSize(
            name, weights_of(bundle, spec), tuple(map(_port, spec.inputs)), tuple(map(_port, spec.outputs)), spec.activations
        )
        for name, spec in bundle.graphs.items()
    )


def plan_memory(graphs: Sequence[GraphSize], roles: Roles, *, steps: int, dtype: str = "float32") -> MemoryPlan:
    """The plan for one request of `steps` steps that is computed in `dtype`: weights and activations are in it, ports, state
    and rows in the dtype of the declared interface. (The torch backend keeps the state in `dtype`.) ValueError for another
    dtype, or where no graph is run in a loop.
    """
    if dtype not in WIDTH:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(WIDTH)}.")
    sizes = {graph.name: graph for graph in graphs}
    loop = [name for name, when in roles.when.items() if when == "loop" and name in sizes]
    if not loop:
        raise ValueError(f"no graph is run in a loop; got {', '.join(sizes) or 'none'}.")
    read = {port[0]: _bytes(port) for name in loop for port in sizes[name].inputs}
    request_state = sum(count for name, count in read.items() if name in roles.state)
    schedule_rows = sum(read[port] * min(steps, roles.windows.get(port, steps)) for port in roles.rows & read.keys())
    between_ports = roles.state | roles.rows
    plans = []
    for name, when in roles.when.items():
        if name in sizes:
            graph = sizes[name]
            ports = sum(_bytes(port) for port in (*graph.inputs, *graph.outputs) if port[0] not in between_ports)
            plans.append(GraphPlan(name, when, converted(graph.weights, dtype), _activations(graph, dtype), ports))
    between = request_state + schedule_rows
    touched = {
        name: any(port[0] in between_ports for port in (*graph.inputs, *graph.outputs)) for name, graph in sizes.items()
    }
    needs = {plan.name: plan.alone + (between if touched[plan.name] else 0) for plan in plans}
    busiest = max(plan.alone - plan.weights for plan in plans)
    resident = sum(plan.weights for plan in plans) + between + busiest
    largest = max(needs, key=lambda name: needs[name])
    return MemoryPlan(
        dtype, tuple(plans), request_state, schedule_rows, steps, resident, max(needs[name] for name in loop), needs[largest],
        tuple(_fit(gib, resident, needs, roles.when) for gib in DEVICES),
        tuple(plan.name for plan in plans if plan.activations is None),
    )  # fmt: skip


def _fit(gib: int, resident: int, needs: Mapping[str, int], when: Mapping[str, str]) -> Fit:
    """All graphs resident; else one after the other; else those that do not fit on the host; else not at all."""
    room = gib * GIB - RESERVE
    if resident <= room:
        return Fit(gib, "fits, all graphs resident", room - resident)
    largest = max(needs.values())
    if largest <= room:
        return Fit(gib, "fits with request modules dropped before the loop, one graph at a time", room - largest)
    served = [name for name in needs if when[name] != "before"]
    over = [name for name, need in needs.items() if need > room]
    if not set(over) & set(served):
        most = max(need for name, need in needs.items() if name not in over)
        return Fit(gib, f"fits with {', '.join(over)} on the host and request modules dropped", room - most)
    worst = max((name for name in served), key=lambda name: needs[name])
    return Fit(gib, f"does not fit ({worst})", room - needs[worst])


def _activations(graph: GraphSize, dtype: str) -> int | None:
    return None if graph.activations is None else graph.activations * WIDTH[dtype] // WIDTH[graph.typed]


def converted(weights: Mapping[str, int], dtype: str) -> int:
    """Bytes of weights, given by the dtype that they are stored in, once floats are in `dtype`."""
    return sum(count * WIDTH[dtype] // WIDTH[kind] if kind in WIDTH else count for kind, count in weights.items())


def _bytes(port: tuple[str, str, tuple[int, ...]]) -> int:
    return DTYPES[port[1]].bytes * math.prod(port[2])


def _port(port: Port) -> tuple[str, str, tuple[int, ...]]:
    return port.name, port.dtype, tuple(dim.opt for dim in port.dims)


def weights_of(bundle: Bundle, spec: GraphSpec) -> dict[str, int]:
    """Bytes of a graph's weights by dtype: of the file beside it or in a package; else its ONNX file is nearly all weights."""
    if spec.data is not None:
        return stored_bytes(bundle.path / spec.data.file)
    if spec.weights is not None:
        found = importlib.util.find_spec(spec.weights.package)
        where = next(iter(found.submodule_search_locations), None) if found and found.submodule_search_locations else None
        path = Path(where) / spec.weights.file if where is not None else None
        return stored_bytes(path) if path is not None and path.is_file() else {}
    return {"float32": (bundle.path / spec.file).stat().st_size}


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes of a safetensors file's tensors by dtype, from its header alone; `BundleError` for a file that is none."""
    try:
        with path.open("rb") as file:
            count = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(count, path.stat().st_size)))
        total: dict[str, int] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                kind = _STORED.get(entry["dtype"], "other")
                total[kind] = total.get(kind, 0) + int(end) - int(begin)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"the weights {path} cannot be read ({error!r:.100}). Copy or export the bundle again.") from None
    return total
