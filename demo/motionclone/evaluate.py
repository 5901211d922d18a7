"""How well the demo's model follows a reference, and whether it draws what was asked for.

    figures = evaluate(generate, targets("report", 48))

`generate(row, targets)` gives the frames of one of ROWS, so that the exported bundle and PyTorch are measured alike. Each
target is a reference clip on a path that no training saw, and a prompt for an object that no training saw either. Measured:

    abs     px, mean distance over frames between the sprite's centre and the reference's
    align   px, the same after the best common offset
    near    share of clips whose align is under 4 px
    colour  share of clips with the prompt's colour
    shape   share of frames with the prompt's shape, as templates of all shapes see it

The path of a sprite that never moves is measured beside them. Intervals are 95 % percentile bootstraps over targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import domain
import numpy as np
from figures import interval
from looks import LOOKED_AT, SEEDS, Frames, colour_of, shape_of
from numpy.typing import NDArray
from world import FRAMES, HELD_PAIRS

ROWS = ("unguided", "guided", "random reference")
METRICS = ("abs", "align", "near", "colour", "shape")
NEAR = 4.0  # px


@dataclass(frozen=True)
class Target:
    """A reference clip, and the object that is to move as it does."""

    reference: domain.Spec
    colour: str
    shape: str
    seed: int

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} moves"

    def references(self, count: int = 1) -> list[Frames]:
        """`count` clips `[F, 64, 64, 3]` of the same path; the objects and backgrounds of all but the first are others."""
        rng = np.random.default_rng([3, self.seed])
        clips = [domain.render(self.reference)[0]]
        while len(clips) < count:
            other = domain.sample_spec(rng, path=np.zeros((1, 2)), start=(0.0, 0.0))
            if (other.colour, other.shape) != (self.colour, self.shape):
                clips.append(domain.render(replace(other, start=self.reference.start, path=self.reference.path))[0])
        return clips


def targets(split: str, count: int) -> list[Target]:
    """The same ones at each call: half on free paths of another seed than training's, half of the families it left out."""
    rng = np.random.default_rng(SEEDS[split])
    made = []
    for index in range(count):
        path = domain.free_path(rng, FRAMES) if index % 2 else None
        family = domain.UNSEEN[index // 2 % len(domain.UNSEEN)]
        reference = domain.sample_spec(rng, family, path=path, frames=FRAMES)
        while True:  # a reference shares neither colour nor shape with the prompt
            colour, shape = HELD_PAIRS[rng.integers(len(HELD_PAIRS))]
            if reference.colour != colour and reference.shape != shape:
                break
        made.append(Target(reference, colour, shape, SEEDS[split] * 1000 + index))
    return made


def measure(frames: Frames, target: Target) -> list[float]:
    """METRICS of a generated clip [F, 64, 64, 3]."""
    away = domain.track(frames) - target.reference.centres
    weight = domain.sprite_weight(frames)
    shapes = [shape_of(weight[index]) == target.shape for index in LOOKED_AT]
    return [*path_error(away), float(colour_of(frames) == target.colour), float(np.mean(shapes))]


def path_error(away: NDArray[np.float64]) -> list[float]:
    """abs, align and near of the distances [F, 2] px from the reference's path."""
    align = float(np.linalg.norm(away - away.mean(axis=0), axis=1).mean())
    return [float(np.linalg.norm(away, axis=1).mean()), align, float(align < NEAR)]


def evaluate(
    generate: Callable[[str, Sequence[Target]], Frames], wanted: Sequence[Target], rows: Sequence[str] = ROWS
) -> list[Mapping[str, object]]:
    """A row of figures for each of `rows`, for the references themselves and for a sprite that never moves.

    generate: row, targets -> frames uint8 [N, F, 64, 64, 3]; "random reference" is to be guided by another target's clip.
    """
    made = []
    for row in rows:
        frames = generate(row, wanted)
        made.append(summary(row, np.array([measure(*pair) for pair in zip(frames, wanted, strict=True)])))
    return made + never_moves(wanted)


def never_moves(wanted: Sequence[Target]) -> list[Mapping[str, object]]:
    """Rows of the references themselves, and of a sprite that never moves."""
    themselves = [measure(t.references()[0], replace(t, colour=t.reference.colour, shape=t.reference.shape)) for t in wanted]
    made = [summary("the references themselves", np.array(themselves))]
    still = [path_error(np.full((FRAMES, 2), domain.SIZE / 2) - t.reference.centres) for t in wanted]
    made.append(summary("never moves", np.array(still)))
    return made


def summary(row: str, scores: NDArray[np.float64]) -> Mapping[str, object]:
    """Means with intervals, and the median path error."""
    figures = {name: interval(column) for name, column in zip(METRICS, scores.T, strict=False)}
    return {"row": row, **figures, "align_median": round(float(np.median(scores[:, 1])), 4)}


def table(figures: Sequence[Mapping[str, object]]) -> str:
    """The figures as a Markdown table."""
    lines = ["| motion from | steps | abs px | align px | median | under 4 px | colour | shape |", "| --- " * 8 + "|"]
    for row in figures:
        cells = [str(row["row"]), str(row.get("steps") or "")]
        for name in ("abs", "align", "align_median", "near", "colour", "shape"):
            value = row.get(name, "")
            if isinstance(value, list):
                cells.append(f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]")
            else:
                cells.append(f"{value:.2f}" if value else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(path: str, wanted: Sequence[Target], frames: Mapping[str, Frames], count: int = 12) -> None:
    """A PNG: for each target its reference, then what was made for it, 6 frames each."""
    from PIL import Image

    shown = np.linspace(0, FRAMES - 1, 6).round().astype(int)
    strips = []
    for index, target in enumerate(wanted[:count]):
        clips = [target.references()[0], *(made[index] for made in frames.values())]
        strips.append(np.concatenate([np.concatenate(list(clip[shown]), axis=1) for clip in clips], axis=1))
    Image.fromarray(np.concatenate(strips)).save(path)
