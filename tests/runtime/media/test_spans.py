"""Where a clip is cut: fixed rules, limits of the file and of a table, and no more memory than the frames that are kept."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media.frames import length
from motionrt.runtime.media.video import decode_clip, read_clip, span_start, write_video

F, H, W, FPS = 5, 16, 24, 8


def counting(path: Path, frames: int, rate: int = FPS) -> Path:
    """A video whose frame i is grey of level 2 i."""
    greys = (2 * np.arange(frames)).astype(np.uint8)
    write_video(path, np.ascontiguousarray(np.broadcast_to(greys[:, None, None, None], (frames, H, W, 3))), rate)
    return path


def numbers(video: np.ndarray) -> list[int]:
    return [round(float(x)) for x in (video.mean((1, 2, 3)) + 1) * 127.5 / 2]


@pytest.mark.parametrize(
    "span, start, end, want",
    [
        ("start", None, None, 0.0),
        ("start", 1.5, None, 1.5),
        ("start", 1.5, 2.0, 1.5),
        ("centre", None, None, 4.6875),  # (10 - 5 / 8) / 2
        ("centre", 4.0, None, 6.6875),
        ("centre", None, 2.0, 0.6875),
        ("centre", 4.0, 6.0, 4.6875),
        ("centre", 4.0, 4.25, 4.0),  # shorter than the clip
        ("centre", 4.0, 99.0, 6.6875),  # the file ends before
        ("centre", 1 / 3, 2 / 3 + 5 / 8, 0.5),
    ],
)
def test_span_start(tmp_path: Path, span: str, start: float | None, end: float | None, want: float) -> None:
    assert span_start(counting(tmp_path / "a.mp4", 80), span, F / FPS, start, end) == pytest.approx(want, abs=1e-6)


def test_span_start_refuses(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 8)
    with pytest.raises(InputError, match="span rule is 'random'; allowed are start, centre"):
        span_start(path, "random", 1)
    for start, end in ((2.0, 2.0), (2.0, 1.0), (None, 0.0)):
        with pytest.raises(InputError, match="allowed are seconds after the start"):
            span_start(path, "start", 1, start, end)
    with pytest.raises(InputError, match="start is nan"):
        span_start(path, "centre", 1, float("nan"))
    with pytest.raises(MediaError, match="no video file"):
        span_start(tmp_path / "missing.mp4", "centre", 1)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(MediaError, match="cannot be decoded"):
        span_start(tmp_path / "bad.mp4", "centre", 1)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.mkv", "a.webm", "a.avi", "a.h264"])
def test_length_of_any_container(tmp_path: Path, name: str) -> None:
    codec = {"a.gif": "gif", "a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "rgb8" if codec == "gif" else "yuv420p"
        for i in range(50):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((H, W, 3), i, np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert abs(length(tmp_path / name) - 2) <= Fraction(1, 20)


@pytest.mark.parametrize("start, end, want", [
    (0.0, 9.0, [0, 1, 2, 3, 4]), (4.0, 9.0, [32, 33, 34, 35, 36]), (4.0, 4.625, [32, 33, 34, 35, 36]),
    (4.0, 4.5, [32, 33, 33, 34, 35]), (4.0, 4.25, [32, 32, 32, 33, 33]), (4.0, 4.125, [32] * 5),
    (4.05, 4.06, [32] * 5), (0.0, 0.01, [0] * 5), (9.75, 99.0, [78, 78, 78, 79, 79]),
])  # fmt: skip
def test_decode_clip_uses_nothing_behind_the_end(tmp_path: Path, start: float, end: float, want: list[int]) -> None:
    clip = decode_clip(counting(tmp_path / "a.mp4", 80), F, H, W, FPS, start, end)
    assert numbers(clip.video) == pytest.approx(want, abs=1)
    assert all(number < end * FPS for number in numbers(clip.video))
    assert clip.fps == pytest.approx(F / clip.duration)


def test_decode_clip_between_two_far_frames(tmp_path: Path) -> None:
    """The one frame that is seen from `start` to `end` began before both."""
    assert numbers(read_clip(counting(tmp_path / "a.mp4", 20, 1), F, H, W, FPS, 7.4)) == pytest.approx([7, 8, 8, 8, 8], abs=1)
    clip = decode_clip(tmp_path / "a.mp4", F, H, W, FPS, 7.4, 7.6)
    assert numbers(clip.video) == pytest.approx([7] * 5, abs=1)


def test_decode_clip_refuses_limits_that_hold_nothing(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 8)
    with pytest.raises(InputError, match="end is 0.5; allowed are seconds after the start, 0.5"):
        decode_clip(path, F, H, W, FPS, 0.5, 0.5)
    with pytest.raises(MediaError, match="ends at 0.875 s; choose a start before 5 s"):
        decode_clip(path, F, H, W, FPS, 5, 6)


def test_the_centre_is_the_same_clip_again_from_its_recorded_start(tmp_path: Path) -> None:
    path = counting(tmp_path / "a.mp4", 77, 24)
    begin = span_start(path, "centre", F / FPS)
    clip = decode_clip(path, F, H, W, FPS, begin)
    assert clip.start == begin == span_start(path, "centre", F / FPS)
    np.testing.assert_array_equal(clip.video, read_clip(path, F, H, W, FPS, clip.start))


CLIMB = """
import resource, sys
from motionrt.runtime.media.video import decode_clip
def peak(path):
    decode_clip(path, 5, 64, 64, 8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
small = peak(sys.argv[1])
print(peak(sys.argv[2]) - small)
"""


@pytest.mark.slow
def test_decode_clip_of_4k_keeps_only_the_frames_it_needs(tmp_path: Path) -> None:
    """48 frames of 2160p are 1.2 GB as RGB; the clip needs five small ones."""
    with av.open(str(tmp_path / "large.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=60)
        stream.height, stream.width, stream.pix_fmt = 2160, 3840, "yuv420p"
        for i in range(48):
            frame = av.VideoFrame(3840, 2160, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([5 * i]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    small = counting(tmp_path / "small.mp4", 8)
    command = [sys.executable, "-P", "-c", CLIMB, str(small), str(tmp_path / "large.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, "MiB"
