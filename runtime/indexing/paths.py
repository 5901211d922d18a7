"""What a path on the picture is called, by rules: straight, a turn, a circle, waves, ... All lengths are relative."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HARDLY = 0.05  # sides from end to end, or less: it hardly moves
JUMP, RUSH, RUN = 0.35, 0.15, 0.26  # of the time it moves at all, by more than so much of its longest step; once without rest
CLOSED = 0.35  # of its extent, or less, lie between a path's ends: it is closed
STRAIGHT, FLAT = 0.15, 0.35  # of its length, or less, is a path's width: a straight line; a line to and fro
ROUND = 0.22  # of its radius, or less, a path is off a circle
CORNER = 0.15  # of its height, or less, a bent path is off two straight lines: a turn
BACK = 0.25  # of the way between its ends, or less, a path goes back that gets on
CIRCLE, SPIRAL, LOOP = 0.7, 0.7, 0.65  # turns, or more
SHARP = 0.04  # of its height, or less, a wave is off straight lines between its crests by RMS (a sine: 0.07): a zigzag
_POINTS = 33  # of a path that is as dense everywhere
_DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")

Array = NDArray[np.float64]


def direction(along: Array) -> str:
    """The nearest of eight directions of `along [2]`, x right and y down: "left", "up left"."""
    return _DIRECTIONS[round(float(np.arctan2(along[1], along[0])) / (np.pi / 4)) % 8]


def name_path(course: Array) -> tuple[str, str]:
    """What a path `course [F, 2]` in sides (x right, y down) is called, and where it goes.

    ("straight" | "wave" | "zigzag" | "hop" | "jump" | "loop" | "return" | "arc" | "curve", a direction; of jumps and "turn" two
    with " then " between), ("circle", "clockwise" or "counterclockwise"), ("spiral", "out" or "in"), ("swing", "sideways"),
    ("bob" | "bounce", "up and down"), ("eight", "around"), ("none", "none").
    """
    extent = float(np.ptp(course, axis=0).max())
    if len(course) < 3 or extent <= HARDLY:
        return ("none", "none") if extent <= HARDLY else ("straight", direction(course[-1] - course[0]))
    if to := _jumps(course):
        return "jump", to
    smooth = course.copy()
    smooth[1:-1] = (course[:-2] + 2 * course[1:-1] + course[2:]) / 4
    middle = smooth - smooth.mean(axis=0)
    axes = np.linalg.svd(middle, full_matrices=False)[2]
    length, width = np.ptp(middle @ axes.T, axis=0)
    net = smooth[-1] - smooth[0]
    if width <= FLAT * length and (line := _line((smooth - smooth[0]) @ axes[0], axes[0], width / length)):
        return line
    even = _even(smooth)
    if found := _spiral(even):
        return found
    turned = _turned(np.diff(even, axis=0))
    off, centre = _circle(even)
    if off <= ROUND and abs(swept := _turned(even - centre)) >= CIRCLE:
        return "circle", "clockwise" if swept > 0 else "counterclockwise"
    crosses, closed = _crosses(even), float(np.linalg.norm(net)) <= CLOSED * extent
    if closed and crosses and abs(turned) < CIRCLE:
        return "eight", "around"
    if closed:
        return ("circle", "clockwise" if turned > 0 else "counterclockwise") if abs(turned) >= CIRCLE else ("curve", "around")
    if crosses and abs(turned) >= LOOP:
        return "loop", direction(net)
    return _onward(course, smooth, net)


def _line(along: Array, axis: Array, width: float) -> tuple[str, str] | None:
    """A path that is nearly a line, by how far it is on it, `along [F]`; None if it is a bent one."""
    turns = _reversals(along, 0.2)
    if not turns:
        return ("straight", direction(axis * along[-1])) if width <= STRAIGHT else None
    peak = along[turns[0]]
    if len(turns) == 1 and abs(along[-1]) < 0.6 * abs(peak):
        return "return", direction(axis * peak)
    if abs(axis[0]) > abs(axis[1]):
        return "swing", "sideways"
    up = -along * np.sign(axis[1])
    return ("bounce" if len(turns) > 2 and up.min() > -0.2 * np.ptp(up) else "bob"), "up and down"


def _jumps(course: Array) -> str | None:
    """Where a path jumps that hardly moves most of the time."""
    lengths = np.linalg.norm(np.diff(course, axis=0), axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lengths > RUSH * lengths.max(), [0]])))
    runs = edges.reshape(-1, 2)  # from and to which picture it moves
    if np.ptp(runs, axis=1).sum() > JUMP * len(lengths) or np.ptp(runs, axis=1).max() > max(1, RUN * len(lengths)):
        return None
    return " then ".join(direction(course[last] - course[first]) for first, last in runs)


def _onward(course: Array, smooth: Array, net: Array) -> tuple[str, str]:
    """A path that gets on: a turn, waves, a zigzag, hops, an arc."""
    to, far = direction(net), float(np.linalg.norm(net))
    rel = (smooth - smooth[0]) / far
    along, aside = rel @ net / far, rel @ np.array([net[1], -net[0]]) / far
    turns = _reversals(aside, 0.3)
    if len(turns) == 1:
        off, corner = min((_off_corner(rel, at), at) for at in range(1, len(rel) - 1))
        first, second = rel[corner], rel[-1] - rel[corner]
        bend = abs(np.angle(complex(*first) * complex(*second).conjugate()))
        if off <= CORNER * np.ptp(aside) and bend > np.pi / 5 and direction(first) != direction(second):
            return "turn", f"{direction(first)} then {direction(second)}"
        return "arc", to
    if (np.maximum.accumulate(along) - along).max() > BACK or not turns:
        return "curve", to
    up = aside * np.sign(net[0])  # how far up it is beside its line
    if abs(net[0]) > abs(net[1]) and len(turns) > 2 and up.min() > -0.25 * np.ptp(up):
        return "hop", to
    crests, aside = [0, *turns, len(course) - 1], course @ np.array([net[1], -net[0]]) / far
    off = float(np.sqrt(np.mean((aside - np.interp(np.arange(len(aside)), crests, aside[crests])) ** 2)))
    return "zigzag" if off <= SHARP * np.ptp(aside) else "wave", to


def _off_corner(path: Array, corner: int) -> float:
    """How far a path is at most from the two straight lines between its ends and a corner."""
    worst = 0.0
    for some in (path[: corner + 1], path[corner:]):
        line = some[-1] - some[0]
        across = (some - some[0]) @ np.array([line[1], -line[0]]) / max(float(np.linalg.norm(line)), 1e-9)
        worst = max(worst, float(np.abs(across).max()))
    return worst


def _even(path: Array) -> Array:
    """The same path with points that are as far from each other everywhere."""
    at = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1))])
    where = np.linspace(0, at[-1], _POINTS)
    return np.stack([np.interp(where, at, path[:, axis]) for axis in (0, 1)], axis=1)


def _turned(arrows: Array) -> float:
    """How far `arrows [N, 2]` turn from the first to the last, in turns, clockwise."""
    z = arrows[:, 0] + 1j * arrows[:, 1]
    return float(np.angle(z[1:] * z[:-1].conj()).sum() / (2 * np.pi))


def _spiral(path: Array) -> tuple[str, str] | None:
    """A path that goes round where it began ever farther from it, or the same backwards."""
    for way, points in (("out", path), ("in", path[::-1])):
        arrows = points - points[0]
        far = np.linalg.norm(arrows, axis=1)
        some = arrows[len(arrows) // 6 :]
        if np.corrcoef(far, np.arange(len(far)))[0, 1] > 0.85 and abs(_turned(some)) >= SPIRAL:
            return "spiral", way
    return None


def _circle(path: Array) -> tuple[float, Array]:
    """The circle through `path` by least squares (Kasa 1976): how far off it is, of its radius, and the centre."""
    system = np.column_stack([2 * path, np.ones(len(path))])
    *centre, rest = np.linalg.lstsq(system, (path**2).sum(axis=1), rcond=None)[0]
    radius = float(np.sqrt(max(rest + centre[0] ** 2 + centre[1] ** 2, 1e-12)))
    return float(np.std(np.linalg.norm(path - centre, axis=1))) / radius, np.array(centre)


def _crosses(path: Array) -> bool:
    """Whether the polyline crosses itself: two of its pieces each have the other's ends on both sides."""
    a, b = path[:-1], path[1:]

    def side(p: Array, q: Array, r: Array) -> Array:
        d, e = q - p, r - p
        return np.asarray(d[..., 0] * e[..., 1] - d[..., 1] * e[..., 0])

    p, q, r, s = a[:, None], b[:, None], a[None], b[None]
    apart = np.abs(np.subtract.outer(np.arange(len(a)), np.arange(len(a)))) > 2
    return bool(((side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0) & apart).any())


def _reversals(values: Array, least: float) -> list[int]:
    """Where `values [F]` turn back by more than `least` of their range: the places of the extremes, but for the ends."""
    found, best, way, least = [], 0, 0, least * float(np.ptp(values))
    for at in range(1, len(values)):
        change = values[at] - values[best]
        if not way:
            way, best = (int(np.sign(change)), at) if abs(change) > least else (0, 0)
        elif change * way > 0:
            best = at
        elif -change * way > least:
            found.append(best)
            way, best = -way, at
    return found
