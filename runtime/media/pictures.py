"""What Pillow opens: pictures of any format, without its limits on the process, and those that move, frame by frame."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from motionrt.runtime.errors import MediaError
from motionrt.runtime.media.colour import h273
from motionrt.runtime.media.limits import Limits

_FOREIGN = ("EPS", "WMF")  # formats that Pillow hands to other programs
_FLOAT_WHITE, _FLOAT_MOST = 1.0, 16.0  # the white of floats; what only a few highlights exceed
_HEAD = 1 << 16  # bytes: where the tags of colour are, before the pixels
_KEPT = 16  # bytes that are kept of each pixel of an animation: the canvas of the decoder, and Pillow's pictures


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """`Image.open` without its limit on pixels, which is one for the whole process and warns before it refuses.

    `info` of the picture has `h273`, its transfer and primaries, if the file says them.
    """
    Image.init()
    head = file.read(_HEAD)
    prefix = head[:16]
    for kind in Image.ID:
        factory, accept = Image.OPEN[kind]
        if kind in _FOREIGN or (accept is not None and accept(prefix) is not True):
            continue
        file.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # as Pillow does: not of this format
            image: Image.Image = factory(file, name)
            image.info["h273"] = h273(head)
            return image
    raise ValueError("it is of no format that is known")


def simple(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel and modes that can be resized: L, LA, RGB, RGBA, CMYK or LAB."""
    if image.mode[0] in "IF":
        return _grey(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        mode = "LA" if grey else "RGBA"
    else:
        mode = image.mode if image.mode in ("CMYK", "LAB") else "L" if grey else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _grey(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> L or LA, by what the format declares and never by the brightest pixel."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise MediaError("has NaN or infinite pixels; replace them.")
        if np.count_nonzero(values > _FLOAT_MOST) > values.size / 100:
            raise MediaError(
                f"holds floats up to {values.max():g}; floats are read as 0 (black) to {_FLOAT_WHITE:g} (white). Divide them by"
                " their white."
            )
        white = _FLOAT_WHITE
    elif image.mode == "I" and image.format != "PPM":
        raise MediaError(
            "holds whole numbers of 32 bits or with a sign, which do not say what is white. Save it with 8 or 16 bits (as a"
            " Pillow image: mode L or I;16)."
        )
    else:  # a pgm is scaled to 16 bits by Pillow; a tiff says how many bits it has
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
        white = 2 ** (bits if image.mode != "I" else 16) - 1
    levels = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 256):
        rows = values[top : top + 256].astype(np.float64)
        levels[top : top + 256] = np.rint(rows * (255 / white)).clip(0, 255)
    grey = Image.fromarray(levels)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255))))
    return grey


def is_picture(path: Path) -> bool:
    """Whether the file is of a format of pictures that can move: gif, png, webp or avif, whatever its name is."""
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith((b"GIF8", b"\x89PNG")) or head[8:] == b"WEBP" or head[4:] in (b"ftypavif", b"ftypavis")


def animation(path: Path, limits: Limits) -> Iterator[tuple[Fraction, Fraction, Image.Image]]:
    """(start, duration, picture) of each frame; seconds. Raises MediaError (size) and ValueError (damage).

    A duration of up to 10 ms counts as 100 ms, as browsers show it. The still that an animated png may have for viewers that
    do not move is left out.
    """
    time = Fraction(0)
    with open(path, "rb") as file:
        try:
            with open_picture(file, str(path)) as image:
                try:
                    limits.check_picture(*image.size, _KEPT)
                except MediaError as error:
                    raise MediaError(f"{path} {error}") from error
                for number in range(int(getattr(image, "default_image", False)), getattr(image, "n_frames", 1)):
                    image.seek(number)
                    image.load()
                    shown = Fraction(image.info.get("duration", 0)).limit_denominator(1000)
                    duration = (shown if shown > 10 else Fraction(100)) / 1000
                    yield time, duration, image.copy()
                    time += duration
        except MediaError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise ValueError(str(error) or "a frame of it is damaged") from error
