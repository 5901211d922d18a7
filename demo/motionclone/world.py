"""Which clips of the demo's domain training may see, and which are left for the measurement. Numpy only."""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import domain
import numpy as np
from looks import named
from numpy.typing import NDArray

FRAMES = 16
APART = 0.5  # in RGB, at least between the two colours of an object
# Colour and shape never seen together by any stage, the autoencoder's included: every colour once.
HELD_PAIRS = (
    ("red", "star"), ("orange", "cross"), ("yellow", "circle"), ("green", "triangle"),
    ("cyan", "square"), ("blue", "square"), ("purple", "diamond"), ("pink", "circle"),
)  # fmt: skip


def allowed(rng: np.random.Generator, spec: domain.Spec) -> domain.Spec:
    """The clip, with another shape drawn where its colour and shape are held out."""
    while (spec.colour, spec.shape) in HELD_PAIRS:
        spec = replace(spec, shape=domain.SHAPES[rng.integers(len(domain.SHAPES))])
    return spec


def a_paint(rng: np.random.Generator, spec: domain.Spec) -> NDArray[np.float64]:
    """What an object of the clip's shape may be painted with, `[64, 64, 3]` in [0, 1]: one strong colour, but none that looks
    most like one that is held out with this shape, or two of different names, divided by a line through its centre.
    """
    while True:
        colours = [np.array(colorsys.hsv_to_rgb(*(float(v) for v in rng.uniform((0, 0.6, 0.7), (1, 1, 1))))) for _ in "ab"]
        names = [named(colour) for colour in colours]
        if rng.random() < 0.5 and (names[0], spec.shape) not in HELD_PAIRS:
            colours[1] = colours[0]
            break
        if names[0] != names[1] and math.dist(*colours) > APART:
            break
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.arange(domain.SIZE) + 0.5
    x, y = axis - spec.start[0], axis[:, None] - spec.start[1]
    return np.where((x * math.cos(angle) + y * math.sin(angle) > 0)[..., None], *colours)


def training_clip(rng: np.random.Generator) -> domain.Spec:
    """A clip that may be trained on: 60 % on free paths, the others of the seen families."""
    path = domain.free_path(rng, FRAMES) if rng.random() < 0.6 else None
    return allowed(rng, domain.sample_spec(rng, path=path, frames=FRAMES))
