"""Stills in, with Pillow: any format, mode, range and profile to one small array. The rules are in docs/media.md."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media.colour import still_to_srgb
from motionrt.runtime.media.frames import Float, check_size, cover_image, existing, normalise, reason
from motionrt.runtime.media.limits import LIMITS, Limits, check_limits
from motionrt.runtime.media.pictures import Canvas, open_picture, simple

T = TypeVar("T")
Still = str | os.PathLike[str] | Image.Image | NDArray[Any]  # a file, a Pillow image, or uint8 [h,w], [h,w,3] or [h,w,4]
_WHOLE = 1 << 25  # pixels: up to here a jpeg is decoded at its full size
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def read_image(source: Still, height: int, width: int, *, limits: Limits = LIMITS) -> Float:
    """Read a still of any size, mode, range, profile, EXIF orientation and alpha (over white) -> float32 [3,H,W] in [-1,1].

    source: a file (its first picture), a Pillow image, or a uint8 array [h,w], [h,w,3] or [h,w,4]. Resized with an
    antialiased bicubic filter until it covers `height` x `width`, then cropped around the centre. A jpeg of more than 33
    million pixels is decoded at 1/2, 1/4 or 1/8 of its size, but never at less than twice the asked one. Raises MediaError
    for files that are missing, damaged or beyond `limits` and InputError for arrays and sizes that cannot be used.
    """
    check_size(height=height, width=width)
    check_limits(limits)
    small = _read(source, lambda image: _small(image, height, width, limits))
    video = normalise(np.asarray(small)[None])
    return video.reshape(video.shape[1:])


def still_size(source: Still, limits: Limits = LIMITS) -> tuple[int, int]:
    """Columns and rows of a still as it is seen, upright. Raises what `read_image` raises."""

    def size(image: Image.Image) -> tuple[int, int]:
        columns, rows = image.size
        limits.check_picture(columns, rows, 0)
        return (columns, rows) if _orientation(image) < 5 else (rows, columns)

    return _read(source, size)


def read_painted(source: Still, what: str = "image", limits: Limits = LIMITS) -> Image.Image:
    """How strongly each pixel of a still is painted, as a grey picture of its own size, upright: the brightest of its colours,
    by how far it covers. Black and what is transparent are 0. what: its name, for what is raised, as `read_image` does."""
    check_limits(limits)

    def painted(image: Image.Image) -> Image.Image:
        limits.check_picture(*image.size, 16)
        image.load()
        plain = simple(image)
        if plain.mode in ("CMYK", "LAB"):
            plain = still_to_srgb(plain, image.info)
        red, green, blue, alpha = plain.convert("RGBA").split()
        strong = ImageChops.multiply(ImageChops.lighter(ImageChops.lighter(red, green), blue), alpha)
        return strong if (turn := _UPRIGHT.get(_orientation(image))) is None else strong.transpose(turn)

    return _read(source, painted, what)


def _read(source: Still, use: Callable[[Image.Image], T], what: str = "image") -> T:
    """What `use` makes of an open still, which is called `what`; whatever is wrong with it is said in one sentence."""
    if isinstance(source, np.ndarray):
        plain = source.dtype == np.uint8 and source.ndim in (2, 3) and source.shape[2:] in ((), (3,), (4,))
        if not plain or 0 in source.shape:
            raise InputError(
                f"the {what} array is {source.dtype} {list(source.shape)}; allowed is uint8 [h,w], [h,w,3] or [h,w,4]."
                " For floats in [0,1] pass `(x * 255).round().astype('uint8')`."
            )
        source = Image.fromarray(np.ascontiguousarray(source))
    name = f"the {what}" if isinstance(source, Image.Image) else str(existing(source, what))
    try:
        if isinstance(source, Image.Image):
            return use(source)
        with open(name, "rb") as file, open_picture(file, name) as image:
            return use(image)
    except MediaError as error:
        raise MediaError(f"{name} {error}") from error
    except MemoryError as error:
        raise MediaError(f"{name} needs more memory than there is; make it smaller.") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise MediaError(f"{name} cannot be read as an image: {reason(error)}. Use an intact png or jpeg.") from error


def _orientation(image: Image.Image) -> int:
    """What EXIF says of how a picture is turned: 1 (upright) to 8."""
    with contextlib.suppress(Exception):  # damaged EXIF: the picture is still good
        return turn if (turn := image.getexif().get(0x0112, 1)) in _UPRIGHT else 1
    return 1


def _small(image: Image.Image, height: int, width: int, limits: Limits) -> Image.Image:
    """RGB of `height` x `width`, upright. Only the result is converted: the large picture exists once, or twice."""
    columns, rows = image.size
    reduction = _reduction(image, max(height, width))
    if reduction > 1:
        image.draft(None, (columns // reduction, rows // reduction))
    coefficients = 6 if image.info.get("progressive") else 0  # bytes that libjpeg keeps of each stored pixel
    per_pixel = 16 if image.mode[0] in "IF" else 8
    limits.check_picture(columns, rows, 1, image.width * image.height * per_pixel + columns * rows * coefficients)
    image.load()
    orientation = _orientation(image)
    turn = _UPRIGHT.get(orientation)
    if orientation >= 5:
        height, width = width, height
    shown = Canvas(image).shown(image) if image.format == "GIF" and image.tell() == 0 else image
    small = still_to_srgb(cover_image(simple(shown), height, width), image.info)
    return small if turn is None else small.transpose(turn)


def _reduction(image: Image.Image, asked: int) -> int:
    """By how much a file can give the picture smaller than it is stored, and needs to: 1, 2, 4 or 8."""
    if image.format not in ("JPEG", "MPO") or not hasattr(image, "tile"):
        return 1
    scale = 1
    while scale < 8 and image.width * image.height > _WHOLE * scale**2 and min(image.size) >= 4 * scale * asked:
        scale *= 2
    return scale
