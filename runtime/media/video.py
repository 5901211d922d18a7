"""Images and videos in and out: Pillow for stills, PyAV for clips, one rule for time, size, colour and orientation.

Shapes: F frames, H and W pixels. Everything read is float32 RGB in [-1, 1], channels first; everything written is uint8
RGB, channels last. Reading has no random part: the same file, window and size always give the same array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from motionrt.runtime.arguments import path_of
from motionrt.runtime.errors import InputError, MediaError, shown
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
from motionrt.runtime.media.limits import LIMITS, Limits, check_limits
from motionrt.runtime.media.stills import read_image as read_image

if TYPE_CHECKING:
    from av import VideoFrame

File = str | os.PathLike[str]
WRITABLE = (".mp4", ".gif", ".webp", ".png")
# What a format holds: the largest side in pixels, the lowest and the highest frames per second, and why no more.
_BOUNDS: dict[str, tuple[int, Fraction, int, str]] = {
    ".mp4": (16384, Fraction(1, 1000), 1000, "that is what players follow"),
    ".gif": (65535, Fraction(100, 65535), 50, "browsers show delays under 20 ms as 100 ms"),
    ".webp": (16383, Fraction(1000, 2**24 - 1), 90, "browsers show delays of up to 10 ms as 100 ms"),
}
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


def read_clip(
    path: File, frames: int, height: int, width: int, fps: Rate, start: float | None = None, *, limits: Limits = LIMITS
) -> Float:
    """The frames of `decode_clip` alone: float32 [F,3,H,W] in [-1,1]."""
    return decode_clip(path, frames, height, width, fps, start, limits=limits).video


def decode_clip(
    path: File, frames: int, height: int, width: int, fps: Rate, start: float | None = None, end: float | None = None,
    *, limits: Limits = LIMITS,
) -> DecodedClip:  # fmt: skip
    """Cut `frames` frames at `fps` out of a video of any frame rate, from `start` seconds (default 0) on.

    Frame i is the decoded frame nearest to `start + i / fps`, of two equally near ones the earlier: at a constant rate
    this is the first frame at or after the target minus half a frame. A clip that ends before the last target is
    stretched: targets are spread evenly from `start` to its last frame, and frames repeat if there are too few.
    No frame at or after `end` seconds is used. Rotation, mirroring and non-square pixels are undone; colours come as sRGB
    over white; size as in `read_image`. gif, animated png and animated webp are videos too. Raises MediaError (missing,
    damaged, no video, `start` behind the end, beyond `limits`) and InputError.
    """
    import av

    check_size(frames=frames, height=height, width=width)
    check_limits(limits)
    begin, rate = fraction("start", 0 if start is None else start), fraction("fps", fps)
    limit = None if end is None else fraction("end", end)
    if rate <= 0:
        raise InputError(f"fps is {fps!r}; allowed is any number above 0.")
    if limit is not None and limit <= begin:
        raise InputError(f"end is {end!r}; allowed are seconds after the start, {float(begin):g}.")
    file = existing(path, "video")
    try:
        limits.check_memory(frames * height * width * 15, "Ask for fewer or smaller frames")  # uint8, then float32
    except MediaError as error:
        raise InputError(f"a clip of {frames} frames of {height} x {width} {error}") from error
    cut = False

    def convert(picture: Picture) -> Pixels:
        pixels, aspect = picture()
        return cover(pixels, height, width, aspect)

    def frames_from(begin: Fraction) -> Iterator[tuple[Fraction, Picture]]:
        nonlocal cut
        for time, picture in decode(file, begin, limits):
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


def check_span(span: object) -> None:
    """InputError for what is no rule of `span_start`."""
    if not isinstance(span, str) or span not in SPANS:
        raise InputError(f"the span rule is {shown(span)}; allowed are {', '.join(SPANS)}.")


def span_start(
    path: File, span: str, seconds: float, start: float | None = None, end: float | None = None, *, limits: Limits = LIMITS
) -> float:
    """Where a clip of `seconds` begins by the rule `span`, within the limits `start` and `end` of the file, in seconds.

    "start": at `start`, or the beginning. "centre": in the middle between the limits, or at `start` if they are nearer
    to each other than `seconds`; without `end`, the file's own end counts. Raises InputError, MediaError.
    """
    check_span(span)
    check_limits(limits)
    first = fraction("start", 0 if start is None else start)
    limit = None if end is None else fraction("end", end)
    if limit is not None and limit <= first:
        raise InputError(f"end is {end!r}; allowed are seconds after the start, {float(first):g}.")
    if span == "centre":
        last = length(existing(path, "video"), limits)
        last = last if limit is None else min(last, limit)
        first = max(first, (first + last - fraction("seconds", seconds)) / 2)
    return float(first.limit_denominator(10**6))


def check_output(path: File, height: int, width: int, fps: Rate) -> Fraction:
    """What `write_video` refuses and can be known before there are frames; the rate. Raises MediaError and InputError."""
    file = path_of("the file to write", path)
    kind = file.suffix.lower()
    if kind not in WRITABLE:
        raise MediaError(f"cannot write {file}: unknown extension {file.suffix!r}; allowed are {', '.join(WRITABLE)}.")
    rate = fraction("fps", fps)
    if rate <= 0:
        raise InputError(f"fps is {fps!r}; allowed is any number above 0.")
    if kind == ".png":
        return rate
    side, slowest, fastest, why = _BOUNDS[kind]
    if max(height, width) > side:
        raise InputError(f"the frames are {width} x {height}; {kind} holds at most {side} x {side}. Make them smaller.")
    if not slowest <= rate <= fastest:
        others = ", ".join(name for name, bounds in _BOUNDS.items() if bounds[1] <= rate <= bounds[2])
        raise InputError(
            f"fps is {float(rate):g}; {kind} allows {float(slowest):.2g} to {fastest}: {why}."
            + (f" Choose another rate, or {others}." if others else " Choose another rate.")
        )
    return rate


def write_video(path: File, frames: Pixels, fps: Rate) -> None:
    """Write uint8 [F,H,W,3] as .mp4 (H.264), .gif, .webp (animated) or .png (a sheet of all frames), by extension.

    Every frame is written, also one that equals the frame before, and all of them play at `fps`; a gif counts time in 10 ms
    and a webp in 1 ms, rounded so that the whole plays as long as it should. A single frame of a webp is a still. An odd
    height or width of an mp4 is padded to even by repeating the last row or column, as 4:2:0 needs. The same frames decode
    to the same video, but libx264 may write them in other bits. The file appears whole or not at all. Raises MediaError
    (unknown extension, no permission, full disk), InputError (frames, and sizes and rates that the format cannot hold) and
    MemoryError.
    """
    import av

    file = path_of("the file to write", path)
    try:
        array = np.asarray(frames)
    except Exception as error:  # lists of different lengths, and whatever an object may raise
        raise InputError(f"the frames are {shown(frames)}; allowed is uint8 [F,H,W,3].") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
        check_output(file, 1, 1, 25)  # an extension that is wrong is said first
        raise InputError(f"the frames are {array.dtype} {list(array.shape)}; allowed is uint8 [F,H,W,3], none 0.")
    rate = check_output(file, array.shape[1], array.shape[2], fps)
    write = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp, ".png": _write_sheet}[file.suffix.lower()]
    with replacing(file, MediaError) as temporary:
        try:
            write(temporary, array, rate)
        except av.error.FFmpegError as error:
            if isinstance(error, OSError | MemoryError):  # a full disk, no permission: said by `replacing`
                raise
            if isinstance(error, av.error.ExternalError):  # all that libx264 returns, also where an allocation failed
                why = f"its encoder failed and does not say why ({reason(error)}): there may be too little memory"
                fix = "Free some memory, or use another format"
            else:
                why, fix = reason(error), "Use another format"
            raise MediaError(f"cannot write {file}: {why}. Nothing was written. {fix}.") from error


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


def _write_gif(path: Path, frames: Pixels, rate: Fraction) -> None:
    """Each frame with the 256 colours that suit it."""
    import av

    def of_256_colours(pixels: Pixels) -> VideoFrame:
        picture = Image.fromarray(pixels).quantize(256)
        palette = np.full((256, 4), 255, np.uint8)  # alpha, red, green, blue
        colours = np.asarray(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[: len(colours), 1:] = colours
        both: Any = (np.array(picture), palette)
        return av.VideoFrame.from_ndarray(both, format="pal8")

    _write_animation(path, "gif", "pal8", frames, rate, 100, of_256_colours)


def _write_webp(path: Path, frames: Pixels, rate: Fraction) -> None:
    import av

    def opaque(pixels: Pixels) -> VideoFrame:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        return frame.reformat(format="bgra", threads=1)

    _write_animation(path, "libwebp", "bgra", frames, rate, 1000, opaque)


def _write_animation(
    path: Path, codec: str, layout: str, frames: Pixels, rate: Fraction, per_second: int, make: Callable[[Pixels], VideoFrame]
) -> None:
    """A looping picture with FFmpeg, which keeps equal frames (Pillow and libwebp's own animation make one of them)."""
    import av

    kind = codec.removeprefix("lib")
    ends = [round(i * per_second / rate) for i in range(len(frames) + 1)]
    container_options = {"loop": "0"} | ({"final_delay": str(ends[-1] - ends[-2])} if kind == "gif" else {})
    with av.open(str(path), "w", format=kind, options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=per_second, options={"quality": "90"} if kind == "webp" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], layout
        stream.codec_context.time_base = Fraction(1, per_second)
        lengths = {start: end - start for start, end in pairwise(ends)}
        for number in range(len(frames) + 1):
            frame = None if number == len(frames) else make(frames[number])
            if frame is not None:
                frame.pts, frame.time_base = ends[number], Fraction(1, per_second)
            for packet in stream.encode(frame):
                packet.duration = lengths[packet.pts]
                container.mux(packet)


def _write_sheet(path: Path, frames: Pixels, rate: Fraction) -> None:
    Image.fromarray(_sheet(frames)).save(path, format="PNG")


def _sheet(frames: Pixels) -> Pixels:
    """Lay [F,H,W,3] out row by row as one nearly square picture; empty cells are white."""
    count, height, width, _ = frames.shape
    columns = min(count, math.ceil(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = frames
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
