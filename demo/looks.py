"""What a generated clip shows, as the later systems of the demo are measured: its sprite's colour and shape. Numpy only."""

from __future__ import annotations

import domain
import numpy as np
from numpy.typing import NDArray

SEEDS = {"choose": 501, "report": 777}  # settings are chosen on other targets than those reported
LOOKED_AT = (2, 6, 10, 14)  # frames whose shape is judged
Frames = NDArray[np.uint8]


def chroma(colour: NDArray[np.float64]) -> NDArray[np.float64]:
    grey = colour - colour.mean()
    return np.asarray(grey / (np.linalg.norm(grey) + 1e-6))


def colour_of(frames: Frames) -> str:
    """The name of the sprite's colour in uint8 frames [F, H, W, 3], in the middle frame."""
    middle = len(frames) // 2
    weight = domain.sprite_weight(frames)[middle]
    return named((frames[middle] / 255.0 * weight[..., None]).sum(axis=(0, 1)) / max(float(weight.sum()), 1e-9))


def named(colour: NDArray[np.float64]) -> str:
    """The name of the most alike of the domain's colours."""

    def likeness(name: str) -> float:
        known = np.asarray(domain.COLOURS[name])
        return float(chroma(colour) @ chroma(known)) - abs(0.3 * float(colour.mean() - known.mean()))

    return max(domain.COLOURS, key=likeness)


def shape_of(weight: NDArray[np.float64]) -> str:
    """The name of the shape of a sprite [H, W] (`domain.sprite_weight` of a frame): the template that overlaps best."""
    mask = weight > 0.12
    if mask.sum() < 20:
        return "nothing"
    axis = np.arange(len(mask)) + 0.5
    y, x = ((weight.sum(axis=side) * axis).sum() / weight.sum() for side in (1, 0))

    def overlap(shape: str) -> float:
        best = 0.0
        for radius in (8.5, 9.5, 10.5, 11.5):
            for right in (-1, 0, 1):
                for down in (-3.0, -1.5, 0.0, 1.5):  # a triangle's centre of mass lies lower than its centre
                    inside = domain.shape_distance(shape, axis[None] - x - right, axis[:, None] - y - down, radius) < 0
                    best = max(best, float((inside & mask).sum() / (inside | mask).sum()))
        return best

    return max(domain.SHAPES, key=overlap)
