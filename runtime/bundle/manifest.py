"""bundle.json, format 2: a system as data. Inputs, graphs, a plan of names, loops, and the record that a memory keeps of a
clip.

    manifest = read_manifest(bundle / "bundle.json")

Values have names. Inputs give the first ones; a *node* of the plan (a graph or a loop) takes those that its ports name and
gives those of its outputs. What a name means is nowhere else: the run side knows no system. `BundleError` in plain words for
whatever this version does not understand, and for a plan in which a value is read that nothing gives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from motionrt.runtime.dtypes import DTYPES, PORTS
from motionrt.runtime.errors import BundleError
from motionrt.runtime.files import is_sealed

FORMAT = 2
NOISE = "noise"  # the port that is given standard normal numbers of its size
SCORES = "reference_scores"  # the value with the scores of the references, most similar first; 1 for what was not searched
BATCH = "batch"  # the size of a port's first dimension that requests may share; `2*batch` is twice that, and so on

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """A record of bundle.json: keys that it does not declare are refused."""


class Dim(_Strict, frozen=True):
    """One dimension: sizes from `min` to `max`; equal `name`s are equal sizes within a call. In JSON a fixed one is its
    size."""

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"dimension '{self.name}' must have 0 <= min <= opt <= max")

    def __str__(self) -> str:
        return str(self.min) if self.min == self.max else f"{self.name} {self.min}-{self.max}"


if TYPE_CHECKING:
    Dims = tuple[Dim, ...]
else:
    Dims = tuple[Dim | Annotated[int, Meta(ge=0)], ...]


class Port(_Strict, frozen=True):
    """One input or output of a graph. `dtype` is one of `dtypes.PORTS`."""

    name: str
    dtype: str
    dims: Dims

    def __post_init__(self) -> None:
        if self.dtype not in PORTS:
            raise ValueError(f"port `{self.name}` is {self.dtype}; allowed: {', '.join(PORTS)}")
        force_setattr(self, "dims", tuple(d if isinstance(d, Dim) else Dim("", d, d, d) for d in self.dims))

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes that it is tuned for, and of one request where requests may share it (`2*batch` rows: two for each)."""
        return tuple(dim.min if dim.name.endswith(BATCH) else dim.opt for dim in self.dims)

    @property
    def shared(self) -> bool:
        """Whether its rows belong to the requests of a batch."""
        return bool(self.dims) and self.dims[0].name.endswith(BATCH)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.dims))}]"


class File(_Strict, frozen=True):
    """A file inside the bundle, and its SHA-256."""

    file: str
    sha256: Digest


class Weights(_Strict, frozen=True):
    """Weights that stay in an installed package: import name `package`, `file` inside it, its digest."""

    package: Annotated[str, Meta(pattern=r"^[A-Za-z_]\w*$")]
    file: str
    sha256: Digest


class Program(_Strict, frozen=True):
    """The torch form of a graph: `file` from `torch.export.save` by version `torch`; ports, each in the program's order.

    Its weights lie in the graph's own `data` file.
    """

    file: str
    sha256: Digest
    torch: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class GraphSpec(_Strict, frozen=True):
    """The declared interface of one graph and the file that holds it; `activations`: bytes alive at once in a call.

    `weights`, `data`: where its weights are if not inside: in a package, in a safetensors file of the bundle (which several
    graphs may share). `wide`: patterns (as of `fnmatch`) of weights whose results leave the range of float16.
    """

    name: str
    file: str
    sha256: Digest
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: Weights | None = None
    data: File | None = None
    activations: int | None = None
    wide: tuple[str, ...] = ()
    program: Program | None = None

    def __post_init__(self) -> None:
        if self.program is None:
            return
        for got, ports in ((self.program.inputs, self.inputs), (self.program.outputs, self.outputs)):
            if sorted(got) != sorted(port.name for port in ports):
                raise ValueError(f"the program of graph '{self.name}' has the ports {list(got)}, which are not the graph's")

    @property
    def weights_sha256(self) -> str:
        """Identifies all weights outside `file`: their file's digest, the digest of both digests for two files, "" for none."""
        digests = [part.sha256 for part in (self.weights, self.data) if part is not None]
        return "".join(digests) if len(digests) < 2 else hashlib.sha256("".join(digests).encode()).hexdigest()


class Tokenizer(_Strict, frozen=True):
    """A tokenizers JSON file; texts of more than `max_length` tokens are refused, shorter ones may be padded."""

    file: str
    sha256: Digest
    max_length: Count
    pad_id: int = 0


class ImageInput(_Strict, frozen=True, tag_field="kind", tag="image"):
    """A still: fitted to `height` x `width` pixels; `gives`: value name -> the range of its numbers, `[1, 3, H, W]` float32."""

    height: Count
    width: Count
    gives: Mapping[str, tuple[float, float]]
    help: str = ""
    default: None = None


class TextInput(_Strict, frozen=True, tag_field="kind", tag="text"):
    """A text. With a `tokenizer` it gives `NAME.input_ids` and `NAME.attention_mask`, int64 `[1, L]`; without, nothing but
    what the memory is searched by. No `default`: it must be given."""

    tokenizer: str | None = None
    default: str | None = None
    help: str = ""


class NumberInput(_Strict, frozen=True, tag_field="kind", tag="number"):
    """A finite number from `min` to `max`; it gives a value of its name, float32 in the shape of the port that reads it."""

    default: float | None = None
    min: float | None = None
    max: float | None = None
    help: str = ""


class ColumnInput(_Strict, frozen=True, tag_field="kind", tag="column"):
    """A finite number for all steps, or one for each: it takes the place of `column` in the rows of `loop`.

    Not given, the rows stay as they were exported; `default` says what they hold, for people. What only scales something in
    the rows has a column of its own, which holds 1, and the step graph multiplies.
    """

    loop: str
    column: str
    default: float | None = None
    help: str = ""


class TracksInput(_Strict, frozen=True, tag_field="kind", tag="tracks"):
    """Drags on the picture of input `image`, whose size is H x W here; none need be given.

    It gives `NAME.flow`, float32 `[1, frames, 2, H, W]`: the displacement (x, y) of each pixel, in pixels, from the first frame
    to each of the `frames` behind it, in a square of `unit` pixels to each side of where a drag begins, and 0 elsewhere; and
    `NAME.mask`, float32 `[1, 1, H, W]`: 1 in these squares. Graphs that read the mask at every `cell`-th pixel find each drag.
    `mask`: the input of kind mask that says what stands still: the flow is 0 there, and the mask 1.
    """

    image: str
    frames: Count
    unit: Count
    cell: Count = 1
    mask: str | None = None
    help: str = ""
    default: None = None


class MaskInput(_Strict, frozen=True, tag_field="kind", tag="mask"):
    """What may move, painted on the picture of input `image`; it gives a value of its name, float32 `[1, 1, H, W]`: 1 where
    all must stand still, and 0 where it may move: everywhere, where nothing is painted or given."""

    image: str
    help: str = ""
    default: None = None


class FieldInput(_Strict, frozen=True, tag_field="kind", tag="field"):
    """A motion field over the picture of input `image`. Where it is given it stands in for the value of its name that the plan
    makes, float32 `[1, frames, 2, H, W]`: displacements (x, y) in pixels from the first frame to each one behind it."""

    image: str
    frames: Count
    help: str = ""
    default: None = None


class Way(_Strict, frozen=True):
    """What is different in the plan where an input of kind choice takes this value.

    `reads`: value -> of the node that gives it: port -> the value that it reads there instead (as `Node.reads`). `schedules`:
    loop -> the schedule that it runs, and its number of steps. `drawn`: inputs that count as given.
    """

    reads: Mapping[str, Mapping[str, str]] = {}
    schedules: Mapping[str, tuple[str, Count]] = {}
    drawn: tuple[str, ...] = ()


class ChoiceInput(_Strict, frozen=True, tag_field="kind", tag="choice"):
    """One of the names of `options`, each a way through the plan. `absent`: the one that is taken where the chosen one reads a
    reference and there is none."""

    options: Mapping[str, Way]
    default: str
    absent: str | None = None
    help: str = ""

    def __post_init__(self) -> None:
        if unknown := {self.default, self.absent or self.default} - {*self.options}:
            raise ValueError(f"'{min(unknown)}' is chosen and is none of the options {', '.join(self.options)}")


Input = ImageInput | TextInput | NumberInput | ColumnInput | TracksInput | MaskInput | FieldInput | ChoiceInput
DRAWN = TracksInput | MaskInput | FieldInput  # what lies over a picture; none of these must be given


def reference_name(part: str) -> str:
    """The value that a part of the record is in the plan."""
    return f"reference_{part}"


class Part(_Strict, frozen=True):
    """One array of a record: `dtype` (NumPy's name) and sizes. It reaches the plan as `reference_NAME`, `[1, K, *dims]`.

    No part is called `scores`: `reference_scores`, float32 `[1, K]`, are those of the search.
    """

    name: str
    dtype: str
    dims: tuple[Count, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.dtype == "bfloat16":
            raise ValueError(f"part '{self.name}' of the record is {self.dtype}, which NumPy does not have")
        if reference_name(self.name) == SCORES:
            raise ValueError(f"a part of the record is called '{self.name}', and `{SCORES}` are the scores of the search")


class ClipSize(_Strict, frozen=True):
    """What is cut out of a video for the memory: `frames` pictures of `height` x `width` at `fps`."""

    frames: Count
    height: Count
    width: Count
    fps: Rate


class MemorySpec(_Strict, frozen=True):
    """What the memory keeps of a clip, and how a request finds clips.

    Captions, and the text input `text` of a request, are tokenized by `tokenizer` and made vectors by graph `query`. A clip's
    record: `graphs`, run in order on `video [K, F, 3, H, W]` (float32, [-1, 1]), `image` (its first pictures `[K, 3, H, W]`)
    and `pixels` (uint8 `[K, F, H, W, 3]`), give `record`, by name. `default` and `max`: how many clips a request takes.
    Graphs may also read `field` (float32 `[K, F - 1, 2, H, W]`: displacements (x, y) in pixels of H x W from a clip's first
    picture to each one behind it), which lies beside the clip, or is found in it (`indexing/fields.py`).
    `absent`: what stands in for a record where there is none: value -> "zeros", or a number; a number for an input is also how
    a request says that it wants none (of a column: in every step). A request must have a clip where this is empty and neither a
    loop nor a choice has an `absent` either. `fingerprint`: of what made vectors and records: a memory fits that has the same.
    A clip that lasts less than `least_seconds` is refused, not stretched; so is one that shows too little motion: a mean
    absolute difference of consecutive pictures below `least_change`, of 255 levels.
    `calibration`: (a, b, c), where a clip whose caption has cosine s with the prompt and share w of its words moves as asked
    with probability 1 / (1 + exp(-(a + b s + c w))): what an encoder's scores are worth, measured; None where nobody has.
    """

    text: str
    query: str
    tokenizer: str
    default: Count
    max: Count
    clip: ClipSize
    record: tuple[Part, ...]
    fingerprint: Digest
    graphs: tuple[str, ...] = ()
    absent: Mapping[str, float | str] = {}
    least_seconds: Rate | None = None
    least_change: Annotated[float, Meta(gt=0, le=255)] | None = None
    calibration: tuple[float, float, float] | None = None


class Node(_Strict, frozen=True):
    """One graph in the plan whose ports are not named like the values: `reads`: port -> value, `writes`: port -> value.

    Of a loop values that it reads and gives have names of their own, which are taken for ports; `reads` may also say what a
    carried port starts with."""

    graph: str
    reads: Mapping[str, str] = {}
    writes: Mapping[str, str] = {}


class Slice(_Strict, frozen=True):
    """A port that is given a part of `value` in each step: `axes`: axis -> the column that says where the part begins."""

    value: str
    axes: Mapping[int, str]


class Collect(_Strict, frozen=True):
    """An output that is put together from all steps, as the value `value` of `dims`: `axes` as of `Slice`.

    `ramps`: axis -> columns with how far a part overlaps the one before and after it there: they are blended linearly.
    """

    value: str
    dims: tuple[Count, ...]
    axes: Mapping[int, str]
    ramps: Mapping[int, tuple[str, str]] = {}


class Without(_Strict, frozen=True):
    """What `runs` in the place of a step graph where none of `inputs` is given."""

    runs: str
    inputs: tuple[str, ...]


class Where(_Strict, frozen=True):
    """What `runs` in the place of a step graph in rows whose `column` is `value`: the same result for less."""

    runs: str
    column: str
    value: float


class Preview(_Strict, frozen=True):
    """A cheap look at the video while a loop runs: output `value` of a step, float `[1, F, C, h, w]`, through a linear map.

    The colour of a pixel is `factors` `[C, 3]` times its channels plus `bias` `[3]`: red, green, blue, 0 to 255. `quality`: how
    near that comes to the frames made as small, as measured.
    """

    value: str
    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    quality: Mapping[str, Any] = {}


class Loop(_Strict, frozen=True):
    """Step graphs, what is carried from step to step, and rows of numbers `[T, R]`, whose `columns` have names.

    Column `graph` says which of `graphs` a step runs. In step t a port is given, by its name: what is carried; a feed, the
    numbers of row t in some columns; row t of a table, which the graphs `tables` make of the feeds of all rows at once;
    standard normal `noise`, where column `noise` of row t is not 0, else zeros; a slice; any other value as it is.
    `carry`: output -> input of the next step; `start`: input -> "noise", "zeros" or a value; `gives`: carried input -> the
    value that it is called at the end. `schedules`: name -> the numbers of steps that there are rows for; `default`: one of
    them. `plain`: the graph of the step before it was rewritten, to compare with.

    `absent`: graph -> the one that runs in its place where there is no reference; `without`: the same where nothing is drawn of
    what it is for. `windows`: graph of `tables` -> of how many rows at a time it is asked, just before the first step that
    reads them, where those of all steps would take too much room; what it made before is let go of then. Tables, and values of
    the plan, that no step of the rows reads are not made.

    `history`: input or output of the step graphs -> ports that are given what it was in the last step, the one before, and so
    on, of those that read no such port themselves; zeros before there was one. `extrapolates`: the step graph that takes the
    place of the network by that (`runtime/schedules.py` makes rows of it). `preview`: how a step is looked at, where that was
    calibrated.

    `ahead`: step graph -> calls that are made before it in each of its steps, none of which reads what another one gives: they
    may run at the same time, on devices of their own. Their ports are given values as those of a step, and what they give is
    given to the step. `where`: step graph -> the one that runs in its place in some rows.
    """

    graphs: tuple[str, ...]
    columns: tuple[str, ...]
    schedules: Mapping[str, tuple[Count, ...]]
    default: tuple[str, int]
    feeds: Mapping[str, tuple[str, ...]] = {}
    carry: Mapping[str, str] = {}
    start: Mapping[str, str] = {}
    tables: tuple[str, ...] = ()
    noise: str | None = None
    gives: Mapping[str, str] = {}
    slices: Mapping[str, Slice] = {}
    collect: Mapping[str, Collect] = {}
    plain: str | None = None
    absent: Mapping[str, str] = {}
    windows: Mapping[str, Count] = {}
    without: Mapping[str, Without] = {}
    history: Mapping[str, tuple[str, ...]] = {}
    extrapolates: str | None = None
    preview: Preview | None = None
    ahead: Mapping[str, tuple[Node, ...]] = {}
    where: Mapping[str, Where] = {}

    @property
    def as_written(self) -> Loop:
        """The loop around `plain`, the step before it was rewritten, which reads no tables and leaves out no steps."""
        assert self.plain is not None
        return msgspec.structs.replace(self, graphs=(self.plain,), tables=(), history={}, extrapolates=None)

    @property
    def remembered(self) -> set[str]:
        """The ports that are given what a value was in earlier steps."""
        return {port for ports in self.history.values() for port in ports}

    def calls(self, step: str) -> tuple[Node, ...]:
        """The graphs that a step which runs `step` calls: those ahead of it, and itself."""
        return (*self.ahead.get(step, ()), Node(step))

    @property
    def run(self) -> tuple[str, ...]:
        """The graphs that steps may call, each once: the step graphs first."""
        return tuple(dict.fromkeys((*self.graphs, *(node.graph for nodes in self.ahead.values() for node in nodes))))


class Output(_Strict, frozen=True):
    """The value that is the video, float32 `[1, F, 3, H, W]` in [-1, 1], and its sizes; `fps`: pictures a second.

    `field`: a value on the way to it that people may look at as motion: float32 `[1, F or F - 1, 2, H, W]`, displacements (x,
    y) in pixels from the first frame to each one, or to each one behind it.
    """

    value: str
    frames: Count
    height: Count
    width: Count
    fps: Rate
    field: str | None = None


class Approximation(_Strict, frozen=True):
    """What `graphs` do not compute exactly, by name, and what that costs in quality, as measured.

    `schedules`: loop -> a schedule of it; where there are some, only requests that run one of them are not exact.
    """

    name: str
    graphs: tuple[str, ...]
    quality: Mapping[str, Any]
    schedules: Mapping[str, str] = {}


class Manifest(_Strict, frozen=True, kw_only=True):
    """bundle.json. `tables`: the file of all loops' rows; `partition`, `provenance`: what the exporter says, for people.

    `seal`: the digest of all else (`files.sealed`), if there is one, by which damage is noticed."""

    format: int
    name: str
    motionrt: str
    inputs: Mapping[str, Input]
    plan: tuple[str | Node, ...]
    loops: Mapping[str, Loop]
    graphs: Mapping[str, GraphSpec]
    tables: File
    output: Output
    memory: MemorySpec | None = None
    tokenizers: Mapping[str, Tokenizer] = {}
    approximations: tuple[Approximation, ...] = ()
    partition: Mapping[str, Any] = {}
    provenance: Mapping[str, Any] = {}
    seal: Digest | None = None

    def __post_init__(self) -> None:
        if problem := next(_faults(self), None):
            raise ValueError(problem)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The plan, every entry as a node; a loop's `graph` is the name of the loop."""
        return tuple(Node(entry) if isinstance(entry, str) else entry for entry in self.plan)

    def reads(self, node: Node, steps: Collection[str] | None = None) -> set[str]:
        """The values that a node needs; noise is drawn for it, and rows belong to the loop.

        steps: the graphs that the steps of a loop run, of those that it has; all if not given.
        """
        loop = self.loops.get(node.graph)
        if loop is None:
            return {node.reads.get(port.name, port.name) for port in self.graphs[node.graph].inputs} - {NOISE}
        loop = started(loop, node)
        made = {port.name for table in loop.tables for port in self.graphs[table].outputs}
        inner = {*loop.feeds, *loop.start, *loop.carry.values(), *loop.slices, *loop.remembered, *made, NOISE}
        run = loop.graphs if steps is None else steps
        ports = {port.name for graph in tables_of(loop, self.graphs, run) for port in self.graphs[graph].inputs}
        for step in run:
            ports |= read_by(loop, self.graphs, step) - made_ahead(loop, self.graphs, step)
        starts = {value for value in loop.start.values() if value not in (NOISE, "zeros")}
        read = (ports - inner) | {part.value for part in loop.slices.values()}
        return starts | {node.reads.get(name, name) for name in read}

    @property
    def references(self) -> set[str]:
        """The values that references are in the plan."""
        return set() if self.memory is None else {SCORES, *(reference_name(part.name) for part in self.memory.record)}

    @property
    def off(self) -> dict[str, float]:
        """The inputs by which a request says that it wants no reference, with their values."""
        given = {} if self.memory is None else self.memory.absent
        numbers = {name for name, spec in self.inputs.items() if isinstance(spec, NumberInput | ColumnInput)}
        return {name: value for name, value in given.items() if name in numbers and not isinstance(value, str)}

    @property
    def optional(self) -> bool:
        """Whether a request may do without a reference."""
        return self.memory is not None and bool(
            self.memory.absent or any(loop.absent for loop in self.loops.values()) or any(one.absent for one in self.choices)
        )

    @property
    def choices(self) -> list[ChoiceInput]:
        """The inputs of kind choice."""
        return [one for one in self.inputs.values() if isinstance(one, ChoiceInput)]

    def way(self, chosen: Mapping[str, Any] | None = None, absent: bool = False) -> Way:
        """The plan's changes by the options `chosen`, input -> name, the default where one is missing; `absent`: by those that
        need no reference."""
        reads, schedules, drawn = dict[str, Mapping[str, str]](), dict[str, tuple[str, int]](), list[str]()
        for name, one in self.inputs.items():
            if isinstance(one, ChoiceInput):
                option = (chosen or {}).get(name, one.default)
                way = one.options[one.absent if absent and one.absent is not None else option]
                reads |= {value: {**reads.get(value, {}), **ports} for value, ports in way.reads.items()}
                schedules |= way.schedules
                drawn += way.drawn
        return Way(reads, schedules, tuple(drawn))

    def by(self, way: Way) -> tuple[Node, ...]:
        """The nodes of the plan, changed by `way`."""
        nodes = list[Node]()
        for node in self.nodes:
            own = dict(node.reads)
            for value in self.gives(node) & way.reads.keys():
                own |= way.reads[value]
            nodes.append(Node(node.graph, own, node.writes))
        return tuple(nodes)

    def unreferenced(self, node: Node) -> set[str]:
        """The graphs that the steps of a loop run where there is no reference."""
        loop = self.loops.get(node.graph)
        return set() if loop is None else {loop.absent.get(graph, graph) for graph in loop.graphs}

    def gives(self, node: Node) -> set[str]:
        """The values that a node makes."""
        loop = self.loops.get(node.graph)
        if loop is None:
            return {node.writes.get(port.name, port.name) for port in self.graphs[node.graph].outputs}
        given = {*loop.gives.values(), *(part.value for part in loop.collect.values())}
        return {node.writes.get(value, value) for value in given}

    def port(self, value: str) -> Port | None:
        """The first input of the plan's graphs that reads `value`; None where none does."""
        for node in self.nodes:
            loop = self.loops.get(node.graph)
            calls = [Node(node.graph)] if loop is None else [one for step in loop.graphs for one in loop.calls(step)]
            for call in (*calls, *map(Node, () if loop is None else loop.tables)):
                for port in self.graphs[call.graph].inputs:
                    name = call.reads.get(port.name, port.name)
                    if node.reads.get(name, name) == value:
                        return port
        return None


def started(loop: Loop, node: Node) -> Loop:
    """`loop` with what its carried ports start with where `node` of the plan has it."""
    own = {port: node.reads.get(port, node.reads.get(value, value)) for port, value in loop.start.items()}
    return loop if own == loop.start else msgspec.structs.replace(loop, start=own)


def read_by(loop: Loop, graphs: Mapping[str, GraphSpec], step: str) -> set[str]:
    """What step graph `step` and the calls ahead of it are given, by the names that the loop knows."""
    return {call.reads.get(port.name, port.name) for call in loop.calls(step) for port in graphs[call.graph].inputs}


def made_ahead(loop: Loop, graphs: Mapping[str, GraphSpec], step: str) -> set[str]:
    """The ports of step graph `step` that calls ahead of it give."""
    nodes = loop.ahead.get(step, ())
    return {node.writes.get(port.name, port.name) for node in nodes for port in graphs[node.graph].outputs}


def tables_of(loop: Loop, graphs: Mapping[str, GraphSpec], steps: Iterable[str]) -> list[str]:
    """The graphs of a loop's tables that are read by the step graphs `steps`, or by others of these, in order."""
    read = {name for step in steps for name in read_by(loop, graphs, step)}
    found = list[str]()
    for table in reversed(loop.tables):
        if any(port.name in read for port in graphs[table].outputs):
            found.append(table)
            read |= {port.name for port in graphs[table].inputs}
    return found[::-1]


def needed(
    manifest: Manifest, there: set[str], wanted: set[str] | None = None, reads: Callable[[Node], set[str]] | None = None,
    nodes: Sequence[Node] | None = None,
) -> list[Node]:
    """The nodes of the plan that must run to make the video out of the values `there`, in order.

    With `wanted`: those of them that read one of these. reads: what a node needs, `manifest.reads` if not given; nodes: the
    plan, as it is declared if not given.
    """
    want, route, reads = {manifest.output.value}, list[Node](), reads or manifest.reads
    for node in reversed(manifest.nodes if nodes is None else nodes):
        if manifest.gives(node) & want - there:
            route.append(node)
            want |= reads(node)
    route.reverse()
    return route if wanted is None else [node for node in route if reads(node) & wanted - there]


def _drawn(name: str, entry: TracksInput | MaskInput | FieldInput, image: ImageInput) -> dict[str, tuple[int, ...]]:
    """The values that what is drawn on `image` gives, with their sizes behind the first."""
    plane = (image.height, image.width)
    if isinstance(entry, MaskInput):
        return {name: (1, *plane)}
    field = (entry.frames, 2, *plane)
    return {f"{name}.flow": field, f"{name}.mask": (1, *plane)} if isinstance(entry, TracksInput) else {name: field}


def _faults(manifest: Manifest) -> Iterator[str]:
    """What does not fit together, a sentence each: names of nothing, and values that are read before they are there."""
    graphs, loops, memory = manifest.graphs, manifest.loops, manifest.memory
    for name, loop in loops.items():
        for graph in (*loop.run, *loop.tables, *([loop.plain] if loop.plain else [])):
            if graph not in graphs:
                yield f"loop '{name}' runs '{graph}', which is no graph of the bundle"
        for step in loop.ahead:
            if step not in loop.graphs:
                yield f"loop '{name}' makes calls ahead of '{step}', which is none of its step graphs"
            given = made_ahead(loop, graphs, step)
            if unread := given - {port.name for port in graphs[step].inputs}:
                yield f"loop '{name}' makes `{min(unread)}` ahead of '{step}', which does not read it"
        for step, at in loop.where.items():
            if not {step, at.runs} <= {*loop.graphs} or at.runs in loop.where or at.column not in loop.columns:
                yield (
                    f"loop '{name}' runs '{at.runs}' in place of '{step}' where `{at.column}` is {at.value:g}; both must be"
                    " graphs of it, that one stay, and this be a column of it"
                )
        columns = [column for feed in loop.feeds.values() for column in feed] + [loop.noise or "graph"]
        columns += [column for part in loop.slices.values() for column in part.axes.values()]
        for collected in loop.collect.values():
            columns += [*collected.axes.values(), *(column for pair in collected.ramps.values() for column in pair)]
        if unknown := {"graph", *columns} - {*loop.columns}:
            yield f"loop '{name}' has no column '{min(unknown)}'; it has {', '.join(loop.columns)}"
        for graph, instead in loop.absent.items():
            if not {graph, instead} <= {*loop.graphs} or instead in loop.absent:
                yield f"loop '{name}' runs '{instead}' in place of '{graph}'; both must be graphs of it, and that one stay"
        for graph, other in loop.without.items():
            drawn = all(isinstance(manifest.inputs.get(one), DRAWN) for one in other.inputs)
            if not {graph, other.runs} <= {*loop.graphs} or other.runs in loop.without or not other.inputs or not drawn:
                yield (
                    f"loop '{name}' runs '{other.runs}' in place of '{graph}' without {', '.join(other.inputs)}; both must be"
                    " graphs of it, that one stay, and these be inputs that are drawn"
                )
        if loop.extrapolates is not None and loop.extrapolates not in loop.graphs:
            yield f"loop '{name}' extrapolates by '{loop.extrapolates}', which is none of its step graphs"
        if (look := loop.preview) is not None:
            shown = [port for graph in {*loop.graphs} & {*graphs} for port in graphs[graph].outputs if port.name == look.value]
            if not shown or any(len(port.dims) != 5 or port.dims[2].opt != len(look.factors) for port in shown):
                channels = len(look.factors)
                yield f"loop '{name}' previews `{look.value}`; a step must give it as [1, F, {channels}, h, w]"
        for graph in {*loop.graphs} & {*graphs} if loop.history else ():
            ports = {port.name for spec in [graphs[graph]] for port in (*spec.inputs, *spec.outputs)}
            if not ports & loop.remembered and (missing := {*loop.history} - ports):
                yield f"loop '{name}' remembers `{min(missing)}`, which its step '{graph}' has not got"
        for table in loop.windows:
            outside = {*loop.tables} - {table}
            if table not in loop.tables or {table} & {*tables_of(loop, graphs, outside)}:
                yield f"loop '{name}' asks '{table}' for rows in windows; it must be one of its tables that no other one reads"
        if loop.default[1] not in loop.schedules.get(loop.default[0], ()):
            wanted = f"{loop.default[0]} with {loop.default[1]} steps"
            yield f"the default schedule of loop '{name}', {wanted}, is not among its schedules"
    for item in manifest.approximations:
        for graph in item.graphs:
            if graph not in graphs:
                yield f"approximation '{item.name}' is of graph '{graph}', which is not there"
        for loop_name, schedule in item.schedules.items():
            if loop_name not in loops or schedule not in loops[loop_name].schedules:
                yield f"approximation '{item.name}' is of schedule '{schedule}' of loop '{loop_name}', which is not there"
    for node in manifest.nodes:
        if node.graph not in graphs and node.graph not in loops:
            yield f"the plan runs '{node.graph}', which is no graph and no loop of the bundle"
    there: set[str] = set()
    for name, entry in manifest.inputs.items():
        if isinstance(entry, TextInput):
            there |= {f"{name}.input_ids", f"{name}.attention_mask"} if entry.tokenizer else set()
            if entry.tokenizer is not None and entry.tokenizer not in manifest.tokenizers:
                yield f"input '{name}' is read by tokenizer '{entry.tokenizer}', which the bundle has not got"
        elif isinstance(entry, ImageInput):
            there |= set(entry.gives)
        elif isinstance(entry, NumberInput):
            there.add(name)
        elif isinstance(entry, ChoiceInput):
            yield from _strange(manifest, name, entry)
        elif isinstance(entry, DRAWN):
            over = manifest.inputs.get(entry.image)
            if not isinstance(over, ImageInput):
                yield f"input '{name}' is drawn on '{entry.image}', which is no image input of the bundle"
                continue
            for value, dims in _drawn(name, entry, over).items():
                if not isinstance(entry, FieldInput):  # which the plan makes, too
                    there.add(value)
                if (port := manifest.port(value)) is not None and port.shape[1:] != dims:
                    yield f"input '{name}' gives `{value}` of {list(dims)} a request, and a graph reads it as {port}"
            brush = manifest.inputs.get(entry.mask or "") if isinstance(entry, TracksInput) else None
            bounded = isinstance(brush, MaskInput) and brush.image == entry.image
            if isinstance(entry, TracksInput) and entry.mask and not bounded:
                yield f"input '{name}' is bounded by '{entry.mask}', which is no mask over '{entry.image}'"
        elif entry.loop not in loops or entry.column not in loops[entry.loop].columns:
            yield f"input '{name}' changes column '{entry.column}' of loop '{entry.loop}', which is not there"
    if memory is not None:
        there |= manifest.references
        for graph in (memory.query, *memory.graphs):
            if graph not in graphs:
                yield f"the memory needs '{graph}', which is no graph of the bundle"
        if memory.tokenizer not in manifest.tokenizers or not isinstance(manifest.inputs.get(memory.text), TextInput):
            yield f"the memory is searched by input '{memory.text}' and tokenizer '{memory.tokenizer}', which are not there"
        if memory.default > memory.max:
            yield f"a request takes {memory.default} clips and at most {memory.max}"
    for way in [Way(), *(way for one in manifest.choices for way in one.options.values())]:
        given = {*there}
        for node in manifest.by(way):
            if missing := manifest.reads(node) - given:
                yield f"'{node.graph}' of the plan reads `{min(missing)}`, which nothing before it gives"
            given |= manifest.gives(node)
    there = given
    if manifest.output.value not in there:
        yield f"nothing gives `{manifest.output.value}`, which is the video"
    out = manifest.output
    fields = [name for name, entry in manifest.inputs.items() if isinstance(entry, FieldInput)]
    for name in [*fields, *([out.field] if out.field else [])]:
        if name not in there:
            yield f"nothing gives `{name}`, which is a motion field"
    if out.field and (port := manifest.port(out.field)) is not None:
        if port.shape[1:] not in [(frames, 2, out.height, out.width) for frames in (out.frames - 1, out.frames)]:
            yield f"the motion field that is shown, {port}, is not of the size of the video and of two channels"
    if memory is not None and manifest.optional:
        reads = lambda node: manifest.reads(node, manifest.unreferenced(node))  # noqa: E731
        nodes = manifest.by(manifest.way(absent=True))
        if left := needed(manifest, set(memory.absent), manifest.references, reads, nodes):
            yield f"'{left[0].graph}' of the plan reads a reference also where there is none, which `absent` allows"


def _strange(manifest: Manifest, name: str, entry: ChoiceInput) -> Iterator[str]:
    """What the options of a choice name that is not there."""
    made = set[str]().union(*map(manifest.gives, manifest.nodes))
    for option, way in entry.options.items():
        what = f"'{option}' of input '{name}'"
        for value in way.reads.keys() - made:
            yield f"{what} changes how `{value}` is made, which nothing gives"
        for loop, (schedule, steps) in way.schedules.items():
            if loop not in manifest.loops or steps not in manifest.loops[loop].schedules.get(schedule, ()):
                yield f"{what} runs {steps} steps of '{schedule}' in loop '{loop}', which is not there"
        for drawn in way.drawn:
            if not isinstance(manifest.inputs.get(drawn), DRAWN):
                yield f"{what} counts '{drawn}' as drawn, which is no input that is"


def read_manifest(path: Path) -> Manifest:
    """Parse the file `path`; `BundleError` for anything that this version does not understand."""
    if not os.path.isdir(path.parent):  # which takes any text for a name
        raise BundleError(f"bundle {path.parent} is not a directory. Give the directory that `motionrt export` wrote.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise BundleError(f"{path.parent} holds no bundle.json. Give the directory that `motionrt export` wrote.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}). Export the bundle again.") from None
    number = raw.get("format") if isinstance(raw, dict) else None
    if number != FORMAT:
        newer = isinstance(number, int) and number > FORMAT
        fix = "a newer version of motionrt wrote it: upgrade motionrt" if newer else "export it again"
        raise BundleError(f"bundle {path.parent} has format {number}; this version reads format {FORMAT} ({fix}).")
    if "seal" in raw and not is_sealed(raw):
        raise BundleError(
            f"{path} is damaged, or was changed by hand: it is not what its `seal` was made of. Copy or export the bundle"
            " again; to keep a change of yours, remove `seal` from it."
        )
    return parse_manifest(raw)


def parse_manifest(raw: Mapping[str, Any]) -> Manifest:
    """bundle.json as it was parsed from JSON, checked as a whole."""
    graphs = raw.get("graphs")
    if isinstance(graphs, Mapping):  # a graph knows its name
        named = {key: {**entry, "name": key} if isinstance(entry, Mapping) else entry for key, entry in graphs.items()}
        raw = {**raw, "graphs": named}
    try:
        manifest: Manifest = msgspec.convert(raw, Manifest, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        raise BundleError(f"bundle.json: {_where(raw, error)}. Upgrade motionrt, or export the bundle again.") from None
    for file in _files(manifest):
        if not file or Path(file).is_absolute() or ".." in Path(file).parts:  # it must not be able to point anywhere else
            raise BundleError(f"bundle.json: the file {file!r} must lie inside its directory. Export the bundle again.")
    return manifest


def _where(raw: Mapping[str, Any], error: msgspec.ValidationError) -> str:
    """An error of the manifest with the name of the entry that it is in, and what stands there."""
    kinds = (("graph", GraphSpec), ("loop", Loop), ("input", Input), ("tokenizer", Tokenizer))
    named = [(kind, of, raw[f"{kind}s"]) for kind, of in kinds if isinstance(raw.get(f"{kind}s"), Mapping)]
    for what, entry, of in ((f"{kind} '{name}': ", entry, of) for kind, of, some in named for name, entry in some.items()):
        try:
            msgspec.convert(entry, of, strict=True, str_keys=True)
        except msgspec.ValidationError as inner:
            return what + _got(entry, str(inner))
    return _got(raw, str(error))


def _got(entry: Any, text: str) -> str:
    """msgspec's sentence, with the value that it is about where its path leads to one."""
    said, at, path = text.partition(" - at `$")
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        try:
            entry = entry[name or int(index)]
        except (LookupError, TypeError):
            return text
    return f"`{path.strip('.`')}` is {entry!r:.60}: {said}" if at and "[...]" not in path else text


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _files(manifest: Manifest) -> Iterator[str]:
    yield manifest.tables.file
    yield from (tokenizer.file for tokenizer in manifest.tokenizers.values())
    for graph in manifest.graphs.values():
        yield graph.file
        yield from (part.file for part in (graph.weights, graph.data, graph.program) if part is not None)
