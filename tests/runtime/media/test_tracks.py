"""Which frames a file is: the track that moves, animated pictures and their times, files cut off, limits."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media.frames import length
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.media.video import decode_clip, read_clip, span_start, write_video

H, W = 32, 48


def grey(level: int) -> np.ndarray:
    return np.full((H, W, 3), level, np.uint8)


def levels(video: np.ndarray) -> list[int]:
    return [round(float(x)) for x in (video.mean((1, 2, 3)) + 1) * 127.5]


def near(got: list[int], want: list[int], off: int = 1) -> bool:
    return len(got) == len(want) and max(abs(a - b) for a, b in zip(got, want, strict=True)) <= off


def tracks(path: Path, *contents: tuple[str, list[int], bool]) -> Path:
    """A file of several video tracks: (codec, greys of its frames at 8 fps, whether it is flagged as the default)."""
    default = av.stream.Disposition.default
    with av.open(str(path), "w") as container:
        streams = []
        for codec, _, flagged in contents:
            stream = container.add_stream(codec, rate=8)
            stream.height, stream.width = H, W
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = default if flagged else av.stream.Disposition(0)
            streams.append(stream)
        for stream, (_, greys, _) in zip(streams, contents, strict=True):
            for level in greys:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(level), format="rgb24")))
            container.mux(stream.encode(None))
    return path


MOVING = [10 * i for i in range(16)]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
def test_the_track_that_moves_is_read(tmp_path: Path, suffix: str) -> None:
    path = tracks(tmp_path / f"a.{suffix}", ("mjpeg", [200], True), ("libx264", MOVING, False))
    clip = decode_clip(path, 16, H, W, 8)
    assert near(levels(clip.video), MOVING, 3) and clip.fps == 8
    begin = span_start(path, "centre", 0.5)
    assert begin == pytest.approx(0.75, abs=0.05) and near(levels(read_clip(path, 2, H, W, 8, begin)), [60, 70], 3)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_of_several_tracks_that_move_the_default_is_read(tmp_path: Path, suffix: str) -> None:
    other = [255 - level for level in MOVING]
    flagged = tracks(tmp_path / f"a.{suffix}", ("libx264", MOVING, False), ("libx264", other, True))
    assert near(levels(read_clip(flagged, 16, H, W, 8)), other, 3)
    first = tracks(tmp_path / f"b.{suffix}", ("libx264", MOVING, True), ("libx264", other, False))
    assert near(levels(read_clip(first, 16, H, W, 8)), MOVING, 3)


def test_a_file_of_stills_only_is_still_read(tmp_path: Path) -> None:
    path = tracks(tmp_path / "a.mkv", ("mjpeg", [200], False), ("mjpeg", [90], True))
    assert near(levels(read_clip(path, 2, H, W, 8)), [90, 90], 2)


DURATIONS = [100, 250, 50, 400, 200]  # ms
GREYS = [0, 50, 100, 150, 200]


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.apng"])
def test_animations_are_clips_with_the_times_of_their_frames(tmp_path: Path, name: str) -> None:
    first, *rest = (Image.fromarray(grey(level)) for level in GREYS)
    first.save(tmp_path / name, save_all=True, append_images=rest, duration=DURATIONS, loop=0)
    starts = [sum(DURATIONS[:i]) for i in range(5)]
    for begin in (0.0, 0.3):
        got = levels(read_clip(tmp_path / name, 4, H, W, 10, begin))
        want = [min(range(5), key=lambda n, t=1000 * begin + 100 * i: (abs(starts[n] - t), n)) for i in range(4)]
        assert near(got, [GREYS[n] for n in want], 2)
    assert float(length(tmp_path / name)) == pytest.approx(1.0, abs=0.001)
    with pytest.raises(MediaError, match="choose a start"):
        read_clip(tmp_path / name, 4, H, W, 10, 5)


def test_durations_too_short_to_be_shown_are_those_of_browsers(tmp_path: Path) -> None:
    first, *rest = (Image.fromarray(grey(level)) for level in GREYS)
    for name, duration in (("a.webp", 10), ("a.gif", 10), ("b.webp", 0)):
        first.save(tmp_path / name, save_all=True, append_images=rest, duration=duration, loop=0)
        assert float(length(tmp_path / name)) == pytest.approx(0.5), name
        assert near(levels(read_clip(tmp_path / name, 5, H, W, 10)), GREYS, 2)


def test_a_damaged_animation_is_a_media_error(tmp_path: Path) -> None:
    first, *rest = (Image.fromarray(np.random.default_rng(i).integers(0, 256, (H, W, 3), np.uint8)) for i in range(5))
    first.save(tmp_path / "a.webp", save_all=True, append_images=rest, duration=100)
    data = (tmp_path / "a.webp").read_bytes()
    random = np.random.default_rng(0)
    for number in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[random.integers(12, len(data), 8)] = random.integers(0, 256, 8)
        (tmp_path / "b.webp").write_bytes(damaged[: len(damaged) - number * 40].tobytes())
        try:
            video = read_clip(tmp_path / "b.webp", 5, H, W, 10)
            length(tmp_path / "b.webp")
        except MediaError:
            continue
        assert video.shape == (5, 3, H, W)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_centre_of_a_file_that_was_cut_off_is_that_of_what_plays(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    options = {"movflags": "+faststart"} if suffix == "mp4" else {}
    with av.open(str(tmp_path / f"a.{suffix}"), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=8, options={"g": "8", "crf": "10", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        for i in range(160):
            noise = random.integers(-12, 13, (H, W, 3)) + i + 12
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise.clip(0, 255).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    assert float(length(tmp_path / f"a.{suffix}")) == pytest.approx(20, abs=0.1)
    (tmp_path / f"b.{suffix}").write_bytes(whole[: len(whole) // 2])
    plays = float(length(tmp_path / f"b.{suffix}"))
    assert 6 < plays < 14
    begin = span_start(tmp_path / f"b.{suffix}", "centre", 1)
    assert begin == pytest.approx((plays - 1) / 2)
    clip = decode_clip(tmp_path / f"b.{suffix}", 8, H, W, 8, begin)
    assert clip.duration == 1 and near(levels(clip.video), [12 + round(8 * begin) + i for i in range(8)], 3)


def test_a_longer_sound_track_does_not_move_the_centre(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=8), container.add_stream("aac", rate=44100)
        video.height, video.width, video.pix_fmt = H, W, "yuv420p"
        for level in MOVING:
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey(level), format="rgb24")))
        container.mux(video.encode(None))
        for i in range(430):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert float(length(path)) == pytest.approx(2, abs=0.13)


@pytest.mark.parametrize("limits, words", [
    (Limits(pixels=H * W - 1), "is 48 x 32, 0 million pixels; allowed are"),
    (Limits(memory=H * W * 32 - 1), "takes about 0 MiB"),
    (Limits(frames=15), "more than 15 frames or 14400 s"), (Limits(seconds=1.8), "more than 500000 frames or 1.8 s"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["mp4", "webp"])
def test_decoding_is_bounded(tmp_path: Path, suffix: str, limits: Limits, words: str) -> None:
    path = tmp_path / f"a.{suffix}"
    write_video(path, np.stack([grey(level) for level in MOVING]), 8)
    if suffix == "webp" and limits.memory < 1 << 30:
        limits = Limits(memory=H * W * 16 - 1)
    with pytest.raises(MediaError, match=words):
        read_clip(path, 1, 4, 4, 8, 1.9, limits=limits)
    assert read_clip(path, 1, 4, 4, 8, 1.9).shape == (1, 3, 4, 4)


def test_a_clip_larger_than_memory_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.stack([grey(0), grey(9)]), 8)
    with pytest.raises(InputError, match="a clip of 1000000 frames of 4000 x 4000 takes about .* MiB to decode"):
        read_clip(tmp_path / "a.mp4", 1_000_000, 4000, 4000, 8)
