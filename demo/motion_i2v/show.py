"""What `python demo/run.py --system motion-i2v` shows of a picture: prompt and field, a drag, a brush, a retrieved field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from domain import SIZE, track
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.media.fields import colours, field_view
from motionrt.runtime.media.video import write_video
from motionrt.runtime.pipeline import MotionPipeline, Result

Frames = NDArray[np.uint8]
COLUMNS = ("the prompt", "its field", "dragged to the middle", "free in a disc alone", "with a retrieved field")
LINES = ("video", "drag: px off", "brush: levels outside", "retrieved")
FREE = 22.0  # px, the disc that the brush paints around the object
WAY = 16.0  # px, of a drag
FURTHEST = 24.0  # px, shown in full colour


def show(pipeline: MotionPipeline, inputs: Mapping[str, Any], path: Path) -> tuple[list[Frames], list[Result], tuple[str, ...]]:
    """Writes `path`.mp4 and `path`-field.mp4; the videos of COLUMNS, results, and the cells of LINES behind the first.

    inputs: `prompt` and `image`, the path of a picture of SIZE x SIZE.
    """
    picture = np.asarray(Image.open(inputs["image"]).convert("RGB"))
    start = track(picture[None])[0]
    middle = np.full(2, SIZE / 2)
    way = middle - start if np.abs(middle - start).max() > 4 else np.array([1.0, 0.0])
    end = start + way / np.linalg.norm(way) * WAY
    axis = np.arange(SIZE) + 0.5
    free = np.hypot(axis - start[0], axis[:, None] - start[1]) < FREE
    subject = " ".join(str(inputs["prompt"]).split()[:3])

    told = pipeline(**inputs)
    drawn = pipeline(inputs["image"], f"{subject} moves", drag=[[tuple(start), tuple(end)]])
    painted = pipeline(**inputs, brush=free)
    found = pipeline(**inputs, retrieval="placed")
    assert told.field is not None
    write_video(path.with_suffix(".mp4"), told.frames, told.fps)
    write_video(path.with_name(f"{path.name}-field.mp4"), field_view(told.frames, told.field), told.fps)

    asked = start + np.linspace(0, 1, len(drawn.frames))[:, None] * (end - start)
    off = np.linalg.norm(track(drawn.frames) - asked, axis=1)[1:].mean()
    level = np.abs(painted.frames.astype(float) - painted.frames[0])[:, ~free].mean()
    clip = found.references[0].source if found.references else str(found.fallback)
    videos = [told.frames, colours(told.field, FURTHEST), drawn.frames, painted.frames, found.frames]
    return videos, [told, drawn, painted, found], (f"{off:.1f}", f"{level:.2f}", Path(clip).stem)
