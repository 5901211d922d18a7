"""Latents to pictures in parts that bound memory, as the rows of a loop: chunks of frames, and tiles of the picture.

    size = (tile_size(60, 2), tile_size(90, 2))              # latents of a tile, where there are 2 along each side
    made = decoding({"decode": ..., "decode_next": ...}, [(3, 9), (2, 8)], (5, 16, 60, 90), 8, caches=caches)

Chunks are exact where the decoder hands on what its convolutions read of the frames before (`caches`): there is no seam. Tiles
overlap and are blended linearly. A tile's group norms see the tile alone: tiles are an approximation that an export opts into.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from motionrt.export.systems.system import Graph, Schedules, lengths
from motionrt.runtime.bundle.manifest import Approximation, Collect, Loop, Slice

OVERLAP = 1 / 6  # of a tile, at least
PICTURES = "pictures"  # the loop that decodes


@dataclass(frozen=True)
class Tile:
    """A span of one axis, in latents: where it begins, its size, and how far it overlaps the ones before and after it."""

    start: int
    size: int
    before: int = 0
    after: int = 0


def tiles_of(length: int, size: int) -> list[Tile]:
    """Tiles of `size` that cover `length`."""
    count = 1 + math.ceil((length - size) / (size * (1 - OVERLAP)))
    starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    shared = [0, *(start + size - following for start, following in zip(starts, starts[1:], strict=False)), 0]
    return [Tile(start, size, shared[i], shared[i + 1]) for i, start in enumerate(starts)]


def tile_size(length: int, count: int) -> int:
    """The smallest size of which `count` tiles cover `length` with the least overlap."""
    return math.ceil(length / (count - (count - 1) * OVERLAP))


@dataclass(frozen=True)
class Decoding:
    """Graphs that make `video` of `latents`, and the loop over them where they do not run in one piece."""

    graphs: Mapping[str, Graph]
    loops: Mapping[str, Loop] = field(default_factory=dict)
    schedules: Mapping[str, Schedules] = field(default_factory=dict)
    approximations: tuple[Approximation, ...] = ()

    @property
    def name(self) -> str:
        """What the plan runs."""
        return next(iter(self.loops or self.graphs))


def decoding(
    graphs: Mapping[str, Graph],
    chunks: Sequence[tuple[int, int]],
    latents: tuple[int, int, int, int],
    scale: int,
    *,
    caches: Sequence[str] = (),
    tiles_error: str = "not measured",
    name: str = PICTURES,
    channels: int = 3,
) -> Decoding:
    """The loop `name` over `decode` and `decode_next`, if there is more to do than one call.

    For each tile all its chunks follow one another: the first by the first of `graphs`, the others by the last. `chunks`:
    (latent frames, pictures) of each; `latents` F, C, H, W; `scale`: pixels per latent along a side; `caches`: inputs `NAME` of
    the last graph, given by output `next_NAME` of the step before; `tiles_error`: what is known of the error of tiles;
    `channels` of a picture. The first input of a graph is of the latents, and its first output the pictures: values are called
    like these.
    """
    first = next(iter(graphs.values()))
    reads, gives = next(iter(first.inputs)), first.outputs[0]
    tile = first.inputs[reads].dims[3:]
    tiled, columns = tile != latents[2:], ("graph", "frame", "top", "left", "out_frame", "out_top", "out_left")
    if not tiled and len(chunks) == 1:
        return Decoding(graphs)
    ramps = ("top_before", "top_after", "left_before", "left_after") if tiled else ()
    rows = []
    for top, left in itertools.product(*(tiles_of(length, int(size)) for length, size in zip(latents[2:], tile, strict=True))):
        frame = picture = 0
        for index, (count, pictures) in enumerate(chunks):
            row = [min(index, len(graphs) - 1), frame, top.start, left.start, picture, scale * top.start, scale * left.start]
            rows.append(row + [scale * size for size in (top.before, top.after, left.before, left.after)][: len(ramps)])
            frame, picture = frame + count, picture + pictures
    if frame != latents[0]:
        raise ValueError(f"chunks {list(chunks)} do not make up {latents[0]} latent frames")
    schedules = {"chunks": {len(rows): np.array(rows, np.float32)}}
    video = Collect(
        gives,
        (picture, channels, scale * latents[2], scale * latents[3]),
        {1: "out_frame", 3: "out_top", 4: "out_left"},
        {3: ("top_before", "top_after"), 4: ("left_before", "left_after")} if tiled else {},
    )
    loop = Loop(
        graphs=tuple(graphs),
        columns=columns + ramps,
        schedules=lengths(schedules),
        default=("chunks", len(rows)),
        carry={f"next_{name}": name for name in caches},
        slices={reads: Slice(reads, {1: "frame", 3: "top", 4: "left"})},
        collect={gives: video},
    )
    quality = {"tiles": len(rows) // len(chunks), "error": tiles_error}
    approximations = (Approximation("tiles", tuple(graphs), quality),) if tiled else ()
    return Decoding(graphs, {name: loop}, {name: schedules}, approximations)
