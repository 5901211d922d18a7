"""Motion-augmented temporal attention (Motion-I2V, arXiv 2401.15977, section 4.2): frames also see frame 0 as a field moves it.

With z_i the normed features of frame i at a place, z'_i those of frame 0 that arrive there (`stencil.py`), and P the table of
positions, frame i asks with W_Q (z_i + P_2i) among the keys W_K (z_i + P_2i) and W_K (z'_i + P_(2i-1)), values alike: F
queries and 2 F - 1 keys. Written for few products: W z'_i is a sum of rows of W z_0, so that frame 0 is projected once and
moved; W P is a table of the weights alone; and keys need no order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.systems.motion_i2v.stencil import Stencil, depth, resized, stencil, warped
from motionrt.export.systems.motionrag import merge_heads, split_heads
from motionrt.kernels.motion_augmented_attention import motion_augmented_attention
from motionrt.kernels.motion_augmented_attention_limits import fits

FORMS = ("own", "released")


@dataclass(frozen=True)
class Warp:
    """How frame 0 reaches the other `frames - 1`: `tables` by the places of a grid, of `rows` requests; see `VideoUNet` for
    `form`, and its `forward` for `fused`."""

    tables: Mapping[int, Stencil]
    frames: int
    rows: int
    form: str = "own"
    fused: bool = False

    def fits(self, places: int, width: int) -> bool:
        """Whether the op is asked for, and takes heads of this width and the table of so many places."""
        return self.fused and fits(self.frames, width, len(self.tables[places].sums))

    def __call__(self, features: Tensor) -> Tensor:
        """Features of frame 0 `[B g, P, D]` -> `[B g, P, F - 1, D]`."""
        width, places = features.shape[-1], features.shape[1]
        beside = features.unflatten(0, (self.rows, -1)).transpose(1, 2)  # branches of a request move alike: one gather
        moved = warped(self.tables[places], beside.flatten(2)).unflatten(-1, (-1, width))
        if self.form == "released":
            # Of two branches, the release gives odd frames their own and even ones the other's: it repeats the features of both
            # in another order than the fields.
            even = (torch.arange(1, self.frames, device=features.device) % 2 == 0)[:, None, None]
            moved = torch.where(even, moved.flip(3), moved)
        return moved.permute(0, 3, 1, 2, 4).flatten(0, 1)


def fields_of(flow: Tensor, grids: list[tuple[int, int]]) -> tuple[Stencil, ...]:
    """The tables for all `grids` of fields f_0->i `[B, F - 1, 2, H, W]` (x, y) in their own pixels."""
    return tuple(stencil(resized(flow, grid)) for grid in grids)


class Tables(nn.Module):
    """`fields_of` as a graph: all tensors of the tables of all grids, in turn."""

    def __init__(self, grids: list[tuple[int, int]]) -> None:
        super().__init__()
        self.grids = grids

    def forward(self, moves: Tensor) -> tuple[Tensor, ...]:
        """`[1, n, 2, H, W]` in pixels -> as `names` calls them."""
        return tuple(value for table in fields_of(moves, self.grids) for value in table.tensors().values())

    def sizes(self, fields: int) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape of each tensor for so many fields, and what its whole numbers are below; 0 for weights. By names."""
        found = {}
        for level, grid in enumerate(self.grids):
            table = stencil(torch.zeros(1, fields, 2, *grid))
            chunks = table.sources.shape[0] - table.beyond.shape[0]
            below = {"sources": grid[0] * grid[1], "weights": 0, "beyond": chunks}
            for name, value in table.tensors().items():
                found[f"{name}_of_grid_{level}"] = (tuple(value.shape), below.get(name, chunks))
                chunks = chunks if name in below else value.shape[0]
        return found


def tables_of(tensors: Sequence[Tensor], grids: list[tuple[int, int]]) -> tuple[Stencil, ...]:
    """What `Tables` gave, put together again."""
    left, found = list(tensors), []
    for grid in grids:
        sources, weights, *sums, beyond = left[: (count := 2 + depth(grid[0] * grid[1]))]
        found.append(Stencil(sources, weights, tuple(sums), beyond))
        del left[:count]
    return tuple(found)


def attended(attn: Any, hidden: Tensor, positions: Tensor, warp: Warp, first: Tensor | None = None) -> Tensor:
    """`hidden [n, P, F, C]` normed, `positions [1, 2 F - 1 or more, C]` -> the update, the same shape. `first [n, P, C]`:
    frame 0 of `hidden`, where that was made apart."""
    count = 2 * warp.frames - 1
    even, odd = positions[0, 0:count:2], positions[0, 1:count:2]
    if warp.fits(hidden.shape[1], hidden.shape[-1] // attn.heads):
        return _fused(attn, hidden, even, odd, warp, first)
    first, others = hidden[:, :, 0] if first is None else first, hidden[:, :, 1:]
    key, value = attn.to_k(first), attn.to_v(first)
    moved = warp(torch.cat([key, value], -1)).chunk(2, -1)
    query = torch.cat([attn.to_q(first)[:, :, None], attn.to_q(others)], 2) + attn.to_q(even)
    pairs = ((attn.to_k, key, moved[0]), (attn.to_v, value, moved[1]))
    keys, values = (
        torch.cat([one[:, :, None], project(others), arrived], 2) + torch.cat([project(even), project(odd)])
        for project, one, arrived in pairs
    )
    query, keys, values = (split_heads(x.flatten(0, 1), attn.heads) for x in (query, keys, values))
    found = merge_heads(F.scaled_dot_product_attention(query, keys, values))
    return attn.to_out[0](found).view(hidden.shape)


def _fused(attn: Any, hidden: Tensor, even: Tensor, odd: Tensor, warp: Warp, first: Tensor | None) -> Tensor:
    """`attended` by the op: rows are projected, and moved and placed in it."""

    def rows(project: Any) -> Tensor:
        found = project(hidden) if first is None else torch.cat([project(first)[:, :, None], project(hidden[:, :, 1:])], 2)
        return found.unflatten(-1, (attn.heads, -1))

    both = torch.cat([even, odd])
    pairs = ((attn.to_q, even), (attn.to_k, both), (attn.to_v, both))
    at = (project(table).unflatten(-1, (attn.heads, -1)) for project, table in pairs)
    table = warp.tables[hidden.shape[1]]
    found = motion_augmented_attention(
        *(rows(project) for project, _ in pairs), *at, table.sources, table.weights, list(table.sums), table.beyond,
        warp.form == "released",
    )  # fmt: skip
    return attn.to_out[0](found.flatten(3))


def rendered(module: Any, hidden: Tensor, warp: Warp, first: Tensor | None = None) -> Tensor:
    """A motion module of diffusers (AnimateDiffTransformer3D) with augmented attention: `hidden [n F, C, h, w]`, the same
    shape. `first [n, C, h, w]`: frame 0 of it, where that was made apart."""
    height, width = hidden.shape[-2:]

    def tokens(x: Tensor, frames: int) -> Tensor:
        rows = nn.GroupNorm.forward(module.norm, x).unflatten(0, (-1, frames))  # every frame on its own
        return module.proj_in(rows.permute(0, 3, 4, 1, 2).flatten(1, 2))

    x = tokens(hidden, warp.frames)
    alone = None if first is None else tokens(first, 1)[:, :, 0]
    for block in module.transformer_blocks:
        for norm, attn in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
            x = x + attended(attn, norm(x), block.pos_embed.pe, warp, None if alone is None else norm(alone))
            alone = None  # from here on it has seen the others
        x = x + block.ff(block.norm3(x))
    out = module.proj_out(x).unflatten(1, (height, width)).permute(0, 3, 4, 1, 2)
    return out.flatten(0, 1) + hidden
