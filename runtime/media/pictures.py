"""What Pillow opens: pictures of any format, without its limits on the process, and those that move, frame by frame."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageChops

from motionrt.runtime.errors import MediaError
from motionrt.runtime.media.colour import h273
from motionrt.runtime.media.limits import Limits

_FOREIGN = ("EPS", "WMF")  # formats that Pillow hands to other programs
_FLOAT_WHITE, _FLOAT_MOST = 1.0, 16.0  # the white of floats; what only a few highlights exceed
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 1 << 16  # bytes: where the tags of colour are, before the pixels
_WEBP_FLAGS, _WEBP_ALPHA = 20, 0x10  # of an extended webp: where its flags are, and that one (RFC 9649, 2.7)
_KEEP, _CLEAR, _BACK = range(3)  # what becomes of a frame before the next: it stays, nothing, what was before it
_KEPT = 16  # bytes that are kept of each pixel of an animation: the canvas of the decoder, and Pillow's pictures


def open_picture(file: IO[bytes], name: str) -> Image.Image:
    """`Image.open` without its limit on pixels, which is one for the whole process and warns before it refuses.

    `info` of the picture has `h273`, its transfer and primaries, if the file says them. Of a webp the pixels say what is
    transparent, and not the flag in its header: some encoders forget it, and what no frame covers is transparent in any case.
    """
    Image.init()
    head = file.read(_HEAD)
    if head.startswith(_PNG):
        _check_chunks(file)
    prefix = head[:16]
    if prefix[8:] == b"WEBPVP8X" and len(head) > _WEBP_FLAGS and not head[_WEBP_FLAGS] & _WEBP_ALPHA:
        file.seek(0)
        data = bytearray(file.read())  # as Pillow does
        data[_WEBP_FLAGS] |= _WEBP_ALPHA
        file = io.BytesIO(data)
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


def _check_chunks(file: IO[bytes]) -> None:
    """ValueError if a chunk of a png is not what was written: Pillow does not compare the checksums of its pixels."""
    file.seek(len(_PNG))
    while len(start := file.read(8)) == 8:
        size, crc = int.from_bytes(start[:4], "big"), zlib.crc32(start[4:])
        while size and (data := file.read(min(size, _HEAD))):
            size, crc = size - len(data), zlib.crc32(data, crc)
        if size or file.read(4) != crc.to_bytes(4, "big"):
            raise ValueError("it is damaged: a part of it is cut, or its checksum differs")
        if start[4:] == b"IEND":
            return


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


class Canvas:
    """What of the canvas of a gif or an animated png its frames cover. The rest is transparent, as browsers show it; Pillow
    fills it with the colour of the background, or black.
    """

    def __init__(self, image: Image.Image) -> None:
        self._left = Image.new("L", image.size)  # what is still covered when the next frame comes

    def shown(self, image: Image.Image) -> Image.Image:
        """The frame that `image` is at, which is loaded; to be called for one after the other. It may be `image` itself."""
        if image.format == "GIF":
            box, disposal = image.dispose_extent, image.disposal_method - 1  # type: ignore[attr-defined]
        else:
            box, disposal = image.info.get("bbox"), image.info.get("disposal", _KEEP)
        if box is None:
            return image
        covered = Image.new("L", image.size)  # that of a gif may grow
        covered.paste(self._left)
        before = covered.copy()
        covered.paste(255, box)
        self._left = before if disposal == _BACK else covered.copy()
        if disposal == _CLEAR:
            self._left.paste(0, box)
        if covered.getextrema() == (255, 255):
            return image
        frame = simple(image).convert("RGBA")
        frame.putalpha(ImageChops.darker(frame.getchannel("A"), covered))
        frame.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return frame


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
                first, canvas = int(getattr(image, "default_image", False)), Canvas(image)
                if first:
                    image.paste((0,) * len(image.getbands()), (0, 0, *image.size))  # else frames would lie on that still
                for number in range(first, getattr(image, "n_frames", 1)):
                    image.seek(number)
                    image.load()
                    shown = Fraction(image.info.get("duration", 0)).limit_denominator(1000)
                    duration = (shown if shown > 10 else Fraction(100)) / 1000
                    frame = canvas.shown(image)
                    yield time, duration, image.copy() if frame is image else frame
                    time += duration
        except MediaError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise ValueError(str(error) or "a frame of it is damaged") from error
