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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import force_setattr

from motionrt.runtime.dtypes import DTYPES, PORTS
from motionrt.runtime.errors import BundleError

FORMAT = 2
NOISE = "noise"  # the port that is given standard normal numbers of its size
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

    Not given, the rows stay as they were exported; `default` says what they hold, for people.
    """

    loop: str
    column: str
    default: float | None = None
    help: str = ""


Input = ImageInput | TextInput | NumberInput | ColumnInput


class Part(_Strict, frozen=True):
    """One array of a record: `dtype` (NumPy's name) and sizes. It reaches the plan as `reference_NAME`, `[1, K, *dims]`."""

    name: str
    dtype: str
    dims: tuple[Count, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.dtype == "bfloat16":
            raise ValueError(f"part '{self.name}' of the record is {self.dtype}, which NumPy does not have")


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
    `absent`: what stands in for a record where there is none: value -> "zeros", or a number, which is also how a request says
    that it wants none; empty where a request must have one. `fingerprint`: of what made vectors and records: a memory fits
    that has the same.
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


class Node(_Strict, frozen=True):
    """One graph in the plan whose ports are not named like the values: `reads`: port -> value, `writes`: port -> value."""

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


class Loop(_Strict, frozen=True):
    """Step graphs, what is carried from step to step, and rows of numbers `[T, R]`, whose `columns` have names.

    Column `graph` says which of `graphs` a step runs. In step t a port is given, by its name: what is carried; a feed, the
    numbers of row t in some columns; row t of a table, which the graphs `tables` make of the feeds of all rows at once;
    standard normal `noise`, where column `noise` of row t is not 0, else zeros; a slice; any other value as it is.
    `carry`: output -> input of the next step; `start`: input -> "noise", "zeros" or a value; `gives`: carried input -> the
    value that it is called at the end. `schedules`: name -> the numbers of steps that there are rows for; `default`: one of
    them. `plain`: the graph of the step before it was rewritten, to compare with.
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


class Output(_Strict, frozen=True):
    """The value that is the video, float32 `[1, F, 3, H, W]` in [-1, 1], and its sizes; `fps`: pictures a second."""

    value: str
    frames: Count
    height: Count
    width: Count
    fps: Rate


class Approximation(_Strict, frozen=True):
    """What `graphs` do not compute exactly, by name, and what that costs in quality, as measured."""

    name: str
    graphs: tuple[str, ...]
    quality: Mapping[str, Any]


class Manifest(_Strict, frozen=True, kw_only=True):
    """bundle.json. `tables`: the file of all loops' rows; `partition`, `provenance`: what the exporter says, for people."""

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

    def __post_init__(self) -> None:
        if problem := next(_faults(self), None):
            raise ValueError(problem)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The plan, every entry as a node; a loop's `graph` is the name of the loop."""
        return tuple(Node(entry) if isinstance(entry, str) else entry for entry in self.plan)

    def reads(self, node: Node) -> set[str]:
        """The values that a node needs; noise is drawn for it, and rows belong to the loop."""
        loop = self.loops.get(node.graph)
        if loop is None:
            return {node.reads.get(port.name, port.name) for port in self.graphs[node.graph].inputs} - {NOISE}
        made = {port.name for table in loop.tables for port in self.graphs[table].outputs}
        inner = {*loop.feeds, *loop.start, *loop.carry.values(), *loop.slices, *made, NOISE}
        ports = {port.name for graph in (*loop.graphs, *loop.tables) for port in self.graphs[graph].inputs}
        started = {value for value in loop.start.values() if value not in (NOISE, "zeros")}
        return (ports - inner) | started | {part.value for part in loop.slices.values()}

    def gives(self, node: Node) -> set[str]:
        """The values that a node makes."""
        loop = self.loops.get(node.graph)
        if loop is None:
            return {node.writes.get(port.name, port.name) for port in self.graphs[node.graph].outputs}
        return {*loop.gives.values(), *(part.value for part in loop.collect.values())}

    def port(self, value: str) -> Port | None:
        """The first input of the plan's graphs that reads `value`; None where none does."""
        for node in self.nodes:
            loop = self.loops.get(node.graph)
            for graph in (node.graph,) if loop is None else (*loop.graphs, *loop.tables):
                for port in self.graphs[graph].inputs:
                    if node.reads.get(port.name, port.name) == value:
                        return port
        return None


def _faults(manifest: Manifest) -> Iterator[str]:
    """What does not fit together, a sentence each: names of nothing, and values that are read before they are there."""
    graphs, loops, memory = manifest.graphs, manifest.loops, manifest.memory
    for name, loop in loops.items():
        for graph in (*loop.graphs, *loop.tables, *([loop.plain] if loop.plain else [])):
            if graph not in graphs:
                yield f"loop '{name}' runs '{graph}', which is no graph of the bundle"
        columns = [column for feed in loop.feeds.values() for column in feed] + [loop.noise or "graph"]
        columns += [column for part in loop.slices.values() for column in part.axes.values()]
        for collected in loop.collect.values():
            columns += [*collected.axes.values(), *(column for pair in collected.ramps.values() for column in pair)]
        if unknown := {"graph", *columns} - {*loop.columns}:
            yield f"loop '{name}' has no column '{min(unknown)}'; it has {', '.join(loop.columns)}"
        if loop.default[1] not in loop.schedules.get(loop.default[0], ()):
            wanted = f"{loop.default[0]} with {loop.default[1]} steps"
            yield f"the default schedule of loop '{name}', {wanted}, is not among its schedules"
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
        elif entry.loop not in loops or entry.column not in loops[entry.loop].columns:
            yield f"input '{name}' changes column '{entry.column}' of loop '{entry.loop}', which is not there"
    if memory is not None:
        there |= {f"reference_{part.name}" for part in memory.record}
        for graph in (memory.query, *memory.graphs):
            if graph not in graphs:
                yield f"the memory needs '{graph}', which is no graph of the bundle"
        if memory.tokenizer not in manifest.tokenizers or not isinstance(manifest.inputs.get(memory.text), TextInput):
            yield f"the memory is searched by input '{memory.text}' and tokenizer '{memory.tokenizer}', which are not there"
        if memory.default > memory.max:
            yield f"a request takes {memory.default} clips and at most {memory.max}"
    for node in manifest.nodes:
        if missing := manifest.reads(node) - there:
            yield f"'{node.graph}' of the plan reads `{min(missing)}`, which nothing before it gives"
        there |= manifest.gives(node)
    if manifest.output.value not in there:
        yield f"nothing gives `{manifest.output.value}`, which is the video"


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
