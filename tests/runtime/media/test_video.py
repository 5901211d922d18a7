"""Reading stills and clips, writing videos: sizes, modes, rates, orientation and damage, on files made here."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media import frames as frames_module
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.media.video import decode_clip, read_clip, write_video

F, H, W = 17, 32, 48


def grey(level: int, height: int = 36, width: int = 50) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def encode(
    path: Path, frames: list[np.ndarray], rate: int = 8, times_ms: list[int] | None = None,
    rotate: int | None = None, mirror: bool = False, aspect: Fraction | None = None,
) -> Path:  # fmt: skip
    """A video with PyAV alone, so that reading is tested against another writer than ours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if path.suffix != ".gif" else "gif", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p" if path.suffix != ".gif" else "rgb8"
        if path.suffix != ".gif":
            stream.options = {"crf": "1"}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotate is not None:
            stream.set_display_rotation(rotate, hflip=mirror)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def levels(video: np.ndarray) -> list[int]:
    """The grey of each frame, 0..255."""
    return [round(float(x)) for x in (video.mean((1, 2, 3)) + 1) * 127.5]


def near(got: list[int], want: list[int]) -> bool:
    return len(got) == len(want) and max(abs(a - b) for a, b in zip(got, want, strict=True)) <= 1


# Clips


@pytest.mark.parametrize("rate", [8, 24, 30, 60, 12, 5])
def test_read_clip_takes_the_nearest_frame_of_any_rate(tmp_path: Path, rate: int) -> None:
    path = encode(tmp_path / "a.mp4", [grey(2 * i) for i in range(-(-17 * rate // 8))], rate)
    clip = decode_clip(path, F, H, W, 8)
    # The rule by itself: the first frame at or after the target minus half a frame, of a constant rate.
    want = [-(-(2 * i * rate - 8) // 16) for i in range(F)]
    assert near(levels(clip.video), [2 * max(i, 0) for i in want])
    assert clip.video.shape == (F, 3, H, W) and clip.video.dtype == np.float32 and clip.video.flags.c_contiguous
    assert (clip.start, clip.duration, clip.fps) == (0.0, F / 8, 8.0)


def test_read_clip_from_a_start_in_the_middle_needs_no_exact_key_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [grey(i) for i in range(200)], 24)  # key frames are far apart
    for start in (0.0, 1.0, 2.5, 5.75):
        assert near(levels(read_clip(path, 5, H, W, 8, start)), [round(start * 24) + 3 * i for i in range(5)])


def test_read_clip_of_a_file_with_a_wrong_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", [grey(5 * i) for i in range(50)], 8)
    whole = frames_module.decode_from

    def late(path: Path, seek: Fraction | None, limits: Limits) -> object:
        return (item for item in whole(path, None, limits) if seek is None or item[0] > seek + 1)

    monkeypatch.setattr(frames_module, "decode_from", late)
    assert near(levels(read_clip(path, 3, H, W, 8, 3.0)), [120, 125, 130])


def test_read_clip_stretches_a_short_clip_over_its_whole_length(tmp_path: Path) -> None:
    clip = decode_clip(encode(tmp_path / "a.mp4", [grey(10 * i) for i in range(9)], 8), F, H, W, 8)
    assert near(levels(clip.video), [10 * round(i / 2 - 0.01) for i in range(F)])  # ties go to the earlier frame
    assert clip.duration == pytest.approx(9 / 8) and clip.fps == pytest.approx(17 / (9 / 8))


def test_read_clip_stretches_what_is_left_after_start(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [grey(3 * i) for i in range(40)], 8)
    got = levels(read_clip(path, 5, H, W, 8, 4.75))
    assert near(got, [114, 114, 114, 117, 117])


def test_read_clip_holds_the_frame_of_a_variable_rate(tmp_path: Path) -> None:
    times = [0, 40, 80, 1000, 1040, 2100, 2140]
    path = encode(tmp_path / "a.mp4", [grey(30 * i) for i in range(7)], 25, times)
    got = levels(read_clip(path, F, H, W, 8))
    nearest = [min(range(7), key=lambda n, t=i * 125: (abs(times[n] - t), n)) for i in range(F)]
    assert near(got, [30 * n for n in nearest])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_read_clip_repeats_when_there_are_too_few_frames(tmp_path: Path, frames: int) -> None:
    video = read_clip(encode(tmp_path / "a.mp4", [grey(50 * i) for i in range(frames)], 8), F, H, W, 8)
    got = levels(video)
    assert len(got) == F and near([got[0], got[-1]], [0, 50 * (frames - 1)]) and got == sorted(got)


def test_read_clip_of_a_gif_and_of_a_still(tmp_path: Path) -> None:
    gif = encode(tmp_path / "a.gif", [grey(0), grey(255)] * 9, 8)
    assert [level > 128 for level in levels(read_clip(gif, F, H, W, 8))] == [False, True] * 8 + [False]
    Image.fromarray(grey(77)).save(tmp_path / "a.png")
    assert near(levels(read_clip(tmp_path / "a.png", 3, H, W, 8)), [77] * 3)


def quadrants() -> np.ndarray:
    """Top left red, top right green, bottom left blue, bottom right white."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32, 0] = picture[:32, 32:, 1] = picture[32:, :32, 2] = picture[32:, 32:] = 255
    return picture


@pytest.mark.parametrize("degrees", [None, 0, 90, -90, 180])
@pytest.mark.parametrize("mirror", [False, True])
def test_read_clip_undoes_rotation(tmp_path: Path, degrees: int | None, mirror: bool) -> None:
    path = encode(tmp_path / "a.mp4", [quadrants()] * 2, 8, rotate=degrees, mirror=mirror)
    video = read_clip(path, 1, 64, 64, 8)[0].transpose(1, 2, 0)
    want = np.rot90(quadrants(), (degrees or 0) // 90)  # counter-clockwise, as FFmpeg says it, then mirrored
    if degrees is not None and not mirror:
        with av.open(str(path)) as container:
            assert (next(container.decode(video=0)).rotation - degrees) % 360 == 0
    if degrees is not None and mirror:
        want = want[:, ::-1]
    assert np.abs((video + 1) * 127.5 - want).mean() < 12


def test_read_clip_honours_pixels_that_are_not_square(tmp_path: Path) -> None:
    picture = grey(0, 64, 64)
    picture[:, :16] = 255  # twice as wide as high when shown: a square crop loses a quarter at each side
    plain = read_clip(encode(tmp_path / "a.mp4", [picture], 8), 1, 32, 32, 8)
    wide = read_clip(encode(tmp_path / "b.mp4", [picture], 8, aspect=Fraction(2)), 1, 32, 32, 8)
    assert plain.max() > 0.9 and wide.max() < -0.8


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 300), (300, 2), (36, 50)])
def test_write_and_read_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    frames = np.stack([grey(60 * i + 20, *size) for i in range(4)])
    write_video(tmp_path / "a.mp4", frames, 8)
    assert near(levels(read_clip(tmp_path / "a.mp4", 4, 16, 16, 8)), [20, 80, 140, 200])


# Writing


@pytest.mark.parametrize("fps", [8, 7.5, 30])
@pytest.mark.parametrize("kind", ["mp4", "gif", "webp"])
def test_write_video_keeps_frames_colours_and_rate(tmp_path: Path, kind: str, fps: float) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (17, 1, 1, 3), np.uint8)
    frames = np.broadcast_to(colours, (17, 32, 48, 3))
    path = tmp_path / f"a.{kind.upper() if fps == 30 else kind}"
    write_video(path, frames, fps)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if kind == "webp":  # FFmpeg cannot read animated WebP
        image = Image.open(path)
        shown, total = [], 0
        for number in range(image.n_frames):
            image.seek(number)
            shown.append(np.asarray(image.convert("RGB"), np.float32).mean((0, 1)))
            total += image.info["duration"]
        got = np.stack(shown)
        assert total == pytest.approx(17000 / fps, abs=1)
    else:
        clip = decode_clip(path, 17, 32, 48, fps)
        got = (clip.video.mean((2, 3)) + 1) * 127.5
        assert clip.duration == pytest.approx(17 / fps)
        with av.open(str(path)) as container:
            assert float(container.duration / 1e6) == pytest.approx(17 / fps, abs=0.011)
    assert np.abs(got - colours[:, 0, 0]).max() < 6


def test_write_video_mp4_says_how_its_colours_are_coded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", np.stack([quadrants()] * 2), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.format.name) == (1, 1, "yuv420p")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_reading_leaves_no_threads_behind(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", [np.full((64, 64, 3), 9 * i, np.uint8) for i in range(16)])
    gc.collect()
    before = len(os.listdir("/proc/self/task"))
    gc.disable()  # what is only collected later counts
    try:
        for _ in range(4):
            decode_clip(path, 16, 64, 64, 8)
        grown = len(os.listdir("/proc/self/task")) - before
    finally:
        gc.enable()
    decoders = 4 * (1 + (os.cpu_count() or 1))  # may have threads until they are collected
    assert grown <= decoders, "a conversion starts threads for every frame"


def test_write_video_png_is_a_sheet_in_reading_order(tmp_path: Path) -> None:
    write_video(tmp_path / "a.png", np.stack([grey(i, 4, 8) for i in range(5)]), 8)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (12, 16, 3)
    assert sheet[::4, ::8, 0].tolist() == [[0, 1], [2, 3], [4, 255]]


def test_write_video_makes_folders_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.gif"
    for level in (10, 200):
        write_video(path, np.stack([grey(level)]), 8)
        assert near(levels(read_clip(path, 1, 8, 8, 8)), [level])


@pytest.mark.parametrize("name", ["a.avi", "a", "a.jpg", ".mp4"])
def test_write_video_refuses_other_extensions(tmp_path: Path, name: str) -> None:
    with pytest.raises(MediaError, match=r"allowed are \.mp4, \.gif, \.webp, \.png"):
        write_video(tmp_path / name, np.stack([grey(0)]), 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", [
    np.zeros((2, 4, 4, 3), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8),
    np.zeros((2, 4, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.uint8),
])  # fmt: skip
def test_write_video_refuses_other_arrays(tmp_path: Path, frames: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"allowed is uint8 \[F,H,W,3\]"):
        write_video(tmp_path / "a.mp4", frames, 8)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), "8/0"])
def test_rates_that_are_none_are_refused(tmp_path: Path, fps: float) -> None:
    path = encode(tmp_path / "a.mp4", [grey(0)])
    with pytest.raises(InputError, match="fps"):
        write_video(tmp_path / "b.mp4", np.stack([grey(0)]), fps)
    with pytest.raises(InputError, match="fps"):
        read_clip(path, 1, H, W, fps)


FULL_DISK = """
import resource, sys
import numpy as np
from motionrt.runtime.errors import MediaError
from motionrt.runtime.media.video import write_video

frames = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a real failing write, in the middle of the file
try:
    write_video(sys.argv[1], frames, 8)
except MediaError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["mp4", "gif", "webp", "png"])
def test_write_video_on_a_full_disk_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"before")
    done = subprocess.run((sys.executable, "-P", "-c", FULL_DISK, path), capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"(?s)cannot write .* Nothing was written", done.stdout), done
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_write_video_into_a_file_as_folder_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(MediaError, match="cannot write"):
        write_video(tmp_path / "file" / "a.mp4", np.stack([grey(0)]), 8)


# Damage


def test_read_clip_of_files_that_hold_no_video(tmp_path: Path) -> None:
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    whole = encode(tmp_path / "whole.mp4", [grey(i) for i in range(40)]).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(tmp_path / "frameless.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    for name, words in {
        "sound.mp4": "no video stream", "empty.mp4": "cannot be decoded", "garbage.mp4": "cannot be decoded",
        "half.mp4": "cannot be decoded",
        "frameless.avi": "frame|decoded", "missing.mp4": "there is no video file", ".": "there is no video file",
        "http://127.0.0.1/a.mp4": "there is no video file", "nul\0.mp4": "there is no video file",
    }.items():  # fmt: skip
        path = name if "/" in name else tmp_path / name
        with pytest.raises(MediaError, match=words):
            read_clip(path, F, H, W, 8)


def test_read_clip_survives_flipped_bytes(tmp_path: Path) -> None:
    whole = encode(tmp_path / "a.mp4", [quadrants() // (1 + i % 3) for i in range(20)]).read_bytes()
    random = np.random.default_rng(1)
    for _ in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(0, len(data), 12)] = random.integers(0, 256, 12)
        (tmp_path / "b.mp4").write_bytes(data.tobytes())
        try:
            video = read_clip(tmp_path / "b.mp4", F, H, W, 8)
        except MediaError:
            continue
        assert video.shape == (F, 3, H, W) and np.isfinite(video).all()


def test_read_clip_refuses_a_start_behind_the_end_and_impossible_sizes(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", [grey(0)] * 8)
    for start in (1.1, 9.0):
        with pytest.raises(MediaError, match=f"ends at 0.875 s; choose a start before {start:g} s"):
            read_clip(path, F, H, W, 8, start)
    for arguments in [(0, H, W, 8), (F, 0, W, 8), (F, H, -1, 8), (True, H, W, 8), (F, H, 1.5, 8)]:
        with pytest.raises(InputError, match="whole number from 1 on"):
            read_clip(path, *arguments)
    for start in (-1.0, float("nan")):
        with pytest.raises(InputError, match="start"):
            read_clip(path, F, H, W, 8, start)
