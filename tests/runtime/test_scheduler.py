"""Many jobs in one process: the same frames as alone, turns, batches that are proven first, and one that stops or fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import BackendError, Cancelled, InputError
from motionrt.runtime.pipeline import Job, MotionPipeline
from motionrt.runtime.scheduler import Scheduler, may_share, merge, split

Still = NDArray[np.uint8]
OFF = {"motion_scale": 0}


class Counting:
    """A backend and what it was asked to run: (graph, size of the batch). `wrong`: a graph whose batches differ by a little;
    `fails`: calls whose latents hold this number fail."""

    def __init__(self, watching: ModuleType, wrong: str = "", fails: float | None = None) -> None:
        self.calls, self.wrong, self.fails = list[tuple[str, int]](), wrong, fails
        self.backend: Any = watching.Watching(self.run)

    def run(self, name: str, inputs: Mapping[str, Any], run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        batch = len(next(iter(inputs.values())))
        self.calls.append((name, batch))
        if "latents" in inputs and self.fails is not None and np.isclose(inputs["latents"], self.fails).any():
            raise RuntimeError("a fault")
        more = np.float32(1e-3 if name == self.wrong and batch > 1 else 0)
        return {key: value + more for key, value in run(inputs).items()}


@pytest.fixture
def pipeline(fake_bundle: Path) -> Iterator[MotionPipeline]:
    with MotionPipeline.from_bundle(fake_bundle, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fault_of_any_kind_leaves_the_other_jobs(pipeline: MotionPipeline, still: Still, batch: int) -> None:
    """Also one that is no error of ours, such as too little memory for one request."""
    scheduler = Scheduler(pipeline, batch)
    jobs = [scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, **OFF))) for i in range(3)]
    run = pipeline.run

    def short(call: Any, placed: Any) -> Any:
        if placed is jobs[1].placed and call.graph in ("decode", "step"):
            raise MemoryError("too little")
        return run(call, placed)

    pipeline.run = short  # type: ignore[method-assign]
    scheduler.same = {"decode": False, "step": False}  # each alone, which is where one of them fails
    scheduler.run()
    assert isinstance(jobs[1].failure, MemoryError)
    assert all(frame.shape == (3, 16, 16, 3) for frame in frames(pipeline, [jobs[0], jobs[2]]))


def test_ctrl_c_leaves_the_jobs_in_the_line(pipeline: MotionPipeline, still: Still) -> None:
    scheduler, run = Scheduler(pipeline), pipeline.run
    jobs = [scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, **OFF))) for i in range(2)]

    def interrupted(call: Any, placed: Any) -> Any:
        pipeline.run = run  # type: ignore[method-assign]
        raise KeyboardInterrupt

    scheduler.turn()
    pipeline.run = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        scheduler.run()
    assert len(scheduler) == 2
    scheduler.run()
    for seed, made in enumerate(frames(pipeline, jobs)):
        np.testing.assert_array_equal(made, pipeline(still, "a", seed=seed, **OFF).frames)


def frames(pipeline: MotionPipeline, jobs: list[Job]) -> list[NDArray[np.uint8]]:
    return [pipeline.result(job).frames for job in jobs]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_jobs_give_what_they_give_alone(pipeline: MotionPipeline, still: Still, batch: int) -> None:
    """Of other lengths, at other steps, with other guidance and another solver: in whatever company."""
    other = {"solver": "dpm", "steps": 4}
    options = [{"steps": 3}, {"steps": 5, "guidance": 4}, other, {"steps": 3, "negative_prompt": "down"}]
    alone = [pipeline(still, "a red ball", seed=i, **OFF, **more).frames for i, more in enumerate(options)]
    scheduler = Scheduler(pipeline, batch)
    jobs = [
        scheduler.add(pipeline.start(pipeline.request(still, "a red ball", seed=i, **OFF, **more)))
        for i, more in enumerate(options)
    ]
    scheduler.run()
    assert len(scheduler) == 0
    for got, wanted in zip(frames(pipeline, jobs), alone, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_jobs_take_turns(pipeline: MotionPipeline, still: Still) -> None:
    long, short = (pipeline.start(pipeline.request(still, "a", steps=steps, **OFF)) for steps in (10, 2))
    scheduler = Scheduler(pipeline)
    scheduler.add(long)
    for _ in range(6):
        scheduler.turn()
    assert long.call is not None and long.call.loop == "video"  # under way when the other comes
    scheduler.add(short)
    order = [job for _ in range(40) for job in scheduler.turn()]
    assert order[:8] == [long, short] * 4
    assert short.frames is not None and len(short.step_seconds) == 2 and len(long.step_seconds) == 10


def test_steps_share_a_batch_once_it_gave_the_same_bits(fake_bundle: Path, watching: ModuleType, still: Still) -> None:
    backend = Counting(watching)
    pipeline = MotionPipeline(Bundle.open(fake_bundle), backend.backend)
    scheduler = Scheduler(pipeline, 2)
    jobs = [scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, steps=4 + i, **OFF))) for i in range(2)]
    scheduler.run()
    assert scheduler.same["step"]
    steps = [size for name, size in backend.calls if name == "step"]
    # the first two: together, and each alone for the proof; then pairs of other steps and schedules; the longer one's last
    # alone
    assert steps == [2, 1, 1, 2, 2, 2, 1]
    assert all(job.failure is None for job in jobs)


def test_where_a_batch_gives_other_bits_jobs_run_alone(fake_bundle: Path, watching: ModuleType, still: Still) -> None:
    backend = Counting(watching, wrong="step")
    pipeline = MotionPipeline(Bundle.open(fake_bundle), backend.backend)
    alone = [pipeline(still, "a", seed=i, steps=3, **OFF).frames for i in range(2)]
    for inexact in (False, True):
        backend.calls.clear()
        scheduler = Scheduler(pipeline, 2, inexact=inexact)
        jobs = [scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, steps=3, **OFF))) for i in range(2)]
        scheduler.run()
        assert scheduler.same["step"] is False  # it is said, whatever was asked for
        steps = [size for name, size in backend.calls if name == "step"]
        assert steps == ([2, 1, 1, 2, 2] if inexact else [2, 1, 1, 1, 1, 1, 1])
        if not inexact:
            for got, wanted in zip(frames(pipeline, jobs), alone, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_one_that_is_aborted_leaves_the_others(pipeline: MotionPipeline, still: Still) -> None:
    scheduler = Scheduler(pipeline, 2)
    one, other = (scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, steps=6, **OFF))) for i in range(2))
    for _ in range(8):
        scheduler.turn()
    scheduler.abort(one)
    scheduler.run()
    assert one.frames is None and one.call is None and one.values == {}
    with pytest.raises(Cancelled, match="stopped before it was done"):
        pipeline.result(one)
    np.testing.assert_array_equal(pipeline.result(other).frames, pipeline(still, "a", seed=1, steps=6, **OFF).frames)


def test_one_that_fails_leaves_the_others(fake_bundle: Path, watching: ModuleType, still: Still) -> None:
    from motionrt.runtime.noise import noise

    backend = Counting(watching)
    pipeline = MotionPipeline(Bundle.open(fake_bundle), backend.backend)
    wanted = pipeline(still, "a", seed=1, steps=4, **OFF).frames
    backend.fails = float(noise(0, 0, 0, (1,))[0])  # the first number of seed 0's latents
    scheduler = Scheduler(pipeline, 2)
    bad, good = (scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, steps=4, **OFF))) for i in range(2))
    scheduler.run()
    assert isinstance(bad.failure, BackendError) and good.failure is None
    with pytest.raises(BackendError, match="a fault"):
        pipeline.result(bad)
    np.testing.assert_array_equal(pipeline.result(good).frames, wanted)


def test_calls_share_a_batch_only_where_the_rest_is_equal(pipeline: MotionPipeline, still: Still) -> None:
    spec = pipeline.bundle.graph("step")
    jobs = [pipeline.start(pipeline.request(still, "a", seed=i, **OFF)) for i in range(2)]
    for job in jobs:
        while job.call is not None and job.call.graph != "step":
            next(job)
    one, other = (job.call for job in jobs)
    assert one is not None and other is not None and may_share(spec, one, other)
    merged = merge(spec, [one, other])
    assert merged["latents"].shape[0] == merged["coefficients"].shape[0] == 2
    parts = split(spec, pipeline.graph("step").run(merged), 2)
    np.testing.assert_array_equal(parts[1]["x0"], pipeline.run(other, {})["x0"])
    motion = pipeline.bundle.graph("motion")  # its clips are no batch of requests
    assert not any(port.shared for port in motion.inputs)


@pytest.mark.parametrize("batch", [0, 1.5, True, "2"], ids=repr)
def test_scheduler_refuses(pipeline: MotionPipeline, batch: Any) -> None:
    with pytest.raises(InputError, match="batch is"):
        Scheduler(pipeline, batch)


def test_whoever_turns_may_say_who_is_first(pipeline: MotionPipeline, still: Still) -> None:
    scheduler = Scheduler(pipeline)
    first, second = (scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, steps=3, **OFF))) for i in range(2))
    assert [scheduler.turn(second) for _ in range(3)] == [[second]] * 3
    assert scheduler.turn() == [first] and scheduler.waiting(first) is not None
    scheduler.abort(first)
    assert scheduler.turn(first) == [second]  # one that left the line is no first any more
    scheduler.run()
    assert scheduler.turn() == []


@pytest.mark.parametrize(("slower", "pays"), [(0.0, True), (0.02, False)])
def test_with_a_gain_batches_are_left_that_do_not_pay(
    fake_bundle: Path, watching: ModuleType, still: Still, slower: float, pays: bool
) -> None:
    """A step that takes 5 ms, and in a batch as long (pays) or more than four times as long."""
    backend = Counting(watching)

    def timed(name: str, inputs: Mapping[str, Any], run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        outputs = Counting.run(backend, name, inputs, run)
        if name == "step":
            time.sleep(0.005 + (slower if len(inputs["latents"]) > 1 else 0))
        return outputs

    pipeline = MotionPipeline(Bundle.open(fake_bundle), watching.Watching(timed))
    scheduler = Scheduler(pipeline, 2, gain=1.1)
    jobs = [scheduler.add(pipeline.start(pipeline.request(still, "a", seed=i, steps=6, **OFF))) for i in range(2)]
    scheduler.run()
    steps = [size for name, size in backend.calls if name == "step"]
    assert steps == [2, 1, 1] * 3 + ([2] * 3 if pays else [1] * 6)
    assert len(scheduler.gains["step"]) == 3 and (sorted(scheduler.gains["step"])[1] >= 1.1) is pays
    assert len(frames(pipeline, jobs)) == 2
