"""What moves in a clip and how, told in words by rules on its motion field: a caption for a clip that has none, and tags.

The camera's motion is what most of the picture does; the object's is that of the pixels that do something else. Lengths are in
sides: 1 is the picture's shorter side. Nothing is learned and nothing is random: the same field gives the same words. The words
are those of memory/motion_words.txt, so that a search by words finds them. What the thing is that moves is not said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.indexing.paths import name_path

CAPTIONED = {"captioned": "by motion"}  # the metadata of a clip whose caption was proposed here
CAMERA = 0.03  # sides that the picture moves on the mean by the camera, or less: the camera is still
OBJECT = 0.04  # sides that a pixel goes on the mean beside the camera, or less: it is no object's
LEAST = 0.002  # of all pixels are the object's, or more
MIXED = 0.4  # of how far it goes, or less, most of the object is off its mean path: else it has no path of its own
WEAK, STRONG = 0.1, 0.3  # sides a second: below moves slowly and weakly, above quickly and strongly
_GRID = 64  # pixels of the shorter side that are looked at, at most
_MARGIN = 0.04  # sides from the picture's edge where nothing is an object's, since what was there goes out of the picture
_ALIKE = 0.025  # sides that a pixel is off the object's path and still weighs half
_ROUNDS = 20  # of a robust fit
_SWAYS = 0.4  # of its farthest place, or nearer, the camera ends at where it began

_MOVES = (("pans left", "pans right"), ("tilts up", "tilts down"), ("zooms in", "zooms out"), ("turns", "turns"))

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """What is known of a clip's motion. speed: the length of the object's path in sides a second; camera_speed: that of the
    picture by the camera.

    camera: "still", "pans left", "pans right", "tilts up", "tilts down", "zooms in", "zooms out", "turns" or "sways".
    path, motion: what `name_path` calls the object's path beside the camera's motion, and where it goes; both are "mixed" where
    what moves has no path in common.
    """

    camera: str
    path: str
    motion: str
    speed: float
    camera_speed: float

    @property
    def strength(self) -> str:
        """Of the object or the camera, whichever moves more: "weak", "medium" or "strong"."""
        fastest = max(self.speed, self.camera_speed)
        return "weak" if fastest < WEAK else "strong" if fastest > STRONG else "medium"


def facts_of(field: NDArray[np.float32], fps: float) -> Facts:
    """The facts of a clip's motion field `[F - 1, 2, H, W]`: how far each pixel of the first picture has gone in each later
    one, x right and y down, in pixels. fps: pictures a second of the clip.
    """
    if not len(field):
        return Facts("still", "none", "none", 0.0, 0.0)
    side = min(field.shape[2:])
    step = max(1, side // _GRID)
    moved = field[:, :, ::step, ::step].astype(np.float64) / side  # [T, 2, h, w]
    ys, xs = ((np.arange(0, size, step) + 0.5 - size / 2) / side for size in field.shape[2:])
    y, x = np.meshgrid(ys, xs, indexing="ij")
    fits = np.array([_similarity(one, x, y) for one in moved])  # [T, 4]
    by_camera = np.einsum("kchw,tk->tchw", _basis(x, y), fits)
    seconds = len(moved) / fps
    camera, camera_speed = _camera(fits, float(np.hypot(x, y).mean()), seconds)
    half = np.array([x.max(), y.max()])[:, None, None] - _MARGIN
    seen = (np.abs(np.stack([x, y]) + by_camera) <= half).all(axis=(0, 1))  # what the camera leaves behind has no motion
    course, alike = _object((moved - by_camera) * seen)
    path, motion = name_path(course) if alike else ("mixed", "mixed")
    length = 0.0 if path == "none" else float(np.linalg.norm(np.diff(course, axis=0), axis=1).sum())
    return Facts(camera, path, motion, length / seconds, camera_speed)


def _basis(x: Array, y: Array) -> Array:
    """What each of four numbers (right, down, larger, turned) does to pixels at `x, y [h, w]` from the centre: [4, 2, h, w]."""
    one, none = np.ones_like(x), np.zeros_like(x)
    return np.array([[one, none], [none, one], [x, y], [-y, x]])


def _similarity(moved: Array, x: Array, y: Array) -> Array:
    """The similarity that most pixels of `moved [2, h, w]` follow, as numbers for `_basis`.

    Least squares reweighted by Geman and McClure's weights (1 + (e / s)^2)^-2, s from coarse to fine, beginning with the
    median of the picture's border, where objects seldom are (Black and Anandan, "The Robust Estimation of Multiple Motions",
    CVIU 1996).
    """
    basis, target = _basis(x, y).reshape(4, -1), moved.reshape(-1)
    border = np.maximum(np.abs(x) / np.abs(x).max(), np.abs(y) / np.abs(y).max()).ravel() > 0.8
    fit = np.array([*np.median(moved.reshape(2, -1)[:, border], axis=1), 0, 0])
    for scale in np.geomspace(0.2, 0.01, _ROUNDS):
        wrong = ((target - fit @ basis) ** 2).reshape(2, -1).sum(axis=0)
        weighted = basis * np.tile((1 + wrong / scale**2) ** -2.0, 2)
        fit = np.linalg.solve(weighted @ basis.T + 1e-9 * np.eye(4), weighted @ target)
    return fit


def _camera(fits: Array, radius: float, seconds: float) -> tuple[str, float]:
    """What the camera does, by its similarities [T, 4] from the first picture on, and its speed. A camera that pans left moves
    the picture to the right. radius: mean distance of a pixel from the centre.
    """
    course = np.concatenate([np.zeros((1, 4)), fits]) * [1, 1, radius, radius]
    speed = float(np.linalg.norm(np.diff(course, axis=0), axis=1).sum()) / seconds
    far = np.linalg.norm(course, axis=1)
    if far.max() <= CAMERA:
        return "still", 0.0
    if far[-1] <= _SWAYS * far.max():
        return "sways", speed
    most = int(np.abs(course[-1]).argmax())
    return _MOVES[most][int(course[-1, most] < 0)], speed


def _object(beside: Array) -> tuple[Array, bool]:
    """The path [T + 1, 2] from (0, 0) of what moves otherwise than the camera, and whether most of it moves alike, by what the
    camera's motion leaves, `beside [T, 2, h, w]`. Zeros where nothing moves.

    The path is a mean over pixels, which weigh by how far they go and by how well they keep to it (Cauchy's weights).
    """
    far = np.linalg.norm(beside, axis=1).mean(axis=0)
    weight = far**2 * (far > OBJECT)
    if (weight > 0).mean() < LEAST:
        return np.zeros((len(beside) + 1, 2)), True
    for _ in range(_ROUNDS):
        course = np.tensordot(beside, weight, 2) / weight.sum()
        off = np.linalg.norm(beside - course[:, :, None, None], axis=1).mean(axis=0)
        weight = far * (far > OBJECT) / (1 + (off / _ALIKE) ** 2)
    most = off[far > 0.5 * far.max()]
    alike = float(np.median(most)) <= MIXED * float(np.linalg.norm(course, axis=1).mean())
    return np.concatenate([np.zeros((1, 2)), course]), alike


PHRASES = {
    "none": "hardly moves",
    "mixed": "moves in several ways at once",
    "straight": "moves {to} in a straight line",
    "turn": "goes {to}",
    "circle": "moves around in a {to} circle",
    "spiral": "moves {to} in a spiral",
    "swing": "swings sideways from side to side",
    "bob": "bobs up and down and back",
    "bounce": "bounces up and down in place",
    "return": "goes {to} and comes back",
    "wave": "moves {to} in gentle waves",
    "zigzag": "moves {to} in a sharp zigzag",
    "hop": "hops {to} in arcs, like jumps",
    "jump": "stands still and suddenly jumps {to}",
    "loop": "moves {to} and makes a loop on the way",
    "eight": "moves along a figure eight",
    "arc": "moves {to} in an arc",
    "curve": "moves along a curve and ends {to}",
}
_CAMERA = {"pans left": "pans to the left", "pans right": "pans to the right", "still": "is still"}


def caption_of(facts: Facts) -> str:
    """Facts as an English sentence, such as "moves to the left in a straight line, quickly; the camera is still"."""
    if facts.path == "none" and facts.camera != "still":
        return f"the camera {_CAMERA.get(facts.camera, facts.camera)}{_how(facts.camera_speed)}"
    moves = PHRASES[facts.path].format(to=_to(facts)) + ("" if facts.path == "none" else _how(facts.speed))
    also = "" if facts.camera == "still" else _how(facts.camera_speed)
    return f"{moves}; the camera {_CAMERA.get(facts.camera, facts.camera)}{also}"


def tags_of(facts: Facts) -> dict[str, str]:
    """Facts as metadata, to filter by: where the object goes, along what path, what the camera does, how strong it all is."""
    return {"motion": facts.motion, "path": facts.path, "camera": facts.camera, "strength": facts.strength}


def _how(speed: float) -> str:
    return ", slowly" if speed < WEAK else ", quickly" if speed > STRONG else ""


def _to(facts: Facts) -> str:
    """Where it goes, as a sentence has it: "left" is "to the left", "up left" "diagonally up and to the left"."""
    if facts.path in ("circle", "spiral"):
        return facts.motion
    legs = []
    for leg in facts.motion.split(" then "):
        words = [word if word in ("up", "down") else f"to the {word}" for word in leg.split()]
        legs.append(f"diagonally {' and '.join(words)}" if len(words) > 1 else words[0])
    return (" then turns " if facts.path == "turn" else " then ").join(legs)
