"""Reading stills: modes, ranges, profiles, transparency, orientation, sizes and damage, on files made here."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media.frames import cover, normalise
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.media.stills import read_image

ROOT = Path(__file__).resolve().parents[3]


def quadrants() -> np.ndarray:
    """Top left red, top right green, bottom left blue, bottom right white."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32, 0] = picture[:32, 32:, 1] = picture[32:, :32, 2] = picture[32:, 32:] = 255
    return picture


def colour(source: object, side: int = 8) -> list[int]:
    """The mean RGB of a still, 0..255."""
    read = read_image(source, side, side)  # type: ignore[arg-type]
    return np.rint((read.mean((1, 2)) + 1) * 127.5).astype(int).tolist()


def near(got: list[int], want: tuple[int, ...], off: int = 1) -> bool:
    return max(abs(a - b) for a, b in zip(got, want, strict=True)) <= off


@pytest.mark.parametrize("mode, colour, want", [
    ("RGB", (200, 100, 50), (200, 100, 50)), ("L", 90, (90, 90, 90)), ("1", 1, (255, 255, 255)),
    ("RGBA", (200, 100, 50, 255), (200, 100, 50)), ("RGBA", (200, 100, 50, 0), (255, 255, 255)),
    ("RGBA", (0, 0, 0, 51), (204, 204, 204)), ("LA", (0, 51), (204, 204, 204)), ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("I;16", 257 * 201, (201, 201, 201)), ("F", 0.2, (51, 51, 51)),
    ("La", (0, 51), (204, 204, 204)), ("RGBa", (0, 0, 0, 51), (204, 204, 204)), ("HSV", (0, 255, 255), (255, 0, 0)),
    ("YCbCr", (90, 128, 128), (90, 90, 90)),
])  # fmt: skip
def test_read_image_of_any_mode(mode: str, colour: object, want: tuple[int, ...]) -> None:
    got = (read_image(Image.new(mode, (7, 5), colour), 8, 8) + 1) * 127.5
    assert got.shape == (3, 8, 8) and np.abs(got.mean((1, 2)) - want).max() <= 0.5


def test_read_image_of_files(tmp_path: Path) -> None:
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "t.png", transparency=1)
    Image.new("I;16", (6, 4), 257 * 99).save(tmp_path / "deep.png")
    Image.new("CMYK", (16, 16), (0, 255, 0, 0)).save(tmp_path / "c.jpg")
    Image.new("F", (6, 4), float("nan")).save(tmp_path / "nan.tiff")
    for name, want in {
        "p.png": (10, 200, 30), "t.png": (255, 255, 255), "deep.png": (99, 99, 99), "c.jpg": (255, 0, 255),
    }.items():  # fmt: skip
        for path in (tmp_path / name, str(tmp_path / name)):
            got = (read_image(path, 8, 8) + 1) * 127.5
            assert np.abs(got.mean((1, 2)) - want).max() <= 4, name
    with pytest.raises(MediaError, match="NaN"):
        read_image(tmp_path / "nan.tiff", 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_undoes_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = quadrants()[:, :48]
    undo = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: np.rot90(a, 2), 4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1), 6: np.rot90, 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
            8: lambda a: np.rot90(a, 3)}[orientation]  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    got = (read_image(tmp_path / "a.png", 64, 48) + 1) * 127.5
    assert np.abs(got.transpose(1, 2, 0) - upright).max() < 1


def test_read_image_covers_and_crops_the_centre() -> None:
    wide = np.zeros((64, 5000, 3), np.uint8)
    wide[:, 2468:2532] = np.arange(64, dtype=np.uint8)[:, None]
    assert np.array_equal(np.rint((read_image(wide, 64, 64) + 1) * 127.5), wide[:, 2468:2532].transpose(2, 0, 1))
    tall = wide.swapaxes(0, 1)
    assert np.array_equal(np.rint((read_image(tall, 64, 64) + 1) * 127.5), tall[2468:2532].transpose(2, 0, 1))
    assert (read_image(np.full((1, 1), 255, np.uint8), 32, 64) == 1).all()
    assert (read_image(np.zeros((1, 60_000), np.uint8), 480, 720) == -1).all()


def test_read_image_shrinks_without_aliasing() -> None:
    stripes = np.zeros((512, 512), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(read_image(stripes, 64, 64)[:, :, 4:-4]).max() < 0.02


@pytest.mark.parametrize("array", [
    np.zeros((4, 4, 3), np.float32), np.full((4, 4, 3), np.nan), np.zeros((0, 4, 3), np.uint8),
    np.zeros(4, np.uint8),
    np.zeros((4, 4, 2), np.uint8), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16), np.zeros((4, 4), bool),
])  # fmt: skip
def test_read_image_refuses_other_arrays(array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"allowed is uint8 \[h,w\]"):
        read_image(array, 8, 8)


def test_read_image_of_damaged_files_is_a_media_error(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(good)
    data = good.read_bytes()
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = data[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    contents = {"cut.png": data[: len(data) // 2], "none.png": b"", "text.png": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match="cannot be read as an image"):
            read_image(tmp_path / name, 8, 8)
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(MediaError, match="is 60000 x 60000, 3600 million pixels; allowed are 300. Make it smaller"):
        read_image(tmp_path / "bomb.png", 8, 8)
    with pytest.raises(MediaError, match="there is no image file"):
        read_image(tmp_path / "missing.png", 8, 8)
    with pytest.raises(InputError, match="path of a file"):
        read_image(None, 8, 8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="height"):
        read_image(good, 0, 8)


def test_every_part_of_a_png_is_compared_with_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.effect_noise((40, 30), 60).save(file)
    good = file.read_bytes()
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(8, len(good), 61)]
    for damaged in (*flipped, good[: len(good) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(MediaError, match="a.png"):
            read_image(file, 16, 16)


def test_plain_stills_are_read_as_ever() -> None:
    """The demo's inputs: pixel for pixel what Pillow decodes, through the one resize; no rule of colour touches them."""
    for path in sorted((ROOT / "demo/inputs").glob("*.png")):
        for size in ((64, 64), (48, 80)):
            want = normalise(cover(np.asarray(Image.open(path).convert("RGB")), *size)[None])[0]
            assert np.array_equal(read_image(path, *size), want), path.name


# Ranges: what a format declares to be white is white, however bright the brightest pixel is.


@pytest.mark.parametrize("scale", [1.0, 1.001, 4.0, 0.5])
def test_floats_are_zero_to_one_whatever_the_brightest_is(tmp_path: Path, scale: float) -> None:
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0) * np.float32(scale)
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    got = (read_image(tmp_path / "a.tif", 64, 64) + 1) * 127.5
    assert np.abs(got - np.rint(255 * ramp.clip(0, 1))).max() < 1.01


def test_one_bright_pixel_darkens_nothing(tmp_path: Path) -> None:
    picture = np.full((64, 64), 0.5, np.float32)
    picture[0, 0] = 1e6
    Image.fromarray(picture).save(tmp_path / "a.tif")
    assert round(float((read_image(tmp_path / "a.tif", 64, 64)[0, 9, 9] + 1) * 127.5)) == 128


@pytest.mark.parametrize("dtype, words", [
    (np.float32, r"holds floats up to 255; floats are read as 0 \(black\) to 1 \(white\)"),
    (np.int32, "do not say what is white"),
    (np.uint32, "do not say what is white"), (np.int16, "do not say what is white"),
])  # fmt: skip
def test_ranges_that_say_no_white_are_refused(tmp_path: Path, dtype: type, words: str) -> None:
    tiff(tmp_path / "a.tif", np.arange(256).reshape(16, 16).astype(dtype))
    with pytest.raises(MediaError, match=words):
        read_image(tmp_path / "a.tif", 8, 8)


def tiff(path: Path, values: np.ndarray, bits: int | None = None, packed: bytes | None = None) -> None:
    """A grey tiff of any numbers: Pillow writes only some of them."""
    rows, columns = values.shape
    data = values.astype(values.dtype.newbyteorder("<")).tobytes() if packed is None else packed
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = [(256, columns), (257, rows), (258, bits or 8 * values.itemsize), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, rows), (279, len(data)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    offset = 8 + len(data) + len(data) % 2
    head = b"II*\0" + struct.pack("<I", offset)
    path.write_bytes(head + data + b"\0" * (len(data) % 2) + struct.pack("<H", len(tags)) + entries + b"\0" * 4)


def test_whole_numbers_of_8_12_and_16_bits_have_the_white_of_their_format(tmp_path: Path) -> None:
    levels = np.full((8, 8), 100)
    tiff(tmp_path / "8.tif", levels.astype(np.uint8))
    tiff(tmp_path / "16.tif", (levels * 257).astype(np.uint16))
    packed = b"".join(struct.pack(">I", 1606 << 12 | 1606)[1:] for _ in range(32))  # two numbers in three bytes
    tiff(tmp_path / "12.tif", levels.astype(np.uint16), 12, packed)
    Image.fromarray((levels * 257).astype(np.uint16)).save(tmp_path / "16.png")
    (tmp_path / "10.pgm").write_bytes(b"P5 8 8 1023\n" + np.full(64, 401, ">u2").tobytes())
    for name in ("8.tif", "16.tif", "12.tif", "16.png", "10.pgm"):
        assert near(colour(tmp_path / name), (100, 100, 100)), name


def test_transparent_numbers_of_16_bits_are_white(tmp_path: Path) -> None:
    values = np.full((8, 8), 3000, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=3000)
    with Image.open(tmp_path / "a.png") as written:
        assert written.info["transparency"] == 3000
    assert colour(tmp_path / "a.png") == [255, 255, 255]


# Profiles


def rgb_profile(primaries: list[list[float]], gamma: float = 2.2) -> bytes:
    """An ICC profile of version 2 of the primaries (columns: X, Y, Z of red, green and blue, adapted to D50)."""

    def xyz(values: list[float]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    blocks = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz([0.9642, 1.0, 0.8249]),
              b"rXYZ": xyz(primaries[0]), b"gXYZ": xyz(primaries[1]), b"bXYZ": xyz(primaries[2]),
              b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}  # fmt: skip
    return icc(b"RGB ", blocks)


def icc(space: bytes, blocks: dict[bytes, bytes]) -> bytes:
    table, body, offset = b"", b"", 132 + 12 * len(blocks)
    for name, block in blocks.items():
        block += b"\0" * (-len(block) % 4)
        table += name + struct.pack(">II", offset + len(body), len(block))
        body += block
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(24)
    head += bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    return head + bytes(128 - len(head)) + struct.pack(">I", len(blocks)) + table + body


ADOBE_RGB = [[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]]
P3 = [[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif", "palette.png", "alpha.png", "alpha.webp"])
@pytest.mark.parametrize("primaries, want", [(ADOBE_RGB, (0, 181, 64)), (P3, (0, 185, 54))])
def test_profiles_are_converted_to_srgb_whatever_the_container(
    tmp_path: Path, name: str, primaries: list[list[float]], want: tuple[int, ...]
) -> None:
    picture = Image.new("RGB", (16, 16), (60, 180, 75))
    if name.startswith("palette"):
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    elif name.startswith("alpha"):
        picture = picture.convert("RGBA")
        picture.putpixel((0, 0), (0, 0, 0, 0))
    options = {"lossless": True} if name.endswith("webp") else {"quality": 100} if name.endswith(("jpg", "avif")) else {}
    picture.save(tmp_path / name, icc_profile=rgb_profile(primaries), **options)
    # gamma 2.2 alone differs a little from the curve that the known values were made with
    got = (read_image(tmp_path / name, 16, 16)[:, 8, 8] + 1) * 127.5
    assert near(got.round().astype(int).tolist(), want, 5), got


def test_a_grey_profile_and_cmyk(tmp_path: Path) -> None:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0"  # linear light
    grey = icc(b"GRAY", {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78,
                         b"cprt": b"text\0\0\0\0none\0", b"wtpt": b"XYZ \0\0\0\0" + bytes(12), b"kTRC": curve})  # fmt: skip
    for mode, value in (("L", 55), ("LA", (55, 255)), ("I;16", 55 * 257)):
        Image.new(mode, (8, 8), value).save(tmp_path / "a.png", icc_profile=grey)
        assert near(colour(tmp_path / "a.png"), (128, 128, 128), 2), mode
    Image.new("CMYK", (8, 8), (0, 255, 0, 0)).save(tmp_path / "a.tif", icc_profile=grey)  # not of its channels: ignored
    assert colour(tmp_path / "a.tif") == [255, 0, 255]


def cmyk_profile(ink: tuple[int, int, int]) -> bytes:
    """A profile of four inks, of which the second has the colour `ink` in Lab and every other mixture is black."""
    corners = np.full((2, 2, 2, 2, 3), (0, 128, 128), np.uint8)
    corners[0, 0, 0, 0], corners[0, 1, 0, 0] = (255, 128, 128), (round(ink[0] * 2.55), ink[1] + 128, ink[2] + 128)
    straight = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += straight * 4 + corners.tobytes() + straight * 3
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    whole = icc(b"CMYK", {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": b"XYZ \0\0\0\0" + bytes(12), b"A2B0": table})
    return whole[:12] + b"prtr" + whole[16:20] + b"Lab " + whole[24:]


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_cmyk_with_a_profile_has_its_inks(tmp_path: Path, name: str) -> None:
    """L* 54, a* 81, b* 70 is red, (255, 0, 0) nearly: what this profile's second ink is, and magenta is not."""
    for inks, want in (((0, 255, 0, 0), (255, 0, 0)), ((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (0, 0, 0))):
        picture = Image.new("CMYK", (16, 16), inks)
        picture.save(tmp_path / name, icc_profile=cmyk_profile((54, 81, 70)), **({"quality": 100} if name == "a.jpg" else {}))
        assert near(colour(tmp_path / name), want, 8), inks


def test_a_profile_that_does_not_fit_or_is_damaged_is_ignored(tmp_path: Path) -> None:
    for mode, value in (("RGB", (60, 180, 75)), ("L", 90), ("RGBA", (60, 180, 75, 255))):
        want = value[:3] if isinstance(value, tuple) else (90, 90, 90)
        for profile in (b"none", rgb_profile(P3)[:200], b"\0" * 200, *([rgb_profile(P3)] if mode == "L" else [])):
            Image.new(mode, (8, 8), value).save(tmp_path / "a.png", icc_profile=profile)
            assert colour(tmp_path / "a.png") == list(want)


def test_an_srgb_profile_changes_nothing_that_can_be_seen(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise).save(tmp_path / "a.png", icc_profile=profile)
    assert np.abs((read_image(tmp_path / "a.png", 32, 32) + 1) * 127.5 - noise.transpose(2, 0, 1)).max() <= 1.01


def with_chunk(path: Path, name: bytes, data: bytes) -> Path:
    """The same png with a chunk more after its header."""
    whole = path.read_bytes()
    chunk = name + data
    path.write_bytes(whole[:33] + struct.pack(">I", len(data)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:])
    return path


def test_hdr_and_wide_gamut_stills_are_converted_as_videos_are(tmp_path: Path) -> None:
    def png(level: tuple[int, int, int], primaries: int, transfer: int) -> list[int]:
        Image.new("RGB", (8, 8), level).save(tmp_path / "a.png")
        return colour(with_chunk(tmp_path / "a.png", b"cICP", bytes([primaries, transfer, 0, 1])))

    assert near(png((148, 148, 148), 9, 16), (255, 255, 255), 2)  # PQ: 203 nits
    assert near(png((191, 191, 191), 9, 18), (255, 255, 255), 2)  # HLG: 75 %
    assert near(png((109, 109, 109), 9, 16), (128, 128, 128), 3)
    assert near(png((60, 180, 75), 12, 13), (0, 183, 57), 1)  # Display P3
    assert png((60, 180, 75), 1, 13) == [60, 180, 75]


def test_hdr_avif_is_converted(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (148, 148, 148)).save(tmp_path / "a.avif", quality=100)
    data = (tmp_path / "a.avif").read_bytes()
    at = data.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(data[:at] + struct.pack(">HH", 9, 16) + data[at + 4 :])
    assert near(colour(tmp_path / "a.avif"), (255, 255, 255), 3)


def test_the_gamma_of_a_png(tmp_path: Path) -> None:
    for gamma, want in ((100000, 128), (45455, 55), (55556, 71)):  # linear light, that of sRGB nearly, that of old Macs
        Image.new("L", (8, 8), 55).save(tmp_path / "a.png")
        got = colour(with_chunk(tmp_path / "a.png", b"gAMA", struct.pack(">I", gamma)))
        assert near(got, (want,) * 3, 2), gamma
    assert colour(with_chunk(tmp_path / "a.png", b"sRGB", b"\0")) == [55] * 3


def test_lab_is_converted(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.new("RGB", (8, 8), (200, 100, 50)),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    lab.save(tmp_path / "a.tif")
    assert near(colour(tmp_path / "a.tif"), (200, 100, 50), 3)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "palette.png", "palette.gif", "a.avif", "a.tif", "key.png", "mask.png"])
def test_transparent_stills_lie_on_white(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGBA", (16, 16), (200, 30, 30, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 16))
    options: dict[str, object] = {"lossless": True} if name.endswith("webp") else {}
    if name == "palette.png":
        picture = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    elif name == "key.png":
        picture, options = picture.convert("RGB"), {"transparency": (0, 0, 0)}
    elif name == "mask.png":
        picture, options = picture.getchannel("A").convert("1"), {"transparency": 0}
    picture.save(tmp_path / name, **options)
    got = np.rint((read_image(tmp_path / name, 16, 16) + 1) * 127.5)
    assert np.abs(got[:, 8, 2] - 255).max() <= 2
    assert np.abs(got[:, 8, 13] - ((255,) * 3 if name == "mask.png" else (200, 30, 30))).max() <= 4


# Limits


LARGE = """
import resource, sys
from PIL import Image
from motionrt.runtime.media.stills import read_image
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
read_image(Image.new("RGB", (64, 64)), 64, 64)
before = peak()
read = read_image(sys.argv[1], 64, 64)
print(peak() - before, *((read[:, 32, 32] + 1) * 127.5).round().astype(int).tolist())
"""


@pytest.mark.slow
def test_a_photo_of_200_million_pixels_is_read_small(tmp_path: Path) -> None:
    """Without a warning (errors here), in a fraction of the 800 MB that its pixels take."""
    made = "import sys; from PIL import Image; Image.new('RGB', (16320, 12240), (10, 200, 30)).save(sys.argv[1], quality=50)"
    subprocess.run([sys.executable, "-P", "-c", made, str(tmp_path / "a.jpg")], check=True, timeout=100)
    command = [sys.executable, "-P", "-W", "error", "-c", LARGE, str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    climb, *got = map(int, done.stdout.split())
    assert climb < 100, "MiB"
    assert near(got, (10, 200, 30), 2) and not done.stderr


def test_a_reduced_photo_shows_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    picture = np.stack(
        [np.broadcast_to(ramp, (512, 512)), np.broadcast_to(ramp[:, None], (512, 512)), np.full((512, 512), 9)], 2
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    whole = read_image(tmp_path / "a.jpg", 48, 64)
    monkeypatch.setattr("motionrt.runtime.media.stills._WHOLE", 256 * 256)
    assert np.abs(read_image(tmp_path / "a.jpg", 48, 64) - whole).max() < 4 / 127.5


@pytest.mark.parametrize("limits, words", [
    (Limits(pixels=4095), "is 64 x 64, 0 million pixels; allowed are 0.004095"),
    (Limits(memory=4096 * 8 - 1), "takes about 0 MiB"),
])  # fmt: skip
def test_limits_are_options(tmp_path: Path, limits: Limits, words: str) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=f"{words}.*raise the limit .--limit (pixels|memory)=[0-9]+; in Python limits=Limits"):
        read_image(tmp_path / "a.png", 8, 8, limits=limits)
    read_image(tmp_path / "a.png", 8, 8, limits=Limits(pixels=4096, memory=4096 * 8))


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), 2**63, 10**400, True, "1", None, np.array(3)], ids=repr)
@pytest.mark.parametrize("name", ["pixels", "frames", "seconds", "memory"])
def test_limits_are_checked(name: str, wrong: object) -> None:
    with pytest.raises(InputError, match=f"the limit `{name}`"):
        Limits(**{name: wrong})  # type: ignore[arg-type]


def test_limits_that_are_counts_are_whole() -> None:
    assert Limits(pixels=4e8, frames=np.int64(9), seconds=np.float16(0.5)) == Limits(400_000_000, 9, 0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`frames` is 1.5; allowed is a whole number"):
        Limits(frames=1.5)  # type: ignore[arg-type]


def test_limits_of_texts() -> None:
    assert Limits.parse([]) == Limits() and Limits.parse(["pixels=4e8", "seconds=0.5"]) == Limits(400_000_000, seconds=0.5)
    for texts in (["pixel=1"], ["pixels"], ["pixels="], ["pixels=a"], ["pixels=0"], ["frames=nan"], ["frames=1.5"],
                  ["pixels=1", "pixels=2"], ["pixels=" + "9" * 5000], [""]):  # fmt: skip
        with pytest.raises(InputError, match="limit.* is .*; allowed is"):
            Limits.parse(texts)


def test_no_limits_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"limits is 5; allowed is Limits\(\.\.\.\) of motionrt.runtime.media.limits"):
        read_image(tmp_path / "a.png", 8, 8, limits=5)  # type: ignore[arg-type]
