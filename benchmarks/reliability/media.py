"""Pictures, videos and tables of captions to damage. Most of their formats have no checksum: what a decoder gives is no longer
what was written, and nothing can tell. Of those that have one (png), damage must be seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.benchmarks.reliability.damage import Subject, digest
from motionrt.runtime.indexing.sources import open_sources
from motionrt.runtime.media.video import read_clip, read_image

FRAMES, HEIGHT, WIDTH, RATE = 5, 48, 64, 8
OTHER_PIXELS, OTHER_TEXT = "other pixels", "other text"
STILLS: dict[str, dict[str, Any]] = {
    "png": {}, "jpg": {}, "webp": {"quality": 80}, "gif": {}, "bmp": {}, "tif": {}, "avif": {}, "ppm": {}, "tga": {}, "ico": {},
    "jp2": {}, "dds": {}, "sgi": {}, "pcx": {},
    "lzw.tif": {"compression": "tiff_lzw"}, "deflate.tif": {"compression": "tiff_adobe_deflate"},
    "progressive.jpg": {"progressive": True}, "lossless.webp": {"lossless": True},
}  # fmt: skip
# extension: codec, pixel format, options
VIDEOS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp4": ("libx264", "yuv420p", {}), "mov": ("prores_ks", "yuv422p10le", {}), "mkv": ("ffv1", "yuv420p", {"slicecrc": "1"}),
    "webm": ("libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}), "avi": ("mpeg4", "yuv420p", {}),
    "ts": ("mpeg2video", "yuv420p", {}), "mpg": ("mpeg1video", "yuv420p", {}), "flv": ("flv", "yuv420p", {}),
    "wmv": ("wmv2", "yuv420p", {}), "m4v": ("mpeg4", "yuv420p", {}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12"}), "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
}  # fmt: skip
ANIMATIONS = ("gif", "png", "webp", "avif")


def pictures() -> NDArray[np.uint8]:
    """Something that moves over something smooth, uint8 [F,H,W,3]."""
    row, column = np.mgrid[:HEIGHT, :WIDTH]
    found = np.stack([row * 5, column * 3, (row + column) * 2], axis=-1).astype(np.uint8)[None].repeat(FRAMES, 0)
    for number, frame in enumerate(found):
        frame[8:24, 6 * number : 6 * number + 16] = (250, 40, 90)
    return found


def still(folder: Path, name: str) -> Subject:
    file = folder / f"a.{name}"
    Image.fromarray(pictures()[2]).save(file, **STILLS[name])

    def read() -> int:
        array = read_image(file, 24, 32)
        assert array.shape == (3, 24, 32) and np.isfinite(array).all()
        return digest(array.tobytes())

    return Subject([file], {"read_image": read}, other="" if name == "png" else OTHER_PIXELS)


def clip(file: Path, other: str = OTHER_PIXELS) -> Subject:
    def read(start: float) -> int:
        video = read_clip(file, 3, 24, 32, RATE, start)
        assert video.shape == (3, 3, 24, 32) and np.isfinite(video).all()
        return digest(video.tobytes())

    return Subject([file], {"read_clip": partial(read, 0.0), "from a start": partial(read, 0.25)}, other=other)


def video(folder: Path, name: str) -> Subject:
    codec, layout, options = VIDEOS[name]
    file = folder / f"a.{name}"
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(25 if codec.startswith("mpeg") else RATE), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, layout
        stream.codec_context.thread_count = 1
        for number in range(12):
            frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(pictures()[number % FRAMES]), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return clip(file)


def animation(folder: Path, name: str) -> Subject:
    file = folder / f"a.{name}"
    first, *rest = map(Image.fromarray, pictures())
    first.save(file, save_all=True, append_images=rest, duration=120)
    return clip(file, "" if name == "png" else OTHER_PIXELS)


ROWS: list[dict[str, Any]] = [
    {"video": f"clips/{number}.mp4", "caption": f"a thing number {number} moves to the left", "start_sec": number / 4,
     "end_sec": number / 4 + 2, "dataset": f"set{number % 3}", "licence": "CC0"}
    for number in range(40)
]  # fmt: skip


def table(folder: Path, kind: str) -> Subject:
    import csv

    file = folder / f"captions.{kind}"
    if kind == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ROWS[0].keys())
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, write_page_checksum=True)
    else:
        file.write_text(json.dumps({f"{number}.mp4": row["caption"] for number, row in enumerate(ROWS)}))
        for number in range(len(ROWS)):
            (folder / f"{number}.mp4").touch()
    read = partial(open_sources, [folder], captions=file) if kind == "json" else partial(open_sources, [file])
    return Subject([file], {"items": lambda: [repr(item) for item in read().items()]}, other=OTHER_TEXT)


def _each(make: Callable[..., Subject], names: Mapping[str, Any] | tuple[str, ...], what: str) -> dict[str, Any]:
    return {f"{what} {name}": lambda folder, name=name: make(folder, name) for name in names}


KINDS: dict[str, Callable[[Path], Subject]] = {
    **_each(still, STILLS, "still"), **_each(video, VIDEOS, "video"), **_each(animation, ANIMATIONS, "animation"),
    **_each(table, ("csv", "jsonl", "parquet", "json"), "captions"),
}  # fmt: skip
