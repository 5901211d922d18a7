"""Guidance in parts on the run side: what is called ahead of a step, on which device, and when a branch is left out."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.open import RunOptions, open_backend
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.footprint import roles
from motionrt.runtime.bundle.manifest import parse_manifest
from motionrt.runtime.errors import BackendError, BundleError, InputError
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.scheduler import Scheduler

Run = Callable[..., tuple[int, str, str]]
ASKED: dict[str, Any] = {"prompt": "a red ball moves left", "motion_scale": 0, "steps": 5}


class Counting:
    """A backend that counts the calls of each graph, and loads, and may wait in `meet`."""

    label, precision, parallel_load = "counting", "float32", False

    def __init__(self, meet: threading.Barrier | None = None) -> None:
        self.inner, self.calls, self.loads, self.meet = OnnxRuntimeBackend(threads=1), Counter[str](), Counter[str](), meet

    def load(self, bundle: Bundle, name: str) -> Any:
        self.loads[name] += 1
        graph, own = self.inner.load(bundle, name), self

        def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
            own.calls[name] += 1
            if own.meet is not None and name == "step_branch":
                own.meet.wait(timeout=20)
            return graph.run(inputs)

        return SimpleNamespace(spec=graph.spec, put=graph.put, run=run)


@pytest.fixture
def picture() -> Any:
    return np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture
def whole(fake_bundle: Path, picture: Any) -> Callable[..., Any]:
    """The frames of the bundle whose step has both branches in it."""
    pipeline = MotionPipeline.from_bundle(fake_bundle, threads=1)
    return lambda **asked: pipeline(picture, **{**ASKED, **asked}).frames.astype(int)


@pytest.mark.parametrize("guidance", [None, 1.0, 3.5, [3.0, 2.0, 1.0, 1.0, 2.0]], ids=["default", "1", "3.5", "of steps"])
def test_parts_give_the_frames_of_the_whole(guidance: Any, split_bundle: Path, whole: Callable[..., Any], picture: Any) -> None:
    asked = {} if guidance is None else {"guidance": guidance}
    for device in (None, "cpu", "cpu+cpu", "cpu+cpu+cpu"):
        with MotionPipeline.from_bundle(split_bundle, threads=1, device=device) as pipeline:
            result = pipeline(picture, **ASKED, **asked)
        assert np.abs(result.frames - whole(**asked)).max() <= 1
        assert len(result.step_seconds) == 5
        assert result.backend.count("CPUExecutionProvider") == (device or "cpu").count("cpu")


def test_a_branch_is_left_out_where_guidance_is_1(split_bundle: Path, picture: Any) -> None:
    backend = Counting()
    pipeline = MotionPipeline(Bundle.open(split_bundle), backend)
    pipeline(picture, **ASKED, guidance=[3.0, 2.0, 1.0, 1.0, 1.0])
    assert backend.calls["step_branch"] == 2 * 2 + 3
    assert (backend.calls["step"], backend.calls["step_conditional"]) == (2, 3)
    backend.calls.clear()
    pipeline(picture, **ASKED, guidance=1)
    assert backend.calls["step_branch"] == backend.calls["step_conditional"] == 5 and not backend.calls["step"]


def test_the_command_takes_guidance_and_devices_as_they_are_written(
    split_bundle: Path, picture: Any, tmp_path: Path, run: Run
) -> None:
    Image.fromarray(picture).save(still := tmp_path / "still.png")
    asked = ("generate", "-b", split_bundle, "-i", still, "-p", "a red ball", "--motion-scale", 0, "-o", tmp_path / "a.mp4")
    code, out, err = run(*asked, "--steps", 3, "--guidance", "3,1,1", "--device", "cpu+cpu")
    assert code == 0 and "step_conditional" in out, err
    for wrong, says in (("3,x", "'3,x' is no number, and no list of one for each step"), ("3,1", "has 2 numbers for 3 steps")):
        code, _, err = run(*asked, "--steps", 3, "--guidance", wrong)
        assert code == 2 and says in err


def test_branches_run_at_the_same_time_each_on_its_device(split_bundle: Path, picture: Any, whole: Callable[..., Any]) -> None:
    """Each call waits for the other one, in every step: one after the other they would wait for ever."""
    meet = threading.Barrier(2)
    first, second = Counting(meet), Counting(meet)
    both: Any = first
    both.beside = (second,)
    pipeline = MotionPipeline(Bundle.open(split_bundle), both)
    pipeline.load()
    assert second.loads == {"step_branch": 1}  # nothing else is wanted there
    frames = pipeline(picture, **ASKED).frames
    assert np.abs(frames - whole()).max() <= 1
    assert first.calls["step_branch"] == second.calls["step_branch"] == 5 and sum(second.calls.values()) == 5


def test_an_error_beside_is_the_requests(split_bundle: Path, picture: Any) -> None:
    class Broken(Counting):
        def load(self, bundle: Bundle, name: str) -> Any:
            graph = super().load(bundle, name)

            def run(inputs: Mapping[str, Any]) -> dict[str, Any]:
                raise BackendError("the second device is gone.")

            return SimpleNamespace(spec=graph.spec, put=graph.put, run=run)

    backend: Any = Counting()
    backend.beside = (Broken(),)
    with pytest.raises(BackendError, match="the second device is gone"):
        MotionPipeline(Bundle.open(split_bundle), backend)(picture, **ASKED)


def test_with_low_memory_the_graphs_of_a_step_stay_beside_each_other(split_bundle: Path, picture: Any) -> None:
    backend = Counting()
    pipeline = MotionPipeline(Bundle.open(split_bundle), backend, low_memory=True)
    pipeline(picture, **ASKED)
    assert backend.loads["step_branch"] == backend.loads["step"] == 1 and {*pipeline._graphs} == {"decode"}


def test_jobs_take_turns_and_progress_counts_steps(split_bundle: Path, picture: Any) -> None:
    with MotionPipeline.from_bundle(split_bundle, threads=1) as pipeline:
        requests = [pipeline.request(picture, **ASKED, seed=seed) for seed in (1, 2)]
        alone = [pipeline.result(pipeline.start(request)).frames for request in requests]
        scheduler = Scheduler(pipeline, batch=2)
        jobs = [scheduler.add(pipeline.start(request)) for request in requests]
        assert jobs[0].calls() | {"step": 5} == jobs[0].calls()
        scheduler.run()
        for frames, job in zip(alone, jobs, strict=True):
            np.testing.assert_array_equal(pipeline.result(job).frames, frames)
        seen: list[tuple[int, int]] = []
        pipeline(picture, **ASKED, callback=lambda step, steps: seen.append((step, steps)))
    assert seen == [(step, 5) for step in range(5)]


def test_bundle_tells_networks_from_what_puts_them_together(split_bundle: Path, run: Run) -> None:
    bundle = Bundle.open(split_bundle)
    assert bundle.steps == ["step", "step_conditional", "step_branch"] and bundle.networks == ["step_branch"]
    assert roles(bundle.manifest).when["step_branch"] == "loop"
    code, out, _ = run("inspect", split_bundle)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and "ahead of step ──▶ step_branch ──▶ without" in lines
    assert any("where guidance is 1: step_conditional in place of step" in line for line in lines)


@pytest.mark.parametrize("device", ["cpu+cpu", "cpu+"])
def test_several_devices_are_for_bundles_with_parts(device: str, fake_bundle: Path) -> None:
    says = "2 devices are given for one request, and a step of bundle 'fake' is one call. Export it with --split-guidance"
    with pytest.raises((InputError, BackendError), match=says if device == "cpu+cpu" else "device is ''"):
        MotionPipeline.from_bundle(fake_bundle, device=device)


def test_auto_takes_one_device(split_bundle: Path) -> None:
    with pytest.raises(InputError, match="with the backend auto it must be cpu, cuda, or not given"):
        MotionPipeline.from_bundle(split_bundle, backend="auto", device="cuda:0+cuda:1")
    assert open_backend(RunOptions(device="cpu+cpu", threads=1)).label.count("+") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ahead": {"other": []}}, "makes calls ahead of 'other', which is none of its step graphs"),
        ({"ahead": {"step": [{"graph": "decode"}]}}, "makes `video` ahead of 'step', which does not read it"),
        ({"ahead": {"step": [{"graph": "nothing"}]}}, "runs 'nothing', which is no graph of the bundle"),
        ({"ahead": {}}, "reads `conditioned`, which nothing before it gives"),
        ({"where": {"step": {"runs": "other", "column": "guidance", "value": 1}}}, "runs 'other' in place of 'step' where"),
        ({"where": {"step": {"runs": "step_conditional", "column": "x", "value": 1}}}, "where `x` is 1; both must be graphs"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: Mapping[str, Any], says: str, split_bundle: Path) -> None:
    raw = json.loads((split_bundle / "bundle.json").read_text())
    raw["loops"]["video"] |= change
    with pytest.raises(BundleError, match=says):
        parse_manifest(raw)
