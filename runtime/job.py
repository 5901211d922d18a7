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

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle, Schedule
from motionrt.runtime.bundle.manifest import (
    DRAWN,
    NOISE,
    SCORES,
    ChoiceInput,
    ColumnInput,
    ImageInput,
    Loop,
    Manifest,
    Node,
    Preview,
    needed,
    reference_name,
    started,
)  # fmt: skip
from motionrt.runtime.errors import BackendError, InputError, MemoryStoreError, shown
from motionrt.runtime.inputs import choice, column, complete, values_of
from motionrt.runtime.loop import Call, Outputs, run_loop, windows
from motionrt.runtime.media.limits import LIMITS, Limits
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
    the bundle's. `references`: how many clips to retrieve, or the clips themselves (`Reference`s, ids of clips in the memory,
    or paths of video files), most similar first. `search`: which clips may be retrieved. `given`: values of the plan by name,
    float32, in place of what would compute them: only what is still needed is run.
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
    it; `choice`: why, where that was left to "auto". `field`: how far each pixel of the first frame has gone in each frame,
    float32 [F, 2, H, W] (x, y; pixels), where the bundle shows it. `notes`: what was kept in another way than it was given.
    `approximations`: by name (`bundle.manifest.approximations`), what was not computed exactly; empty: all was.
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
    field: NDArray[np.float32] | None = None
    notes: Sequence[str] = ()
    approximations: Sequence[str] = ()


class Job:
    """One request on its way. An iterator: `next` has one call of a graph run and returns it, without what it was given."""

    def __init__(
        self, bundle: Bundle, memory: Memory | None, request: Request, run: Callable[[Call, Placed], Outputs],
        *, limits: Limits = LIMITS, folder: Path = Path(),
    ) -> None:  # fmt: skip
        """Every check that can be made without running a graph: `InputError`, `MediaError`, `MemoryStoreError`.

        limits: of decoding; folder: where relative sources of clips start, whose memory keeps no records.
        """
        self.bundle, self.request, self._run, self._limits, self._folder = bundle, request, run, limits, folder
        self.seconds: dict[str, float] = {}
        self.step_seconds: list[float] = []
        self.references: list[Reference] = []
        self._cut: dict[int, NDArray[np.float32]] = {}  # by place: references that have no record yet and are of no memory
        self.fallback: str | None = None
        self.field: NDArray[np.float32] | None = None
        self.placed: Placed = {}
        for name, kind in (("inputs", Mapping), ("given", Mapping), ("search", Search)):
            if not isinstance(value := getattr(request, name), kind):
                raise InputError(f"{name} is {shown(value)}; it must be a {kind.__name__}.")
        self.seed = check_seed(request.seed)
        self.frames: NDArray[np.uint8] | None = None
        self.failure: Exception | None = None  # why it ended before its end, where a scheduler ran it
        self._shown: tuple[Preview, Any] | None = None  # what the last step gave, where it can be looked at, and how
        self.keep = False  # whether values stay that no call will read any more, for whoever looks at them
        self.seeded = False  # whether the next call is one that another seed would change
        self._drawn = False  # whether such a call was run
        self._told = 0.0  # seconds that are in a stage already
        self._host = 0.0  # seconds since the last call that belong to the next one
        self._call: Call | None = None
        manifest = bundle.manifest
        with self._stage("inputs"):
            self._inputs = inputs = complete(manifest, request.inputs)
            options = {name: one for name, one in manifest.inputs.items() if isinstance(one, ChoiceInput)}
            self._chosen = {name: choice(name, one, inputs[name]) for name, one in options.items()}
            self._go(absent=True)
            if self._stands_in:  # checked above that it could do without a reference
                self._go()
            self.values: dict[str, Any]
            self.values, self.notes = values_of(bundle, inputs, limits)
            for name, value in request.given.items():
                self.values[name] = check_given(manifest, name, value)
        self._first = frozenset(self.values)  # what no graph takes the place of
        self._query = self._references(memory, inputs)
        self._calls = self._walk()

    @property
    def approximations(self) -> list[str]:
        """The names of what the bundle does not compute exactly, of what was run so far."""
        run, chosen = self.seconds.keys(), {(loop, schedule.name) for loop, schedule in self.schedules.items()}
        return [
            one.name for one in self.bundle.manifest.approximations
            if (chosen & {*one.schedules.items()} if one.schedules else run & {*one.graphs})
        ]  # fmt: skip

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
        return replace(call, inputs={})  # whoever keeps it keeps no tables or values that are to make room

    def send(self, outputs: Outputs, seconds: float) -> None:
        """Take the outputs of `call`, which was run in so many seconds, and go on to the next."""
        call = self._call
        assert call is not None
        taken, self._call, self._drawn = self._host + seconds, None, self.seeded
        self.seconds[call.graph] = self.seconds.get(call.graph, 0.0) + taken
        if call.loop and self.bundle.in_loop(call.graph):
            self.step_seconds.append(taken)
        look = self.bundle.manifest.loops[call.loop].preview if call.loop else None
        if look is not None and look.value in outputs:
            self._shown = look, outputs[look.value]
        self._advance(outputs)
        if self._call is None and self.frames is not None:  # what was left to do behind the last call is a part of it
            self.seconds[call.graph] += self._host

    def calls(self, seeds: int = 1) -> dict[str, int]:
        """How many calls of each graph the whole answer takes, as far as it can be said before the memory was searched, and
        where no other job ran before (tables of a loop are kept); with `fork`s for so many seeds in all. What is called ahead
        of a step is a part of it."""
        manifest, count = self.bundle.manifest, Counter[str]()
        if manifest.memory is not None:
            count.update([manifest.memory.query] if self._query is not None else [])
            count.update([*manifest.memory.graphs] * len(self._cut))
        same, changed = self._route()
        for node, times in [*((node, 1) for node in same), *((node, seeds) for node in changed)]:
            loop = manifest.loops.get(node.graph)
            if loop is None:
                count[node.graph] += times
                continue
            steps = self.steps_of(node.graph)
            count.update(steps * times)
            for table, spans in windows(loop, manifest.graphs, steps).items():
                count[table] += len(spans) * (times if table in loop.windows else 1)
        return dict(count)

    def preview(self) -> NDArray[np.uint8] | None:
        """What the last step says that the video will be, small: uint8 `[F, h, w, 3]`, in the size of the latents.

        None before a step was run, once the job is over, and where no preview was calibrated for the bundle (`motionrt preview
        calibrate`). It is made when it is asked for, and changes nothing of the job.
        """
        return None if self._shown is None else to_preview(*self._shown)

    def fork(self, seed: int) -> Job:
        """The same request with another seed, from here on: what is there already (text, search, motion) is not computed again.

        The best moment is when the job first says `seeded`: nothing more can be shared. Its frames are those of this seed
        alone. `InputError` once a call that the seed changes was run.
        """
        if self._drawn:
            raise InputError("this job has used its seed already; fork it as soon as it says `seeded`.")
        other = copy(self)
        other.request, other.seed = replace(self.request, seed=seed), check_seed(seed)
        other.values, other.placed, other.references = dict(self.values), dict(self.placed), list(self.references)
        other.seconds, other.step_seconds, other._shown = {}, [], None
        other._call, other._calls = None, other._walk()
        return other

    def close(self) -> None:
        """Stop: nothing more is run, and what was computed is let go of."""
        self._calls.close()
        self._call, self._shown, self.values, self.placed = None, None, {}, {}

    def _advance(self, outputs: Outputs | None) -> None:
        start, told = time.perf_counter(), self._told
        try:
            self._call = next(self._calls) if outputs is None else self._calls.send(outputs)
        except StopIteration as end:
            if end.value is not None:
                self.frames = end.value
            self._shown = None
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
            still = (yield from self._still()) if self._query.choice.looks else None
            with self._stage("search"):
                self.references = self._query.search(np.asarray(found[output])[0], still)
            if not self.references:
                self._fall_back(self._query.nothing(np.asarray(found[output])[0]))
            self._query = None
        if self.references:
            for place, item in enumerate(self.references):
                if not item.record:  # kept on demand, or a file: it is made now
                    record = yield from _made(self.bundle, item, self._cut.get(place), self._folder, self._limits)
                    self.references[place] = replace(item, record=record)
            self._cut = {}
            values |= self._recorded()
        if unlike := max((item.unlike for item in self.references), default=0):
            clips = "clip whose caption fits as well moves" if unlike == 1 else "clips whose captions fit as well move"
            self.notes.append(f"{unlike} {clips} unlike the others found, and stayed behind them: captions may be wrong.")
        self.notes = list(dict.fromkeys([*self.notes, *self._unheard()]))
        same, changed = self._route()
        for place, node in enumerate(route := same + changed):
            self.seeded = place >= len(same)
            stream = noise_stream(manifest, node.graph)

            def draw(step: int, shape: tuple[int, ...], stream: int = stream) -> NDArray[np.float32]:
                return noise(self.seed, stream, step, shape)

            if node.graph in manifest.loops:
                rows, loop = self.schedules[node.graph].rows, started(manifest.loops[node.graph], node)
                given = values | {name: values[value] for name, value in node.reads.items() if name not in loop.start}
                made = yield from run_loop(node.graph, loop, manifest.graphs, rows, given, draw)
            else:
                spec = manifest.graphs[node.graph]
                ports = {port.name: node.reads.get(port.name, port.name) for port in spec.inputs}
                given = {
                    port.name: draw(0, port.shape) if ports[port.name] == NOISE else values[ports[port.name]]
                    for port in spec.inputs
                }
                made = dict((yield Call(node.graph, given)))
            written = {node.writes.get(name, name): value for name, value in made.items()}
            values |= {name: value for name, value in written.items() if name not in self._first}
            left = {manifest.output.value, manifest.output.field}.union(*(map(self._reads, route[place + 1 :])))
            for name in () if self.keep else values.keys() - left:  # what nobody reads any more makes room
                del values[name]
        if (motion := values.get(manifest.output.field or "")) is not None:
            self.field = to_field(np.asarray(motion), manifest.output.frames)
        return to_frames(np.asarray(values[manifest.output.value]))

    def _still(self) -> Generator[Call, Outputs, tuple[str, NDArray[Any]]]:
        """The part of records by which a still is known, and what it is of this request's."""
        from motionrt.runtime.indexing.encoders import still_calls

        manifest = self.bundle.manifest
        assert manifest.memory is not None
        (name,) = _stills(manifest)
        made = yield from _calls(still_calls(manifest.memory, manifest.graphs, self.values[name][0]))
        ((part, array),) = made.items()
        return part, array

    def steps_of(self, loop: str) -> list[str]:
        """The graphs that the steps of `loop` run, one after the other."""
        spec = self.bundle.manifest.loops[loop]
        return [spec.graphs[int(graph)] for graph in self.schedules[loop].rows[:, spec.columns.index("graph")]]

    def _reads(self, node: Node) -> set[str]:
        """The values that a node needs for this request."""
        manifest = self.bundle.manifest
        return manifest.reads(node, {*self.steps_of(node.graph)} if node.graph in manifest.loops else None)

    def _route(self) -> tuple[list[Node], list[Node]]:
        """The nodes that are left to run: those that no seed changes, and those that it does."""
        return by_seed(self.bundle.manifest, self._needed(), self._reads)

    def _needed(self, wanted: set[str] | None = None) -> list[Node]:
        """The nodes that are left to run; `wanted`: those of them that read one of these values."""
        manifest, there = self.bundle.manifest, set(self.values) | set(self.request.given)
        return needed(manifest, there, wanted, self._reads, manifest.by(self._way))

    def _go(self, absent: bool = False) -> None:
        """Take the way through the plan that was chosen, or the one that needs no reference; and what each loop runs over."""
        self._way = self.bundle.manifest.way(self._chosen, absent)
        self.schedules = {name: self._schedule(name, self._inputs) for name in self.bundle.manifest.loops}

    def _without(self) -> None:
        """Go on without a reference: by what stands in for one. `InputError` where a request must have one."""
        manifest = self.bundle.manifest
        self.values |= absent(manifest)
        self._go(absent=True)
        self.schedules = {
            name: replace(schedule, rows=_instead(manifest.loops[name], schedule.rows, manifest.loops[name].absent))
            for name, schedule in self.schedules.items()
        }

    def _schedule(self, loop: str, inputs: Mapping[str, Any]) -> Schedule:
        """The rows of `loop` for this request: those that were exported, but for the columns that it gives."""
        spec = self.bundle.manifest.loops[loop]
        if not spec.feeds:
            return self.bundle.schedule(loop)
        name, steps = self._way.schedules.get(loop, (self._of(loop, "solver"), self._of(loop, "steps")))
        schedule = self.bundle.schedule(loop, name, steps)
        rows, drawn = schedule.rows, {*inputs, *self._way.drawn}
        idle = {graph: other.runs for graph, other in spec.without.items() if not drawn & {*other.inputs}}
        if idle:
            rows = _instead(spec, rows, idle)
        for name, entry in self.bundle.manifest.inputs.items():
            if isinstance(entry, ColumnInput) and entry.loop == loop and inputs.get(name) is not None:
                rows = rows.copy()
                rows[:, spec.columns.index(entry.column)] = column(name, inputs[name], schedule.steps)
        for graph, other in spec.where.items():
            rows = _instead(spec, rows, {graph: other.runs}, rows[:, spec.columns.index(other.column)] == other.value)
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
        manifest, given = self.bundle.manifest, self.request.references
        if (spec := manifest.memory) is None:
            if given is not None or self.request.search != Search():
                raise InputError(f"bundle '{self.bundle.name}' takes no references; leave them out.")
            return None
        given = int(given) if isinstance(given, np.integer) else given
        if not isinstance(given, int | Sequence | None) or isinstance(given, str | bytes | bool):
            raise InputError(f"references is {shown(given)}; give a number of clips or a list of references.")
        none = manifest.off
        if any(name in inputs and np.all(np.equal(inputs[name], value)) for name, value in none.items()):
            self._without()
            return None
        if not self._needed(manifest.references):
            self._check_unused(given)
            return None
        count = given if isinstance(given, int) else spec.default if given is None else len(given)
        advice = "".join(f" For none at all use {name}={value:g}." for name, value in none.items())
        if not 1 <= count <= spec.max:
            raise InputError(f"references is {shown(count)}; this bundle takes 1 to {spec.max}.{advice}")
        by_hand = [] if given is None or isinstance(given, int) else list(given)
        for item in by_hand:
            record: Mapping[str, Any] = getattr(item, "record", {})
            if _is_id(item) or _is_file(item) or not record and getattr(item, "source_sha256", None):
                continue  # of a memory; its record may be one that is made on demand
            for part in spec.record:
                array = record.get(part.name)
                shape = getattr(array, "shape", None)
                if shape != part.dims:
                    raise InputError(
                        f"references holds {shown(item)} whose {part.name} is {shape}; this bundle takes references (or ids of "
                        f"clips in the memory, or paths of videos) with {part.name} {part.dims}."
                    )
                check_finite(f"the {part.name} of {shown(item)} in references", array)
        if memory is None and given is None and self._stands_in:
            self._fall_back("no motion: there is no motion memory to find clips in")
            return None
        if memory is None and (not by_hand or any(_is_id(item) for item in by_hand)):
            raise InputError(
                "this pipeline has no motion memory to find clips in; open it with one "
                f"(MotionPipeline.from_bundle(bundle, memory=...)), or pass references=[...].{advice}"
            )
        if by_hand:
            with self._stage("search"):
                self.references = [self._given(memory, place, item) for place, item in enumerate(by_hand)]
            return None
        assert memory is not None
        # The default bends to what there is (any cosine will do, but fewer clips as well); a number that was asked for does
        # not.
        search, there = self.request.search, len(memory)
        if there < (1 if given is None or search.may_be_short else count):  # said before the prompt's vector is computed
            text = f"the motion memory holds {there or 'no'} clips, and the request asks for {count} of them"
            raise MemoryStoreError(f"{text}. Ask for fewer, or add clips: `motionrt memory add`.")
        if given is None:
            search = search.lenient().likely() if manifest.optional else search.lenient()
        if search.looks and not _stills(manifest):
            raise InputError(f"looks is on, and bundle '{self.bundle.name}' takes no still of its clips' size; leave it off.")
        tokens = self.bundle.tokenize(spec.tokenizer, inputs[spec.text], what=f"the {spec.text.replace('_', ' ')}")
        return _Query(memory, inputs[spec.text], tokens, count, search, self.request.search)

    @property
    def _stands_in(self) -> dict[str, str]:
        """The choices that are others where there is no reference: input -> its option then."""
        every = self.bundle.manifest.inputs
        options = {name: one.absent for name, one in every.items() if isinstance(one, ChoiceInput)}
        return {name: one for name, one in options.items() if one is not None and one != self._chosen[name]}

    def _fall_back(self, why: str) -> None:
        """Go on without a reference although some was asked for."""
        self.fallback = "; ".join([why, *(f"{name} is {one} instead" for name, one in self._stands_in.items())])
        self._without()

    def _check_unused(self, given: Any) -> None:
        """`InputError` for references that are given where what is chosen reads none."""
        for name, one in self.bundle.manifest.inputs.items():
            if given is not None and isinstance(one, ChoiceInput) and one.absent == self._chosen[name]:
                others = " or ".join(option for option in one.options if option != one.absent)
                raise InputError(f"references are given, and with {name} {one.absent} nothing reads them. Use {name} {others}.")

    def _unheard(self) -> list[str]:
        """A sentence for what is drawn that nothing on the way to the video reads, and for steps that are others."""
        read = set[str]().union(*map(self._reads, self._needed()))
        asked = {loop: (self._of(loop, "solver"), self._of(loop, "steps")) for loop in self._way.schedules}
        said = [
            f"loop '{loop}' runs {steps} steps of {name}: what is chosen needs these."
            for loop, (name, steps) in self._way.schedules.items()
            if not {asked[loop]} <= {(None, None), (None, steps), (name, None), (name, steps)}
        ]
        return said + [
            f"{name} has no effect: what would follow it is not run, because something else takes its place."
            for name, entry in self.bundle.manifest.inputs.items()
            if isinstance(entry, DRAWN) and name in self._inputs and not {name, f"{name}.flow"} & read
        ]

    def _given(self, memory: Memory | None, place: int, item: Any) -> Reference:
        """The reference that is given by hand: itself, by its id, or as a video file."""
        if not _is_file(item):
            return _by_id(memory, item) if _is_id(item) else item
        from motionrt.runtime.indexing.encoders import clip_of_file

        reference, self._cut[place] = clip_of_file(self.bundle, item, self._folder, self._limits)
        return reference

    def _recorded(self) -> dict[str, Any]:
        """The references' records as values `[1, K, ...]`, in the dtypes of the ports that read them."""
        manifest = self.bundle.manifest
        assert manifest.memory is not None
        scores = np.array([item.score for item in self.references], np.float32)
        arrays = {SCORES: np.where(np.isnan(scores), 1, scores)}  # what was not searched for counts as equal
        for part in manifest.memory.record:
            arrays[reference_name(part.name)] = np.stack([item.record[part.name] for item in self.references])
        ports = {name: manifest.port(name) for name in arrays}
        return {name: arrays[name][None].astype(port.dtype, copy=False) for name, port in ports.items() if port is not None}


@dataclass(frozen=True)
class _Query:
    """A search of a memory, before the prompt's vector is known."""

    memory: Memory
    text: str
    tokens: Mapping[str, NDArray[np.int64]]
    count: int
    choice: Search
    asked: Search

    def search(self, embedding: NDArray[np.float32], still: tuple[str, NDArray[Any]] | None) -> list[Reference]:
        return self.memory.search(embedding, self.count, self.choice, self.text, still)

    def nothing(self, embedding: NDArray[np.float32]) -> str:
        """Why there is no reference."""
        anything = replace(self.choice, minimum_score=-1.0, minimum_probability=0.0, looks=False)
        best = self.memory.search(embedding, 1, anything, self.text)
        least = self.choice.minimum_probability
        if best and least and best[0].probability < least:
            return (
                f"no motion: the likeliest clip of the motion memory, {best[0].caption[:80]!r}, moves as asked with a"
                f" probability of {best[0].probability:.0%}, and minimum_probability is {least:.0%}"
            )
        conditions = [
            f"{name} {value}" for name in ("minimum_score", "where") if (value := getattr(self.asked, name)) is not None
        ]
        return f"no motion: no clip of the motion memory passes {', '.join(conditions)}".rstrip()


def _stills(manifest: Manifest) -> list[str]:
    """The value, if any, that a request's still is in the form of clips' pictures: of their size, from -1 to 1."""
    assert manifest.memory is not None
    size = manifest.memory.clip.height, manifest.memory.clip.width
    stills = [one for one in manifest.inputs.values() if isinstance(one, ImageInput) and (one.height, one.width) == size]
    return [name for one in stills for name, span in one.gives.items() if tuple(span) == (-1.0, 1.0)][:1]


def _instead(
    loop: Loop, rows: NDArray[np.float32], other: Mapping[str, str], there: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Rows of `loop` with graphs in the place of others, in all rows or those of `there`."""
    rows, at = rows.copy(), loop.columns.index("graph")
    names = [loop.graphs[int(run)] for run in rows[:, at]]
    runs = np.array([loop.graphs.index(other.get(graph, graph)) for graph in names])
    rows[:, at] = runs if there is None else np.where(there, runs, rows[:, at])
    return rows


def by_seed(
    manifest: Manifest, route: Sequence[Node], reads: Callable[[Node], set[str]] | None = None
) -> tuple[list[Node], list[Node]]:
    """The nodes of a route that no seed changes, and those that it does, each in order; reads: as for `needed`."""
    reads = reads or manifest.reads
    same, changed, drawn = list[Node](), list[Node](), set[str]()
    for node in route:
        loop = manifest.loops.get(node.graph)
        if loop is None:
            draws = any(node.reads.get(port.name, port.name) == NOISE for port in manifest.graphs[node.graph].inputs)
        else:
            draws = loop.noise is not None or NOISE in loop.start.values()
        if draws or reads(node) & drawn:
            drawn |= manifest.gives(node)
            changed.append(node)
        else:
            same.append(node)
    return same, changed


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
    if not manifest.optional:
        how = "open the pipeline with a memory, or pass references=[...]"
        raise InputError(f"bundle '{manifest.name}' needs a reference; {how}.")
    values: dict[str, Any] = {}
    for name, value in manifest.memory.absent.items():
        port = manifest.port(name)
        if port is not None and not isinstance(manifest.inputs.get(name), ColumnInput):
            values[name] = np.full(port.shape, 0 if isinstance(value, str) else value, port.dtype)
    return values


def to_frames(video: NDArray[Any]) -> NDArray[np.uint8]:
    """Float [1, F, 3, H, W] in [-1, 1] to uint8 [F, H, W, 3]; `BackendError` if a value is not finite."""
    if not np.isfinite(video).all():
        raise BackendError("the decoder gave NaN or infinite values; export the bundle again, or lower the guidance.")
    pixels = np.clip(np.rint((video[0] + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def to_preview(look: Preview, value: Any) -> NDArray[np.uint8]:
    """Float `[1, F, C, h, w]`, also on a device, to uint8 `[F, h, w, 3]` by the linear map of a preview; what is not finite is
    grey."""
    latents = np.asarray(value)[0].astype(np.float32, copy=False).transpose(0, 2, 3, 1)
    colours = latents @ np.asarray(look.factors, np.float32) + np.asarray(look.bias, np.float32)
    pixels: NDArray[np.uint8] = np.clip(np.rint(np.nan_to_num(colours, nan=127.0)), 0, 255).astype(np.uint8)
    return pixels


def to_field(value: NDArray[Any], frames: int) -> NDArray[np.float32]:
    """Float [1, F, 2, H, W], or F - 1 of them without that of the first frame, to float32 [F, 2, H, W], the first one zero;
    `BackendError` if a value is not finite."""
    fields = np.asarray(value[0], np.float32)
    if not np.isfinite(fields).all():
        raise BackendError("the motion field has NaN or infinite values; export the bundle again, or lower the guidance.")
    return fields if len(fields) == frames else np.concatenate([np.zeros_like(fields[:1]), fields])


def _made(
    bundle: Bundle, reference: Reference, video: NDArray[np.float32] | None, folder: Path, limits: Limits
) -> Generator[Call, Outputs, dict[str, NDArray[Any]]]:
    """The record of a reference that has none: `video`, else its file, cut again, through the graphs that index clips."""
    from motionrt.runtime.indexing.encoders import clip_calls, reference_calls

    if video is not None:
        calls = clip_calls(bundle, video, Path(reference.source), reference.start, limits)
    else:
        calls = reference_calls(bundle, reference, folder, limits)
    return (yield from _calls(calls))


def _calls(calls: Generator[Any, Any, dict[str, NDArray[Any]]]) -> Generator[Call, Outputs, dict[str, NDArray[Any]]]:
    """The calls of a generator of `indexing.encoders`, as a job makes them, and what came out."""
    try:
        graph, inputs = next(calls)
        while True:
            outputs = yield Call(graph, inputs)
            graph, inputs = calls.send({name: np.asarray(value) for name, value in outputs.items()})
    except StopIteration as end:
        return dict(end.value)


def _is_file(item: Any) -> bool:
    """Whether an item of references is a video file."""
    return isinstance(item, str | os.PathLike)


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
