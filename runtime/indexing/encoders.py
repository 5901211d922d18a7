"""The graphs of a bundle that make what a motion memory keeps: the vector of a caption, the record of a clip.

What a clip's graphs are given, K clips at once: `video` float32 [K,F,3,H,W] in [-1,1], `image`, their first pictures
[K,3,H,W], `pixels`, `video` as uint8 [K,F,H,W,3], and `field`, their motion fields [K,F-1,2,H,W] (fields.py). They run in
their order, each on what its ports name, also of what those before it gave; the record is taken from these values by name.

What runs graphs is a generator that yields the call that it wants next, (graph, inputs), and is sent the outputs: so whoever
has calls of its own to make (a job) can make these among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import path_of
from motionrt.runtime.backends.seam import Backend, Graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import GraphSpec, MemorySpec
from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.indexing.fields import FIELD, beside, field_of, reads_field
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.media.flow import check_flow, dense_flow
from motionrt.runtime.media.limits import LIMITS, Limits
from motionrt.runtime.media.video import DecodedClip, File, decode_clip
from motionrt.runtime.memory.file import memory_spec
from motionrt.runtime.memory.memory import Reference
from motionrt.runtime.memory.rows import Layout

Record = dict[str, NDArray[Any]]
Calls = Generator[tuple[str, Record], Mapping[str, NDArray[Any]], Record]  # what is wanted, what it gave, what came out
STILL = 4  # of 255 levels: up to so much a still changes by being coded as a video
_hashes = FileHashes()  # of the files that records on demand are made of


@dataclass(frozen=True)
class ClipEncoders:
    """What turns a captioned clip into what the memory keeps: the graphs that `spec` names, and the clips that they take.

    tokenize: caption -> values for the query graph, B = 1; load: a graph by its name; graphs: what each of them declares.
    """

    spec: MemorySpec
    tokenize: Callable[[str], Mapping[str, NDArray[np.int64]]]
    load: Callable[[str], Graph]
    graphs: Mapping[str, GraphSpec]

    @classmethod
    def from_bundle(cls, bundle: Bundle, backend: Backend) -> ClipEncoders:
        """Those of `bundle`; a graph is loaded when it is first used."""
        return cls.of(bundle, functools.cache(lambda name: backend.load(bundle, name)))

    @classmethod
    def of(cls, bundle: Bundle, load: Callable[[str], Graph]) -> ClipEncoders:
        """Those of `bundle`, as `load` gives them by name. BundleError if its requests take no clips."""
        spec = memory_spec(bundle)
        return cls(spec, lambda text: bundle.tokenize(spec.tokenizer, text), load, bundle.graphs)

    def embed(self, caption: str) -> NDArray[np.float32]:
        """The vector of a caption, float32 [E]. Raises InputError if it is too long."""
        values = self.tokenize(caption)
        (vector,) = self.load(self.spec.query)(_read(self.graphs[self.spec.query], values)).values()
        return vector.reshape(vector.shape[1:])

    def field(self, clip: DecodedClip, path: Path, limits: Limits = LIMITS) -> NDArray[np.float32] | None:
        """The motion field of `clip`, cut out of `path`, where records are made of it. Raises what `field_of` raises."""
        return field_of(clip.video, path, clip.start, limits) if reads_field(self.spec, self.graphs) else None

    def records(self, videos: NDArray[np.float32], fields: NDArray[np.float32] | None = None) -> list[Record]:
        """The record of each of `videos` [K,F,3,H,W], as `record_calls` makes them."""
        if fields is None and reads_field(self.spec, self.graphs):
            check_flow("the video", "Search by a prompt")
        made = _run(record_calls(self.spec, self.graphs, videos, fields), self.load)
        return [{name: values[row] for name, values in made.items()} for row in range(len(videos))]

    def part_of_image(self, image: NDArray[np.float32]) -> tuple[str, NDArray[Any]]:
        """The float part of the record that a still [3,H,W] is searched by: the first one that is made of `image` alone."""
        name, _ = _part_of_stills(self.spec, self.graphs)
        return name, _run(still_calls(self.spec, self.graphs, image), self.load)[name]

    def part_of_video(self, video: NDArray[np.float32]) -> tuple[str, NDArray[Any]]:
        """The float part of the record that a video [F,3,H,W] is searched by: the first one that a still does not have."""
        _, there = _of_stills(self.spec, self.graphs)
        name = _searched(self.spec, lambda name: name not in there, "a video and of no still")
        return name, self.records(video[None])[0][name]


def still_calls(spec: MemorySpec, graphs: Mapping[str, GraphSpec], image: NDArray[np.float32]) -> Calls:
    """The float part of the record that a still [3,H,W] is searched by, alone, by its name: the first one made of `image`
    alone. InputError where there is none."""
    name, run = _part_of_stills(spec, graphs)
    values: Record = {"image": image[None]}
    for graph in run:
        values |= yield graph, _read(graphs[graph], values)
    return {name: values[name][0]}


def _part_of_stills(spec: MemorySpec, graphs: Mapping[str, GraphSpec]) -> tuple[str, list[str]]:
    run, there = _of_stills(spec, graphs)
    return _searched(spec, lambda name: name in there, "a still"), run


def _of_stills(spec: MemorySpec, graphs: Mapping[str, GraphSpec]) -> tuple[list[str], set[str]]:
    """The graphs that run on `image` alone, and the values that there are then."""
    names, there = list[str](), {"image"}
    for name in spec.graphs:
        if there.issuperset(port.name for port in graphs[name].inputs):
            names.append(name)
            there |= {port.name for port in graphs[name].outputs}
    return names, there


def _searched(spec: MemorySpec, wanted: Callable[[str], bool], what: str) -> str:
    for part in spec.record:
        if np.dtype(part.dtype).kind == "f" and wanted(part.name):
            return part.name
    raise InputError(f"records of this bundle have no float part that is made of {what}; search by a prompt.")


def cut(spec: MemorySpec, path: Path, start: float | None, end: float | None, limits: Limits = LIMITS) -> DecodedClip:
    """A clip as the bundle takes them, from `start` seconds of a file on, up to `end` (`decode_clip`)."""
    size = spec.clip
    return decode_clip(path, size.frames, size.height, size.width, size.fps, start, end, limits=limits)


def check_moves(spec: MemorySpec, path: Path, clip: DecodedClip) -> None:
    """MediaError for a clip, cut out of `path`, that is too short for the bundle, or shows too little motion."""
    span = f"from {clip.start:g} to {clip.start + clip.duration:g} s"
    if spec.least_seconds is not None and clip.duration < spec.least_seconds - 1e-6:
        least = f"a clip takes {spec.least_seconds:g} s or more"
        raise MediaError(f"{path} is too short: it has {clip.duration:g} s {span}, and {least}. Use a longer one.")
    fix = "Leave it out, or choose a part that moves"
    if len(clip.video) > 1 and np.abs(clip.video - clip.video[:1]).max() * 127.5 <= STILL:
        raise MediaError(f"{path} shows one picture {span}, which is no motion. {fix}.")
    change = np.mean([np.abs(after - before).mean() for before, after in pairwise(clip.video)] or [0]) * 127.5
    if spec.least_change is not None and change < spec.least_change:
        least = f"a clip takes {spec.least_change:g} or more"
        raise MediaError(f"{path} hardly moves {span}: from picture to picture {change:.2g} of 255 levels; {least}. {fix}.")


def record_calls(
    spec: MemorySpec, graphs: Mapping[str, GraphSpec], videos: NDArray[np.float32], fields: NDArray[np.float32] | None = None
) -> Calls:
    """The records of `videos` [K,F,3,H,W], whose motion fields are `fields` [K,F-1,2,H,W], or are found where they are read:
    each part [K, *dims] as the graphs give it, of the size that the bundle declares.

    InputError if a graph gives another shape, or another dtype for a part that is not float (no number is rounded to a
    whole one without a word). A float part is rounded to its dtype where it is kept, and must be finite then.
    """
    values: Record = {"video": videos, "image": np.ascontiguousarray(videos[:, 0])}
    read = {port.name for name in spec.graphs for port in graphs[name].inputs}
    if "pixels" in read | {part.name for part in spec.record}:
        values["pixels"] = np.ascontiguousarray(np.rint((videos + 1) * 127.5).astype(np.uint8).transpose(0, 1, 3, 4, 2))
    if FIELD in read:
        values[FIELD] = np.stack([dense_flow(video) for video in videos]) if fields is None else fields
    for name in spec.graphs:
        values |= yield name, _read(graphs[name], values)
    for part in spec.record:
        got = values.get(part.name)
        if got is None:
            raise InputError(f"no graph of the memory gives `{part.name}` of the record. Export the bundle again.")
        both_float = got.dtype.kind == "f" == np.dtype(part.dtype).kind
        if got.shape != (len(videos), *part.dims) or not (both_float or got.dtype == part.dtype):
            raise InputError(
                f"`{part.name}` of a clip came out as {got.dtype} {list(got.shape[1:])}; the bundle declares {part.dtype}"
                f" {list(part.dims)} for the record. Export the bundle again."
            )
    return {part.name: values[part.name] for part in spec.record}


def reference_calls(bundle: Bundle, reference: Reference, folder: Path = Path(), limits: Limits = LIMITS) -> Calls:
    """The record of a clip whose memory does not keep it: its file is cut again, and the graphs of `bundle` run on it.

    The arrays are those that a memory with records would have given back, up to what a backend's numbers depend on how many
    clips it is given at once. folder: where relative sources start; limits: of decoding. Raises MediaError if the file is
    gone, or its bytes are not those that were indexed; InputError.
    """
    spec, path = memory_spec(bundle), folder / reference.source
    if _hashes.sha256(path) != reference.source_sha256:
        raise MediaError(
            f"the video file {path} is not the one that clip {reference.id} ({reference.caption[:80]!r}) was indexed from: its"
            " bytes are others. Restore it, or remove the clip and add the file again."
        )
    text = reference.metadata.get("end_sec")
    try:
        end = None if text is None else float(text)
    except ValueError:
        raise InputError(f"`end_sec` of clip {reference.id} is {text!r}; allowed are seconds, or none.") from None
    return (yield from clip_calls(bundle, cut(spec, path, reference.start, end, limits).video, path, reference.start, limits))


def clip_of_file(
    bundle: Bundle, file: File, folder: Path, limits: Limits = LIMITS
) -> tuple[Reference, NDArray[np.float32]]:
    """A video file as a reference of no memory, its score NaN and its record still to be made, and its first clip, float32
    [F,3,H,W]: cut as a memory cuts it. folder: where a relative path starts. Raises MediaError, InputError."""
    spec, path = memory_spec(bundle), folder / path_of("a reference", file)
    clip = cut(spec, path, None, None, limits)
    check_moves(spec, path, clip)
    if reads_field(spec, bundle.graphs):
        beside(path, clip.start)  # what is missing is said before any work
    return Reference(0, nan, "", str(path), clip.start, clip.duration, {}, fps=clip.fps), clip.video


def clip_calls(bundle: Bundle, video: NDArray[np.float32], path: Path, start: float, limits: Limits = LIMITS) -> Calls:
    """The record of `video` [F,3,H,W], cut out of the file `path` from `start` seconds on, as a memory would have given it
    back."""
    spec = memory_spec(bundle)
    fields = field_of(video, path, start, limits)[None] if reads_field(spec, bundle.graphs) else None
    made = yield from record_calls(spec, bundle.graphs, video[None], fields)
    return Layout(1, spec.record, "").rounded({name: values[0] for name, values in made.items()}, f"the clip {path}")


def make_record(bundle: Bundle, load: Callable[[str], Graph], reference: Reference, folder: Path = Path()) -> Record:
    """What `reference_calls` makes, by the graphs that `load` gives by name."""
    return _run(reference_calls(bundle, reference, folder), load)


def _run(calls: Calls, load: Callable[[str], Graph]) -> Record:
    try:
        name, inputs = next(calls)
        while True:
            name, inputs = calls.send(load(name)(inputs))
    except StopIteration as done:
        made: Record = done.value
        return made


def _read(graph: GraphSpec, values: Mapping[str, NDArray[Any]]) -> Record:
    """What `graph` reads of `values`."""
    if missing := [port.name for port in graph.inputs if port.name not in values]:
        there = ", ".join(values)
        raise InputError(f"graph '{graph.name}' reads `{missing[0]}`; there are only {there}. Export the bundle again.")
    return {port.name: values[port.name] for port in graph.inputs}
