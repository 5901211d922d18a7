"""MotionClone's shipped demo, as a newcomer gets it: its bundle and memory, on ONNX Runtime, with no options."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import domain
import numpy as np
import pytest

from motionrt.runtime.errors import InputError
from motionrt.runtime.files import sha256_of
from motionrt.runtime.pipeline import MotionPipeline

PLACE = Path(__file__).resolve().parents[2] / "demo" / "motionclone"
PROMPT = "a red star slides straight to the left"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[MotionPipeline]:
    with MotionPipeline.from_bundle(PLACE / "bundle", memory=PLACE / "memory", threads=1) as opened:
        yield opened


def test_bundle_and_memory_are_of_the_shipped_checkpoint(pipeline: MotionPipeline) -> None:
    assert pipeline.bundle.manifest.provenance["checkpoint"] == sha256_of(PLACE / "checkpoint.safetensors")
    captions = json.loads((PLACE / "clips" / "captions.json").read_text())
    assert pipeline.memory is not None and len(pipeline.memory) == len(captions)
    sizes = {path.name: path.stat().st_size for path in (PLACE / "bundle").rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 25e6, sizes


def test_a_retrieved_clip_is_followed_and_the_energy_falls(pipeline: MotionPipeline) -> None:
    job, energies = pipeline.start(pipeline.request(PROMPT, seed=1)), []
    while (call := job.call) is not None:
        outputs = pipeline.run(call, job.placed)
        if "energy" in outputs:
            scale = np.asarray(call.inputs["weight"]).item()
            energies.append(float(np.asarray(outputs["energy"]).item()) / scale)
        job.send(outputs, 0.0)
    result = pipeline.result(job)
    assert [reference.caption for reference in result.references] == [domain.FAMILIES["slide_left"].phrase]
    assert len(energies) >= 8 and energies[-1] < energies[0] / 2, energies
    centres = domain.track(result.frames)
    assert centres[-1, 0] - centres[0, 0] < -8, centres
    assert abs(centres[-1, 1] - centres[0, 1]) < 6, centres


@pytest.mark.slow
def test_without_a_reference_it_is_the_plain_model(pipeline: MotionPipeline) -> None:
    off = pipeline(PROMPT, seed=1, steps=10, motion_scale=0)
    below = pipeline(PROMPT, seed=1, steps=10, minimum_score=1.0)
    assert off.frames.shape == (16, 64, 64, 3) and np.array_equal(off.frames, below.frames)
    assert off.fallback is None and "minimum_score" in (below.fallback or "")
    assert "step_guided" not in off.seconds and "extract" not in off.seconds


def test_an_image_is_refused_in_a_sentence(pipeline: MotionPipeline) -> None:
    with pytest.raises(InputError, match="image"):
        pipeline(PROMPT, image="star.png")
