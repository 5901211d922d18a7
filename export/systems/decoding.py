"""Latents to pictures in parts that bound memory, as the rows of a loop: chunks of frames, and tiles of the picture.

    shape = (tile_size(60, 2), tile_size(90, 2))             # latents of a tile, where there are 2 along each side
    loop, rows = decoding_loop(("decode", "decode_next"), [(3, 9), (2, 8)], (5, 16, 60, 90), shape, 8, caches)

Chunks are exact where the decoder hands on what its convolutions read of the frames before (`caches`): there is no seam. Tiles
overlap and are blended linearly: a tile's group norms see the tile alone, so tiles are an approximation that an export opts into.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from motionrt.export.systems.system import Schedules, lengths
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


def decoding_loop(
    graphs: Sequence[str],
    chunks: Sequence[tuple[int, int]],
    latents: tuple[int, int, int, int],
    tile: tuple[int, int],
    scale: int,
    caches: Sequence[str] = (),
) -> tuple[Loop, Schedules]:
    """The loop `pictures` and its rows. For each tile all its chunks follow one another, the first by `graphs[0]`, which has no
    caches, the others by the last of `graphs`.

    `chunks`: (latent frames, pictures) of each; `latents` F, C, H, W; `tile`: height and width of the graphs' latents; `scale`:
    pixels per latent along a side; `caches`: inputs `NAME` of the second graph that output `next_NAME` of the step before gives.
    """
    tiled = tile != latents[2:]
    columns = ("graph", "frame", "top", "left", "out_frame", "out_top", "out_left")
    ramps = ("top_before", "top_after", "left_before", "left_after") if tiled else ()

    def rows() -> Iterator[list[int]]:
        for top in tiles_of(latents[2], tile[0]):
            for left in tiles_of(latents[3], tile[1]):
                frame = picture = 0
                for index, (count, pictures) in enumerate(chunks):
                    graph = min(index, len(graphs) - 1)
                    overlaps = [scale * size for size in (top.before, top.after, left.before, left.after)] if tiled else []
                    yield [graph, frame, top.start, left.start, picture, scale * top.start, scale * left.start, *overlaps]
                    frame, picture = frame + count, picture + pictures
                assert frame == latents[0], "chunks do not make up the latents"

    table = np.array(list(rows()), np.float32)
    schedules = {"chunks": {len(table): table}}
    frames = sum(pictures for _, pictures in chunks)
    video = Collect(
        "video",
        (frames, 3, scale * latents[2], scale * latents[3]),
        {1: "out_frame", 3: "out_top", 4: "out_left"},
        {3: ("top_before", "top_after"), 4: ("left_before", "left_after")} if tiled else {},
    )
    loop = Loop(
        graphs=tuple(graphs),
        columns=columns + ramps,
        schedules=lengths(schedules),
        default=("chunks", len(table)),
        carry={f"next_{name}": name for name in caches},
        slices={"latents": Slice("latents", {1: "frame", 3: "top", 4: "left"})},
        collect={"video": video},
    )
    return loop, schedules


def tiles_quality(graphs: Sequence[str], tiles: int, known: str = "not measured") -> tuple[Approximation, ...]:
    """What a bundle says of tiles, with what is `known` of their error; nothing for the whole picture."""
    return (Approximation("tiles", tuple(graphs), {"tiles along a side": tiles, "error": known}),) if tiles > 1 else ()
