"""Which clips of the demo's domain training may see, and which are left for the measurement. Numpy only."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import domain
import numpy as np
from looks import named

FRAMES = 16
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


def a_paint(rng: np.random.Generator, shape: str) -> tuple[float, float, float]:
    """Any strong colour in [0, 1], but for those that look most like one that is held out with `shape`."""
    while True:
        paint = colorsys.hsv_to_rgb(*(float(v) for v in rng.uniform((0, 0.6, 0.7), (1, 1, 1))))
        if (named(np.array(paint)), shape) not in HELD_PAIRS:
            return paint


def training_clip(rng: np.random.Generator) -> domain.Spec:
    """A clip that may be trained on: 60 % on free paths, the others of the seen families."""
    path = domain.free_path(rng, FRAMES) if rng.random() < 0.6 else None
    return allowed(rng, domain.sample_spec(rng, path=path, frames=FRAMES))
