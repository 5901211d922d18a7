"""The files of a finished job, and small videos of clips: written whole, with their digests."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import MediaError
from motionrt.runtime.files import replacing, sha256_of
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.job import Result, to_frames
from motionrt.runtime.media.fields import field_view
from motionrt.runtime.media.video import decode_clip, write_video
from motionrt.runtime.memory.file import memory_spec
from motionrt.runtime.memory.memory import Reference
from motionrt.runtime.serve.messages import Written
from motionrt.runtime.serve.work.order import OUTPUTS

_PREVIEW = 192  # pixels of the longer side
_SEEN = 96  # the same of a look at a job that runs, at least
_hashes = FileHashes()  # of the files of clips, so that each is read once


def sha256_of_frames(frames: NDArray[np.uint8]) -> str:
    """Hex SHA-256 of frames [F, H, W, 3] as they lie in memory, without their shape."""
    return hashlib.sha256(frames.tobytes()).hexdigest()


def write_all(folder: Path, results: Sequence[Result], output: str) -> list[Written]:
    """Write the frames of each of `results` into `folder` in the form `output`, with a picture of the first one, a sheet of all
    and, where there is one, its motion field as `field_view` shows it. Raises `MediaError`; what was written until then stays,
    for whoever owns the folder to remove."""
    written = list[Written]()
    for place, result in enumerate(results):
        frames, fps = result.frames, result.fps
        video, still, sheet = (
            folder / f"video-{place}.{output}",
            folder / f"thumbnail-{place}.webp",
            folder / f"sheet-{place}.png",
        )
        write_video(video, frames, fps)
        with replacing(still, MediaError) as temporary:
            Image.fromarray(frames[0]).save(temporary, "WEBP", quality=90)
        if output != "png":
            write_video(sheet, frames, fps)
        made = [
            (video, "video", OUTPUTS[output]), (still, "thumbnail", "image/webp"),
            (video if output == "png" else sheet, "spritesheet", "image/png"),
        ]  # fmt: skip
        if result.field is not None:
            made.append((folder / f"field-{place}.mp4", "field", OUTPUTS["mp4"]))
            write_video(made[-1][0], field_view(frames, result.field), fps)
        for path, kind, form in made:
            written.append(Written(path.name, f"{kind}-{place}", form, path.stat().st_size, sha256_of(path)))
    return written


def animated(pictures: NDArray[np.uint8], seconds: float) -> bytes:
    """Small pictures [F, h, w, 3] as a looping webp that lasts `seconds`, each pixel a square of them until it can be seen."""
    times = -(-_SEEN // max(pictures.shape[1:3]))
    large = [Image.fromarray(one) for one in pictures.repeat(times, 1).repeat(times, 2)]
    buffer, each = io.BytesIO(), max(1, round(1000 * seconds / len(large)))
    large[0].save(buffer, "WEBP", save_all=True, append_images=large[1:], duration=each, loop=0, quality=80, method=0)
    return buffer.getvalue()


def write_preview(bundle: Bundle, folder: Path, reference: Reference, previews: Path) -> str:
    """The span of a clip as a small silent video in the folder `previews`, if it is not there yet; the name of that file, which
    no other span of no other file has. folder: the clip's memory's, where relative sources may start. MediaError where the
    clip's file is gone, is not what it was, or cannot be decoded."""
    spec = memory_spec(bundle)
    shrink = min(1.0, _PREVIEW / max(spec.clip.height, spec.clip.width))
    height, width = (max(2, round(size * shrink / 2) * 2) for size in (spec.clip.height, spec.clip.width))
    end = float(reference.metadata["end_sec"]) if "end_sec" in reference.metadata else None
    what = (reference.source_sha256, reference.start, end, spec.clip.frames, float(spec.clip.fps), height, width)
    span = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    path = previews / f"{reference.source_sha256[:16]}-{span}.mp4"
    if path.is_file():
        with contextlib.suppress(OSError):
            os.utime(path)  # those that nobody asks for go first
        return path.name
    places = [place / reference.source for place in (Path(), folder, folder.parent)]  # here, in the memory, beside it
    there = [place for place in places if place.is_file()]
    source = next((place for place in there if _hashes.sha256(place) == reference.source_sha256), None)
    if source is None:
        why = "was changed since it was indexed" if there else "is not on this machine any more"
        raise MediaError(f"the video of clip {reference.id} {why}.")
    cut = decode_clip(source, spec.clip.frames, height, width, spec.clip.fps, reference.start, end)
    write_video(path, to_frames(cut.video[None]), min(1000.0, max(0.001, cut.fps)))  # what an mp4 takes
    return path.name
