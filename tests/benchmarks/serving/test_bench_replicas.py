"""The question about replicas, without Ray: when a kill counts as one, and what counts as lost."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from motionrt.benchmarks import harness
from motionrt.benchmarks.serving import bench_replicas


class Told:
    """A client of a server that has as many replicas as `replicas` says at each order; jobs end as `ends` says."""

    def __init__(self, replicas: list[int], ends: list[tuple[str, int, str]]) -> None:
        self.replicas, self.ends, self.orders = replicas, ends, 0

    def create(self, prompt: str, image: Any, *, seed: int, steps: int) -> dict[str, Any]:
        self.orders += seed == 0
        return {"id": str(seed)}

    def retrieve(self, job: str) -> dict[str, Any]:
        runs = int(job) < self.replicas[self.orders - 1]
        status = "in_progress" if runs and self.replicas[self.orders - 1] > 1 else "completed"
        return {"status": status, "motionrt": {"step": 1}}

    def wait(self, job: str) -> dict[str, Any]:
        status, attempt, byte = self.ends[int(job)]
        return {"status": status, "error": None, "motionrt": {"attempt": attempt, "frames_sha256": [byte * 64]}}


class Ray:
    def replicas(self) -> list[int]:
        return [1234567, 7654321]


def test_a_round_with_a_kill_begins_when_two_replicas_work_and_counts_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: killed.append((pid, signal)))
    want = np.full((4, 32), 0xAA, np.uint8)
    good = [("completed", 1, "a"), ("completed", 2, "a"), ("completed", 1, "a"), ("completed", 1, "a")]
    client: Any = Told([1, 2], good)
    ray: Any = Ray()
    _, lost, again = bench_replicas.killed(client, ray, 4, want)
    assert (lost, again, client.orders, killed) == (0, 1, 2, [(1234567, 9)])
    client = Told([2], [("completed", 1, "a"), ("failed", 2, "a"), ("completed", 1, "b"), ("completed", 1, "a")])
    assert bench_replicas.killed(client, ray, 4, want)[1] == 2  # one failed, and one has other frames


def test_a_job_that_failed_is_no_figure() -> None:
    with pytest.raises(harness.ParityError, match="a job failed"):
        bench_replicas.digests([{"status": "failed", "error": "x", "motionrt": {}}])
