"""Colours of videos as a careful viewer shows them: transparency over white, HDR and wide gamuts to sRGB."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.errors import MediaError
from motionrt.runtime.media import frames as frames_module
from motionrt.runtime.media.colour import BT2020, DISPLAY_P3, HLG, PQ, video_to_srgb
from motionrt.runtime.media.frames import cover, normalise, upright
from motionrt.runtime.media.video import decode_clip, read_clip, read_image

ROOT = Path(__file__).resolve().parents[3]
H, W = 48, 64


def half_transparent() -> np.ndarray:
    """The left half transparent (black beneath), the right half red and opaque; uint8 [H,W,4]."""
    rgba = np.zeros((H, W, 4), np.uint8)
    rgba[:, W // 2 :] = (200, 30, 30, 255)
    rgba[0] = (9, 9, 9, 128)
    return rgba


def levels(video: np.ndarray, y: int, x: int) -> list[int]:
    return np.rint((video[0, :, y, x] + 1) * 127.5).astype(int).tolist()


def near(got: list[int], want: tuple[int, ...], off: int) -> bool:
    return max(abs(a - b) for a, b in zip(got, want, strict=True)) <= off


def test_plain_clips_are_read_as_ever() -> None:
    """The demo's clips: bit for bit what FFmpeg gives as rgb24, through the one resize; no rule of colour touches them."""
    for path in sorted((ROOT / "demo/clips").glob("*.mp4"))[::16]:
        with av.open(str(path)) as container:
            plain = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)]
            rate = container.streams.video[0].average_rate
        assert rate is not None
        want = normalise(np.stack([cover(np.asarray(pixels, np.uint8), 64, 64) for pixels in plain]))
        assert np.array_equal(read_clip(path, len(plain), 64, 64, rate), want), path.name


@pytest.mark.parametrize("name, codec, pixels", [
    ("a.mov", "png", "rgba"), ("a.mov", "qtrle", "argb"), ("a.mov", "prores_ks", "yuva444p10le"),
    ("a.webm", "libvpx-vp9", "yuva420p"), ("b.webm", "libvpx", "yuva420p"), ("a.mkv", "ffv1", "bgra"),
])  # fmt: skip
def test_transparent_videos_lie_on_white(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = H, W, pixels
        if codec.startswith("libvpx"):
            stream.options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
            stream.metadata["alpha_mode"] = "1"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(half_transparent(), format="rgba")
            container.mux(stream.encode(frame.reformat(format=pixels, threads=1)))
        container.mux(stream.encode(None))
    video = read_clip(tmp_path / name, 3, H, W, 8)
    assert near(levels(video, 20, 8), (255, 255, 255), 2)
    assert near(levels(video, 20, W - 8), (200, 30, 30), 8)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_transparent_animations_lie_on_white_as_their_stills_do(tmp_path: Path, name: str) -> None:
    first = Image.fromarray(half_transparent())
    second = Image.fromarray(half_transparent()[:, ::-1].copy())
    options = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], duration=125, disposal=2, loop=0, **options)
    video = read_clip(tmp_path / name, 2, H, W, 8)
    still = read_image(tmp_path / name, H, W)
    for got in (video, still[None]):
        assert near(levels(got, 20, 8), (255, 255, 255), 2) and near(levels(got, 20, W - 8), (200, 30, 30), 4)
    assert near(levels(video[1:], 20, 8), (200, 30, 30), 4) and near(levels(video[1:], 20, W - 8), (255, 255, 255), 2)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("moves", [True, False], ids=["animation", "still"])
def test_the_pixels_of_a_webp_say_what_is_transparent_and_not_its_flag(tmp_path: Path, moves: bool, lossless: bool) -> None:
    path, first = tmp_path / "a.webp", Image.fromarray(half_transparent())
    more = {"save_all": True, "append_images": [first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]} if moves else {}
    first.save(path, lossless=lossless, exif=b"Exif\0\0II*\0\b\0\0\0\0\0", duration=125, exact=True, **more)
    want = read_image(path, H, W), read_clip(path, 2, H, W, 8)
    data = bytearray(path.read_bytes())
    assert data[12:16] == b"VP8X" and data[20] & 16, "it has a header, and the flag of transparency there"
    data[20] &= ~16
    path.write_bytes(data)
    got = read_image(path, H, W), read_clip(path, 2, H, W, 8)
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
    assert near(levels(got[1], 20, 8), (255, 255, 255), 2) and near(levels(got[1], 20, W - 8), (200, 30, 30), 8)


def test_what_no_frame_of_a_webp_covers_is_white(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], duration=125, lossless=True)
    data = bytearray((tmp_path / "a.webp").read_bytes())
    assert data[12:16] == b"VP8X" and not data[20] & 16
    data[24:30] = (W - 1).to_bytes(3, "little") + (H - 1).to_bytes(3, "little")  # the size of the canvas
    (tmp_path / "a.webp").write_bytes(data)
    video = read_clip(tmp_path / "a.webp", 2, H, W, 8)
    assert [levels(video[i:], 5, 5) for i in (0, 1)] == [[255, 0, 0], [0, 0, 255]]
    assert levels(video, 40, 40) == levels(video[1:], 40, 40) == [255, 255, 255]
    assert np.array_equal(read_image(tmp_path / "a.webp", H, W), video[0])


@pytest.mark.parametrize("clear", [None, 0], ids=["opaque", "transparent"])
def test_what_no_frame_of_a_gif_covers_is_white(tmp_path: Path, clear: int | None) -> None:
    """Nor its background colour, the first of its palette, which browsers do not show either."""
    first, second = (Image.new("P", (16, 16), 1) for _ in range(2))
    first.putpalette([0, 200, 0, 255, 0, 0])
    second.putpalette([0, 200, 0, 0, 0, 255])
    more = {} if clear is None else {"transparency": clear}
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second], duration=125, background=0, optimize=False, **more)
    data = bytearray((tmp_path / "a.gif").read_bytes())
    data[6:10] = W.to_bytes(2, "little") + H.to_bytes(2, "little")  # the size of the canvas
    (tmp_path / "a.gif").write_bytes(data)
    video = read_clip(tmp_path / "a.gif", 2, H, W, 8)
    assert [levels(video[i:], 5, 5) for i in (0, 1)] == [[255, 0, 0], [0, 0, 255]]
    assert levels(video, 40, 40) == levels(video[1:], 40, 40) == [255, 255, 255]
    assert np.array_equal(read_image(tmp_path / "a.gif", H, W), video[0])


def test_a_gif_that_was_opened_is_read_at_its_frame(tmp_path: Path) -> None:
    """Of which the last is written as its square alone."""
    first = Image.new("RGB", (W, H), "red")
    second = first.copy()
    second.paste("blue", (0, 0, 8, 8))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second], duration=125)
    with Image.open(tmp_path / "a.gif") as image:
        assert levels(read_image(image, H, W)[None], 2, 2) == [255, 0, 0]
        image.seek(1)
        got = read_image(image, H, W)[None]
    assert levels(got, 2, 2) == [0, 0, 255] and levels(got, 40, 40) == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_what_is_left_of_a_png_when_a_frame_is_cleared_is_white(tmp_path: Path, mode: str) -> None:
    """The second frame is written as its square alone: all around it was cleared to black, and not painted."""
    first, second, third = (Image.new(mode, (W, H)) for _ in range(3))
    for picture in (first, third):
        picture.paste(Image.new(mode, (W, H), "red"))
    second.paste(Image.new(mode, (16, 16), "gray"), (0, 0))
    first.save(tmp_path / "a.png", save_all=True, append_images=[second, third], duration=125, disposal=1, blend=0)
    video = read_clip(tmp_path / "a.png", 3, H, W, 8)
    assert levels(video, 40, 40) == levels(video[2:], 40, 40) == [255, 0, 0]
    assert levels(video[1:], 5, 5) == [128, 128, 128] and levels(video[1:], 40, 40) == [255, 255, 255]


def test_the_still_of_a_png_does_not_lie_under_its_frames(tmp_path: Path) -> None:
    frames = [Image.fromarray(half_transparent()), Image.fromarray(half_transparent()[:, ::-1].copy())]
    more = {"default_image": True, "append_images": frames, "blend": 1, "disposal": 1}
    Image.new("RGBA", (W, H), "blue").save(tmp_path / "a.png", save_all=True, duration=125, **more)
    video = read_clip(tmp_path / "a.png", 2, H, W, 8)
    assert near(levels(video, 20, 8), (255, 255, 255), 1) and near(levels(video[1:], 20, W - 8), (255, 255, 255), 1)
    assert near(levels(video, 20, W - 8), (200, 30, 30), 1)
    assert levels(read_image(tmp_path / "a.png", H, W)[None], 20, 8) == [0, 0, 255]


def pq(nits: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, equation 5.1: the signal of light."""
    power = (np.asarray(nits) / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(nits: np.ndarray) -> np.ndarray:
    """BT.2100: the signal of light on a display of 1000 nits."""
    nits = np.asarray(nits, np.float64)
    luminance = nits @ [0.2627, 0.6780, 0.0593]
    scene = nits / 1000 * (np.maximum(luminance, 1e-9) / 1000)[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def linear(srgb: tuple[int, ...]) -> np.ndarray:
    signal = np.array(srgb) / 255
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


TO_2020 = np.array([[0.627404, 0.329283, 0.043313], [0.069097, 0.919540, 0.011362], [0.016391, 0.088013, 0.895595]])
COLOURS = [(255, 255, 255), (128, 128, 128), (200, 60, 60), (10, 180, 40), (0, 0, 0), (3, 2, 250)]


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("want", COLOURS)
def test_hdr_of_sdr_colours_gives_them_back(transfer: int, want: tuple[int, ...]) -> None:
    """White of SDR is 203 nits (BT.2408): what was SDR, mapped into HDR by the book, comes out as it was."""
    nits = 203 * TO_2020 @ linear(want)
    signal = pq(nits) if transfer == PQ else hlg(nits)
    codes = np.rint(np.broadcast_to(signal, (70, 3, 3)) * 65535).astype(np.uint16)
    for primaries in (BT2020, 2):
        assert near(video_to_srgb(codes, transfer, primaries)[69, 2].tolist(), want, 1)


@pytest.mark.parametrize("nits, want", [
    ([203, 203, 203], [255] * 3), ([1000, 1000, 1000], [255] * 3), ([10000] * 3, [255] * 3), ([812, 406, 203], [255, 188, 137]),
])  # fmt: skip
def test_highlights_are_white_or_keep_their_hue(nits: list[float], want: list[int]) -> None:
    codes = np.rint(np.broadcast_to(pq(np.array(nits)), (1, 1, 3)) * 65535).astype(np.uint16)
    assert near(video_to_srgb(codes, PQ, 1)[0, 0].tolist(), tuple(want), 1)


def hdr_file(path: Path, transfer: int, primaries: int, signal: np.ndarray, space: int = 9) -> Path:
    """An H.264 file of 10 bits, of one colour, with the tags of HDR."""
    codes = np.rint(np.broadcast_to(signal, (H, W, 3)) * 65535).astype(np.uint16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv444p10le"
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, primaries
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(codes, format="rgb48le")
            matrix = 9 if space == 9 else 1  # by number: PyAV 17 has no name for BT.2020
            frame = frame.reformat(format="yuv444p10le", dst_colorspace=matrix, dst_color_range="MPEG", threads=1)
            frame.time_base, frame.pts = Fraction(1, 8), None
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("want", COLOURS[:4])
def test_hdr_files_are_read_as_sdr(tmp_path: Path, transfer: int, want: tuple[int, ...]) -> None:
    nits = 203 * TO_2020 @ linear(want)
    path = hdr_file(tmp_path / "a.mp4", transfer, BT2020, pq(nits) if transfer == PQ else hlg(nits))
    assert near(levels(read_clip(path, 2, H, W, 8), 20, 20), want, 6)  # of 10 bits


def test_hdr_agrees_with_ffmpeg(tmp_path: Path) -> None:
    """swscale converts PQ by its own means; where it needs no mapping of gamuts the two agree."""
    for srgb in COLOURS[2:3]:  # swscale takes seconds for a frame
        path = hdr_file(tmp_path / "a.mp4", PQ, BT2020, pq(203 * TO_2020 @ linear(srgb)))
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
        theirs = frame.reformat(format="rgb24", dst_color_trc=13, dst_color_primaries=1, threads=1).to_ndarray()[20, 20]
        assert near(levels(read_clip(path, 1, H, W, 8), 20, 20), tuple(int(v) for v in theirs), 6)


def test_wide_gamut_without_hdr(tmp_path: Path) -> None:
    """(60,180,75) in Display P3 is (0,183,57) in sRGB, in a video as in a still; greys stay as they are."""
    path = hdr_file(tmp_path / "a.mp4", 1, DISPLAY_P3, np.array([60, 180, 75]) / 255, space=1)
    assert near(levels(read_clip(path, 1, H, W, 8), 20, 20), (0, 183, 57), 2)
    path = hdr_file(tmp_path / "b.mp4", 14, BT2020, np.array([90, 90, 90]) / 255)
    assert near(levels(read_clip(path, 1, H, W, 8), 20, 20), (90, 90, 90), 1)


def test_colours_that_cannot_be_converted_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hdr_file(tmp_path / "a.mp4", PQ, BT2020, np.array([0.5, 0.5, 0.5]))
    monkeypatch.setattr(frames_module, "_UNKNOWN_SPACES", (9,))
    with pytest.raises(MediaError, match=r"convert it to SDR \(BT.709\) first"):
        decode_clip(path, 1, H, W, 8)


def test_upright_of_a_transparent_hdr_frame() -> None:
    rgba = np.zeros((H, W, 4), np.uint16)
    rgba[:, W // 2 :] = np.array([*pq(np.full(3, 203.0)) * 65535, 65535]).round()
    rgba[:8] = (0, 0, 0, 65535)
    frame = av.VideoFrame.from_ndarray(rgba, format="rgba64le")
    frame.color_trc, frame.color_primaries = PQ, BT2020
    pixels, _ = upright(frame, 1.0)
    assert pixels[20, 5].tolist() == pixels[20, W - 5].tolist() == [255] * 3 and pixels[2, 5].tolist() == [0] * 3
