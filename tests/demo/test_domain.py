"""The demo's domain: pictures, paths, captions and the tracker that measures motion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from by_path import load_by_path

domain = load_by_path(Path(__file__).resolve().parents[2] / "demo" / "domain.py")


@pytest.mark.parametrize("family", sorted(domain.FAMILIES))
def test_tracker_follows_every_family(family: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        spec = domain.sample_spec(rng, family)
        frames, mask = domain.render(spec)
        assert frames.shape == (17, 64, 64, 3) and frames.dtype == np.uint8
        assert mask.shape == (17, 64, 64) and 0.0 <= mask.min() and mask.max() <= 1.0
        assert np.abs(domain.track(frames) - spec.centres).max() < 1.0


def test_tracker_holds_on_blurred_noisy_frames() -> None:
    rng = np.random.default_rng(5)
    for _ in range(10):
        spec = domain.sample_spec(rng)
        frames, _ = domain.render(spec)
        soft = frames.astype(np.float64)
        for axis in (1, 2):
            for _ in range(2):
                soft = (soft + np.roll(soft, 1, axis) + np.roll(soft, -1, axis)) / 3
        soft = np.clip(soft + rng.normal(size=soft.shape) * 8, 0, 255).astype(np.uint8)
        assert domain.end_point_error(soft, spec.centres) < 2.0


def test_tracker_repeats_the_last_centre_when_the_sprite_is_gone() -> None:
    spec = domain.sample_spec(np.random.default_rng(0), "slide_left")
    frames, _ = domain.render(spec)
    frames[5:] = 128
    centres = domain.track(frames)
    assert np.allclose(centres[5:], centres[4])


def test_tracker_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="uint8"):
        domain.track(np.zeros((64, 64, 3), np.uint8))


def test_same_seed_same_clip_and_paths_stay_inside() -> None:
    for family in domain.FAMILIES:
        first = domain.sample_spec(np.random.default_rng(11), family)
        assert first == domain.sample_spec(np.random.default_rng(11), family)
        assert first.centres.min() >= 8.0 and first.centres.max() <= 56.0
        assert np.allclose(first.path[0], 0.0, atol=1e-6)
    rng = np.random.default_rng(2)
    for _ in range(100):
        spec = domain.sample_spec(rng, path=domain.free_path(rng))
        assert spec.family == "free" and spec.centres.min() >= 8.0 and spec.centres.max() <= 56.0


def test_captions_of_seen_families_use_the_vocabulary_and_all_prompts_fit_twelve_words() -> None:
    vocabulary = set(domain.words())
    rng = np.random.default_rng(1)
    for name in domain.FAMILIES:
        spec = domain.sample_spec(rng, name)
        said = [domain.caption(spec, motion=False), domain.caption(spec), domain.caption(spec, paraphrase=True)]
        assert all(len(text.split()) <= 12 and "," not in text for text in said) and len(set(said)) == 3
        if name in domain.SEEN:
            assert set(" ".join(said[:2]).split()) <= vocabulary


def test_unseen_kinds_are_outside_the_training_support() -> None:
    """Each unseen clip crosses its own path or jumps; no path that training can draw does either, jitter included."""
    rng = np.random.default_rng(9)
    assert len(domain.UNSEEN) >= 2 and not set(domain.SEEN) & set(domain.UNSEEN)
    for name in domain.UNSEEN:
        kinds = {(domain.crosses(s.path), domain.jumps(s.path)) for s in (domain.sample_spec(rng, name) for _ in range(60))}
        assert kinds <= {(True, False), (False, True)} and len(kinds) == 1
    drawn = [domain.sample_spec(rng) for _ in range(600)]
    assert {spec.family for spec in drawn} == set(domain.SEEN)
    drawn += [domain.sample_spec(rng, path=domain.free_path(rng)) for _ in range(600)]
    assert not any(domain.crosses(spec.path) or domain.jumps(spec.path) for spec in drawn)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ([(0, 0), (10, 10), (10, 0), (0, 10)], True),
        ([(0, 0), (10, 0), (0, 0)], False),  # there and back again
        ([(0, 0), (10, 0), (10, 10), (0, 10), (0, 0)], False),  # closed, touching at the end only
        ([(0, 0), (5, 0), (5, 5)], False),
    ],
)
def test_crossing_is_proper(path: list[tuple[float, float]], expected: bool) -> None:
    assert domain.crosses(np.array(path, float)) is expected


def test_size_and_turn_see_what_they_are_named_for() -> None:
    spec = replace(domain.sample_spec(np.random.default_rng(4), "bob"), shape="square", radius=10.0)
    frames = domain.render(spec)[0]
    size, turn = domain.size_and_turn(frames, "square")
    assert np.abs(size - 1).max() < 0.03 and np.abs(turn).max() < 2
    smaller = frames.copy()
    smaller[1:] = domain.render(replace(spec, radius=8.0))[0][1:]
    assert np.allclose(domain.size_and_turn(smaller, "square")[0][1:], 0.8, atol=0.03)
    still = domain.render(replace(spec, shape="triangle"), frames=1)[0][0]
    turned = np.stack([still, np.rot90(still)])  # a quarter turn is 30 degrees modulo a triangle's 120
    assert abs(abs(domain.size_and_turn(turned, "triangle")[1][1]) - 30) < 3


def test_a_still_is_frame_zero_at_any_size() -> None:
    _, spec = domain.input_specs()[0]
    still, _ = domain.render(spec, 256, frames=1)
    frames, _ = domain.render(spec)
    assert still.shape == (1, 256, 256, 3)
    small = still[0].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - frames[0]).mean() < 2.0
