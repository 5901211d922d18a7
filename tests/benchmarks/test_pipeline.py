"""benchmarks/pipeline.py on the fake bundle: both forms of a step see the same request, and graphs the inputs of a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motionrt.benchmarks.pipeline import answer, any_request, open_pipeline, plain_frames, recorded, step_request


def test_the_plain_step_gives_the_frames_of_the_rewritten_one(fake_bundle: Path) -> None:
    with open_pipeline(fake_bundle, threads=1) as pipeline:
        request = any_request(pipeline)
        want, got = answer(pipeline, request).frames, plain_frames(pipeline, request)
    assert want.shape == got.shape and want.std() > 0
    assert np.abs(want.astype(int) - got).max() <= 1


def test_both_forms_take_the_same_step_from_the_middle_of_the_schedule(fake_bundle: Path) -> None:
    with open_pipeline(fake_bundle, threads=1) as pipeline:
        step, columns = step_request(pipeline), pipeline.bundle.manifest.loops["video"].columns
        found = []
        for plain in (False, True):
            inputs = step.one_step(plain=plain)
            row = dict(zip(columns, step.rows[len(step.rows) // 2], strict=True))
            assert inputs["guidance"].tolist() == [row["guidance"]] and inputs["coefficients"][0, 0] == row["p0"]
            assert list(inputs["latents"].shape) == step.shape and inputs["previous_x0"].std() > 0.5, "of an earlier step"
            found.append(pipeline.graph(step.loop(plain=plain).graphs[0])(inputs))
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], rtol=0, atol=1e-5)


def test_what_is_recorded_gives_what_the_request_gave(fake_bundle: Path) -> None:
    with open_pipeline(fake_bundle, threads=1) as pipeline:
        request = any_request(pipeline)
        seen, result = recorded(pipeline, request)
        assert seen.keys() == result.seconds.keys() - {"inputs", "search"}
        video = pipeline.graph("decode")(seen["decode"])["video"][0]
    pixels = np.rint((video + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels, result.frames)


def test_a_bundle_without_the_plain_step_is_said_so(edit_bundle: Callable[..., Path]) -> None:
    def without(manifest: dict[str, Any]) -> None:
        del manifest["loops"]["video"]["plain"]

    with open_pipeline(edit_bundle(without), threads=1) as pipeline, pytest.raises(ValueError, match="carries no plain step"):
        plain_frames(pipeline, any_request(pipeline))
