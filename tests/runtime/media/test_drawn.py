"""What is drawn on a picture, against the numbers of Motion-I2V's released routine, and what cannot be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.media.drawn import Kept, brush, drags, field, pchip, rasterise
from motionrt.runtime.media.stills import read_image, still_size

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "motion_i2v" / "drags.safetensors"
UNITS, TARGETS = {"A": 4, "B": 6, "C": 3}, [0, 1, 7, 14]  # of the cases; those that are stored, of 15
WHOLE = Kept.of(64, 32, 32, 64)


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[Any]]:
    return load_file(GOLDEN)


def tracks(golden: dict[str, NDArray[Any]], case: str) -> list[NDArray[Any]]:
    return [golden[key] for key in sorted(golden) if key.startswith(f"{case}.track") and "points" not in key]


def normalised(flow: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[T, 2, H, W]` pixels as the released routine leaves them: `[T, H, W, 2]` in 0..1."""
    return (flow.transpose(0, 2, 3, 1) / np.float32([64, 32]) + 1) / 2


@pytest.mark.parametrize("case", UNITS)
def test_drags_and_brush_are_those_of_the_release(golden: dict[str, NDArray[Any]], case: str) -> None:
    static, _ = brush("brush", golden[f"{case}.brush_painted"], WHOLE)
    np.testing.assert_array_equal(static[0, 0], golden[f"{case}.brush"])
    if case == "B":  # its drags begin where nothing may move, which is refused below: the squares alone
        paths = [golden[f"B.track{i}_points16"] for i in range(3)]
        corners = np.array([path[0] for path in paths], int)
        squares = np.stack([np.maximum(corners - UNITS[case], 0), corners + UNITS[case]], axis=1)
        drawn, owner = rasterise(paths, squares, 15, 32, 64)
        flow, mask = drawn * (1 - static[0]), np.maximum(owner > 0, static[0, 0])
    else:
        flow, mask = (
            value[0] for value in drags("drag", tracks(golden, case), WHOLE, 15, UNITS[case], static=static)[:2]
        )
        assert flow.dtype == mask.dtype == np.float32 and mask.shape == (1, 32, 64)
        mask = mask[0]
    np.testing.assert_array_equal(normalised(flow)[TARGETS], golden[f"{case}.drag"])
    np.testing.assert_array_equal(mask, golden[f"{case}.mask"])


def test_a_track_is_the_curve_of_scipy() -> None:
    scipy = pytest.importorskip("scipy.interpolate", reason="SciPy comes with scikit-image, for development")
    draw = np.random.default_rng(0)
    for n in range(2, 9):
        points = draw.integers(0, 9, (50, n, 2)).astype(float)  # equal values among them, and turns
        wanted = scipy.PchipInterpolator(np.arange(n), points, axis=1)(np.linspace(0, n - 1, 16))
        np.testing.assert_allclose(np.array([pchip(one, 16) for one in points]), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("given", [(64, 64), (128, 80), (50, 100)])
def test_a_drag_goes_where_the_pixels_of_the_picture_go(given: tuple[int, int]) -> None:
    """A dot in the picture as given is found where its drag begins, and its path is as long as it looks."""
    columns, rows = given
    picture = np.zeros((rows, columns, 3), np.uint8)
    x, y = columns // 2 + 6, rows // 2 - 8
    picture[y - 2 : y + 3, x - 2 : x + 3] = 255
    bright = read_image(picture, 32, 32).mean(axis=0) + 1
    found = [(bright.sum(axis=axis) * (np.arange(32) + 0.5)).sum() / bright.sum() for axis in (0, 1)]
    kept = Kept.of(*still_size(picture), 32, 32)
    flow, mask, said = drags("drag", [[(x + 0.5, y + 0.5), (x + 4.5, y + 8.5)]], kept, 3, unit=2)
    across, down = (np.flatnonzero(mask[0, 0].any(axis=axis)) for axis in (0, 1))
    assert [across[2], down[2]] == [int(part) for part in found] and said == []
    scale = 32 / min(columns, rows)
    np.testing.assert_allclose(flow[0, :, :, down[0], across[0]], scale * np.outer([1, 2, 3], [4, 8]) / 3, rtol=1e-6)


def test_a_picture_that_exif_turns_is_drawn_on_as_it_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("turned.jpg", "turned.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / name, exif=exif)
        assert still_size(tmp_path / name) == (30, 40)


def test_one_point_pins_and_later_tracks_lie_over_earlier_ones() -> None:
    flow, mask, _ = drags("drag", ["10,10", [(14, 10), (24, 10)]], WHOLE, 4, unit=4)
    np.testing.assert_array_equal(flow[0, :, :, 10, 8], [[0.25, 0.25], [0.5, 0.5], [0.75, 0.75], [1, 1]])
    np.testing.assert_array_equal(flow[0, :, 0, 10, 12], [2.5, 5, 7.5, 10])
    assert mask[0, 0].sum() == 8 * 12 and not flow[0, :, :, mask[0, 0] == 0].any()


def test_a_drag_between_the_cells_is_widened_to_its_own_with_a_word() -> None:
    for begin in ([63, 31], [12, 12], [10, 16]):
        _, mask, said = drags("drag", [[begin, (20, 20)]], WHOLE, 2, unit=1, cell=8)
        assert mask[0, 0, ::8, ::8].sum() == 1 and mask[0, 0, begin[1] // 8 * 8, begin[0] // 8 * 8] == 1
        assert said == ["drag 1 lies between the cells of 8 pixels; its square was widened to its cell."]
    assert drags("drag", [[(8, 8), (20, 20)]], WHOLE, 2, unit=1, cell=8)[2] == []


def test_where_the_brush_lets_nothing_move_is_known_to_stand_still() -> None:
    painted = np.zeros((32, 64), bool)
    painted[:, :32] = True
    static, said = brush("brush", painted, WHOLE)
    flow, mask, _ = drags("drag", [[(30, 16), (40, 16)]], WHOLE, 2, unit=8, static=static)
    assert said == [] and not flow[..., 32:].any() and mask[..., 32:].all() and not mask[0, 0, :, :22].any()
    assert flow[0, 1, 0, 16, 31] == 10
    nothing, none, _ = drags("drag", [], WHOLE, 2, unit=8, static=static)
    assert not nothing.any() and np.array_equal(none, static)


STATIC = np.zeros((1, 1, 32, 64), np.float32)
STATIC[..., 32:] = 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "drag is 3; allowed is a list of tracks"),
        ("3,4 5,6", "drag is '3,4 5,6'; allowed is a list of tracks"),
        ([[]], r"drag 1 is \[\]; allowed are 1 to 1024 points"),
        (["1,2", " "], "drag 2 is ' '; allowed are 1 to 1024 points"),
        ([[(1, 2, 3)]], r"drag 1 has the point \(1, 2, 3\); allowed are two finite numbers"),
        (["1,2 3;4"], r"drag 1 has the point \['3;4'\]"),
        ([[(1, float("nan"))]], r"drag 1 has the point \(1, nan\); allowed are two finite numbers, x and y"),
        ([[(1, 1e300)]], r"drag 1 has the point \(1, 1e\+300\)"),
        ([[(True, 1)]], r"drag 1 has the point \(True, 1\)"),
        ([[(1, 2)]] * 65, "drag has 65 tracks; allowed are 64"),
        ([[(64, 2), (3, 4)]], r"drag 1 begins at \(64, 2\), outside of what is kept of the picture: x from 0 to 64, y from"),
        ([[(3, -1), (3, 4)]], r"drag 1 begins at \(3, -1\), outside"),
        ([[(3, 2), (3, 35)]], "drag 1 goes further than the picture is wide or high"),
        ([[(8, 8), (9, 9)], [(9, 8), (20, 8)]], "drag 1 is covered by later ones"),
        ([[(39, 9), (20, 9)]], r"drag 1 begins at \(39, 9\), where the brush lets nothing move"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_of_drags_is_refused(value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        drags("drag", value, WHOLE, 4, unit=4, cell=8, static=STATIC)


def test_a_brush_is_bright_and_opaque_and_lies_over_the_whole_picture(tmp_path: Path) -> None:
    kept = Kept.of(128, 32, 32, 64)  # its middle half
    picture = np.zeros((32, 128, 4), np.uint8)
    picture[:, 48:80] = [200, 30, 30, 255]  # red
    picture[:, 80:96] = [255, 255, 255, 60]  # hardly there
    for size in ((128, 32), (256, 64), (64, 16)):
        path = tmp_path / "brush.png"
        Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(path)
        static, said = brush("brush", path, kept)
        assert static.dtype == np.float32 and said == []
        np.testing.assert_array_equal(np.flatnonzero(static[0, 0, 16] == 0), np.arange(16, 48))
    static, _ = brush("brush", np.eye(64, dtype=np.uint8)[:32] * 255, kept)  # of the video's size: as it is
    np.testing.assert_array_equal(static[0, 0], 1 - np.eye(64)[:32])


def test_a_brush_of_any_size_lies_on_a_picture_of_any_size() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        columns, rows, across, down, height, width = draw.integers(1, 99, 6)
        left, top, right, bottom = Kept.of(columns, rows, height, width).part(across, down)
        assert 0 <= left < right <= across and 0 <= top < bottom <= down
    everything = np.full((7, 13), 255, np.uint8)
    assert not brush("brush", everything, Kept.of(33, 31, 32, 64))[0].any()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_a_brush_is_a_picture_of_any_mode(tmp_path: Path, mode: str) -> None:
    painted, path = Image.new("L", (64, 32)), tmp_path / "brush.tiff"
    painted.paste(255, (0, 0, 20, 32))
    painted.convert(mode).save(path)
    np.testing.assert_array_equal(np.flatnonzero(brush("brush", path, WHOLE)[0][0, 0, 5] == 0), np.arange(20))


def test_nothing_painted_lets_everything_move_and_only_outside_is_refused() -> None:
    static, said = brush("brush", np.zeros((9, 9), np.uint8), WHOLE)
    assert not static.any() and said == ["brush: nothing is painted, so everything may move."]
    assert not brush("brush", None, WHOLE)[0].any()
    outside = np.zeros((32, 100), np.uint8)
    outside[:, :10] = 255
    with pytest.raises(InputError, match="brush has nothing painted that is left in 64 x 32 pixels"):
        brush("brush", outside, Kept.of(100, 32, 32, 64))
    with pytest.raises(InputError, match=r"the brush array is float64 \[4, 4\]"):
        brush("brush", np.zeros((4, 4)), WHOLE)


def test_a_field_follows_the_picture_and_keeps_its_pixels(tmp_path: Path) -> None:
    given = np.random.default_rng(0).normal(size=(3, 2, 32, 64)).astype(np.float32)
    np.testing.assert_array_equal(field("field", given, WHOLE, 3)[0], given)
    np.save(tmp_path / "field.npy", np.concatenate([np.zeros_like(given[:1]), given]).astype(np.float64))
    np.testing.assert_array_equal(field("field", tmp_path / "field.npy", WHOLE, 3)[0], given)
    # Of the whole picture, half as large each way, in its own pixels: 3 of them are 6.
    whole = np.full((3, 2, 16, 64), 3.0, np.float32)
    whole[..., :16] = whole[..., 48:] = -9
    kept = field("field", whole, Kept.of(128, 32, 32, 64), 3)[..., 1:-1]  # what lies beside it reaches half a pixel in
    np.testing.assert_array_equal(kept, np.full((1, 3, 2, 32, 62), 6))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (np.zeros((4, 2, 8, 8), int), r"field is int64 \[4, 2, 8, 8\]; allowed are floats \[3 or 4, 2, h, w\]"),
        (np.zeros((5, 2, 8, 8)), r"field is float64 \[5, 2, 8, 8\]"),
        (np.zeros((3, 2, 0, 8)), "field has 8 x 0 pixels"),
        (np.full((3, 2, 8, 8), np.nan), "field has values that are NaN or beyond 1e"),
        (np.full((3, 2, 8, 8), 1e300), "field has values that are NaN or beyond 1e"),
        (np.ones((4, 2, 8, 8)), "field begins with a field that is not zero"),
        (3, "field is a int; allowed is an array, or the path of an .npy file"),
    ],
)
def test_what_is_no_field_is_refused(value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        field("field", value, WHOLE, 3)


@pytest.mark.parametrize("damage", ["text", "cut", "objects", "archive"])
def test_a_file_that_holds_no_array_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "field.npy"
    if damage == "archive":
        np.savez(tmp_path / "field.npz", a=np.zeros(3))
        (tmp_path / "field.npz").rename(path)
    else:
        np.save(path, np.array([{}, {}]) if damage == "objects" else np.zeros((3, 2, 32, 64)), allow_pickle=True)
        data = b"no array" if damage == "text" else path.read_bytes()
        path.write_bytes(data[:-100] if damage == "cut" else data)
    with pytest.raises(MediaError, match="cannot be read as an array"):
        field("field", path, WHOLE, 3)
