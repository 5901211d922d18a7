"""Motion as it is shown: colours by direction and distance, arrows that end where things are."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from motionrt.runtime.media.fields import colours, field_view


def colour(x: float, y: float, most: float = 1.0) -> list[int]:
    return [int(part) for part in colours(np.array([x, y]).reshape(2, 1, 1), most)[0, 0]]


def test_the_wheel_is_middleburys() -> None:
    """Its corners are those of the colour cube: 15, 6, 4, 11, 13 and 6 hues apart."""
    for hue, corner in zip((0, 15, 21, 25, 36, 49), ([255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255],
                                                     [255, 0, 255]), strict=True):  # fmt: skip
        angle = np.pi * (2 * hue / 54 - 1)
        assert np.abs(np.array(colour(-np.cos(angle), -np.sin(angle))) - corner).max() <= 1


@pytest.mark.parametrize(
    ("x", "y", "hue"), [(1, 0, 0), (0, 1, 54), (-1, 0, 191), (0, -1, 260)], ids=["right", "down", "left", "up"]
)
def test_each_direction_has_its_hue(x: int, y: int, hue: int) -> None:
    found = colorsys.rgb_to_hsv(*(part / 255 for part in colour(x, y)))
    assert abs(360 * found[0] - hue) <= 3 and found[1] > 0.99


def test_distance_is_saturation_and_what_is_beyond_is_darker() -> None:
    assert colour(0, 0) == [255, 255, 255]
    assert [colour(x, 0, most=4) for x in (2, 4, 5)] == [[255, 127, 127], [255, 0, 0], [191, 0, 0]]
    turn = np.linspace(0, 2 * np.pi, 721)
    around = colours(np.stack([np.cos(turn), np.sin(turn)])[..., None], 1.0).astype(int)
    assert np.abs(np.diff(around, axis=0)).max() <= 43  # no seam but that of the wheel's own: a hue


def test_a_view_has_arrows_where_something_moves() -> None:
    frames = np.full((2, 32, 48, 3), 90, np.uint8)
    field = np.zeros((2, 2, 32, 48), np.float32)
    field[1, 0, 8:24, 8:24] = 12
    views = field_view(frames, field)
    assert views.shape == (2, 192, 576, 3) and views.dtype == np.uint8
    still, moved = views[:, :, :288].astype(int)
    changed = np.argwhere((still != moved).any(axis=2))
    (top, left), (bottom, right) = changed.min(axis=0) / 6, changed.max(axis=0) / 6
    assert 7 <= top and bottom <= 25 and 7 <= left and 34 <= right <= 37  # from the square on, and 12 to the right
    beside = views[1, :, 288:]
    assert beside[6 * 16, 6 * 16].tolist() == [255, 0, 0] and beside[6 * 28, 6 * 40].tolist() == [255, 255, 255]
    assert field_view(frames, np.zeros_like(field))[0, 0, 288].tolist() == [255, 255, 255]
