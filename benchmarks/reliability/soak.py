"""Requests for an hour, many of them aborted: what is finished is exactly what it is alone, and memory stays bounded."""

from __future__ import annotations

import gc
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrt.benchmarks.reliability.bundles import DEMO, MEMORY, PROMPT, STILL, plain
from motionrt.benchmarks.reliability.damage import digest
from motionrt.runtime.errors import Cancelled, MotionRTError
from motionrt.runtime.job import Job
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.scheduler import Scheduler

AT_ONCE = 4  # jobs in the line
REOPENED = 400  # requests after which the pipeline is closed and another one opened
SAMPLES = 60  # of memory and open files, in one soak
MAY_GROW = 64  # MiB: by how much the last fifth may exceed the first
GOOD: dict[str, Any] = {"image": STILL, "prompt": PROMPT, "seed": 1, "steps": 2, "solver": "ddim", "references": 3}
REQUESTS: tuple[dict[str, Any], ...] = (
    GOOD,
    GOOD | {"seed": 2, "steps": 3, "solver": "dpm"},
    GOOD | {"references": 5, "distinct": 0.99},
    GOOD | {"prompt": "a blue circle moves to the right", "steps": 1},
    GOOD | {"motion_scale": 0.0},
)
REFUSED: tuple[dict[str, Any], ...] = (
    GOOD | {"steps": 0}, GOOD | {"image": "gone.png"}, GOOD | {"prompt": "x " * 500}, GOOD | {"references": 10**6},
    GOOD | {"seed": -1}, GOOD | {"references": [10**9]},
)  # fmt: skip


class _Abort(Exception):
    """Raised in a callback, as a program of a user may."""


@dataclass
class Soak:
    """What came of the requests. rss, files: MiB resident and open files, at even times from the beginning to the end."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    seconds: float = 0.0
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    @property
    def grew(self) -> int:
        """MiB by which the most of the last fifth exceeds the most of the first."""
        fifth = max(1, len(self.rss) // 5)
        return max(self.rss[-fifth:]) - max(self.rss[:fifth])

    def check(self) -> None:
        """Count what is not bounded as what went wrong."""
        if self.grew > MAY_GROW:
            self.fail("wrong", f"memory grew by {self.grew} MiB")
        if self.files and max(self.files[-3:]) > max(self.files[:3]) + AT_ONCE:
            self.fail("wrong", f"{self.files[-1]} files are open; at the beginning there were {self.files[0]}")

    def fail(self, outcome: str, text: str) -> None:
        self.outcomes[outcome] += 1
        self.bad.append(f"{outcome}: {text}"[:500])


def run(seconds: float, seed: int = 0, say: Callable[[str], object] = print) -> Soak:
    """Requests for so many seconds, drawn from `seed`; `say` hears of every tenth of them."""
    draw, soak, said, since = random.Random(seed), Soak(), 0, 0
    waiting: dict[Job, int] = {}  # those in the line, and which of REQUESTS they are
    pipeline = _opened()
    try:
        want = [digest(pipeline(**request).frames.tobytes()) for request in REQUESTS]
        line, began = Scheduler(pipeline), time.perf_counter()
        while (now := time.perf_counter() - began) < seconds:
            if now >= seconds * len(soak.rss) / SAMPLES:
                soak.rss.append(_resident())
                soak.files.append(len(os.listdir("/proc/self/fd")))
            if now >= seconds * said / 10:
                said += 1
                say(f"soak: {now:.0f} s, {dict(soak.outcomes)}, {soak.rss[-1]} MiB, {soak.files[-1]} open files")
            if since >= REOPENED and not waiting:
                pipeline.close()
                pipeline, since = _opened(), 0
                line = Scheduler(pipeline, batch=draw.choice([1, 2, 4]))
            while len(waiting) < AT_ONCE and since < REOPENED:
                since += 1
                _begin(pipeline, line, waiting, draw, soak, want)
            _go_on(pipeline, line, waiting, draw, soak, want)
    finally:
        pipeline.close()
    soak.seconds = time.perf_counter() - began
    soak.check()
    return soak


def _opened() -> MotionPipeline:
    gc.collect()
    return MotionPipeline.from_bundle(DEMO, MEMORY, backend=plain())


def _begin(
    pipeline: MotionPipeline, line: Scheduler, waiting: dict[Job, int], draw: random.Random, soak: Soak, want: list[int]
) -> None:
    """A request: into the line most times, else one that is refused, or one of its own whose callback aborts it."""
    number = draw.randrange(len(REQUESTS))
    match draw.choice(["line"] * 7 + ["refused", "stopped", "raises"]):
        case "line":
            job = pipeline.start(pipeline.request(**REQUESTS[number]))
            waiting[line.add(job)] = number
        case "refused":
            try:
                pipeline.start(pipeline.request(**draw.choice(REFUSED)))
                soak.fail("wrong", "a request that must be refused was taken")
            except MotionRTError:
                soak.outcomes["error"] += 1
            except Exception as error:
                soak.fail("raw", f"{type(error).__name__}: {error}")
        case how:
            at = draw.randrange(REQUESTS[number]["steps"] + 1)  # the last of them never comes: it is finished

            def callback(step: int, steps: int) -> bool:
                if step == at and how == "raises":
                    raise _Abort
                return step != at

            try:
                _compare(pipeline(**REQUESTS[number], callback=callback).frames, want[number], soak)
            except (Cancelled, _Abort):
                soak.outcomes["aborted"] += 1
            except Exception as error:
                soak.fail("raw", f"{type(error).__name__}: {error}")


def _go_on(
    pipeline: MotionPipeline, line: Scheduler, waiting: dict[Job, int], draw: random.Random, soak: Soak, want: list[int]
) -> None:
    """A turn of the line, or the abort of a job in it; then the results that are there."""
    if waiting and draw.random() < 0.05:
        job = draw.choice(list(waiting))
        line.abort(job)
        del waiting[job]
        soak.outcomes["aborted"] += 1
    line.turn()
    for job in [job for job in waiting if job.frames is not None or job.failure is not None]:
        number = waiting.pop(job)
        try:
            _compare(pipeline.result(job).frames, want[number], soak)
        except Exception as error:
            soak.fail("raw", f"{type(error).__name__}: {error}")


def _compare(frames: Any, want: int, soak: Soak) -> None:
    if digest(frames.tobytes()) == want:
        soak.outcomes["same"] += 1
    else:
        soak.fail("wrong", "other frames than alone")


def _resident() -> int:
    """MiB that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
