"""The motion field of a clip, for memories that keep something of it: from a file beside the clip, or found in its pictures.

`wave.npy` beside `wave.mp4` holds floats `[F - 1, 2, h, w]` or `[F, 2, h, w]` (F: pictures of a clip of the bundle, at its
rate): how far each pixel of the first picture has gone in the others, x and y, in pixels of h x w. It lies over the whole
picture and is scaled and cropped with it, and it is of the clip that begins where the file begins: where a clip begins later,
its field is found in its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import GraphSpec, MemorySpec
from motionrt.runtime.media.drawn import Kept, field, read_field
from motionrt.runtime.media.flow import check_flow, dense_flow
from motionrt.runtime.media.limits import LIMITS, Limits

FIELD = "field"  # the port of a memory's graphs that is given it


def reads_field(spec: MemorySpec, graphs: Mapping[str, GraphSpec]) -> bool:
    """Whether records are made of the clips' fields, too."""
    return any(port.name == FIELD for name in spec.graphs for port in graphs[name].inputs)


def beside(path: Path, start: float) -> Path | None:
    """The file of the field of the clip of `path` that begins at `start` seconds, if there is one. `InputError` where there is
    none and none can be found in the pictures either."""
    file = path.with_suffix(".npy")
    if start == 0 and file.is_file():
        return file
    check_flow(f"the clip {path}{f' from {start:g} s on' if start else ''}", _instead(file, start))
    return None


def _instead(file: Path, start: float) -> str:
    what = f"Put it beside the clip as {file.name} (floats [pictures - 1, 2, h, w], in pixels)"
    return f"{what}, with the clip in a file of its own" if start else what


def field_of(video: NDArray[np.float32], path: Path, start: float, limits: Limits = LIMITS) -> NDArray[np.float32]:
    """The field `[F - 1, 2, H, W]`, in pixels of H x W, of the clip `video [F, 3, H, W]` that was cut out of `path` from
    `start` seconds on. Raises InputError, MediaError."""
    if (file := beside(path, start)) is None:
        return dense_flow(video)
    frames, _, height, width = video.shape
    given = read_field(f"the field {file}", file, limits)
    rows, columns = given.shape[-2:] if given.ndim == 4 and given.size else (height, width)  # what it is else is said below
    kept = Kept.of(columns, rows, height, width)
    (made,) = field(f"the field {file}", given, kept, frames - 1, limits)
    return np.asarray(made, np.float32)
