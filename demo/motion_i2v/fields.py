"""Where every pixel of frame 0 goes: true displacement fields of the demo's clips, and what can be said of them. Numpy only.

A field is float32 `[F - 1, 2, H, W]` in px, channel 0 to the right and 1 down: target i shows the pixel (x, y) of frame 0 at
(x, y) + field[i - 1, :, y, x]. The camera stands still, so the background's is 0; the sprite moves as one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import domain
import numpy as np
from numpy.typing import NDArray
from world import FRAMES, allowed

from motionrt.runtime.media.drawn import rasterise

Floats = NDArray[np.float32]
STRIDE = 8  # between the targets of a clip at its own speed; smaller ones show only its beginning, slower

UNIT = 4  # px, half a drag's square: as large as a cell of the latents, so that no drag falls between them
CELL = 8  # px
Known = tuple[Floats, NDArray[np.bool_]]  # a field [15, 2, 64, 64] px, 0 where nothing is known; and where it is, [64, 64]
Track = NDArray[np.float64]  # where a point (x, y) px is in every frame, [16, 2]


def covered(spec: domain.Spec) -> NDArray[np.bool_]:
    """The pixels `[64, 64]` of frame 0 that are more sprite than background."""
    return np.asarray(domain.render(spec, frames=1)[1][0] >= 0.5)


def true_field(spec: domain.Spec) -> Floats:
    """`[F - 1, 2, 64, 64]` px."""
    return spread(np.asarray(spec.path), covered(spec))


def spread(path: NDArray[np.float64], cover: NDArray[np.bool_]) -> Floats:
    """The field of pixels `cover` `[H, W]` moving along `path` `[F, 2]` px, and of all others staying."""
    moved = (path[1:] - path[0]).astype(np.float32)
    return moved[:, :, None, None] * cover.astype(np.float32)


def as_unit(field: Floats) -> Floats:
    """Px to what the flow autoencoder reads: a share of width or height, -1 to 1 as 0 to 1."""
    size = np.array(field.shape[:-3:-1], np.float32)[:, None, None]
    return np.asarray((field / size + 1) / 2, np.float32)


def as_pixels(unit: Floats) -> Floats:
    """The reverse of `as_unit`; beyond the picture's size it saturates."""
    size = np.array(unit.shape[:-3:-1], np.float32)[:, None, None]
    return np.asarray((unit * 2 - 1).clip(-1, 1) * size, np.float32)


def slowed(path: NDArray[np.float64], stride: float) -> NDArray[np.float64]:
    """The path `[F, 2]` at a stride of at most STRIDE: its beginning, over as many frames."""
    where = np.arange(len(path)) * (stride / STRIDE)
    return np.stack([np.interp(where, np.arange(len(path)), side) for side in path.T], axis=1)


def training_clip(rng: np.random.Generator, named: float) -> tuple[domain.Spec, int]:
    """A clip that may be trained on, a share `named` of them of the seen families; and its stride, mostly STRIDE."""
    path = domain.free_path(rng, FRAMES) if rng.random() >= named else None
    spec = allowed(rng, domain.sample_spec(rng, path=path, frames=FRAMES))
    stride = STRIDE if rng.random() < 0.65 else int(rng.integers(2, STRIDE))
    return replace(spec, path=tuple((float(x), float(y)) for x, y in slowed(np.asarray(spec.path), stride))), stride


def known(tracks: Sequence[Track]) -> Known:
    """Drags as the runtime draws them: a square around where each begins moves with it, later ones lie on earlier ones."""
    corners = np.array([track[0] for track in tracks]).reshape(-1, 1, 2).astype(np.int64)
    squares = (corners + [[-UNIT], [UNIT]]).clip(0, domain.SIZE)
    field, owner = rasterise(tracks, squares, FRAMES - 1, domain.SIZE, domain.SIZE)
    return field, owner > 0


def within(cover: NDArray[np.bool_], rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """`count` pixels (x, y) of `cover`."""
    y, x = np.nonzero(cover)
    return [(float(x[i]), float(y[i])) for i in rng.integers(len(x), size=count)]


def tracks(field: Floats, cover: NDArray[np.bool_], rng: np.random.Generator, moving: int, pinned: int) -> Known:
    """Drags of `moving` points of the sprite and `pinned` points of the background."""
    found = []
    for x, y in within(~cover, rng, pinned) + within(cover, rng, moving):
        moved = field[:, :, int(y), int(x)].astype(np.float64)
        found.append(np.concatenate([np.zeros((1, 2)), moved]) + (x, y))
    return known(found)


def blocks(field: Floats, rng: np.random.Generator) -> Known:
    """Up to half of the picture's blocks of 8x8 px, as the release trains with (spec 4.5)."""
    mask = (rng.random((8, 8)) < rng.uniform(0, 0.5)).repeat(8, 0).repeat(8, 1)
    return field * mask, mask


def brush(field: Floats, cover: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Where nothing may move: all but a disc that holds the sprite, or all that is far from its way."""
    y, x = np.nonzero(cover)
    centre, axis = np.array([x.mean(), y.mean()]) + rng.normal(size=2) * 2, np.arange(len(cover))
    way = [centre] if rng.random() < 0.5 else [centre, *(centre + field[:, :, cover].mean(axis=2))]
    away = np.min([np.hypot(axis - at[0], axis[:, None] - at[1]) for at in way], axis=0)
    return np.asarray(away > away[cover].max() + rng.uniform(0.5, 14 if len(way) == 1 else 7))


def a_control(field: Floats, cover: NDArray[np.bool_], rng: np.random.Generator) -> Known:
    """One control for training: blocks, drags, a brush, drags and a brush, or nothing."""
    kind = rng.choice(5, p=(0.3, 0.35, 0.1, 0.15, 0.1))
    if kind == 0:
        return blocks(field, rng)
    said, mask = np.zeros_like(field), np.zeros_like(cover)
    if kind in (1, 3):
        said, mask = tracks(field, cover, rng, int(rng.integers(1, 5)), int(rng.integers(0, 3)))
    if kind in (2, 3):
        static = brush(field, cover, rng)
        said, mask = said * ~static, mask | static
    return said, mask
