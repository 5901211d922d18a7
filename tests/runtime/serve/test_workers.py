"""The server's end of a worker: whatever becomes of the process, the server goes on and has another one."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from motionrt.runtime.serve.jobs import workers
from motionrt.runtime.serve.jobs.workers import Worker
from motionrt.runtime.serve.messages import Ask, Opening


async def _until(done: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def test_a_worker_that_takes_nothing_does_not_hold_up_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_TAKES", 0.2)

    async def run() -> None:
        lost: list[Worker] = []
        worker = Worker(0, Opening(bundles={"a": "nowhere"}), lambda *said: None, lost.append)
        worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        rescue = threading.Timer(8.0, os.kill, (worker.pid, signal.SIGKILL))  # without it a fault would hang this test
        rescue.start()
        start = time.monotonic()
        for number in range(20):
            worker.send(Ask(number, "search", {"text": "x" * 100_000}))
        took = time.monotonic() - start
        rescue.cancel()
        await _until(lambda: lost)
        await worker.stop()
        assert took < 4

    asyncio.run(run())


def test_a_worker_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, tries = Worker._begin, [0]

    def begin_at_the_third(worker: Worker) -> Any:
        tries[0] += 1
        if tries[0] == 2:
            raise OSError(11, "Resource temporarily unavailable")
        return begin(worker)

    monkeypatch.setattr(Worker, "_begin", begin_at_the_third)
    monkeypatch.setattr(workers, "_WAITS", (0.01,))

    async def run() -> None:
        worker = Worker(0, Opening(bundles={"a": "nowhere"}), lambda *said: None, lambda gone: None)
        worker.start()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        await _until(lambda: tries[0] == 3)
        await worker.stop()

    asyncio.run(run())
