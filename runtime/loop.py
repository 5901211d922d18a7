"""A loop as data: which graph a step runs, what it is given, what is carried to the next. It knows no backend and no system.

    calls = run_loop(loop, graphs, rows, values, draw)      # a generator
    call = next(calls)                                      # Call(graph, inputs): run it, and
    call = calls.send(outputs)                              # give back what it gave; StopIteration holds the values at the end

Network and solver are both inside a step graph. MotionRAG's rows are taken from a scheduler (p0, p1, c0, c1, c2, c3):

    x0     = p0 x + p1 v                                   (v: the guided output of the network)
    x_next = c0 x + c1 x0 + c2 x0_previous + c3 noise      (DDIM: Song 2021, eq. 12; DPM-Solver++: Lu 2022)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import NOISE, Collect, GraphSpec, Loop, Node, Port, made_ahead, tables_of
from motionrt.runtime.errors import InputError

Array = NDArray[Any]
Draw = Callable[[int, tuple[int, ...]], NDArray[np.float32]]
Outputs = Mapping[str, Any]
Steps = Sequence[int]  # of a loop, from 0, in order


@dataclass(frozen=True, eq=False)
class Row:
    """What step `index` of `steps` reads of a table that has the same number of rows for every step, or what `count` steps from
    that one on read."""

    table: Any
    index: int
    steps: int
    count: int = 1

    def of(self, table: Any) -> Any:
        """These rows in `table`: `self.table`, or the same on a device."""
        rows = len(table) // self.steps
        return table[self.index * rows : (self.index + self.count) * rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.table) // self.steps * self.count, *self.table.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        value = np.asarray(self.of(self.table))
        return value if dtype is None else value.astype(dtype)


@dataclass(frozen=True)
class Call:
    """One call of a graph: `inputs` are arrays, values that a graph left on its device, and `Row`s, by port.

    `fixed`: ports whose value is the same object in every step of a loop: worth placing on a device once. `key`: equal keys,
    equal results, whatever the request (a schedule's tables). `step` of `steps`, counted from 1, where it is a step of `loop`.
    `ahead`: calls that are made before it, and may be made at the same time, each with the ports of this one that its outputs
    are for.
    """

    graph: str
    inputs: Mapping[str, Any]
    fixed: frozenset[str] = frozenset()
    key: Hashable = None
    loop: str = ""
    step: int = 0
    steps: int = 0
    ahead: tuple[tuple[Call, Mapping[str, str]], ...] = ()


@dataclass
class _Sum:
    """An output that is put together: `total` so far, float32 `[1, *dims]`."""

    spec: Collect
    total: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        self.total = np.zeros((1, *self.spec.dims), np.float32)

    def add(self, part: Array, at: Mapping[str, int]) -> None:
        """Put in the part of a step; `at`: the step's columns."""
        place: list[slice] = [slice(None)] * part.ndim
        for axis, column in self.spec.axes.items():
            place[axis] = slice(at[column], at[column] + part.shape[axis])
        weight: Any = 1
        for axis, (before, after) in self.spec.ramps.items():
            shape = [1] * part.ndim
            shape[axis] = -1
            weight = weight * ramp(part.shape[axis], at[before], at[after]).reshape(shape)
        self.total[tuple(place)] += part * weight


def run_loop(
    name: str, loop: Loop, graphs: Mapping[str, GraphSpec], rows: NDArray[np.float32], values: Mapping[str, Any], draw: Draw,
) -> Generator[Call, Outputs, dict[str, Any]]:  # fmt: skip
    """Run `loop`, called `name`, over `rows` `[T, R]`; the values that it gives. `graphs`: interfaces, by name.

    `values`: what the step graphs read that the loop does not make. `draw(i, shape)`: standard normal float32, draw 0 for what
    starts as noise and t + 1 for step t, asked for only where column `loop.noise` is not 0. Raises `InputError` for rows of
    another number of columns, or none.
    """
    if rows.ndim != 2 or rows.shape[1] != len(loop.columns) or not len(rows):
        raise InputError(
            f"the rows of loop '{name}' are {rows.shape}; they must be [T, {len(loop.columns)}] with T of 1 or more."
        )
    at = {column: index for index, column in enumerate(loop.columns)}
    steps = [loop.graphs[int(graph)] for graph in rows[:, at["graph"]]]
    ports = {graph: {port.name: port for port in graphs[graph].inputs} for graph in (*loop.run, *loop.tables)}
    feeds = {
        port.name: _feed(rows[:, [at[column] for column in loop.feeds[port.name]]], port)
        for taken in ports.values() for port in taken.values() if port.name in loop.feeds
    }  # fmt: skip
    spans, tables = windows(loop, graphs, steps), dict[str, tuple[Any, Steps]]()  # a table, and the steps that it is for

    def table_call(graph: str, span: Steps) -> Call:
        given, same = dict[str, Any](), set[str]()
        for port in ports[graph]:
            if port in feeds:
                given[port] = feeds[port][[*span]]
            elif port in tables:
                value, every = tables[port]
                given[port] = value if span == every else Row(value, span[0], len(every), len(span))
            else:
                given[port] = values[port]
                same.add(port)
        of_rows = feeds.keys() >= given.keys() and graph not in loop.windows
        key = (graph, *(given[port].tobytes() for port in given)) if of_rows else None
        return Call(graph, given, frozenset(same if graph in loop.windows else ()), key)

    for graph, (span, *_) in spans.items():
        if graph not in loop.windows:
            outputs = yield table_call(graph, span)
            tables |= {port: (value, span) for port, value in outputs.items()}
    carried: dict[str, Any] = {}
    zeros: dict[str, Array] = {}
    for port, start in loop.start.items():
        spec = _port(ports, loop.graphs, port)
        zeros[port] = np.zeros(spec.shape, spec.dtype)
        carried[port] = draw(0, spec.shape) if start == NOISE else zeros[port] if start == "zeros" else values[start]
    if loop.noise is not None:
        zeros[NOISE] = np.zeros(_port(ports, loop.graphs, NOISE).shape, np.float32)
    first = {port: _port(ports, loop.graphs, port) for port in loop.remembered}
    remembered: dict[str, Any] = {port: np.zeros(spec.shape, spec.dtype) for port, spec in first.items()}
    sliced = {port: np.asarray(values[part.value]) for port, part in loop.slices.items()}
    sums = {output: _Sum(part) for output, part in loop.collect.items()}

    def given(node: Node, t: int, where: Mapping[str, int], made: set[str]) -> tuple[dict[str, Any], frozenset[str]]:
        """The inputs of a call in step t, but for the ports `made`, and the names of those that stay the same."""
        inputs, fixed = dict[str, Any](), set[str]()
        for port, spec in ports[node.graph].items():
            source = node.reads.get(port, port)
            if source in carried:
                inputs[port] = carried[source]
            elif source in remembered:
                inputs[port] = remembered[source]
            elif source in feeds:
                inputs[port] = Row(feeds[source], t, len(rows))
            elif source in tables:
                table, span = tables[source]
                inputs[port] = Row(table, span.index(t), len(span))
            elif source == NOISE and loop.noise is not None:
                silent = rows[t, at[loop.noise]] == 0
                inputs[port] = zeros[NOISE] if silent else draw(t + 1, spec.shape)
            elif source in sliced:
                cut = [slice(None)] * len(spec.dims)
                for axis, column in loop.slices[source].axes.items():
                    cut[axis] = slice(where[column], where[column] + spec.dims[axis].opt)
                inputs[port] = np.ascontiguousarray(sliced[source][tuple(cut)])
            elif source not in made:
                inputs[port] = values[source]
                fixed.add(port)
        return inputs, frozenset(fixed)

    for t, row in enumerate(rows):
        graph = steps[t]
        for table in loop.windows:
            if (window := next((span for span in spans.get(table, ()) if span[0] == t), None)) is not None:
                for made in graphs[table].outputs:
                    tables.pop(made.name, None)  # before another takes its place
                outputs = yield table_call(table, window)
                tables |= {port: (value, window) for port, value in outputs.items()}
        where = {column: int(row[index]) for column, index in at.items()} if sliced or sums else {}
        ahead = [(Call(node.graph, *given(node, t, where, set())), node.writes) for node in loop.ahead.get(graph, ())]
        inputs, fixed = given(Node(graph), t, where, made_ahead(loop, graphs, graph))
        outputs = yield Call(graph, inputs, fixed, loop=name, step=t + 1, steps=len(rows), ahead=tuple(ahead))
        if loop.history and not remembered.keys() & inputs.keys():
            for value, kept in loop.history.items():
                now = outputs[value] if value in outputs else inputs[value]
                for port in kept:
                    remembered[port], now = now, remembered[port]
        carried |= {port: outputs[output] for output, port in loop.carry.items() if output in outputs}
        for output, total in sums.items():
            total.add(np.asarray(outputs[output]), where)
        del inputs, ahead  # the table that they read makes room for the next window's
    return {loop.gives[port]: carried[port] for port in loop.gives} | {s.spec.value: s.total for s in sums.values()}


def windows(loop: Loop, graphs: Mapping[str, GraphSpec], steps: Sequence[str]) -> dict[str, list[Steps]]:
    """The graphs of the tables that the steps of a loop read, and the steps that each call of one is for; `steps`: what each
    step runs. All at once (but for steps without the network), or in windows of steps that read it and follow each other."""
    spans: dict[str, list[Steps]] = {}
    for table in tables_of(loop, graphs, {*steps}):
        reading, found = {step for step in {*steps} if table in tables_of(loop, graphs, [step])}, list[range]()
        at = [t for t, step in enumerate(steps) if step in reading]
        if (most := loop.windows.get(table)) is None:
            spans[table] = [range(len(steps)) if loop.extrapolates is None or len(at) == len(steps) else at]
            continue
        for t in at:
            if found and found[-1].stop == t and len(found[-1]) < most:
                found[-1] = range(found[-1].start, t + 1)
            else:
                found.append(range(t, t + 1))
        spans[table] = [*found]
    return spans


def ramp(size: int, before: int, after: int) -> NDArray[np.float32]:
    """Weights of a part along one axis: rising over the overlap before, falling over the one after; those of two parts add to
    1."""
    weight = np.ones(size, np.float32)
    weight[:before] = (np.arange(before) + 0.5) / max(1, before)
    weight[size - after :] = 1 - (np.arange(after) + 0.5) / max(1, after)
    return weight


def dynamic_guidance(scale: float, timesteps: Sequence[float] | Array) -> list[float]:
    """CogVideoX's `use_dynamic_cfg`: one guidance scale for each step, to be given as `guidance`.

    g_t = 1 + scale (1 - cos(pi ((T - t) / T)^5)) / 2 with T the number of steps and t the timestep, as diffusers has it
    (T and t are of different units there too).
    """
    steps = len(timesteps)
    return [1 + scale * (1 - math.cos(math.pi * ((steps - float(t)) / steps) ** 5)) / 2 for t in timesteps]


def _feed(columns: NDArray[np.float32], port: Port) -> Array:
    """Columns `[T, n]` as what `port` reads a row of: `[T, n]` for `[batch, n]`, and `[T]` for `[batch]`, which has one
    column."""
    return np.ascontiguousarray(columns if len(port.dims) > 1 else columns[:, 0], dtype=port.dtype)


def _port(ports: Mapping[str, Mapping[str, Port]], graphs: Sequence[str], name: str) -> Port:
    """The port `name` of the first step graph that has it."""
    return next(ports[graph][name] for graph in graphs if name in ports[graph])
