"""What is measured of the demo's Motion-I2V, and on which scenes: numpy only, for the bundle and for PyTorch alike.

A scene is a picture of an object that no training saw (a held-out pair of colour and shape) on a path that none saw either.

    path    px, mean distance over frames 1 to 15 between the tracked sprite and the path that was asked for
    field   px, mean distance between the field's arrows and the true ones, over the sprite's pixels and the targets
    colour  share of clips with the object's colour
    shape   share of frames with the object's shape, as templates of all shapes see it (demo/looks.py)
    leak    grey levels (of 255), mean difference to frame 0's own round trip through the autoencoder where a brush says "stay"

Intervals are 95 % percentile bootstraps over scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import domain
import numpy as np
from fields import CELL, UNIT, Floats, Track, covered, true_field, within
from figures import interval
from looks import LOOKED_AT, SEEDS, Frames, colour_of, shape_of
from numpy.typing import NDArray
from world import FRAMES, HELD_PAIRS

METRICS = ("path", "field", "colour", "shape")
UNSEEN = ("free", domain.UNSEEN[0], "free", domain.UNSEEN[1], "free", domain.UNSEEN[2], "free", domain.UNSEEN[3])
EDGE = 8.0  # px: frames whose asked-for centre is nearer to the picture's edge than this are not judged
ROOM = 13.0  # px around a path's centres that a brush leaves free


@dataclass(frozen=True)
class Scene:
    """A picture and the motion that is asked for in it: `spec` says both. Prompts name the object and any named motion."""

    spec: domain.Spec
    seed: int

    @property
    def picture(self) -> Frames:
        return domain.render(self.spec, frames=1)[0][0]

    @property
    def prompt(self) -> str:
        return domain.caption(self.spec)

    @property
    def plain(self) -> str:
        return domain.caption(self.spec, motion=False)


def scenes(split: str, count: int, families: Sequence[str] = UNSEEN) -> list[Scene]:
    """The same ones at each call: held-out objects, of each of `families` in turn; UNSEEN by default, half of them free paths.

    Prompts name a family, but not how far and in which direction exactly things go.
    """
    rng = np.random.default_rng([SEEDS[split], len(families)])
    made = []
    for index in range(count):
        family = families[index % len(families)]
        path = domain.free_path(rng, FRAMES) if family == "free" else None
        spec = domain.sample_spec(rng, family, path=path, frames=FRAMES)
        colour, shape = HELD_PAIRS[rng.integers(len(HELD_PAIRS))]
        made.append(Scene(replace(spec, colour=colour, shape=shape), SEEDS[split] * 1000 + index))
    return made


def exchanged(scenes: Sequence[Scene], places: int = 5) -> list[Scene]:
    """Every picture with the path of the scene so many places on, as far as the path stays in the picture."""
    return [
        replace(scene, spec=replace(scene.spec, path=scenes[(index + places) % len(scenes)].spec.path, family="free"))
        for index, scene in enumerate(scenes)
    ]


def still(scenes: Sequence[Scene]) -> list[Scene]:
    """Every picture with nothing moving in it."""
    nowhere = ((0.0, 0.0),) * FRAMES
    return [replace(scene, spec=replace(scene.spec, path=nowhere, family="free")) for scene in scenes]


def drawn(scene: Scene, count: int) -> list[Track]:
    """Drags: of one point, the sprite's centre; or of more, half of them on the sprite and the others pins beside it."""
    rng, cover, path = np.random.default_rng([7, scene.seed]), covered(scene.spec), np.asarray(scene.spec.path)
    if count == 1:
        return [path + np.floor(scene.spec.start)]
    beside = ~_grown(cover, 2 * UNIT)
    beside[-UNIT:] = beside[:, -UNIT:] = False  # squares there have no cell of their own
    while True:
        points = np.array(within(cover, rng, count // 2) + within(beside, rng, count - count // 2))
        apart = np.abs(points[:, None] - points).max(axis=2) + 2 * CELL * np.eye(count)
        if apart.min() >= 1.5 * CELL:  # so that each has cells of its own
            return [np.where(index < count // 2, 1, 0) * path + point for index, point in enumerate(points)]


def _grown(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """The mask and all pixels at most `by` rows and columns away."""
    rows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, by), (2 * by + 1, 2 * by + 1))
    return np.asarray(rows.any(axis=(2, 3)))


def stays(scene: Scene) -> NDArray[np.bool_]:
    """A brush: all pixels further than ROOM from every centre of the path stay."""
    axis = np.arange(domain.SIZE) + 0.5
    centres = scene.spec.centres
    away = np.hypot(axis - centres[:, 0, None, None], axis[:, None] - centres[:, 1, None, None])
    return np.asarray(away.min(axis=0) > ROOM)


def remembered(scene: Scene) -> domain.Spec:
    """The clip of a memory that a scene's prompt finds: another object elsewhere, moving in the way of the same family."""
    return domain.sample_spec(np.random.default_rng([11, scene.seed]), scene.spec.family, frames=FRAMES)


def aligned(field: Floats, scene: Scene) -> Floats:
    """A retrieved field `[15, 2, 64, 64]` px, moved by whole pixels so that what moves in it lies on the scene's object."""
    right, down = np.round(_object(scene) - _middle(field)).astype(int)
    shifted, size = np.zeros_like(field), domain.SIZE
    rows, columns = (slice(max(by, 0), size + min(by, 0)) for by in (down, right))
    from_rows, from_columns = (slice(max(-by, 0), size + min(-by, 0)) for by in (down, right))
    shifted[:, :, rows, columns] = field[:, :, from_rows, from_columns]
    return shifted


def hint(field: Floats, scene: Scene) -> list[Track]:
    """One drag of the scene's object, as the middle of what moves in a retrieved field goes."""
    x, y = np.floor(_middle(field)).astype(int)
    moved = np.concatenate([np.zeros((1, 2)), field[:, :, y, x]])
    return [np.floor(_object(scene)) + moved]


def _middle(field: Floats) -> NDArray[np.float64]:
    """(x, y) px of the centre of what moves."""
    far = np.linalg.norm(field, axis=1).max(axis=0)
    y, x = np.nonzero(far > 0.5 * far.max())
    return np.array([x.mean() + 0.5, y.mean() + 0.5])


def _object(scene: Scene) -> NDArray[np.float64]:
    """(x, y) px of the object in the picture."""
    return np.asarray(domain.track(scene.picture[None])[0])


def field_error(field: Floats, scene: Scene) -> float:
    """Px, over the sprite's pixels and the targets."""
    away = np.linalg.norm(field[-(FRAMES - 1) :] - true_field(scene.spec), axis=1)
    return float(away[:, covered(scene.spec)].mean())


def measure(frames: Frames, scene: Scene, field: Floats | None = None) -> list[float]:
    """METRICS of a clip `[16, 64, 64, 3]` and the field that it was made along; no field gives NaN."""
    wanted = scene.spec.centres
    inside = ((wanted > EDGE) & (wanted < domain.SIZE - EDGE)).all(axis=1)
    inside[0] = False
    away = np.linalg.norm(domain.track(frames) - wanted, axis=1)
    weight = domain.sprite_weight(frames)
    judged = [shape_of(weight[index]) == scene.spec.shape for index in LOOKED_AT if inside[index]]
    shape = float(np.mean(judged)) if judged else float("nan")
    error = field_error(field, scene) if field is not None else float("nan")
    return [float(away[inside].mean()), error, float(colour_of(frames) == scene.spec.colour), shape]


def leak(frames: Frames, still: Frames, brush: NDArray[np.bool_]) -> float:
    """Mean difference in grey levels between a clip and frame 0's round trip, where `brush` says that nothing moves."""
    return float(np.abs(frames.astype(np.float64) - still)[:, brush].mean())


def summary(row: str, scores: NDArray[np.float64]) -> Mapping[str, object]:
    """Means with intervals of METRICS `[N, 4]`; a metric that no scene has is left out."""
    figures: dict[str, object] = {"row": row, "scenes": len(scores)}
    for name, column in zip(METRICS, scores.T, strict=True):
        known = column[~np.isnan(column)]
        if len(known):
            figures[name] = interval(known)
    return figures


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """The figures as a Markdown table."""
    head = ["motion from", "scenes", "path px", "field px", "colour", "shape", "leak", "never moves px"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        cells = [str(row["row"]), str(row["scenes"])]
        for name in (*METRICS, "leak", "never moves"):
            value = row.get(name)
            cells.append(f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if isinstance(value, list) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def still_error(scenes: Sequence[Scene]) -> Mapping[str, object]:
    """The row of a sprite that never moves."""
    away = [np.linalg.norm(scene.spec.centres[1:] - scene.spec.centres[0], axis=1).mean() for scene in scenes]
    nothing = np.full(len(scenes), np.nan)
    return summary("never moves", np.stack([np.array(away), np.array(away), nothing, nothing], axis=1))
