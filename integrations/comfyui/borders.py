"""What ComfyUI passes between nodes, as NumPy arrays and files, and back.

IMAGE: float32 tensor `[B, H, W, C]` in [0, 1], MASK: `[B, H, W]`, VIDEO: an object that can be saved.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.utils import ProgressBar
from comfy_api.latest import InputImpl, Types
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.job import Job

_LARGEST = 512  # pixels of the longer side of a look at a video while it is made


def pixels_of_image(image: torch.Tensor) -> NDArray[np.uint8]:
    """The first picture of an IMAGE `[B, H, W, C]`, or the first plane of a MASK `[B, H, W]`, as uint8 without B."""
    levels = image[0].detach().cpu().float() * 255  # it may be of 16 bits
    pixels: NDArray[np.uint8] = np.clip(np.rint(levels.numpy()), 0, 255).astype(np.uint8)
    return pixels


def image_of_pixels(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8 `[F, H, W, 3]` as an IMAGE."""
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255))


def video_of_image(image: torch.Tensor, fps: float) -> Any:
    """An IMAGE as a VIDEO of so many frames per second."""
    rate = Fraction(fps).limit_denominator(60000)
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=image, audio=None, frame_rate=rate))


def file_of_video(video: Any, folder: str, name: str) -> Path:
    """A VIDEO, written into a folder as an mp4."""
    path = Path(folder) / f"{name}.mp4"
    video.save_to(str(path))
    return path


def tracks_of_text(name: str, text: str) -> list[Any]:
    """Drags: a line for each, "x,y x,y ...", or JSON, also as nodes that draw splines write it: points {"x": 1, "y": 2}."""
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        value = json.loads(text, object_hook=lambda point: [point["x"], point["y"]])
    except (ValueError, KeyError):
        allowed = 'a line "x,y x,y" for each drag, or JSON such as [[[10, 20], [30, 25]]]'
        raise InputError(f"{name} is {shown(text)}; allowed is {allowed}.") from None
    flat = bool(value) and isinstance(value[0], list) and not isinstance(value[0][0], list | dict)
    return [value] if flat else list(value)


def told(references: list[Any]) -> str:
    """A line for each clip whose motion was used: its score, caption and file."""
    return "\n".join(
        f"{'by hand' if one.score != one.score else f'{one.score:.3f}'}  {one.caption}  ({Path(one.source).name})".strip()
        for one in references
    )


class Watched:
    """A progress bar of `total` parts that also asks whether the user has stopped."""

    def __init__(self, total: int) -> None:
        self.total, self._bar = total, ProgressBar(total)
        throw_exception_if_processing_interrupted()

    def update(self, done: int, look: Image.Image | None = None) -> None:
        """`done` parts are done; look: a picture of how it comes on. Raises ComfyUI's own exception after a stop."""
        self._bar.update_absolute(min(done, self.total), self.total, None if look is None else ("JPEG", look, _LARGEST))
        throw_exception_if_processing_interrupted()


def run(job: Job) -> None:
    """Run a job to its end, a call of a graph at a time; a stop ends it before the next one."""
    try:
        watched = Watched(sum(job.calls().values()))
        for done, _ in enumerate(job, 1):
            pictures = job.preview()
            watched.update(done, None if pictures is None else Image.fromarray(pictures[-1]))
    finally:
        job.close()
