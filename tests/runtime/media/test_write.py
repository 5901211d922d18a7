"""What is written plays at the right speed with every frame, or is refused: limits of the formats, equal frames, rates."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media import video
from motionrt.runtime.media.frames import length
from motionrt.runtime.media.video import check_output, decode_clip, read_clip, write_video


def shown(path: Path) -> tuple[list[int], list[float]]:
    """The grey of each frame in the file, and its milliseconds."""
    greys, times = [], []
    with Image.open(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            greys.append(round(float(np.asarray(image.convert("RGB")).mean())))
            times.append(image.info["duration"])
        assert image.info.get("loop") == 0
    return greys, times


def greys(*levels: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 16, 24, 3)))


@pytest.mark.parametrize("fps", [8, 12.5, Fraction(24000, 1001), 30, 50, 0.5])
@pytest.mark.parametrize("kind", ["gif", "webp"])
@pytest.mark.parametrize("levels", [[90] * 17, [0, 0, 0, 80, 80, 160, 160, 160], [10, 200]], ids=["equal", "runs", "two"])
def test_every_frame_is_in_the_file_for_its_time(tmp_path: Path, kind: str, fps: float | Fraction, levels: list[int]) -> None:
    path, unit = tmp_path / f"a.{kind}", 10 if kind == "gif" else 1
    write_video(path, greys(*levels), fps)
    got, times = shown(path)
    assert len(got) == len(levels) and max(abs(a - b) for a, b in zip(got, levels, strict=True)) <= 1
    assert sum(times) == pytest.approx(1000 * len(levels) / float(fps), abs=unit)
    assert max(times) - min(times) <= unit
    clip = decode_clip(path, len(levels), 16, 24, fps)
    read = [round(float(x)) for x in (clip.video.mean((1, 2, 3)) + 1) * 127.5]
    assert max(abs(a - b) for a, b in zip(read, levels, strict=True)) <= 1
    assert clip.duration == pytest.approx(len(levels) / float(fps), abs=0.02)


@pytest.mark.parametrize("fps", [0.001, 0.3, 8, Fraction(24000, 1001), 60, 240, 1000])
def test_an_mp4_plays_at_any_rate_that_is_allowed(tmp_path: Path, fps: float | Fraction) -> None:
    write_video(tmp_path / "a.mp4", greys(*[50] * 9, 60), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.frames == 10 and stream.average_rate == Fraction(fps).limit_denominator(60000)
    assert float(length(tmp_path / "a.mp4")) == pytest.approx(10 / float(fps), rel=1e-3)


@pytest.mark.parametrize("kind, fps, words", [
    ("gif", 60, r"fps is 60; .gif allows 0.0015 to 50: browsers show .* Choose another rate, or .mp4, .webp"),
    ("gif", 0.001, r"allows 0.0015 to 50.*or .mp4, .webp"), ("webp", 100, r"fps is 100; .webp allows 6e-05 to 90.*or .mp4\."),
    ("webp", 1e-5, "Choose another rate.$"), ("mp4", 1e-5, "mp4 allows 0.001 to 1000"), ("mp4", 1001, "allows 0.001 to 1000"),
    ("mp4", 1e-6, "allows 0.001"), ("mp4", 1e-9, "any number above 0"),
])  # fmt: skip
def test_rates_that_a_format_cannot_hold_are_refused(tmp_path: Path, kind: str, fps: float, words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_video(tmp_path / f"a.{kind}", greys(0, 1), fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, side", [("mp4", 16384), ("webp", 16383), ("gif", 65535)])
def test_sizes_that_a_format_cannot_hold_are_refused(tmp_path: Path, kind: str, side: int) -> None:
    for shape in ((1, 2, side + 1, 3), (1, side + 1, 2, 3)):
        with pytest.raises(InputError, match=rf".{kind} holds at most {side} x {side}. Make them smaller"):
            write_video(tmp_path / f"a.{kind}", np.zeros(shape, np.uint8), 8)
    assert not list(tmp_path.iterdir())
    write_video(tmp_path / f"a.{kind}", np.zeros((1, 2, side, 3), np.uint8), 8)
    assert read_clip(tmp_path / f"a.{kind}", 1, 2, 2, 8).max() < -0.9


def test_the_limits_can_be_asked_before_there_are_frames() -> None:
    assert check_output("a.MP4", 64, 64, np.float32(8)) == 8 and check_output("a.png", 99999, 99999, 1e-3) > 0
    with pytest.raises(MediaError, match="unknown extension"):
        check_output("a.avi", 64, 64, 8)
    with pytest.raises(InputError, match="fps is 60"):
        check_output("a.gif", 64, 64, 60)


@pytest.mark.parametrize("rate", [np.float32(8), np.float64(8), np.int64(8), 8])
def test_rates_of_any_number_type(tmp_path: Path, rate: float) -> None:
    write_video(tmp_path / "a.mp4", greys(0, 100), rate)
    assert decode_clip(tmp_path / "a.mp4", 2, 8, 8, rate).duration == 0.25


def test_colours_of_a_gif_are_those_that_suit_each_frame(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 12, 20, 3), np.uint8)  # 240 colours a frame
    write_video(tmp_path / "a.gif", frames, 8)
    assert np.abs((read_clip(tmp_path / "a.gif", 3, 12, 20, 8) + 1) * 127.5 - frames.transpose(0, 3, 1, 2)).max() < 0.01


def test_an_encoder_that_fails_is_a_media_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, frames: object, rate: object) -> None:
        raise av.error.ExternalError(1, "broken")

    monkeypatch.setattr(video, "_write_mp4", broken)
    # libx264 returns nothing else where an allocation failed, and says so on a line of its own
    with pytest.raises(MediaError, match="cannot write .*a.mp4: .*broken.* too little memory. Nothing was written. Free some "):
        write_video(tmp_path / "a.mp4", greys(0), 8)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_for_an_encoder_says_nothing_of_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from av.error import MemoryError as NoMemory

    def fails(*args: object, **named: object) -> None:
        raise NoMemory(12, "Cannot allocate memory", "libx264")

    monkeypatch.setattr("av.open", fails)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 8)
    assert not list(tmp_path.iterdir())
