"""A request and its job: the calls of graphs that answer it, one after the other, each asked for and then given its result.

    job = pipeline.start(Request({"image": "star.png", "prompt": "a star turns"}))     # every check, no work
    for call in job:                                                                   # one `next` is one call of a graph
        print(call.graph, call.step, call.steps)
    job.result.frames

Stage times, progress, stopping (`close`), low memory, batches and benchmarks are all read off a job: there is no other way
through the plan. A job says what it wants next (`call`) and takes what came of it (`send`); who runs the call is not its
concern.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle, Schedule
from motionrt.runtime.bundle.manifest import NOISE, ColumnInput, Manifest, Node
from motionrt.runtime.errors import BackendError, InputError, MemoryStoreError, shown
from motionrt.runtime.inputs import column, complete, convert
from motionrt.runtime.loop import Call, Outputs, run_loop
from motionrt.runtime.memory.search import Search
from motionrt.runtime.noise import check_seed, noise

if TYPE_CHECKING:
    from motionrt.runtime.memory.memory import MotionMemory, Reference
    from motionrt.runtime.memory.set import MemorySet

    Memory = MotionMemory | MemorySet

Placed = dict[tuple[str, str], tuple[Any, Any]]  # (graph, port) -> a value, and the same on the graph's device

_GRAPHS = 1 << 32  # noise streams: of loops from 0 on, of graphs from here on, by their place in the plan


@dataclass(frozen=True)
class Request:
    """What is asked for. `inputs`: by the names that the bundle declares; None or absent is the default.

    `seed`: the same one gives the same frames. `solver`, `steps`: for every denoising loop, or a mapping from loops; None takes
    the bundle's. `references`: how many clips to retrieve, or the clips themselves (`Reference`s, or ids of clips in the
    memory), most similar first. `search`: which clips may be retrieved. `given`: values of the plan by name, float32, in place
    of what would compute them: only what is still needed is run.
    """

    inputs: Mapping[str, Any]
    seed: int = 0
    solver: str | Mapping[str, str] | None = None
    steps: int | Mapping[str, int] | None = None
    references: int | Sequence[Any] | None = None
    search: Search = Search()
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A generated video.

    `frames` uint8 [F, H, W, 3]; `references` the clips whose motion was used, most similar first; `seconds` by graph ("inputs":
    reading what was given, "search": the memory; a graph of a loop: all of its steps); `step_seconds` one per denoising step;
    `fps` frames per second; `fallback` says why there is no reference although some was asked for. `backend`: what computed
    it; `choice`: why, where that was left to "auto".
    """

    frames: NDArray[np.uint8]
    references: list[Reference]
    seconds: dict[str, float]
    step_seconds: list[float]
    seed: int
    fps: float
    fallback: str | None = None
    backend: str = ""
    choice: str | None = None


class Job:
    """One request on its way. An iterator: `next` has one call of a graph run and returns it."""

    def __init__(self, bundle: Bundle, memory: Memory | None, request: Request, run: Callable[[Call, Placed], Outputs]) -> None:
        """Every check that can be made without running a graph: `InputError`, `MediaError`, `MemoryStoreError`."""
        self.bundle, self.request, self._run = bundle, request, run
        self.seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []
        self.references: list[Reference] = []
        self.fallback: str | None = None
        self.placed: Placed = {}
        for name, kind in (("inputs", Mapping), ("given", Mapping), ("search", Search)):
            if not isinstance(value := getattr(request, name), kind):
                raise InputError(f"{name} is {shown(value)}; it must be a {kind.__name__}.")
        self.seed = check_seed(request.seed)
        self.frames: NDArray[np.uint8] | None = None
        self.failure: Exception | None = None  # why it ended before its end, where a scheduler ran it
        self.keep = False  # whether values stay that no call will read any more, for whoever looks at them
        self._off = False  # whether the request says that it wants no reference
        self._told = 0.0  # seconds that are in a stage already
        self._host = 0.0  # seconds since the last call that belong to the next one
        self._call: Call | None = None
        manifest = bundle.manifest
        with self._stage("inputs"):
            inputs = complete(manifest, request.inputs)
            self.schedules = {name: self._schedule(name, inputs) for name in manifest.loops}  # what each loop runs over
            self.values: dict[str, Any] = {}
            for name, value in inputs.items():
                self.values |= convert(bundle, name, value)
            for name, value in request.given.items():
                self.values[name] = check_given(manifest, name, value)
        self._query = self._references(memory, inputs)
        self._calls = self._walk()

    # --- running ------------------------------------------------------------------------------------------------------

    @property
    def call(self) -> Call | None:
        """What is to be run next; None once there is nothing left (`frames` is there), or the job was closed."""
        if self._call is None and self.frames is None:
            self._advance(None)
        return self._call

    def __iter__(self) -> Iterator[Call]:
        return self

    def __next__(self) -> Call:
        call = self.call
        if call is None:
            raise StopIteration
        start = time.perf_counter()
        outputs = self._run(call, self.placed)
        self.send(outputs, time.perf_counter() - start)
        return call

    def send(self, outputs: Outputs, seconds: float) -> None:
        """Take the outputs of `call`, which was run in so many seconds, and go on to the next."""
        call = self._call
        assert call is not None
        taken, self._call = self._host + seconds, None
        self.seconds[call.graph] = self.seconds.get(call.graph, 0.0) + taken
        if call.loop and self.bundle.in_loop(call.graph):
            self.step_seconds.append(taken)
        self._advance(outputs)
        if self._call is None and self.frames is not None:  # what was left to do behind the last call is a part of it
            self.seconds[call.graph] += self._host

    def close(self) -> None:
        """Stop: nothing more is run, and what was computed is let go of."""
        self._calls.close()
        self._call, self.values, self.placed = None, {}, {}

    def _advance(self, outputs: Outputs | None) -> None:
        start, told = time.perf_counter(), self._told
        try:
            self._call = next(self._calls) if outputs is None else self._calls.send(outputs)
        except StopIteration as end:
            if end.value is not None:
                self.frames = end.value
            self.values, self.placed = dict(self.values) if self.keep else {}, {}
        self._host = time.perf_counter() - start - (self._told - told)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._told += seconds
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    # --- the plan -----------------------------------------------------------------------------------------------------

    def _walk(self) -> Generator[Call, Outputs, NDArray[np.uint8]]:
        manifest, values = self.bundle.manifest, self.values
        if self._query is not None:
            assert manifest.memory is not None
            query = manifest.memory.query
            (output,) = (port.name for port in manifest.graphs[query].outputs)
            found = yield Call(query, {port.name: self._query.tokens[port.name] for port in manifest.graphs[query].inputs})
            with self._stage("search"):
                self.references = self._query.search(np.asarray(found[output])[0])
            if not self.references:
                self.fallback = self._query.nothing()
        if self.references:
            for place, item in enumerate(self.references):
                if not item.record:  # kept on demand: it is made of its file now
                    self.references[place] = replace(item, record=(yield from _made(self.bundle, item)))
            values |= self._recorded()
        elif self._query is not None or self._off:
            values |= absent(manifest)
        route = needed(manifest, set(values) | set(self.request.given))
        for place, node in enumerate(route):
            stream = noise_stream(manifest, node.graph)

            def draw(step: int, shape: tuple[int, ...], stream: int = stream) -> NDArray[np.float32]:
                return noise(self.seed, stream, step, shape)

            if node.graph in manifest.loops:
                schedule = self.schedules[node.graph]
                key = (node.graph, schedule.name, schedule.steps)
                made = yield from run_loop(
                    node.graph, manifest.loops[node.graph], manifest.graphs, schedule.rows, values, draw, key
                )
            else:
                spec = manifest.graphs[node.graph]
                ports = {port.name: node.reads.get(port.name, port.name) for port in spec.inputs}
                given = {
                    port.name: draw(0, port.shape) if ports[port.name] == NOISE else values[ports[port.name]]
                    for port in spec.inputs
                }
                outputs = yield Call(node.graph, given)
                made = {node.writes.get(name, name): value for name, value in outputs.items()}
            values |= {name: value for name, value in made.items() if name not in self.request.given}
            left = {manifest.output.value}.union(*(manifest.reads(later) for later in route[place + 1 :]))
            for name in () if self.keep else values.keys() - left:  # what nobody reads any more makes room
                del values[name]
        return to_frames(np.asarray(values[manifest.output.value]))

    def _schedule(self, loop: str, inputs: Mapping[str, Any]) -> Schedule:
        """The rows of `loop` for this request: those that were exported, but for the columns that it gives."""
        spec = self.bundle.manifest.loops[loop]
        if not spec.feeds:
            return self.bundle.schedule(loop)
        schedule = self.bundle.schedule(loop, self._of(loop, "solver"), self._of(loop, "steps"))
        rows = schedule.rows
        for name, entry in self.bundle.manifest.inputs.items():
            if isinstance(entry, ColumnInput) and entry.loop == loop and inputs.get(name) is not None:
                rows = rows.copy()
                rows[:, spec.columns.index(entry.column)] = column(name, inputs[name], schedule.steps)
        return replace(schedule, rows=rows)

    def _of(self, loop: str, what: str) -> Any:
        """The solver or the number of steps of one loop."""
        value = getattr(self.request, what)
        if not isinstance(value, Mapping):
            return value
        if unknown := value.keys() - self.bundle.manifest.loops.keys():
            loops = ", ".join(self.bundle.manifest.loops)
            raise InputError(f"{what} names the loop {shown(next(iter(unknown)))}; this bundle has {loops}.")
        return value.get(loop)

    # --- references ---------------------------------------------------------------------------------------------------

    def _references(self, memory: Memory | None, inputs: Mapping[str, Any]) -> _Query | None:
        """Check what is asked of the memory, and take the clips that are given by hand; the search that is left to do, if
        any."""
        spec, given = self.bundle.manifest.memory, self.request.references
        if spec is None:
            if given is not None or self.request.search != Search():
                raise InputError(f"bundle '{self.bundle.name}' takes no references; leave them out.")
            return None
        given = int(given) if isinstance(given, np.integer) else given
        if not isinstance(given, int | Sequence | None) or isinstance(given, str | bytes | bool):
            raise InputError(f"references is {shown(given)}; give a number of clips or a list of references.")
        none = {name: value for name, value in spec.absent.items() if not isinstance(value, str)}
        self._off = any(name in inputs and inputs[name] == value for name, value in none.items())
        parts = {f"reference_{part.name}" for part in spec.record}
        if self._off or not needed(self.bundle.manifest, set(self.values) | set(self.request.given), parts):
            return None
        count = given if isinstance(given, int) else spec.default if given is None else len(given)
        advice = "".join(f" For none at all use {name}={value:g}." for name, value in none.items())
        if not 1 <= count <= spec.max:
            raise InputError(f"references is {shown(count)}; this bundle takes 1 to {spec.max}.{advice}")
        by_hand = [] if given is None or isinstance(given, int) else list(given)
        for item in by_hand:
            record: Mapping[str, Any] = getattr(item, "record", {})
            if _is_id(item) or not record and getattr(item, "source_sha256", None):
                continue  # of a memory; its record may be one that is made on demand
            for part in spec.record:
                array = record.get(part.name)
                shape = getattr(array, "shape", None)
                if shape != part.dims:
                    raise InputError(
                        f"references holds {shown(item)} whose {part.name} is {shape}; this bundle takes references (or ids of "
                        f"clips in the memory) with {part.name} {part.dims}."
                    )
                check_finite(f"the {part.name} of {shown(item)} in references", array)
        if memory is None and (not by_hand or any(_is_id(item) for item in by_hand)):
            raise InputError(
                "this pipeline has no motion memory to find clips in; open it with one "
                f"(MotionPipeline.from_bundle(bundle, memory=...)), or pass references=[...].{advice}"
            )
        if by_hand:
            with self._stage("search"):
                self.references = [_by_id(memory, item) if _is_id(item) else item for item in by_hand]
            return None
        assert memory is not None
        # The default bends to what there is (any cosine will do, but fewer clips as well); a number that was asked for does
        # not.
        search, there = self.request.search, len(memory)
        if there < (1 if given is None or search.may_be_short else count):  # said before the prompt's vector is computed
            text = f"the motion memory holds {there or 'no'} clips, and the request asks for {count} of them"
            raise MemoryStoreError(f"{text}. Ask for fewer, or add clips: `motionrt memory add`.")
        if given is None:
            search = search.lenient()
        tokens = self.bundle.tokenize(spec.tokenizer, inputs[spec.text], what=f"the {spec.text.replace('_', ' ')}")
        return _Query(memory, tokens, count, search, self.request.search)

    def _recorded(self) -> dict[str, Any]:
        """The references' records as values `[1, K, ...]`, in the dtypes of the ports that read them."""
        manifest = self.bundle.manifest
        assert manifest.memory is not None
        found: dict[str, Any] = {}
        for part in manifest.memory.record:
            name = f"reference_{part.name}"
            if (port := manifest.port(name)) is not None:
                stacked = np.stack([item.record[part.name] for item in self.references])
                found[name] = stacked[None].astype(port.dtype, copy=False)
        return found


@dataclass(frozen=True)
class _Query:
    """A search of a memory, before the prompt's vector is known."""

    memory: Memory
    tokens: Mapping[str, NDArray[np.int64]]
    count: int
    choice: Search
    asked: Search

    def search(self, embedding: NDArray[np.float32]) -> list[Reference]:
        return self.memory.search(embedding, self.count, self.choice)

    def nothing(self) -> str:
        """Why there is no reference."""
        conditions = [
            f"{name} {value}" for name in ("minimum_score", "where") if (value := getattr(self.asked, name)) is not None
        ]
        return f"no motion: no clip of the motion memory passes {', '.join(conditions)}".rstrip()


def needed(manifest: Manifest, there: set[str], wanted: set[str] | None = None) -> list[Node]:
    """The nodes of the plan that must run to make the video out of the values `there`, in order.

    With `wanted`: those of them that read one of these.
    """
    want, route = {manifest.output.value}, list[Node]()
    for node in reversed(manifest.nodes):
        if manifest.gives(node) & want - there:
            route.append(node)
            want |= manifest.reads(node)
    route.reverse()
    return route if wanted is None else [node for node in route if manifest.reads(node) & wanted - there]


def check_given(manifest: Manifest, name: str, value: Any) -> Any:
    """`value` if a graph of the plan reads it by `name` and it is one that it takes; `InputError` otherwise."""
    port = manifest.port(name)
    if port is None:
        raise InputError(f"`{name}` is given, and no graph of the plan of bundle '{manifest.name}' reads it.")
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    sliced = any(port.name in loop.slices for loop in manifest.loops.values())  # a loop's graph reads a part of it
    fits = shape is not None and len(shape) == len(port.dims) and all(
        dim.min <= size <= dim.max for size, dim in zip(shape, port.dims, strict=True)
    )  # fmt: skip
    if shape is None or dtype != port.dtype or not (fits or sliced):
        got = f"a {type(value).__name__}" if shape is None else f"{dtype} {list(shape)}"
        raise InputError(f"`{name}` is given as {got}; allowed is {port.dtype} [{', '.join(map(str, port.dims))}].")
    check_finite(f"`{name}`, which is given,", value)
    return value


def check_finite(what: str, value: Any) -> None:
    """`InputError` if an array on the host has numbers that are not finite."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        raise InputError(f"{what} has {bad} NaN or infinite values of {value.size}; all must be finite.")


def noise_stream(manifest: Manifest, name: str) -> int:
    """The stream of `noise` that loop `name`, or graph `name` of the plan, draws from: no two share one."""
    if name in manifest.loops:
        return list(manifest.loops).index(name)
    return _GRAPHS + [node.graph for node in manifest.nodes].index(name)


def absent(manifest: Manifest) -> dict[str, Any]:
    """What stands in for a record where there is none; `InputError` where a request must have one."""
    assert manifest.memory is not None
    if not manifest.memory.absent:
        how = "open the pipeline with a memory, or pass references=[...]"
        raise InputError(f"bundle '{manifest.name}' needs a reference; {how}.")
    values: dict[str, Any] = {}
    for name, value in manifest.memory.absent.items():
        port = manifest.port(name)
        if port is not None:
            values[name] = np.full(port.shape, 0 if isinstance(value, str) else value, port.dtype)
    return values


def to_frames(video: NDArray[Any]) -> NDArray[np.uint8]:
    """Float [1, F, 3, H, W] in [-1, 1] to uint8 [F, H, W, 3]; `BackendError` if a value is not finite."""
    if not np.isfinite(video).all():
        raise BackendError("the decoder gave NaN or infinite values; export the bundle again, or lower the guidance.")
    pixels = np.clip(np.rint((video[0] + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def _made(bundle: Bundle, reference: Reference) -> Generator[Call, Outputs, dict[str, NDArray[Any]]]:
    """The record of a reference that was kept without one: its file, cut again, through the graphs that index clips."""
    from motionrt.runtime.indexing.encoders import reference_calls

    calls = reference_calls(bundle, reference)
    try:
        graph, inputs = next(calls)
        while True:
            outputs = yield Call(graph, inputs)
            graph, inputs = calls.send({name: np.asarray(value) for name, value in outputs.items()})
    except StopIteration as end:
        return dict(end.value)


def _is_id(item: Any) -> bool:
    """Whether an item of references is the id of a clip: True is none, although Python counts it as 1."""
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _by_id(memory: Memory | None, number: Any) -> Reference:
    from motionrt.runtime.memory.set import MemorySet

    assert memory is not None
    if isinstance(memory, MemorySet):
        raise InputError(f"references holds the id {shown(number)}, and the memory is a set; pass memory.get([(name, id)]).")
    if not 0 <= number < 2**63:
        raise InputError(f"references holds the id {shown(number)}; ids of clips are whole numbers from 0 to 2**63 - 1.")
    return memory.get([int(number)])[0]
