"""The demo's procedural video domain: one saturated sprite on a muted, smooth background, moving along a named path.

Numpy only, and without imports from the rest of the project, so that the demo, the tests and the training recipe can
load it by path. Pixels are addressed by their centres: pixel column `i` of a 64-pixel frame lies at x = i + 0.5;
x grows right, y grows down.

    spec = sample_spec(rng, "slide_left")
    frames, mask = render(spec)              # uint8 [17, 64, 64, 3], float32 [17, 64, 64]
    centres = track(frames)                  # float64 [17, 2], px
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 64
FRAMES = 17
FPS = 8
REACH = 20.0  # px travelled by a path of unit length
MARGIN = 10.5  # px kept between a sprite's centre and the frame's edge
MAX_STEP = 9.0  # px per frame; faster is a jump
PER_FAMILY = 8  # clips per family in a memory

Array = NDArray[Any]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.13, 0.13),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.98, 0.88, 0.10),
    "green": (0.12, 0.72, 0.20),
    "cyan": (0.08, 0.80, 0.88),
    "blue": (0.13, 0.28, 0.92),
    "purple": (0.56, 0.14, 0.84),
    "pink": (0.98, 0.30, 0.66),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")


def _triangle_wave(u: Array) -> Array:
    """A wave of period 1 through 0 at u = 0, rising to 1 at 0.25 and falling to -1 at 0.75."""
    return np.asarray(1.0 - 4.0 * np.abs(((u + 0.25) % 1.0) - 0.5), dtype=np.float64)


def _turn(first: tuple[float, float], second: tuple[float, float]) -> Callable[[Array], tuple[Array, Array]]:
    def path(u: Array) -> tuple[Array, Array]:
        a, b = np.minimum(u * 2, 1), np.maximum(u * 2 - 1, 0)
        return first[0] * a + second[0] * b, first[1] * a + second[1] * b

    return path


@dataclass(frozen=True)
class Family:
    """A named motion: `path(u in [0, 1]) -> (x, y)` in units of REACH from (0, 0).

    `phrase` names it in captions; `paraphrase` says the same in words that no caption and no training text has.
    """

    path: Callable[[Array], tuple[Array, Array]]
    phrase: str
    paraphrase: str
    seen: bool = True


_TAU = 2.0 * math.pi
FAMILIES: dict[str, Family] = {
    "slide_left": Family(lambda u: (-u, 0 * u), "slides straight to the left", "moves to the left in a straight line"),
    "slide_right": Family(lambda u: (u, 0 * u), "slides straight to the right", "moves to the right in a straight line"),
    "slide_up": Family(lambda u: (0 * u, -u), "slides straight up", "moves up in a straight line"),
    "slide_down": Family(lambda u: (0 * u, u), "slides straight down", "moves down in a straight line"),
    "diagonal_up_right": Family(
        lambda u: (0.8 * u, -0.8 * u), "drifts diagonally up and right", "floats diagonally to the upper right"
    ),
    "diagonal_down_left": Family(
        lambda u: (-0.8 * u, 0.8 * u), "drifts diagonally down and left", "floats diagonally to the lower left"
    ),
    "diagonal_down_right": Family(
        lambda u: (0.8 * u, 0.8 * u), "drifts diagonally down and right", "floats diagonally to the lower right"
    ),
    "diagonal_up_left": Family(
        lambda u: (-0.8 * u, -0.8 * u), "drifts diagonally up and left", "floats diagonally to the upper left"
    ),
    "circle_clockwise": Family(
        lambda u: (0.5 * np.sin(_TAU * u), 0.5 - 0.5 * np.cos(_TAU * u)),
        "circles around clockwise",
        "goes around in a clockwise circle",
    ),
    "circle_counterclockwise": Family(
        lambda u: (-0.5 * np.sin(_TAU * u), 0.5 - 0.5 * np.cos(_TAU * u)),
        "circles around counterclockwise",
        "goes around in a counterclockwise circle",
    ),
    "zigzag_right": Family(
        lambda u: (u, -0.5 * _triangle_wave(u)), "zigzags sharply to the right", "moves right in a sharp zigzag"
    ),
    "zigzag_left": Family(
        lambda u: (-u, -0.5 * _triangle_wave(u)), "zigzags sharply to the left", "moves left in a sharp zigzag"
    ),
    "wave_right": Family(
        lambda u: (u, 0.3 * np.sin(2 * _TAU * u)), "waves gently to the right", "moves right along a gentle wave"
    ),
    "wave_left": Family(
        lambda u: (-u, 0.3 * np.sin(2 * _TAU * u)), "waves gently to the left", "moves left along a gentle wave"
    ),
    "bounce": Family(lambda u: (0 * u, -0.9 * np.abs(np.sin(_TAU * u))), "bounces in place", "keeps bouncing on the spot"),
    "hop_right": Family(
        lambda u: (u, -0.6 * np.abs(np.sin(_TAU * u))), "hops in arcs to the right", "jumps along in arcs toward the right"
    ),
    "hop_left": Family(
        lambda u: (-u, -0.6 * np.abs(np.sin(_TAU * u))), "hops in arcs to the left", "jumps along in arcs toward the left"
    ),
    "spiral": Family(
        lambda u: (0.7 * u * np.sin(1.5 * _TAU * u), -0.7 * u * np.cos(1.5 * _TAU * u)),
        "spirals outwards",
        "moves out in a growing spiral",
    ),
    "swing": Family(
        lambda u: (0.75 * np.sin(_TAU * u), 0 * u),
        "swings right and left and back",
        "sways from side to side",
    ),
    "bob": Family(
        lambda u: (0 * u, 0.75 * np.sin(_TAU * u)), "bobs down and up and back", "goes down then up like a cork bobbing"
    ),
    "return_right": Family(lambda u: (np.sin(math.pi * u), 0 * u), "dashes right then returns", "rushes right and comes back"),
    "turn_left_up": Family(_turn((-0.9, 0), (0, -0.9)), "goes left then turns up", "moves left and then turns upward"),
    "turn_right_down": Family(_turn((0.9, 0), (0, 0.9)), "goes right then turns down", "moves right and then turns downward"),
    "turn_right_up": Family(_turn((0.9, 0), (0, -0.9)), "goes right then turns up", "moves right and then turns upward"),
    # Outside the training support by their kind of path: see `crosses` and `jumps`.
    "figure_eight": Family(
        lambda u: (0.6 * (np.sin(_TAU * u + 1) - math.sin(1)), 0.45 * (np.sin(2 * _TAU * u + 2) - math.sin(2))),
        "traces a figure eight",
        "follows the outline of the number eight",
        seen=False,
    ),
    "loop_up": Family(
        lambda u: (0.45 * (1 - np.cos(_TAU * u)), -u - 0.45 * np.sin(_TAU * u)),
        "climbs with one loop the loop",
        "flies up and makes a loop on the way",
        seen=False,
    ),
    "jump_left": Family(
        lambda u: (-1.0 * (u > 0.5), 0 * u),
        "stands still then jumps left",
        "waits and then suddenly jumps to the left",
        seen=False,
    ),
    "jump_right_down": Family(
        lambda u: (0.9 * (u > 0.3), 0.9 * (u > 0.65)),
        "jumps right then jumps down",
        "suddenly jumps right and then down",
        seen=False,
    ),
}
SEEN = tuple(name for name, family in FAMILIES.items() if family.seen)
UNSEEN = tuple(name for name, family in FAMILIES.items() if not family.seen)


@dataclass(frozen=True)
class Spec:
    """Everything a clip depends on.

    `start` is the sprite's centre in frame 0, `path` [F, 2] the displacement from it, both in px.
    """

    family: str  # a key of FAMILIES, or "free" for an unnamed random path
    colour: str
    shape: str
    radius: float
    start: tuple[float, float]
    path: tuple[tuple[float, float], ...]
    background: int  # seed of the background

    @property
    def centres(self) -> Array:
        """float64 [F, 2] in px."""
        return np.asarray(self.path, dtype=np.float64) + np.asarray(self.start, dtype=np.float64)


def named_path(name: str, frames: int = FRAMES) -> Array:
    """float64 [frames, 2]: the displacement of a named family in px, without jitter."""
    x, y = FAMILIES[name].path(np.linspace(0.0, 1.0, frames))
    return np.stack([x, y], axis=1) * REACH


def crosses(path: Array) -> bool:
    """Whether the polyline `path` [F, 2] properly crosses itself (touching, or running back along a line, is none)."""
    a, b = np.asarray(path, np.float64)[:-1], np.asarray(path, np.float64)[1:]

    def side(p: Array, q: Array, r: Array) -> Array:  # twice the signed area of triangle p q r
        d, e = q - p, r - p
        return np.asarray(d[..., 0] * e[..., 1] - d[..., 1] * e[..., 0])

    p, q, r, s = a[:, None], b[:, None], a[None], b[None]
    tolerance = 1e-3  # px^2: what floats leave of a line that turns back on itself
    split = [side(p, q, r), side(p, q, s), side(r, s, p), side(r, s, q)]
    proper = (split[0] * split[1] < 0) & (split[2] * split[3] < 0)
    return bool((proper & (np.abs(np.stack(split)).min(axis=0) > tolerance)).any())


def jumps(path: Array) -> bool:
    """Whether `path` [F, 2] px moves more than MAX_STEP px from one frame to the next."""
    return float(np.linalg.norm(np.diff(np.asarray(path), axis=0), axis=1).max()) > MAX_STEP


def free_path(rng: np.random.Generator, frames: int = FRAMES) -> Array:
    """float64 [frames, 2]: an unnamed random path in px; teaches what a path is without any named family.

    Paths that cross themselves or jump are drawn again, so that training never sees the kinds of the unseen families.
    """
    while crosses(path := _any_path(rng, frames)) or jumps(path * 1.1):  # room for jitter_path
        pass
    return path


def _any_path(rng: np.random.Generator, frames: int) -> Array:
    u = np.linspace(0.0, 1.0, frames)
    kind = rng.integers(3)
    if kind == 0:  # straight pieces
        knots = np.concatenate([np.zeros((1, 2)), np.cumsum(rng.normal(size=(rng.integers(1, 4), 2)), axis=0)])
        where = np.linspace(0.0, 1.0, len(knots))
        path = np.stack([np.interp(u, where, knots[:, i]) for i in range(2)], axis=1)
    else:  # a drift and a few harmonics, in a random direction
        path = u[:, None] * rng.normal(size=2) * (1.0 if kind == 1 else 0.3)
        for harmonic in (1, 2) if kind == 1 else (1, 2, 3):
            weight = rng.normal(size=(2, 2)) * (0.5 / harmonic)
            angle = _TAU * harmonic * u * rng.uniform(0.5, 1.0)
            path = path + np.sin(angle)[:, None] * weight[0] + (1.0 - np.cos(angle))[:, None] * weight[1]
    extent = float((path.max(axis=0) - path.min(axis=0)).max())
    return np.asarray(path * (rng.uniform(0.6, 1.15) * REACH / max(extent, 1e-6)), dtype=np.float64)


def jitter_path(path: Array, rng: np.random.Generator) -> Array:
    """The same motion a little larger or smaller and a little rotated."""
    angle = math.radians(rng.uniform(-6.0, 6.0))
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.asarray(path @ rotation * rng.uniform(0.92, 1.06), dtype=np.float64)


def sample_spec(
    rng: np.random.Generator,
    family: str | None = None,
    *,
    path: Array | None = None,
    start: tuple[float, float] | None = None,
    jitter: bool = True,
    frames: int = FRAMES,
) -> Spec:
    """A random clip.

    `family`: a key of FAMILIES (None: a random seen one); `path` [F, 2] px overrides it under the name "free", and its
    length overrides `frames`.
    """
    if path is None:
        family = family if family is not None else SEEN[rng.integers(len(SEEN))]
        base = named_path(family, frames)
    else:
        family, base = "free", np.asarray(path, dtype=np.float64)
    moved = jitter_path(base, rng) if jitter else base
    low, high = MARGIN - moved.min(axis=0), SIZE - MARGIN - moved.max(axis=0)
    if start is None:
        # Starts stay near the middle where they can, so that a start gives little of the motion away.
        centre = (low + high) / 2
        low, high = np.minimum(np.maximum(low, 17.0), centre), np.maximum(np.minimum(high, 47.0), centre)
        at = rng.uniform(low, high)
        start = (float(at[0]), float(at[1]))
    return Spec(
        family=family,
        colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
        shape=SHAPES[rng.integers(len(SHAPES))],
        radius=float(rng.uniform(9.0, 11.0)),
        start=start,
        path=tuple((float(x), float(y)) for x, y in moved),
        background=int(rng.integers(2**31)),
    )


def shape_distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """About the signed distance (px, negative inside) of points to a shape of that radius around the origin."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        out = np.hypot(x, y) - 0.95 * radius
    elif shape == "square":
        out = np.maximum(ax, ay) - 0.85 * radius
    elif shape == "triangle":
        out = np.maximum(y - 0.55 * radius, 0.866 * ax - 0.5 * y - 0.55 * radius)
    elif shape == "diamond":
        out = (ax + ay) * 0.7071 - 0.78 * radius
    elif shape == "star":
        out = (np.hypot(x, y) - radius * (0.8 + 0.3 * np.cos(5.0 * np.arctan2(x, -y)))) * 0.75
    elif shape == "cross":
        arm = 0.4 * radius
        out = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
    else:
        raise ValueError(f"shape is {shape!r}; the domain draws {', '.join(SHAPES)}.")
    return np.asarray(out, dtype=np.float64)


def background(seed: int, size: int = SIZE) -> Array:
    """float32 [size, size, 3] in [0, 1]: a muted gradient with a soft texture. The same picture at every size."""
    rng = np.random.default_rng(seed)
    axis = (np.arange(size) + 0.5) / size
    x, y = axis[None, :], axis[:, None]
    direction, depth = rng.uniform(0, _TAU), rng.uniform(0.05, 0.22)
    grey = rng.uniform(0.32, 0.72) + depth * (math.cos(direction) * (x - 0.5) + math.sin(direction) * (y - 0.5)) * 2.0
    for _ in range(2):
        fx, fy = rng.uniform(-1.6, 1.6, size=2)
        grey = grey + rng.uniform(0.01, 0.045) * np.sin(_TAU * (fx * x + fy * y) + rng.uniform(0, _TAU))
    tint = rng.normal(size=3) * 0.022
    return np.asarray(np.clip(grey[..., None] + (tint - tint.mean()), 0.0, 1.0), dtype=np.float32)


def render(
    spec: Spec, size: int = SIZE, frames: int | None = None, paint: Array | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Draw a clip: frames uint8 [F, size, size, 3] and the sprite's coverage float32 [F, size, size].

    `frames` limits F (1: the still); `paint`: in the place of the spec's colour another, [3], or one for every pixel,
    [size, size, 3], in [0, 1].
    """
    centres = spec.centres[:frames]
    unit = SIZE / size
    axis = (np.arange(size) + 0.5) * unit
    x = axis[None, None, :] - centres[:, 0, None, None]
    y = axis[None, :, None] - centres[:, 1, None, None]
    x, y = np.broadcast_arrays(x, y)
    distance = shape_distance(spec.shape, x, y, spec.radius)
    mask = np.clip(0.5 - distance / unit, 0.0, 1.0).astype(np.float32)
    light = np.clip(1.0 - 0.22 * (x * 0.5 + y * 0.85) / spec.radius, 0.7, 1.15).astype(np.float32)
    colour = np.asarray(COLOURS[spec.colour] if paint is None else paint, dtype=np.float32)
    picture = background(spec.background, size)[None]
    picture = picture + mask[..., None] * (np.minimum(light[..., None] * colour, 1.0) - picture)
    return np.round(picture * 255.0).astype(np.uint8), mask


def caption(spec: Spec, *, motion: bool = True, paraphrase: bool = False) -> str:
    """The caption, such as "a red square slides straight up".

    `motion` False leaves the motion out, as a free path always does; `paraphrase` names it in the family's other words.
    """
    subject = f"a {spec.colour} {spec.shape}"
    if not motion or spec.family == "free":
        return f"{subject} moves"
    family = FAMILIES[spec.family]
    return f"{subject} {family.paraphrase if paraphrase else family.phrase}"


def words() -> list[str]:
    """Every word of the training captions, sorted: the tokenizer's vocabulary. Unseen families' words are not in it."""
    text = ["a an the on something shape moves", *COLOURS, *SHAPES, *(FAMILIES[name].phrase for name in SEEN)]
    return sorted({word for line in text for word in line.split()})


def sprite_weight(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How much each pixel of uint8 frames [F, H, W, 3] belongs to the sprite: float64 [F, H, W] in [0, 0.5].

    The sprite is the saturated thing in a muted picture: pixels weigh by saturation and by likeness to the saturated
    colour of frame 0, which holds on blurred, generated frames too.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames have shape {frames.shape}; a video is uint8 [F, H, W, 3].")
    picture = frames.astype(np.float64) / 255.0
    saturation = np.clip(picture.max(axis=-1) - picture.min(axis=-1) - 0.2, 0.0, 0.5)
    first = saturation[0] ** 2
    chroma = picture - picture.mean(axis=-1, keepdims=True)
    sprite = (first[..., None] * chroma[0]).sum(axis=(0, 1)) / max(float(first.sum()), 1e-9)
    norm = max(float(np.linalg.norm(sprite)), 1e-9)
    likeness = np.clip((chroma @ sprite) / norm / np.maximum(np.linalg.norm(chroma, axis=-1), 1e-6), 0.0, 1.0) ** 4
    return np.asarray(saturation * likeness, dtype=np.float64)


def track(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Centres float64 [F, 2] in px (x, y) of the sprite in uint8 frames [F, H, W, 3]; see `sprite_weight`.

    A frame in which nothing is left repeats the centre before it.
    """
    weight = sprite_weight(frames)
    ys, xs = np.arange(frames.shape[1]) + 0.5, np.arange(frames.shape[2]) + 0.5
    centres = np.zeros((len(frames), 2))
    last = np.array([frames.shape[2] / 2, frames.shape[1] / 2])
    for index, w in enumerate(weight):
        total = float(w.sum())
        if total > 1.0:
            last = np.array([float((w.sum(axis=0) * xs).sum()) / total, float((w.sum(axis=1) * ys).sum()) / total])
        centres[index] = last
    return centres


SYMMETRY = {"square": 4, "triangle": 3, "diamond": 4, "star": 5, "cross": 4}  # a circle shows no rotation


def size_and_turn(frames: NDArray[np.uint8], shape: str) -> tuple[Array, Array]:
    """What happened to the sprite besides moving: size relative to frame 0 [F] and rotation from frame 0 in degrees [F].

    Size is the root of the area; rotation is the phase of the n-th moment of an n-fold symmetric shape (0 for a circle).
    """
    weight, centres = sprite_weight(frames), track(frames)
    area = weight.sum(axis=(1, 2))
    size = np.sqrt(area / max(float(area[0]), 1e-9))
    fold = SYMMETRY.get(shape)
    if fold is None:
        return size, np.zeros(len(frames))
    x = np.arange(frames.shape[2]) + 0.5 - centres[:, 0, None]
    y = np.arange(frames.shape[1]) + 0.5 - centres[:, 1, None]
    z = x[:, None, :] + 1j * y[:, :, None]
    phase = np.angle((weight * np.where(np.abs(z) < 14, z, 0) ** fold).sum(axis=(1, 2)))
    turn = (phase - phase[0] + math.pi) % _TAU - math.pi
    return size, np.degrees(turn) / fold


def end_point_error(frames: NDArray[np.uint8], centres: Array) -> float:
    """Mean distance in px over frames 1.. between the tracked sprite and `centres` [F, 2]."""
    distance = np.linalg.norm(track(frames) - np.asarray(centres), axis=1)
    return float(distance[1:].mean())


def reference_specs(families: Iterable[str] = SEEN, seed: int = 7, per_family: int = PER_FAMILY) -> Iterable[Spec]:
    """The clips of a motion memory: each of `families`, `per_family` times with different sprites."""
    rng = np.random.default_rng(seed)
    for name in families:
        for _ in range(per_family):
            yield sample_spec(rng, name)


def input_specs() -> list[tuple[str, Spec]]:
    """The demo's stills (name, spec); only frame 0 matters, the start lies in the middle so that every motion fits."""
    rng = np.random.default_rng(2024)
    wanted = [
        ("red_star", (32, 32)),
        ("blue_square", (31, 33)),
        ("yellow_circle", (33, 31)),
        ("green_triangle", (32, 34)),
        ("purple_diamond", (30, 32)),
    ]
    out = []
    for name, start in wanted:
        colour, shape = name.split("_")
        spec = sample_spec(rng, "slide_right", start=(float(start[0]), float(start[1])), jitter=False)
        out.append((name, replace(spec, colour=colour, shape=shape, radius=10.0)))
    return out
