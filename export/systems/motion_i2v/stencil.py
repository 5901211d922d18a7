"""Forward warping as a gather: who moves where is sorted out once per field, and every layer then reads sums of a few rows.

Motion-I2V warps frame 0 with an averaging bilinear splat (softmax splatting's "average": Niklaus and Liu, arXiv 2003.05534):

    z_i(p) = sum_q b(p - q - f_i(q)) z_0(q) / (sum_q b(p - q - f_i(q)) + 1e-7)         b: bilinear, four neighbours

Contributions from outside the frame, and of sources that are not finite, are dropped; where nothing arrives there is 0. The
weights depend on the field alone, and a splat is linear in z_0: so `stencil` makes a table of sources and weights for every
target p of every frame i, and `warped` reads any features by it, projected ones as well.

How many sources a target has depends on the field (none to all), but sizes of a graph do not. So a target has `SLOTS` slots of
its own, and what does not fit goes to chunks of `SLOTS` more, which chunks of chunks add up: a tree, in which every level has
room for the worst field (a source has four targets at most). Nothing is left out, and nothing is added up in an order that
changes: there is no scatter with a sum in it. With 4 slots a target costs 11 reads, with 8 it costs 14.

Shapes: B requests, n frames behind frame 0, h x w places, R = B h w n targets in the order [B, place, frame].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SLOTS = 4
EPSILON = 1e-7


class Stencil(NamedTuple):
    """`sources`, `weights` `[R + chunks, SLOTS]`: rows of the features (B h w of them) that a target, and behind the targets a
    chunk, sums. `sums`: for each level of the tree the chunks of the level below that its chunks sum, `[chunks, SLOTS]`;
    `beyond [R]`: the chunk, of all levels in turn, that a target adds. The last chunk of a level is empty: its sum is 0."""

    sources: Tensor
    weights: Tensor
    sums: tuple[Tensor, ...]
    beyond: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by names."""
        sums = {f"sums_{level}": index for level, index in enumerate(self.sums, 2)}
        return {"sources": self.sources, "weights": self.weights, **sums, "beyond": self.beyond}


def depth(places: int) -> int:
    """Levels of the tree for a grid of so many places: no source comes to a target twice."""
    most, found = -(-(places - SLOTS) // SLOTS), 1
    while most > 1:
        most, found = -(-most // SLOTS), found + 1
    return found


def resized(flow: Tensor, grid: tuple[int, int]) -> Tensor:
    """A field `[B, n, 2, H, W]` (x, y) in its own pixels on a grid of another size, in pixels of that; no antialiasing."""
    height, width = flow.shape[-2:]
    small = F.interpolate(flow.flatten(0, 1), size=grid, mode="bilinear", align_corners=False, antialias=False)
    scale = torch.tensor([grid[1] / width, grid[0] / height], dtype=flow.dtype, device=flow.device)
    return (small * scale[:, None, None]).unflatten(0, flow.shape[:2])


def entries(flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a field `[B, n, 2, h, w]` in pixels of the grid the target (R for none), source and bilinear weight of all its
    contributions, `[4 R]` each."""
    batch, frames, _, height, width = flow.shape
    places = height * width
    count = lambda size: torch.arange(size, device=flow.device)  # noqa: E731
    x = flow[:, :, 0] + count(width)
    y = flow[:, :, 1] + count(height)[:, None]
    near = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for what is not finite
    x, y = (torch.where(near, at, torch.zeros_like(at)) for at in (x, y))
    left, top = x.floor(), y.floor()
    right, low = x - left, y - top
    first = count(batch)[:, None, None, None] * places
    frame = count(frames)[:, None, None]
    targets, weights = [], []
    for down in (0, 1):
        for across in (0, 1):
            weight = (right if across else 1 - right) * (low if down else 1 - low)
            column, row = left.long() + across, top.long() + down
            inside = near & (weight > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            target = (first + row * width + column) * frames + frame
            targets.append(torch.where(inside, target, torch.full_like(target, batch * places * frames)))
            weights.append(weight)
    source = (first + count(places).view(height, width)).expand(-1, frames, -1, -1).flatten().repeat(4)
    return torch.stack(targets).flatten(), source, torch.stack(weights).flatten()


@torch.no_grad()
def stencil(flow: Tensor) -> Stencil:
    """The table of a field `[B, n, 2, h, w]` in pixels of the grid; nothing is differentiated."""
    batch, frames, _, height, width = flow.shape
    rows = batch * height * width * frames
    owner, source, weight = entries(flow)
    total = owner.shape[0]
    place = torch.arange(total, device=flow.device)
    order = (owner * total + place).sort().indices  # no two are equal: the order is one
    owner, source, weight = owner[order], source[order], weight[order]
    # Where each owner's entries begin and end among the sorted: counted without a sum, which TensorRT's scatter does not have.
    nowhere = torch.full_like(owner, rows + 1)
    begins, ends = F.pad(owner[:-1], (1, 0), value=-1) != owner, F.pad(owner[1:], (0, 1), value=-1) != owner
    begin = _placed(torch.where(begins, owner, nowhere), place, rows + 1, 0)
    counts = (_placed(torch.where(ends, owner, nowhere), place + 1, rows + 1, 0) - begin)[:rows]
    rank = place - begin[owner]

    chunk = _Chunks(torch.where(rank < SLOTS, rows, owner), rank - SLOTS, counts.clamp(min=SLOTS) - SLOTS, _room(rows, 1))
    slot = torch.where((owner < rows) & (rank < SLOTS), owner * SLOTS + rank, rows * SLOTS + chunk.slot)
    wide = (rows + chunk.room) * SLOTS
    sources, owners = (_placed(slot, value, wide, fill) for value, fill in ((source, 0), (owner, rows)))
    weights = _placed(slot, weight, wide, 0.0)
    levels, sums, offset = [chunk], list[Tensor](), 0
    nothing = chunk.room - 1
    beyond = torch.where(chunk.count == 1, chunk.first, torch.full_like(chunk.first, nothing))
    for level in range(2, depth(height * width) + 1):
        below, offset = levels[-1], offset + levels[-1].room
        more = below.count > 1
        chunk = _Chunks(
            torch.where(F.pad(more, (0, 1))[below.owner], below.owner, rows), below.rank,
            torch.where(more, below.count, torch.zeros_like(below.count)), _room(rows, level),
        )  # fmt: skip
        index = torch.arange(below.room, device=flow.device)
        sums.append(_placed(chunk.slot, index, chunk.room * SLOTS, below.room - 1).view(-1, SLOTS))
        beyond = torch.where(chunk.count == 1, offset + chunk.first, beyond)
        levels.append(chunk)
    table = Stencil(sources.view(-1, SLOTS), weights.view(-1, SLOTS), tuple(sums), beyond)
    arrived = warped(table, torch.ones(batch, height * width, 1, dtype=flow.dtype, device=flow.device)).flatten()
    share = F.pad(1 / (arrived + EPSILON), (0, 1))
    return table._replace(weights=table.weights * share[owners].view(-1, SLOTS))


def warped(table: Stencil, features: Tensor) -> Tensor:
    """Features of frame 0, `[B, h w, D]`, as they arrive in the other frames: `[B, h w, n, D]`."""
    batch, places, width = features.shape
    rows = table.beyond.shape[0]
    sums = torch.matmul(table.weights[:, None], _rows(features.flatten(0, 1), table.sources))[:, 0]
    own, chunks = sums[:rows], [sums[rows:]]
    for index in table.sums:
        chunks.append(_rows(chunks[-1], index).sum(1))
    return (own + _rows(torch.cat(chunks), table.beyond)).view(batch, places, -1, width)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values[index]` by the operator that ONNX calls Gather."""
    return values.index_select(0, index.flatten()).unflatten(0, index.shape)


def _room(rows: int, level: int) -> int:
    """How many chunks a level needs at most, and an empty one: four entries a target, and a target has a chunk on this level if
    it has more than SLOTS + SLOTS^(level - 1) of them (any, on the first); chunks that are full need fewer."""
    least = SLOTS if level == 1 else SLOTS + SLOTS ** (level - 1) + 1
    return 4 * rows // least + 1


class _Chunks:
    """Items of targets, in the order of these, in chunks. `owner`: the target of an item, or R; `rank`: among its target's;
    `counts [R]`: items of every target."""

    def __init__(self, owner: Tensor, rank: Tensor, counts: Tensor, room: int) -> None:
        rows = counts.shape[0]
        self.room, self.count = room, (counts + SLOTS - 1) // SLOTS
        self.first = self.count.cumsum(0) - self.count
        first = F.pad(self.first, (0, 1))
        here = owner < rows
        chunk = first[owner] + torch.div(rank, SLOTS, rounding_mode="floor")
        nowhere = torch.full_like(chunk, room)
        self.slot = torch.where(here, chunk * SLOTS + rank % SLOTS, nowhere * SLOTS)
        leads = here & (rank % SLOTS == 0)
        self.owner = _placed(torch.where(leads, chunk, nowhere), owner, room, rows)
        self.rank = torch.arange(room, device=owner.device) - first[self.owner]


def _placed(at: Tensor, values: Tensor, size: int, fill: float) -> Tensor:
    """`values` at the places `at`, no two the same below `size`, and `fill` elsewhere; what is at `size` is dropped."""
    most = max(size + 1, at.shape[0])  # TensorRT scatters no more than there is room for
    room = torch.full((most,), fill, dtype=values.dtype, device=values.device)
    return room.scatter(0, at, values)[:size]
