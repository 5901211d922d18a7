"""The demo's domain: pictures, paths, captions and the tracker that measures motion."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def load_domain() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "demo" / "domain.py"
    spec = importlib.util.spec_from_file_location("motionrt_demo_domain", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


domain = load_domain()


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


def test_captions_use_the_vocabulary_and_fit_twelve_words() -> None:
    vocabulary = set(domain.words())
    rng = np.random.default_rng(1)
    for name, family in domain.FAMILIES.items():
        spec = domain.sample_spec(rng, name)
        for phrase in [None, *range(len(family.phrases))]:
            text = domain.caption(spec, phrase).split()
            assert len(text) <= 12 and set(text) <= vocabulary


def test_unseen_families_are_never_drawn_for_training() -> None:
    rng = np.random.default_rng(9)
    assert domain.UNSEEN and not set(domain.SEEN) & set(domain.UNSEEN)
    assert not {domain.sample_spec(rng).family for _ in range(300)} & set(domain.UNSEEN)


def test_a_still_is_frame_zero_at_any_size() -> None:
    _, spec = domain.input_specs()[0]
    still, _ = domain.render(spec, 256, frames=1)
    frames, _ = domain.render(spec)
    assert still.shape == (1, 256, 256, 3)
    small = still[0].reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(small - frames[0]).mean() < 2.0
