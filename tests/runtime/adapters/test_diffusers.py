"""A bundle called as diffusers' pipelines are: the same names, the same results, and nothing that is ignored."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from motionrt import DiffusersPipeline
from motionrt.runtime.adapters.diffusers import REFUSED
from motionrt.runtime.errors import Cancelled, InputError
from motionrt.runtime.media.video import read_clip

Still = NDArray[np.uint8]


@pytest.fixture(scope="module")
def pipe(fake_bundle: Path, fake_memory: Path) -> Iterator[DiffusersPipeline]:
    opened = DiffusersPipeline.from_pretrained(fake_bundle, fake_memory, threads=1)
    with opened.pipeline:
        yield opened


def test_frames_are_those_of_the_motion_pipeline(pipe: DiffusersPipeline, still: Still) -> None:
    wanted = pipe.pipeline(
        still, "the star", "red", seed=5, steps=3, guidance=1.5, references=2, motion_scale=0.5, solver="dpm"
    )
    asked: dict[str, Any] = {
        "image": Image.fromarray(still), "prompt": "the star", "negative_prompt": "red", "num_inference_steps": 3,
        "guidance_scale": 1.5, "generator": 5, "references": 2, "motion_scale": 0.5, "solver": "dpm",
        "height": 16, "width": 16, "num_frames": 3,
    }  # fmt: skip
    output = pipe(**asked)
    assert len(output.frames) == 1 and all(frame.mode == "RGB" for frame in output.frames[0])
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in output.frames[0]]), wanted.frames)
    assert [found.id for found in output.results[0].references] == [found.id for found in wanted.references]
    floats = pipe(**asked, output_type="np").frames
    assert floats.dtype == np.float32 and floats.shape == (1, 3, 16, 16, 3) and 0 <= floats.min() <= floats.max() <= 1
    np.testing.assert_array_equal(np.rint(floats[0] * 255), wanted.frames)
    (alone,) = pipe(**asked, output_type="np", return_dict=False)
    np.testing.assert_array_equal(alone, floats)


def test_videos_of_a_prompt_share_what_no_seed_changes(pipe: DiffusersPipeline, still: Still) -> None:
    output = pipe(still, ["the star", "a ball"], num_videos_per_prompt=2, generator=8, num_inference_steps=2, output_type="np")
    assert output.frames.shape[0] == 4 and [result.seed for result in output.results] == [8, 9, 10, 11]
    assert ["text" in result.seconds for result in output.results] == [True, False, True, False]
    for place, (prompt, seed) in enumerate([("the star", 8), ("the star", 9), ("a ball", 10), ("a ball", 11)]):
        alone = pipe.pipeline(still, prompt, seed=seed, steps=2)
        np.testing.assert_array_equal(output.results[place].frames, alone.frames)


def test_generators_are_seeds(pipe: DiffusersPipeline, still: Still) -> None:
    torch = pytest.importorskip("torch")

    def seeds(generator: Any, videos: int = 1) -> list[int]:
        output = pipe(still, "the star", num_inference_steps=1, num_videos_per_prompt=videos, generator=generator)
        return [result.seed for result in output.results]

    assert seeds(torch.Generator().manual_seed(7)) == [7]
    assert seeds([torch.Generator().manual_seed(3), 2], videos=2) == [3, 2]
    drawing = np.random.default_rng(1)
    assert seeds(drawing) != seeds(drawing) and seeds(np.random.default_rng(1)) == seeds(np.random.default_rng(1))
    assert seeds(None) != seeds(None)
    with pytest.raises(InputError, match=r"generator is a list of 1; 2 videos are asked for"):
        seeds([1], videos=2)
    with pytest.raises(InputError, match="seed is 'one'"):
        seeds("one")


def test_callback_is_told_of_each_step_and_can_stop(pipe: DiffusersPipeline, still: Still) -> None:
    told: list[tuple[int, float]] = []

    def callback(inner: DiffusersPipeline, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert inner is pipe and tensors == {}
        told.append((step, timestep))
        inner._interrupt = step == stop
        return tensors

    stop = 9
    pipe(still, "the star", num_inference_steps=3, callback_on_step_end=callback)
    rows = pipe.pipeline.bundle.schedule("video", None, 3).rows
    column = pipe.pipeline.bundle.manifest.loops["video"].columns.index("timestep")
    assert told == [(step, rows[step, column]) for step in range(3)]
    told.clear()
    stop = 1
    with pytest.raises(Cancelled, match="after step 2 of 3"):
        pipe(still, "the star", num_inference_steps=3, callback_on_step_end=callback)
    assert len(told) == 2


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"height": 480}, "height is 480; bundle 'fake' makes 16"),
        ({"num_frames": 49}, "num_frames is 49; bundle 'fake' makes 3"),
        ({"output_type": "pt"}, "output_type is 'pt'; allowed are 'pil' and 'np'"),
        ({"latents": 0}, "latents is 0; nothing here takes it: noise is drawn from the seed"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "tensors stay where they are computed"),
        ({"callback_on_step_end": 1}, "callback_on_step_end is 1; it must be a function"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "they must be equally long"),
        ({"prompt": []}, "they must be equally long"),
        ({"seed": 1}, "seed is 1; here it is called generator"),
        ({"guidance": 2}, "guidance is 2; here it is called guidance_scale"),
        ({"nonsense": 1}, "'nonsense' is nothing that bundle 'fake' takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(pipe: DiffusersPipeline, still: Still, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        pipe(**{"image": still, "prompt": "the star", **asked})


@pytest.mark.slow  # it imports two pipelines, and transformers with them
@pytest.mark.parametrize("name", ["CogVideoXImageToVideoPipeline", "StableVideoDiffusionPipeline"])
def test_every_argument_of_diffusers_is_taken_or_refused(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(getattr(diffusers, name).__call__).parameters
    ours = inspect.signature(DiffusersPipeline.__call__).parameters
    assert theirs.keys() - ours.keys() - REFUSED.keys() == set()
    assert {"image", "num_inference_steps", "generator", "output_type", "callback_on_step_end"} <= theirs.keys() & ours.keys()


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_export_to_video_of_diffusers_takes_the_frames(
    pipe: DiffusersPipeline, still: Still, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output_type: str
) -> None:
    """Its way through OpenCV: no imageio-ffmpeg is installed here."""
    module = importlib.import_module("diffusers.utils.export_utils")
    monkeypatch.setattr(module, "is_imageio_available", lambda: False)
    frames = pipe(still, "the star", num_inference_steps=1, output_type=output_type).frames[0]
    path = module.export_to_video(frames, str(tmp_path / "star.mp4"), fps=8)
    assert read_clip(path, 3, 16, 16, 8).shape == (3, 3, 16, 16)


def test_import_brings_neither_diffusers_nor_torch(tmp_path: Path) -> None:
    code = "import sys, motionrt; motionrt.DiffusersPipeline; print(sorted({'torch', 'diffusers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
