"""What a memory of motion costs in path error: how it is measured, and that a bundle says what was."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from motionrt.benchmarks import harness
from motionrt.benchmarks.guided import fixed_noise
from motionrt.export.systems.motionclone.parts import FIXED_NOISE_ERROR
from motionrt.runtime.pipeline import MotionPipeline


@pytest.mark.slow
def test_only_the_noise_that_a_clip_is_read_with_is_another() -> None:
    clip = fixed_noise.DEMO / "clips" / "000_slide_left.mp4"
    with MotionPipeline.from_bundle(fixed_noise.DEMO / "bundle", threads=1) as pipeline:
        request = pipeline.request("a red star moves", seed=3, steps=10, references=[clip])
        own, fixed = (fixed_noise.answered(pipeline, pipeline.start(request), way) for way in (False, True))
        assert np.array_equal(own, pipeline.result(pipeline.start(request)).frames)
        assert not np.array_equal(own, fixed)


def test_a_bundle_says_what_was_measured() -> None:
    lines = (harness.RESULTS / "fixed_noise.jsonl").read_text().splitlines()
    own, fixed = (json.loads(line) for line in lines[-2:])
    assert (own["noise"], fixed["noise"]) == fixed_noise.WAYS and own["run"] == fixed["run"]
    px, targets = f"{fixed['abs'][0]:.1f} px for {own['abs'][0]:.1f} px", f"{own['targets']} targets"
    assert px in FIXED_NOISE_ERROR and targets in FIXED_NOISE_ERROR
