"""Frames out of video files with PyAV: times, the nearest frame to each target, orientation, size. See `video`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.errors import InputError, MediaError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Rate = float | Fraction  # frames per second, exact if a Fraction
Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Picture = Callable[[], tuple[Pixels, float]]  # converts a decoded frame when called: RGB [h,w,3], pixel width / height
_SEEK_AFTER = 2  # seconds: up to here, decoding from the beginning is cheaper than what can go wrong with a seek


def length(path: Path) -> Fraction:
    """How long the video is, in seconds: what its header says, or the times of its packets. Raises MediaError."""
    import av

    try:
        with av.open(str(path.absolute())) as container:
            stream = _video_stream(container, path)
            if stream.duration and stream.time_base:
                return Fraction(stream.duration * stream.time_base)
            if container.duration:
                return Fraction(container.duration, av.time_base)
            interval = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
            packets = [packet for packet in container.demux(stream) if packet.size]
            times = [packet.pts * packet.time_base for packet in packets if packet.pts is not None]
            if len(times) < len(packets):  # raw streams carry no times: count frames
                return len(packets) * interval
            return max(times) - min(times) + interval if times else Fraction(0)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise undecodable(path, error) from error


def undecodable(path: Path, error: BaseException) -> MediaError:
    return MediaError(f"{path} cannot be decoded: {reason(error)}. Use an intact mp4, webm or gif.")


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    import av

    videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not videos:
        raise MediaError(f"{path} has no video stream (audio or a cover picture only); use a file with video.")
    return videos[0]


def decode(path: Path, start: Fraction) -> Iterator[tuple[Fraction, Picture]]:
    """Yield (seconds since the stream began, frame) in rising order, from a frame at or before `start` on if it can."""
    if start > _SEEK_AFTER:
        frames = decode_from(path, start)
        first = next(frames, None)
        if first is not None and first[0] <= start:
            yield first
            yield from frames
            return  # otherwise the file's index is missing or wrong: decode all of it
    yield from decode_from(path, None)


def decode_from(path: Path, seek: Fraction | None) -> Iterator[tuple[Fraction, Picture]]:
    import av

    with av.open(str(path.absolute())) as container:  # an absolute path is never taken for a protocol (`http:`)
        stream = _video_stream(container, path)
        base, origin = stream.time_base, stream.start_time
        if seek is not None and base is not None:
            container.seek(int(seek / base) + (origin or 0), stream=stream)
        interval = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
        last: Fraction | None = None
        for frame in container.decode(stream):
            if frame.pts is not None and base is not None:
                origin = frame.pts if origin is None else origin
                time = (frame.pts - origin) * base
            elif seek is None:  # raw streams carry no times: count frames
                time = Fraction(0) if last is None else last + interval
            else:
                return
            if last is None or time > last:
                last = time
                yield time, partial(upright, frame, float(stream.sample_aspect_ratio or 1))


def pick(
    decoded: Iterator[tuple[Fraction, Picture]], targets: Sequence[Fraction], convert: Callable[[Picture], Pixels]
) -> tuple[list[Pixels], list[Fraction]]:
    """The frame nearest to each rising target (none if nothing decodes), and the times of the frames looked at."""
    picked: list[Pixels] = []
    times: list[Fraction] = []
    earlier: Picture | None = None
    done: tuple[Picture, Pixels] | None = None

    def take(picture: Picture) -> None:
        nonlocal done
        if done is None or done[0] is not picture:
            done = (picture, convert(picture))
        picked.append(done[1])

    for time, picture in decoded:
        while len(picked) < len(targets) and targets[len(picked)] <= time:
            target = targets[len(picked)]
            take(earlier if earlier is not None and target - times[-1] <= time - target else picture)
        times.append(time)
        earlier = picture
        if len(picked) == len(targets):
            break
    while earlier is not None and len(picked) < len(targets):
        take(earlier)
    return picked, times


def upright(frame: VideoFrame, aspect: float) -> tuple[Pixels, float]:
    """RGB [h,w,3] as it is to be seen (the display matrix undone), and the width of a pixel over its height."""
    # Otherwise each frame would start threads of its own, a hundred of them by the time that anything collects them.
    pixels = np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)
    extras: Any = frame.side_data
    if "DISPLAYMATRIX" in extras:
        # x' = a x + c y, y' = b x + d y: turns by right angles, mirrored or not
        a, b, _, c, d = np.frombuffer(bytes(extras["DISPLAYMATRIX"]), np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, aspect, a, d = pixels.swapaxes(0, 1), 1 / aspect, c, b
        pixels = np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return pixels, aspect


def cover(pixels: Pixels, height: int, width: int, aspect: float = 1.0) -> Pixels:
    """`cover_image` of [h,w,3] -> [height,width,3]."""
    return np.asarray(cover_image(Image.fromarray(pixels), height, width, aspect))


def cover_image(image: Image.Image, height: int, width: int, aspect: float = 1.0) -> Image.Image:
    """Bicubic resize to cover `height` x `width` and crop around the centre, in one filter pass.

    Only the box that stays is read and only the result is made: a 1 x 50000 picture costs no more than any other.
    """
    columns, rows = image.size
    scale = max(width / (columns * aspect), height / rows)
    box_width, box_height = min(width / scale / aspect, columns), min(height / scale, rows)
    left, top = (columns - box_width) / 2, (rows - box_height) / 2
    box = (left, top, min(left + box_width, columns), min(top + box_height, rows))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def normalise(pixels: Pixels) -> Float:
    """uint8 [F,H,W,3] -> float32 [F,3,H,W] in [-1,1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def existing(source: object, what: str) -> Path:
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"the {what} is a {type(source).__name__}; allowed is the path of a file.")
    path = Path(os.fsdecode(source))
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            return path
    raise MediaError(f"there is no {what} file {str(path)!r}; check the path.")


def check_size(**sizes: object) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise InputError(f"{name} is {size!r}; allowed is a whole number from 1 on.")


def fraction(name: str, value: Rate) -> Fraction:
    try:
        number = Fraction(value).limit_denominator(10**6)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{name} is {value!r}; allowed is a finite number.") from error
    if number < 0:
        raise InputError(f"{name} is {value!r}; allowed is 0 or more.")
    return number


def reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
