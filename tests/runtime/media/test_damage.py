"""Damage of every kind of file that is read: one MediaError, or an array of the right shape; nothing raw, no crash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.errors import MediaError
from motionrt.runtime.media.frames import length
from motionrt.runtime.media.video import read_clip, read_image, write_video


def damaged(data: bytes, number: int, random: np.random.Generator) -> bytes:
    """Cut, with other bytes anywhere or in the header, or with a length that is far too large."""
    values = np.frombuffer(data, np.uint8).copy()
    match number % 4:
        case 0:
            return values[: random.integers(0, len(values))].tobytes()
        case 1:
            values[random.integers(0, len(values), 1 + number % 9)] = random.integers(0, 256)
        case 2:
            values[random.integers(0, min(len(values), 200), 3)] = random.integers(0, 256, 3)
        case _:
            at = random.integers(0, len(values) - 4)
            values[at : at + 4] = (255, 255, 255, random.integers(0, 256))
    return values.tobytes()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif", "jpg", "tif", "bmp", "mp4"])
def test_damaged_files_are_one_error_or_an_array(tmp_path: Path, suffix: str) -> None:
    path, random = tmp_path / f"a.{suffix}", np.random.default_rng(7)
    frames = random.integers(0, 256, (5, 24, 32, 4), np.uint8)
    if suffix == "mp4":
        write_video(path, frames[..., :3], 8)
    else:
        first, *rest = (Image.fromarray(pixels) if suffix != "jpg" else Image.fromarray(pixels[..., :3]) for pixels in frames)
        moving = {"save_all": True, "append_images": rest, "duration": 100} if suffix in ("gif", "png", "webp", "avif") else {}
        first.save(path, **moving)
    whole, refused = path.read_bytes(), 0
    for number in range(60 if suffix != "webp" else 15):
        path.write_bytes(damaged(whole, number, random))
        try:
            assert read_image(path, 8, 12).shape == (3, 8, 12)
        except MediaError:
            refused += 1
        try:
            video = read_clip(path, 3, 8, 12, 8)
            assert video.shape == (3, 3, 8, 12) and np.isfinite(video).all() and length(path) >= 0
        except MediaError:
            refused += 1
    assert refused
