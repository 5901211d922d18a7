"""Images and videos in and out: Pillow for stills, PyAV for clips, one rule for time, size, colour and orientation.

Shapes: F frames, H and W pixels. Everything read is float32 RGB in [-1, 1], channels first; everything written is uint8
RGB, channels last. Reading has no random part: the same file, window and size always give the same array.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.files import replacing
from motionrt.runtime.media.frames import (
    Float,
    Picture,
    Pixels,
    Rate,
    check_size,
    cover,
    decode,
    existing,
    fraction,
    length,
    normalise,
    pick,
    reason,
    undecodable,
)  # fmt: skip

File = str | os.PathLike[str]
WRITABLE = (".mp4", ".gif", ".webp", ".png")
SPANS = ("start", "centre")  # where in its limits a clip is cut


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """Frames cut by `decode_clip`, and the span they cover.

    video: float32 [F,3,H,W] in [-1,1]; start and duration in seconds; fps: F / duration, the rate at which a model sees
    the clip (the requested one, unless the clip was stretched).
    """

    video: Float
    start: float
    duration: float
    fps: float


def read_image(source: File | Image.Image | NDArray[Any], height: int, width: int) -> Float:
    """Read a still of any size, mode, EXIF orientation and alpha (laid over white) -> float32 [3,H,W] in [-1,1].

    source: a file, a Pillow image, or a uint8 array [h,w], [h,w,3] or [h,w,4]. Resized with an antialiased bicubic
    filter until it covers `height` x `width`, then cropped around the centre. Raises MediaError for files that are
    missing or damaged and InputError for arrays and sizes that cannot be used.
    """
    check_size(height=height, width=width)
    if isinstance(source, np.ndarray):
        plain = source.dtype == np.uint8 and source.ndim in (2, 3) and source.shape[2:] in ((), (3,), (4,))
        if not plain or 0 in source.shape:
            raise InputError(
                f"the image array is {source.dtype} {list(source.shape)}; allowed is uint8 [h,w], [h,w,3] or [h,w,4]."
                " For floats in [0,1] pass `(x * 255).round().astype('uint8')`."
            )
        source = Image.fromarray(np.ascontiguousarray(source))
    name = "the image" if isinstance(source, Image.Image) else str(existing(source, "image"))
    try:
        with contextlib.nullcontext(source) if isinstance(source, Image.Image) else Image.open(name) as image:
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF: the picture is still good
                image = ImageOps.exif_transpose(image)
            pixels = np.asarray(_rgb(image))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise MediaError(f"{name} cannot be read as an image: {reason(error)}. Use an intact png or jpeg.") from error
    video = normalise(cover(pixels, height, width)[None])
    return video.reshape(video.shape[1:])


def read_clip(path: File, frames: int, height: int, width: int, fps: Rate, start: float | None = None) -> Float:
    """The frames of `decode_clip` alone: float32 [F,3,H,W] in [-1,1]."""
    return decode_clip(path, frames, height, width, fps, start).video


def decode_clip(
    path: File, frames: int, height: int, width: int, fps: Rate, start: float | None = None, end: float | None = None
) -> DecodedClip:
    """Cut `frames` frames at `fps` out of a video of any frame rate, from `start` seconds (default 0) on.

    Frame i is the decoded frame nearest to `start + i / fps`, of two equally near ones the earlier: at a constant rate
    this is the first frame at or after the target minus half a frame. A clip that ends before the last target is
    stretched: targets are spread evenly from `start` to its last frame, and frames repeat if there are too few.
    No frame at or after `end` seconds is used. Rotation, mirroring and non-square pixels are undone; size as in
    `read_image`. Raises MediaError (missing, damaged, no video, `start` behind the end) and InputError.
    """
    import av

    check_size(frames=frames, height=height, width=width)
    begin, rate = fraction("start", start or 0), fraction("fps", fps)
    limit = None if end is None else fraction("end", end)
    if rate <= 0:
        raise InputError(f"fps is {fps!r}; allowed is any number above 0.")
    if limit is not None and limit <= begin:
        raise InputError(f"end is {end!r}; allowed are seconds after the start, {float(begin):g}.")
    file = existing(path, "video")
    cut = False

    def convert(picture: Picture) -> Pixels:
        pixels, aspect = picture()
        return cover(pixels, height, width, aspect)

    def frames_from(begin: Fraction) -> Iterator[tuple[Fraction, Picture]]:
        nonlocal cut
        for time, picture in decode(file, begin):
            if limit is not None and time >= limit:
                cut = True
                return
            yield time, picture

    targets = [begin + i / rate for i in range(frames)]
    try:
        picked, times = pick(frames_from(begin), targets, convert)
        if not times:
            raise MediaError(f"{file} holds no video frame; use a file with at least one.")
        last = times[-1]
        step = (last - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / rate
        if begin > last + step and not cut:
            raise MediaError(f"{file} ends at {float(last):g} s; choose a start before {float(begin):g} s.")
        duration = frames / rate
        if targets[-1] > last + step / 2:
            first = min(max(begin, times[0]), last)
            targets = [first + (last - first) * i / max(frames - 1, 1) for i in range(frames)]
            picked, _ = pick(frames_from(first), targets, convert)
            duration = last - first + step
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise undecodable(file, error) from error
    return DecodedClip(normalise(np.stack(picked)), float(begin), float(duration), float(frames / duration))


def span_start(path: File, span: str, seconds: float, start: float | None = None, end: float | None = None) -> float:
    """Where a clip of `seconds` begins by the rule `span`, within the limits `start` and `end` of the file, in seconds.

    "start": at `start`, or the beginning. "centre": in the middle between the limits, or at `start` if they are nearer
    to each other than `seconds`; without `end`, the file's own end counts. Raises InputError, MediaError.
    """
    if span not in SPANS:
        raise InputError(f"the span rule is {span!r}; allowed are {', '.join(SPANS)}.")
    first = fraction("start", start or 0)
    limit = None if end is None else fraction("end", end)
    if limit is not None and limit <= first:
        raise InputError(f"end is {end!r}; allowed are seconds after the start, {float(first):g}.")
    if span == "centre":
        last = length(existing(path, "video"))
        last = last if limit is None else min(last, limit)
        first = max(first, (first + last - fraction("seconds", seconds)) / 2)
    return float(first.limit_denominator(10**6))


def write_video(path: File, frames: Pixels, fps: Rate) -> None:
    """Write uint8 [F,H,W,3] as .mp4 (H.264), .gif, .webp (animated) or .png (a sheet of all frames), by extension.

    An odd height or width of an mp4 is padded to even by repeating the last row or column, as 4:2:0 needs. The same frames
    decode to the same video, but libx264 may write them in other bits. The file appears whole or not at all. Raises
    MediaError (unknown extension, no permission, full disk) and InputError.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in WRITABLE:
        raise MediaError(f"cannot write {file}: unknown extension {file.suffix!r}; allowed are {', '.join(WRITABLE)}.")
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        raise InputError(f"the frames are {array.dtype} {list(array.shape)}; allowed is uint8 [F,H,W,3], none 0.")
    rate = fraction("fps", fps)
    if rate <= 0:
        raise InputError(f"fps is {fps!r}; allowed is any number above 0.")
    with replacing(file, MediaError) as temporary:
        if kind == ".mp4":
            _write_mp4(temporary, array, rate)
        elif kind == ".png":
            Image.fromarray(_sheet(array)).save(temporary, format="PNG")
        else:
            unit = 10 if kind == ".gif" else 1  # ms: rounding the running time keeps the average rate exact
            ends = [round(i * 1000 / (rate * unit)) * unit for i in range(len(array) + 1)]
            first, *rest = (Image.fromarray(frame) for frame in array)
            first.save(
                temporary, kind[1:].upper(), save_all=True, append_images=rest, loop=0, quality=90,
                duration=[max(b - a, unit) for a, b in zip(ends[:-1], ends[1:], strict=True)],
            )  # fmt: skip


def _write_mp4(path: Path, frames: Pixels, rate: Fraction) -> None:
    import av

    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate.limit_denominator(60000), options={"crf": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Converted and tagged as BT.709, limited range: players disagree about untagged files.
        stream.codec_context.colorspace = stream.codec_context.color_range = 1
        stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _sheet(frames: Pixels) -> Pixels:
    """Lay [F,H,W,3] out row by row as one nearly square picture; empty cells are white."""
    count, height, width, _ = frames.shape
    columns = min(count, math.ceil(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = frames
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB: alpha over white; 32-bit integers hold 16 bits; floats are 0..1, else 0..255."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it has NaN or infinite pixels")
        scale = 1 / 257 if image.mode != "F" else 255.0 if values.max() <= 1 else 1.0
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
