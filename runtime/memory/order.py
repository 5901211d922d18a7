"""Renumbers the nodes of a saved USearch index so that near vectors lie near each other in the file, and so in memory.

A search looks at about a thousand vectors and their lists of neighbours. As clips come in any order these lie anywhere, and
a search of a large index mostly waits for memory. The graph stays what it is: only numbers of nodes change, and answers do
not. Renumbering a graph for its search is from Coleman et al., "Graph Reordering for Cache-Efficient Near Neighbor Search"
(NeurIPS 2022); the order here is that of a tree which halves the vectors along their widest direction.

The file (USearch 2, what `Index.save` writes for i8 vectors, 64-bit keys and 32-bit numbers of nodes; little-endian):
rows and columns u32, the vectors i8 [rows, columns]; 64 bytes of head; size, connectivity, connectivity of level 0, highest
level and entry node u64; the level of each node i16; then for each node its key u64 and its level i16, and for every level
from 0 on a count u32 and as many places for numbers of nodes u32 as that level's connectivity.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_KINDS = bytes((0x17, 0x0E, 0x0F))  # of vectors, keys and numbers of nodes, in the head
_LEAF = 32  # vectors below which a half is not halved again: 12 KB of 384-d
_SAMPLE = 256  # vectors that a direction is chosen from
_CHUNK = 16384  # vectors that are looked at, and nodes that are written, at once


class _Layout(NamedTuple):
    """Where things are in the file: levels int16 [n]; places int64 [n+1], where each node begins, and the end."""

    vectors: NDArray[np.int8]
    fixed: slice
    connectivity: tuple[int, int]  # of level 0, and of those above
    entry: int
    levels: NDArray[np.int16]
    places: NDArray[np.int64]


def reorder(source: Path, target: Path) -> bool:
    """Write the index in `source` to `target`, its nodes in a better order; False if `source` is not laid out as known here.

    Takes a few seconds for 100,000 clips, and little memory beside the two files. OSError if `target` cannot be written.
    """
    if source.stat().st_size < 8:
        return False
    data = np.memmap(source, np.uint8, "r")
    layout = _layout(data)
    if layout is None:
        return False
    order = order_of(layout.vectors)
    number = np.empty(len(order), np.uint32)
    number[order] = np.arange(len(order), dtype=np.uint32)
    with target.open("wb") as file:
        file.write(data[:8].tobytes())
        for start in range(0, len(order), _CHUNK):
            file.write(layout.vectors[order[start : start + _CHUNK]].tobytes())
        file.write(data[layout.fixed].tobytes() + struct.pack("<Q", number[layout.entry]))
        file.write(layout.levels[order].tobytes())
        for start in range(0, len(order), _CHUNK):
            file.write(_nodes(data, layout, order[start : start + _CHUNK], number).tobytes())
    return True


def order_of(vectors: NDArray[np.int8]) -> NDArray[np.int64]:
    """The rows of `vectors` [n,E] so that near ones follow each other: halved along a wide direction, and again."""
    order, random = np.arange(len(vectors)), np.random.default_rng(0)
    spans = [(0, len(vectors))]
    while spans:
        start, stop = spans.pop()
        if stop - start <= _LEAF:
            continue
        rows = order[start:stop]
        direction = _direction(vectors[rows[random.integers(len(rows), size=_SAMPLE)]].astype(np.float32))
        parts = (rows[first : first + _CHUNK] for first in range(0, len(rows), _CHUNK))
        side = np.concatenate([vectors[part].astype(np.float32) @ direction for part in parts])
        middle = len(rows) // 2
        order[start:stop] = rows[np.argpartition(side, middle)]
        spans += [(start, start + middle), (start + middle, stop)]
    return order


def _direction(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    """From the centre of one half of the sample [n,E] to that of the other; halves are made better three times."""
    direction: NDArray[np.float32] = sample[0] - sample[-1]
    for _ in range(3):
        side = sample @ direction
        upper = side > np.median(side)
        if not upper.any():  # all the same
            break
        direction = sample[upper].mean(axis=0) - sample[~upper].mean(axis=0)
    return direction


def _layout(data: NDArray[np.uint8]) -> _Layout | None:
    """What the file says of itself, or None unless every byte is accounted for."""
    rows, columns = struct.unpack("<2I", data[:8].tobytes())
    head = 8 + rows * columns
    start = head + 64 + 40
    if len(data) < start + 2 * rows or data[head : head + 7].tobytes() != b"usearch":
        return None
    size, above, base, _, entry = struct.unpack("<5Q", data[head + 64 : start].tobytes())
    if data[head + 14 : head + 17].tobytes() != _KINDS or size != rows or entry >= rows:
        return None
    levels = data[start : start + 2 * rows].view("<i2")
    length = 10 + 4 * (1 + base) + levels.astype(np.int64) * 4 * (1 + above)
    places = start + 2 * rows + np.concatenate([[0], np.cumsum(length)])
    if places[-1] != len(data) or levels.min(initial=0) < 0:
        return None
    vectors = data[8:head].view(np.int8).reshape(rows, columns)
    return _Layout(vectors, slice(head, start - 8), (base, above), entry, levels, places)


def _nodes(
    data: NDArray[np.uint8], layout: _Layout, nodes: NDArray[np.int64], number: NDArray[np.uint32]
) -> NDArray[np.uint8]:
    """The bytes of `nodes`, one after the other, their neighbours renumbered."""
    length = layout.places[nodes + 1] - layout.places[nodes]
    begins = np.cumsum(length) - length
    found: NDArray[np.uint8] = data[np.repeat(layout.places[nodes] - begins, length) + np.arange(length.sum())]
    levels, at = layout.levels[nodes], begins + 10
    for level in range(int(levels.max(initial=0)) + 1):
        here = at[levels >= level]
        most = layout.connectivity[min(level, 1)]
        words = found[here[:, None] + np.arange(4 * (1 + most))].view("<u4")
        used = np.arange(most) < words[:, :1]
        words[:, 1:][used] = number[words[:, 1:][used]]
        found[here[:, None] + np.arange(4 * (1 + most))] = words.view(np.uint8)
        at += 4 * (1 + most)
    return found
