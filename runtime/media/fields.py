"""A motion field as people look at it: arrows over the frames, and beside them the colour wheel of Middlebury's flow benchmark
(Baker et al., A Database and Evaluation Methodology for Optical Flow, IJCV 2011): hue is direction, saturation is distance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_Pixels = NDArray[np.uint8]
_Field = NDArray[np.float32]
# How many hues lie between two corners of the colour cube: (what rises or falls, from which corner).
_ARCS = ((15, (255, 0, 0), 1, 1), (6, (255, 255, 0), 0, -1), (4, (0, 255, 0), 2, 1), (11, (0, 255, 255), 1, -1),
         (13, (0, 0, 255), 0, 1), (6, (255, 0, 255), 2, -1))  # fmt: skip
_LEAST = 1.0  # pixels: what moves less is shown pale, and not as if it were much
_SIDE = 256  # pixels that the longer side of a view has at least
_ARROWS = 12  # along the longer side


def _hues() -> NDArray[np.float64]:
    """The wheel `[55, 3]`, 0..1."""
    rows = []
    for count, corner, channel, sign in _ARCS:
        part = np.tile(np.array(corner, np.float64), (count, 1))
        part[:, channel] += sign * np.floor(255 * np.arange(count) / count)
        rows.append(part)
    return np.concatenate(rows) / 255


def colours(field: NDArray[np.floating], most: float) -> _Pixels:
    """`field [..., 2, H, W]` (x right, y down) as colours `[..., H, W, 3]`: white stands still, right is red, down yellow, left
    blue-green, up violet; fully saturated at `most` pixels, and darker beyond."""
    hues = _hues()
    x, y = np.moveaxis(np.asarray(field, np.float64) / most, -3, 0)
    length = np.hypot(x, y)[..., None]
    place = (np.arctan2(-y, -x) / np.pi + 1) / 2 * (len(hues) - 1)
    below = place.astype(np.int64)
    part = (place - below)[..., None]
    hue = (1 - part) * hues[below] + part * hues[(below + 1) % len(hues)]
    shown = np.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)
    return np.asarray(np.floor(255 * shown), np.uint8)


def field_view(frames: _Pixels, field: _Field) -> _Pixels:
    """`frames [F, H, W, 3]` with arrows from where pixels of the first frame were to where they are, and beside each its field
    `[F, 2, H, W]` in colours, with the wheel as the key: uint8 `[F, s H, 2 s W, 3]`, s a whole number."""
    height, width = frames.shape[1:3]
    scale, step = -(-_SIDE // max(height, width)), max(1, round(max(height, width) / _ARROWS))
    most = max(_LEAST, float(np.hypot(field[:, 0], field[:, 1]).max()))
    painted, key = colours(field, most), _key(scale * max(height, width) // 6)
    views = np.empty((len(frames), scale * height, 2 * scale * width, 3), np.uint8)
    for view, frame, one, colour in zip(views, frames, field, painted, strict=True):
        left = Image.fromarray(frame).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(left)
        for y in range(step // 2, height, step):
            for x in range(step // 2, width, step):
                _arrow(draw, scale * (np.array([x, y]) + 0.5), scale * one[:, y, x])
        right = Image.fromarray(colour).resize((scale * width, scale * height), Image.Resampling.NEAREST)
        right.paste(key, (4, right.height - key.height - 4), key.getchannel("A"))
        place = (8 + key.width, right.height - 16)
        ImageDraw.Draw(right).text(place, f"{most:.3g} px", "black", stroke_width=1, stroke_fill="white")
        view[:] = np.concatenate([np.asarray(left), np.asarray(right)], axis=1)
    return views


def _key(side: int) -> Image.Image:
    """The wheel itself, of `side` pixels, as a picture whose corners are clear."""
    place = (2 * np.arange(side) + 1) / side - 1
    disc = np.stack(np.meshgrid(place, place))
    inside = np.where(np.hypot(*disc) <= 1, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([colours(disc, 1.0), inside]))


def _arrow(draw: ImageDraw.ImageDraw, begin: NDArray[np.float64], way: NDArray[np.float64]) -> None:
    """An arrow, white with a dark edge; a dot for what hardly moves."""
    length, end = float(np.hypot(*way)), begin + way
    if length < 2:
        draw.ellipse([*(begin - 1), *(begin + 1)], "white", "black")
        return
    along = way / length
    back, side = end - min(8.0, length / 2) * along, min(4.0, length / 4) * np.array([-along[1], along[0]])
    for colour, edge in (("black", 3), ("white", 1)):
        draw.line([*begin, *back], colour, edge)
        draw.line([*(back + side), *end, *(back - side), *(back + side)], colour, edge)
