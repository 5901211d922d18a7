"""What people draw on a picture, as arrays of the size that the picture is brought to: drags, a brush, a motion field.

    kept = Kept.of(*still_size("star.png"), height, width)           # the part of the picture that becomes height x width
    static, said = brush("brush", "brush.png", kept)                 # where nothing may move
    flow, mask, said = drags("drag", ["10,20 30,25"], kept, targets=15, unit=8, cell=8, static=static)

Points and pixels of what is drawn are those of the picture as it is given, (0, 0) its upper left corner; they go where its
pixels go. What cannot be kept raises an `InputError` that begins with the name of the input; what is kept in another way
than it was said is told, in sentences.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.errors import InputError, MediaError, shown
from motionrt.runtime.media.frames import Box, cover_box, existing, reason
from motionrt.runtime.media.limits import LIMITS, Limits
from motionrt.runtime.media.stills import Still, read_painted

Float = NDArray[np.float32]
MOST_TRACKS, MOST_POINTS = 64, 1024  # of one request, of one track
MAGIC = b"\x93NUMPY"  # begins an .npy file
_FURTHEST = 1e6  # pixels that anything can be meant to go
_PAINTED = 127.5  # of 255: what is painted more strongly may move


@dataclass(frozen=True)
class Kept:
    """How a picture of `columns` x `rows` becomes `width` x `height`: by its part `box`, as `read_image` takes it."""

    columns: int
    rows: int
    height: int
    width: int
    box: Box

    @classmethod
    def of(cls, columns: int, rows: int, height: int, width: int) -> Kept:
        return cls(columns, rows, height, width, cover_box(columns, rows, height, width))

    def points(self, given: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points `[..., 2]` of the picture, in pixels of what it becomes."""
        left, top, right, bottom = self.box
        return (given - (left, top)) * (self.width / (right - left), self.height / (bottom - top))

    def part(self, columns: int, rows: int) -> Box:
        """What becomes `width` x `height` of a plane of `columns` x `rows`: all of one of that size; else it lies over the
        whole picture."""
        if (columns, rows) == (self.width, self.height):
            return 0, 0, columns, rows
        x, y = columns / self.columns, rows / self.rows
        left, top, right, bottom = self.box
        return left * x, top * y, min(right * x, columns), min(bottom * y, rows)  # rounded it may be a bit more

    def __str__(self) -> str:
        left, top, right, bottom = self.box
        return f"x from {left:g} to {right:g}, y from {top:g} to {bottom:g} of {self.columns} x {self.rows} pixels"


# --- drags ------------------------------------------------------------------------------------------------------------


def drags(
    name: str, value: Any, kept: Kept, targets: int, unit: int, cell: int = 1, static: Float | None = None
) -> tuple[Float, Float, list[str]]:
    """`flow [1, T, 2, H, W]` and `mask [1, 1, H, W]` of drags, and what is to be said of them; T: `targets`.

    value: tracks, each a list of points (x, y) or a text "x,y x,y": through its points, evenly in time, a pixel moves where the
    track begins, and all within `unit` pixels with it; one point alone moves by one pixel to the right and down, which pins it.
    cell: see `TracksInput`. static `[1, 1, H, W]`: 1 where nothing may move: the flow is 0 there, and the mask 1.
    """
    paths = []
    for number, points in enumerate(_tracks(name, value), 1):
        path = kept.points(points)
        path = pchip(np.concatenate([path, path + 1]) if len(path) == 1 else path, targets + 1)
        (x, y), what, begins = path[0], f"{name} {number}", f"begins at ({points[0, 0]:g}, {points[0, 1]:g})"
        if not (0 <= x < kept.width and 0 <= y < kept.height):
            raise InputError(f"{what} {begins}, outside of what is kept of the picture: {kept}. Begin it inside.")
        if (np.abs(path - path[0]) > (kept.width, kept.height)).any():
            raise InputError(f"{what} goes further than the picture is wide or high; allowed is as far. Make it shorter.")
        if static is not None and static[0, 0, int(y), int(x)]:
            fix = "begin it where the brush has painted, or paint there too"
            raise InputError(f"{what} {begins}, where the brush lets nothing move; {fix}.")
        paths.append(path)
    starts = np.array([path[0] for path in paths]).reshape(-1, 2)
    squares, widened = _squares(starts, unit, cell, kept)
    said = [f"{name} {i + 1} lies between the cells of {cell} pixels; its square was widened to its cell." for i in widened]
    flow, owner = rasterise(paths, squares, targets, kept.height, kept.width)
    mask = np.asarray(owner > 0, np.float32)[None, None]
    if static is not None:
        flow *= 1 - static[0]
        mask, owner = np.maximum(mask, static), np.where(static[0, 0] > 0, 0, owner)
    left = np.unique(owner[::cell, ::cell])
    if gone := [number for number in range(1, len(paths) + 1) if number not in left]:
        fix = f"begin drags at least {2 * max(unit, cell)} pixels of {kept.width} x {kept.height} apart, and within the brush"
        raise InputError(f"{name} {gone[0]} is covered by later ones, or by what the brush lets stand still; {fix}.")
    return flow[None], mask, said


def rasterise(
    paths: Sequence[NDArray[np.float64]], squares: NDArray[np.int64], targets: int, height: int, width: int
) -> tuple[Float, NDArray[np.int64]]:
    """`flow [T, 2, H, W]` and whose it is, `[H, W]`: the number of a path from 1 on, or 0. paths: `[T + 1, 2]` each, in pixels;
    squares `[K, 2, 2]`: where each begins and ends (x, y), the end not in it. Later ones lie over earlier ones."""
    flow, owner = np.zeros((targets, 2, height, width), np.float32), np.zeros((height, width), np.int64)
    for number, (path, ((left, top), (right, bottom))) in enumerate(zip(paths, squares, strict=True), 1):
        flow[:, :, top:bottom, left:right] = (path[1:] - path[0])[:, :, None, None]
        owner[top:bottom, left:right] = number
    return flow, owner


def _squares(starts: NDArray[np.float64], unit: int, cell: int, kept: Kept) -> tuple[NDArray[np.int64], list[int]]:
    """The squares `[K, 2, 2]` around `starts` `[K, 2]`, and which of them were widened so that they hold a multiple of `cell`
    in both directions: from floor(p) - unit to floor(p) + unit, cut at the border."""
    corner = starts.astype(np.int64)
    begin, end = np.maximum(corner - unit, 0), np.minimum(corner + unit, (kept.width, kept.height))
    first = -(-begin // cell) * cell
    narrow = first >= end
    begin = np.where(narrow, corner // cell * cell, begin)
    return np.stack([begin, end], axis=1), np.flatnonzero(narrow.any(axis=1)).tolist()


def pchip(points: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """`count` points `[count, 2]`, evenly in time, on a smooth curve through `points` `[n, 2]`, n of 2 or more, that overshoots
    none of them: a piecewise cubic Hermite (Fritsch, Butland 1984) with even knots, and the three-point formula at the ends."""
    secant = np.diff(points, axis=0)
    before, after = secant[:-1], secant[1:]
    rising = before * after > 0
    inner = np.where(rising, 2 * before * after / np.where(rising, before + after, 1), 0)
    slope = np.concatenate([_end(secant)[None], inner, _end(secant[::-1])[None]])
    time = np.linspace(0, len(points) - 1, count)
    knot = np.minimum(time.astype(np.int64), len(points) - 2)
    u, d, m, n = (time - knot)[:, None], secant[knot], slope[knot], slope[knot + 1]
    curve: NDArray[np.float64] = points[knot] + u * (m + u * (3 * d - 2 * m - n + u * (m + n - 2 * d)))
    return curve


def _end(secant: NDArray[np.float64]) -> NDArray[np.float64]:
    """The slope at the first point, kept from overshooting."""
    first, second = secant[0], secant[min(1, len(secant) - 1)]  # of a straight line the same
    slope = (3 * first - second) / 2
    turns = (first * second <= 0) & (np.abs(slope) > 3 * np.abs(first))
    return np.where(slope * first <= 0, 0, np.where(turns, 3 * first, slope))


def _tracks(name: str, value: Any) -> list[NDArray[np.float64]]:
    """Tracks as arrays of points `[n, 2]`; `InputError` for what is none."""
    like = '[[(10, 20), (30, 25)]] or ["10,20 30,25"]'
    if not _listed(value):
        raise InputError(f"{name} is {shown(value)}; allowed is a list of tracks, each with its points, such as {like}.")
    if len(value) > MOST_TRACKS:
        raise InputError(f"{name} has {len(value)} tracks; allowed are {MOST_TRACKS}. Leave some out.")
    tracks = []
    for number, track in enumerate(value, 1):
        points = [point.split(",") for point in track.split()] if isinstance(track, str) else track
        if not _listed(points) or not 1 <= len(points) <= MOST_POINTS:
            raise InputError(f"{name} {number} is {shown(track)}; allowed are 1 to {MOST_POINTS} points, such as {like}.")
        for point in points:
            if not _listed(point) or len(point) != 2 or not all(map(_finite, point)):
                raise InputError(f"{name} {number} has the point {shown(point)}; allowed are two finite numbers, x and y.")
        tracks.append(np.array([[float(x), float(y)] for x, y in points]))
    return tracks


def _listed(value: Any) -> TypeGuard[Sequence[Any]]:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and abs(float(value)) <= _FURTHEST  # NaN is not
    except (TypeError, ValueError, OverflowError):
        return False


# --- a brush ----------------------------------------------------------------------------------------------------------


def brush(name: str, value: Still | None, kept: Kept, limits: Limits = LIMITS) -> tuple[Float, list[str]]:
    """`static [1, 1, H, W]` float32: 1 where all must stand still, 0 where a picture is painted, and what is to be said of it.
    Nothing painted or None: 0 everywhere.

    value: any still, or bool or uint8 `[h, w]`: bright and opaque is painted. Raises what `read_image` raises, too.
    """
    nothing = np.zeros((1, 1, kept.height, kept.width), np.float32)
    if value is None:
        return nothing, []
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        value = value.astype(np.uint8) * 255
    painted = read_painted(value, name, limits)
    if not (np.asarray(painted) > _PAINTED).any():
        return nothing, [f"{name}: nothing is painted, so everything may move."]
    small = painted.resize((kept.width, kept.height), Image.Resampling.BILINEAR, box=kept.part(*painted.size))
    static = np.asarray(np.asarray(small) <= _PAINTED, np.float32)
    if static.all():
        fix = "paint a larger part, in white, of what is kept"
        raise InputError(f"{name} has nothing painted that is left in {kept.width} x {kept.height} pixels ({kept}); {fix}.")
    return static[None, None], []


# --- a field ----------------------------------------------------------------------------------------------------------


def field(name: str, value: Any, kept: Kept, targets: int, limits: Limits = LIMITS) -> Float:
    """A motion field `[1, T, 2, H, W]` float32, pixels of H x W. value: an array of floats `[T or T + 1, 2, h, w]`, or an .npy
    file of one: displacements in its own pixels; it may begin with the zero field of the first frame. Raises MediaError."""
    array = read_field(name, value, limits)
    if array.ndim != 4 or array.shape[0] - targets not in (0, 1) or array.shape[1] != 2 or array.dtype.kind != "f":
        raise InputError(
            f"{name} is {array.dtype} {list(array.shape)}; allowed are floats [{targets} or {targets + 1}, 2, h, w]: for each"
            " frame behind the first how far each pixel has gone, x and y."
        )
    rows, columns = array.shape[2:]
    if 0 in (rows, columns):
        raise InputError(f"{name} has {columns} x {rows} pixels; allowed is 1 x 1 or more.")
    if not (np.abs(array) <= _FURTHEST).all():  # NaN is not
        raise InputError(f"{name} has values that are NaN or beyond {_FURTHEST:g}; allowed are pixels. Replace them.")
    if len(array) > targets and array[0].any():
        raise InputError(f"{name} begins with a field that is not zero, and the first frame goes nowhere; leave that out.")
    left, top, right, bottom = box = kept.part(columns, rows)
    scale = (kept.width / (right - left), kept.height / (bottom - top))
    made = np.empty((1, targets, 2, kept.height, kept.width), np.float32)
    for target, axis in np.ndindex(targets, 2):
        plane = Image.fromarray(np.ascontiguousarray(array[len(array) - targets + target, axis], np.float32))
        if plane.size != (kept.width, kept.height):
            plane = plane.resize((kept.width, kept.height), Image.Resampling.BILINEAR, box=box)
        made[0, target, axis] = np.asarray(plane) * np.float32(scale[axis])
    return made


def is_array(value: Any) -> bool:
    """Whether `value` is not another kind of file (a video): an array, an .npy file by its name or its content, or nothing that
    is there."""
    if not isinstance(value, str | os.PathLike):
        return True
    path = Path(value)
    if path.suffix.lower() == ".npy" or not path.is_file():
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_field(name: str, value: Any, limits: Limits = LIMITS) -> NDArray[Any]:
    """The array that `value` is, or that its .npy file holds. Raises InputError, MediaError."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} is a {type(value).__name__}; allowed is an array, or the path of an .npy file.")
    path: Path = existing(value, name)
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # only its head is read
        limits.check_memory(mapped.nbytes, "Make it smaller")
        return np.array(mapped)
    except MediaError as error:
        raise MediaError(f"{path} {error}") from error
    except Exception as error:  # of a damaged head, nearly anything
        raise MediaError(f"{path} cannot be read as an array: {reason(error)}. Write it with numpy.save.") from error
