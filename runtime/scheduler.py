"""Many jobs in one process: each gets its turn, and calls of one graph that may share a batch are run as one.

    scheduler = Scheduler(pipeline, batch=4)
    jobs = [scheduler.add(pipeline.start(request)) for request in requests]
    scheduler.run()
    results = [pipeline.result(job) for job in jobs]

Turns are by calls: the job that waited longest has its call run, with those of others that fit beside it, and goes to the end
of the line. So a request that comes while a long one runs waits for one call and not for the whole of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from motionrt.runtime.arguments import flag, instance, real, whole
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.job import Job
from motionrt.runtime.loop import Call
from motionrt.runtime.pipeline import MotionPipeline

_PROBES = 3  # calls that are run both ways before it is said what a batch gains


class Scheduler:
    """Runs the jobs of one pipeline. Not safe to call from several threads at once. A job that fails keeps why
    (`Job.failure`, which `pipeline.result` raises), and the others go on: take the results one by one.

    batch: most jobs in one call; 1, the default, runs each alone, which costs large models nothing (a step of theirs fills a
    device by itself). `same`: graph -> whether it gave the same bits alone and in a batch on this backend. That is never
    assumed: the first calls that could share a batch are run both ways, and where the results differ (or a backend takes no
    batch) the graph's calls are run alone from then on, unless `inexact`. `gains`: graph -> how many times as long it took
    alone, as often as that was measured; with `gain`, the middle of the first three must be at least that, or calls are run
    alone.
    """

    def __init__(self, pipeline: MotionPipeline, batch: int = 1, *, inexact: bool = False, gain: float = 0.0) -> None:
        instance("the pipeline", pipeline, MotionPipeline, "an open MotionPipeline")
        batch, inexact, pays = whole("batch", batch, 1), flag("inexact", inexact), real(gain)
        if pays is None or pays < 0:
            raise InputError(f"gain is {shown(gain)}; allowed is a number of 0 or more, such as 1.1.")
        self.pipeline, self.batch, self.inexact, self.gain = pipeline, batch, inexact, pays
        self.same: dict[str, bool] = {}
        self.gains: dict[str, list[float]] = {}
        self._line: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def add(self, job: Job) -> Job:
        """Put a job at the end of the line."""
        instance("the job", job, Job, "what pipeline.start(...) gives")
        self._line.append(job)
        return job

    def abort(self, job: Job) -> None:
        """Stop a job; the others do not notice."""
        instance("the job", job, Job, "what pipeline.start(...) gives")
        job.close()
        if job in self._line:
            self._line.remove(job)

    def run(self) -> None:
        """Run until no job is left. One that fails keeps its error (`Job.failure`), and the others go on."""
        while self._line:
            self.turn()

    def turn(self, first: Job | None = None) -> list[Job]:
        """Run one call: of `first`, else of the job that waited longest, and of those that share its batch. The jobs that went
        on."""
        if first is not None and first in self._line:
            self._line.remove(first)
            self._line.appendleft(first)
        while self._line and self.waiting(self._line[0]) is None:
            self._line.popleft()
        if not self._line:
            return []
        group = self._group(self._line[0])
        for job in group:
            self._line.remove(job)
        try:
            if len(group) == 1 or not self._together(group):
                for job in group:
                    self._alone(job)
        finally:  # also behind Ctrl-C: whoever catches it may go on
            self._line += [job for job in group if self.waiting(job) is not None]
        return group

    def waiting(self, job: Job) -> Call | None:
        """The call that a job waits for, if it still does; `job.failure` says why where it cannot."""
        try:
            return None if job.failure is not None else job.call
        except Exception as error:  # of any kind: it must not take the others with it
            job.failure = error
            return None

    def _group(self, first: Job) -> list[Job]:
        call = first.call
        assert call is not None
        spec, group = self.pipeline.bundle.graph(call.graph), [first]
        most = min([self.batch, *(port.dims[0].max // port.dims[0].min for port in spec.inputs if port.shared)])
        if call.key is not None or call.ahead or not self._shares(call.graph):
            return group
        for job in list(self._line)[1:]:
            other = self.waiting(job)
            if len(group) < most and other is not None and other.graph == call.graph and may_share(spec, call, other):
                group.append(job)
        return group

    def _shares(self, graph: str) -> bool:
        """Whether calls of `graph` may be run as one: nothing that was found speaks against it."""
        found = self.gains.get(graph, ())
        pays = not self.gain or len(found) < _PROBES or sorted(found)[_PROBES // 2] >= self.gain
        return pays and (self.inexact or self.same.get(graph) is not False)

    def _alone(self, job: Job) -> None:
        start, call = time.perf_counter(), job.call
        assert call is not None
        try:
            job.send(self.pipeline.run(call, job.placed), time.perf_counter() - start)
        except Exception as error:
            job.failure = error

    def _together(self, group: Sequence[Job]) -> bool:
        """Run the calls of a group as one; False where they are to be run alone instead."""
        calls = [job.call for job in group if job.call is not None]
        graph, start = self.pipeline.graph(calls[0].graph), time.perf_counter()
        try:
            parts = split(graph.spec, graph.run(merge(graph.spec, calls)), len(group))
            name, together = graph.spec.name, time.perf_counter() - start
            gains = self.gains.setdefault(name, [])
            if name not in self.same or self.gain and len(gains) < _PROBES:
                alone = [dict(self.pipeline.run(call, job.placed)) for call, job in zip(calls, group, strict=True)]
                gains.append((time.perf_counter() - start - together) / together)
                self.same[name] = self.same.get(name, True) and all(
                    np.array_equal(np.asarray(one[port]), np.asarray(part[port]), equal_nan=True)
                    for one, part in zip(alone, parts, strict=True) for port in one
                )  # fmt: skip
                parts = parts if self.inexact else alone
        except Exception:  # no batch of this size, or one of the calls is at fault: alone, only that one fails
            self.same.setdefault(calls[0].graph, False)
            return False
        seconds = (time.perf_counter() - start) / len(group)
        for job, part in zip(group, parts, strict=True):
            try:
                job.send(part, seconds)
            except Exception as error:
                job.failure = error
        return True


def may_share(spec: GraphSpec, one: Call, other: Call) -> bool:
    """Whether two calls of graph `spec` may be run as one: their inputs agree in every port without a batch dimension, and in
    all other sizes of those with one."""
    for port in spec.inputs:
        a, b = one.inputs[port.name], other.inputs[port.name]
        if port.shared:
            if a.shape != b.shape:
                return False
        elif a is not b and not np.array_equal(np.asarray(a), np.asarray(b)):
            return False
    return any(port.shared for port in spec.inputs)


def merge(spec: GraphSpec, calls: Sequence[Call]) -> dict[str, Any]:
    """The inputs of calls that may share a batch, as those of one: gathered on the host."""
    return {
        port.name: np.concatenate([np.asarray(call.inputs[port.name]) for call in calls]) if port.shared
        else calls[0].inputs[port.name]
        for port in spec.inputs
    }  # fmt: skip


def split(spec: GraphSpec, outputs: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The outputs of a batch of `count` as those of each: copies, so that one does not keep all."""
    shared = {port.name: port.shared for port in spec.outputs}
    host = {name: np.asarray(value) for name, value in outputs.items()}
    rows = {name: np.split(value, count) if shared[name] else [value] * count for name, value in host.items()}
    return [{name: parts[i].copy() if shared[name] else parts[i] for name, parts in rows.items()} for i in range(count)]
