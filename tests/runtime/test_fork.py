"""Several seeds of one request: what no seed changes is computed once, and each gives the frames that it gives alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import InputError
from motionrt.runtime.job import Job, by_seed, needed
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.scheduler import Scheduler

Still = NDArray[np.uint8]


class Counted:
    """A pipeline of the fake bundle and its memory, and the graphs that it ran."""

    def __init__(self, bundle: Path, memory: Path, watching: ModuleType) -> None:
        self.ran: list[str] = []
        self.memory = MotionMemory.open(memory, readonly=True)
        self.pipeline = MotionPipeline(Bundle.open(bundle), watching.Watching(self._run), self.memory)

    def _run(self, name: str, inputs: Mapping[str, Any], run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        self.ran.append(name)
        return run(inputs)

    def start(self, still: Still, **options: Any) -> Job:
        return self.pipeline.start(self.pipeline.request(still, "a red ball moves right", **options))


@pytest.fixture
def counted(fake_bundle: Path, fake_memory: Path, watching: ModuleType) -> Iterator[Counted]:
    made = Counted(fake_bundle, fake_memory, watching)
    with made.memory:
        yield made


def walk(job: Job, until: Callable[[Job], bool] = lambda job: False) -> Job:
    while job.call is not None and not until(job):
        next(job)
    return job


def test_seeds_share_what_no_seed_changes(counted: Counted, still: Still) -> None:
    alone = {seed: walk(counted.start(still, seed=seed, steps=3)).frames for seed in (5, 6, 7)}
    counted.ran.clear()
    first = walk(counted.start(still, seed=5, steps=3), lambda job: job.seeded)
    jobs = [first, first.fork(6), first.fork(7)]
    before, scheduler = [*counted.ran], Scheduler(counted.pipeline)
    for job in jobs:
        scheduler.add(job)
    scheduler.run()
    for seed, job in zip((5, 6, 7), jobs, strict=True):
        np.testing.assert_array_equal(counted.pipeline.result(job).frames, alone[seed])
        assert job.request.seed == seed and job.references == first.references and job.references
    assert {"text", "text_query", "cama"} <= set(before)
    assert all(counted.ran.count(name) == before.count(name) for name in before)  # and not again for the others
    assert counted.ran.count("step") == 9 and "step" not in before
    assert len({frames.tobytes() for frames in alone.values() if frames is not None}) == 3  # another seed is another video


def test_calls_are_counted_before_they_are_run(counted: Counted, still: Still) -> None:
    for options in ({"steps": 3}, {"steps": 4, "solver": "dpm"}, {"steps": 3, "motion_scale": 0}):
        job = counted.start(still, seed=1, **options)
        expected = job.calls()
        counted.ran.clear()
        counted.pipeline._kept.clear()
        walk(job)
        assert expected == {name: counted.ran.count(name) for name in dict.fromkeys(counted.ran)}
    job = counted.start(still, seed=1, steps=3)
    one, three = job.calls(), job.calls(3)
    assert three["step"] == 3 * one["step"] and {name for name in three if three[name] == one[name]}


def test_no_fork_behind_the_first_call_that_a_seed_changes(counted: Counted, still: Still) -> None:
    job = walk(counted.start(still, seed=1, steps=3), lambda job: bool(job.step_seconds))
    with pytest.raises(InputError, match="used its seed already"):
        job.fork(2)
    with pytest.raises(InputError, match="seed"):
        counted.start(still, seed=1).fork(-1)


def test_a_seed_changes_what_draws_and_what_reads_it(fake_bundle: Path) -> None:
    manifest = Bundle.open(fake_bundle).manifest
    route = needed(manifest, set(manifest.inputs))
    same, changed = by_seed(manifest, route)
    assert sorted(node.graph for node in same + changed) == sorted(node.graph for node in route)
    assert "video" in [node.graph for node in changed] and "video" not in [node.graph for node in same]
    drawn = {value for node in changed for value in manifest.gives(node)}
    assert not any(manifest.reads(node) & drawn for node in same)
