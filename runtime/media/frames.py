"""Frames out of video files with PyAV: times, the nearest frame to each target, orientation, size. See `video`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media.colour import HDR, WIDE, over_white, still_to_srgb, video_to_srgb
from motionrt.runtime.media.limits import LIMITS, Limits, more
from motionrt.runtime.media.pictures import animation, is_picture, simple

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

Rate = float | Fraction  # frames per second, exact if a Fraction
Float = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom; (0, 0) is the upper left corner of a picture
Picture = Callable[[], tuple[Pixels, float]]  # converts a decoded frame when called: RGB [h,w,3], pixel width / height
_KEPT = 32  # bytes of each pixel of a frame, with the frames that a decoder keeps beside it
_SCANNED = 20_000  # packets that are looked at to find which tracks move
_LAST_STAMP = 2**63 - 1
_UNKNOWN_SPACES = (14, 15)  # H.273: ICtCp, IPT-C2
_SEEK_AFTER = 2  # seconds: up to here, decoding from the beginning is cheaper than what can go wrong with a seek


def length(path: Path, limits: Limits = LIMITS) -> Fraction:
    """How long the video plays, in seconds: what its header says, if there is a frame within a second of that end.

    Otherwise (a file that was cut off, a longer sound track, no header) what the times of its frames say. Raises MediaError.
    """
    if is_picture(path):
        try:
            return sum((seconds for _, seconds, _ in islice(animation(path, limits), limits.frames)), Fraction(0))
        except ValueError as error:
            raise undecodable(path, error) from error
    with opened(path, limits) as (container, stream):
        header = Fraction(0)
        if stream.duration and stream.time_base:
            header = Fraction(stream.duration * stream.time_base)
        elif container.duration:
            header = Fraction(container.duration, 1_000_000)
        if header and _last(container, stream, header - 1, limits) >= header - 1:
            return header
    with opened(path, limits) as (container, stream):
        return _last(container, stream, None, limits)


def _last(container: InputContainer, stream: VideoStream, seek: Fraction | None, limits: Limits) -> Fraction:
    """When the last frame in the file ends, in seconds since the stream began; 0 if there is none behind `seek`."""
    import av

    interval = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
    base, last, counted = stream.time_base or Fraction(1), Fraction(0), 0
    origin: int | None = stream.start_time
    try:
        if seek is not None and seek > 0:
            _seek(container, stream, int(seek / base) + (origin or 0))
        for packet in islice(container.demux(stream), limits.frames):
            if not packet.size or packet.is_corrupt:
                continue
            counted += 1
            if packet.pts is not None:
                origin = packet.pts if origin is None else origin
                last = max(last, (packet.pts - origin) * base + (packet.duration * base if packet.duration else interval))
            elif seek is None:  # raw streams carry no times: count frames
                last = counted * interval
    except (av.error.FFmpegError, OSError):
        if not counted and seek is None:
            raise
    return last


def _seek(container: InputContainer, stream: VideoStream, stamp: int) -> None:
    """To the key frame before a time stamp; one that no file can hold is behind its end."""
    container.seek(max(-_LAST_STAMP, min(stamp, _LAST_STAMP)), stream=stream)


def undecodable(path: Path, error: BaseException) -> MediaError:
    return MediaError(f"{path} cannot be decoded: {reason(error)}. Use an intact mp4, webm, gif or webp.")


@contextlib.contextmanager
def opened(path: Path, limits: Limits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and the track to read; MediaError if there is none, if it is too large, or for what FFmpeg refuses."""
    import av

    try:
        with av.open(str(path.absolute())) as container:  # an absolute path is never taken for a protocol (`http:`)
            stream = _video_stream(container, path)
            check_frame(path, stream.width, stream.height, limits)
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise undecodable(path, error) from error


def check_frame(path: Path, width: int, height: int, limits: Limits) -> None:
    try:
        limits.check_picture(width, height, _KEPT)
    except MediaError as error:
        raise MediaError(f"{path} {error}") from error


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """Of the tracks that move (two frames, or more), the one that the file calls its default, or else the first."""
    import av

    attached = av.stream.Disposition.attached_pic
    videos = [s for s in container.streams.video if not s.disposition & attached and s.codec_context is not None]
    if not videos:
        raise MediaError(f"{path} has no video stream that can be read (audio or a cover picture only); use a file with video.")
    moving = videos
    if len(videos) > 1:
        counts = dict.fromkeys((s.index for s in videos), 0)
        with av.open(str(path.absolute())) as scanned, contextlib.suppress(av.error.FFmpegError):
            for packet in islice(scanned.demux(*(scanned.streams[index] for index in counts)), _SCANNED):
                counts[packet.stream_index] += bool(packet.size)
                if min(counts.values()) > 1:
                    break
        moving = [s for s in videos if counts[s.index] > 1] or videos
    return next((s for s in moving if s.disposition & av.stream.Disposition.default), moving[0])


def decode(path: Path, start: Fraction, limits: Limits = LIMITS) -> Iterator[tuple[Fraction, Picture]]:
    """Yield (seconds since the stream began, frame) in rising order, from a frame at or before `start` on if it can."""
    frames = bounded(path, decode_from(path, start if start > _SEEK_AFTER else None, limits), limits)
    first = next(frames, None)
    if start > _SEEK_AFTER and (first is None or first[0] > start):  # the file's index is missing or wrong: decode all of it
        frames = bounded(path, decode_from(path, None, limits), limits)
        first = next(frames, None)
    if first is not None:
        yield first
        yield from frames


def bounded(path: Path, frames: Iterator[tuple[Fraction, Picture]], limits: Limits) -> Iterator[tuple[Fraction, Picture]]:
    """The same frames; MediaError if they go on beyond the limits of frames or seconds."""
    first: Fraction | None = None
    for number, (time, picture) in enumerate(frames):
        first = time if first is None else first
        if number >= limits.frames or time - first > limits.seconds:
            raise MediaError(
                f"{path} must be decoded for more than {limits.frames} frames or {limits.seconds:g} s to find this clip. Cut"
                f" the file, write it with key frames, or {more('frames' if number >= limits.frames else 'seconds')}."
            )
        yield time, picture


def decode_from(path: Path, seek: Fraction | None, limits: Limits) -> Iterator[tuple[Fraction, Picture]]:
    if is_picture(path):
        yield from ((time, partial(_plain, picture)) for time, _, picture in animation(path, limits))
        return
    with opened(path, limits) as (container, stream):
        base, origin = stream.time_base, stream.start_time
        if seek is not None and base is not None:
            _seek(container, stream, int(seek / base) + (origin or 0))
        interval = 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))
        last: Fraction | None = None
        for frame in _decoded(container, stream):
            check_frame(path, frame.width, frame.height, limits)
            if frame.colorspace in _UNKNOWN_SPACES:
                raise MediaError(f"{path} codes its colours as ICtCp or IPT (Dolby Vision); convert it to SDR (BT.709) first.")
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


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames of a track; those of VP8 and VP9 with transparency through libvpx: FFmpeg's own decoders leave it out."""
    import av

    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if name is None or "1" not in (stream.metadata.get("alpha_mode"), stream.metadata.get("ALPHA_MODE")):
        yield from container.decode(stream)
        return
    decoder: Any = av.CodecContext.create(name, "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _plain(image: Image.Image) -> tuple[Pixels, float]:
    return np.asarray(still_to_srgb(simple(image), image.info)), 1.0


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
    pixels = _rgb(frame)
    extras: Any = frame.side_data
    if "DISPLAYMATRIX" in extras:
        # x' = a x + c y, y' = b x + d y: turns by right angles, mirrored or not
        a, b, _, c, d = np.frombuffer(bytes(extras["DISPLAYMATRIX"]), np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, aspect, a, d = pixels.swapaxes(0, 1), 1 / aspect, c, b
        pixels = np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return pixels, aspect


def _rgb(frame: VideoFrame) -> Pixels:
    """The frame as sRGB [h,w,3], over white where it is transparent."""
    codes: Any
    # With more than one thread each frame would start its own, a hundred of them by the time that anything collects them.
    clear = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    if frame.color_trc in HDR or frame.color_primaries in WIDE:
        codes = frame.to_ndarray(format="rgba64le", threads=1)
        pixels = video_to_srgb(codes[..., :3], frame.color_trc, frame.color_primaries)
        if not clear:
            return pixels
        rgba = np.dstack([pixels, (codes[..., 3] >> 8).astype(np.uint8)])
    elif not clear:
        return np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)
    else:
        rgba = np.asarray(frame.to_ndarray(format="rgba", threads=1), np.uint8)
    return np.asarray(over_white(Image.fromarray(rgba)))


def cover(pixels: Pixels, height: int, width: int, aspect: float = 1.0) -> Pixels:
    """`cover_image` of [h,w,3] -> [height,width,3]."""
    return np.asarray(cover_image(Image.fromarray(pixels), height, width, aspect))


def cover_image(image: Image.Image, height: int, width: int, aspect: float = 1.0) -> Image.Image:
    """Bicubic resize to cover `height` x `width` and crop around the centre, in one filter pass.

    Only the box that stays is read and only the result is made: a 1 x 50000 picture costs no more than any other.
    """
    return image.resize((width, height), Image.Resampling.BICUBIC, box=cover_box(*image.size, height, width, aspect))


def cover_box(columns: int, rows: int, height: int, width: int, aspect: float = 1.0) -> Box:
    """The part (left, top, right, bottom) of a picture of `columns` x `rows` that becomes `width` x `height` pixels."""
    scale = max(width / (columns * aspect), height / rows)
    box_width, box_height = min(width / scale / aspect, columns), min(height / scale, rows)
    left, top = (columns - box_width) / 2, (rows - box_height) / 2
    return left, top, min(left + box_width, columns), min(top + box_height, rows)


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
    given: Any = value
    try:
        number = Fraction(float(given) if isinstance(given, np.floating) else given).limit_denominator(10**6)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{name} is {value!r}; allowed is a finite number.") from error
    if number < 0:
        raise InputError(f"{name} is {value!r}; allowed is 0 or more.")
    return number


def reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
