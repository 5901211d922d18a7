"""Between the store and the workers: which job goes where, what came of it, and who wants to know.

All of it runs in one event loop. The store is told first and the workers after, so that a kill at any moment leaves every job
in the store: a queued one is queued again, a running one is begun once more, and after a second time it fails with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from motionrt.runtime.serve.jobs.fair import Fair
from motionrt.runtime.serve.jobs.live import Live, stopped, watch
from motionrt.runtime.serve.jobs.store import ATTEMPTS, JobRow, Store
from motionrt.runtime.serve.jobs.workers import Worker
from motionrt.runtime.serve.messages import Cancel, Ended, FromWorker, Opening, Order, Progress, Ready, Run
from motionrt.runtime.serve.web.refusal import Refused

_log = logging.getLogger(__name__)
TOGETHER = 4  # keys whose jobs take turns in one worker


class Dispatcher:
    """See the module. listener(what, live): told of "queued", "started", "stage", "restarted" and "ended"."""

    def __init__(
        self, store: Store, openings: Sequence[Opening], *, thread: bool = False, lifetime: float = 86400.0,
        together: int = TOGETHER, listener: Callable[[str, Live], None] = lambda what, live: None,
    ) -> None:  # fmt: skip
        self.store, self.lifetime, self._listener = store, lifetime, listener
        self.jobs: dict[str, Live] = {}
        self.draining = False
        self.together = 1 if any(opening.low_memory for opening in openings) else together
        self.batch = max(opening.batch for opening in openings)
        self.alone = any(opening.replicas for opening in openings)  # a replica has one job; more would wait there, not here
        self.workers = [Worker(i, opening, self._heard, self._gone, thread) for i, opening in enumerate(openings)]
        self._fair = Fair()
        self._looking: asyncio.Task[None] | None = None
        self.opened = asyncio.Event()  # once a worker was ready, or all are broken
        self.hurry = asyncio.Event()  # stop without waiting for jobs

    async def start(self) -> None:
        """Take up what the store holds, and start the workers."""
        self.store.sweep()
        for row in self.store.waiting():
            if row.kind != "video":
                continue
            if row.status == "in_progress" and row.attempt >= ATTEMPTS:
                self._over(Live(row), "failed", error=_lost(row))
                continue
            with contextlib.suppress(sqlite3.Error, OSError):  # a full disk: it is begun again all the same, as in `_gone`
                row = self.store.requeue(row.id) if row.status == "in_progress" else row
            self.jobs[row.id] = Live(row)
        for worker in self.workers:
            worker.start()
        self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(5.0)
            for worker in self.workers:
                worker.look()
            self._pump()  # where the store could not be written before

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return next((worker.models for worker in self.workers if worker.models), {})

    @property
    def ready(self) -> bool:
        return not self.draining and any(worker.ready for worker in self.workers)

    @property
    def queued(self) -> list[Live]:
        return [live for live in self.jobs.values() if live.worker is None and not live.ending]

    async def ask(self, what: str, about: dict[str, Any], seconds: float = 30.0) -> Any:
        """The answer of a worker that is ready; `Refused` where none is."""
        there = [worker for worker in self.workers if worker.ready]
        if not there:
            broken = next((worker.broken for worker in self.workers if worker.broken), None)
            text = f"no worker is ready: {broken}" if broken else "no worker is ready yet; try again in a moment."
            raise Refused(503, "starting", text, headers={"Retry-After": "2"}, kind="server_error")
        busy = {worker: sum(live.worker is worker for live in self.jobs.values()) for worker in there}
        return await min(there, key=lambda worker: busy[worker]).ask(what, about, seconds)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def submit(self, row: JobRow) -> Live:
        """Let a job that is in the store be run."""
        live = self.jobs[row.id] = Live(row)
        self._note("queued", live)
        self._pump()
        return live

    def _pump(self) -> None:
        """Give jobs to workers that have room."""
        if self.draining:
            return
        for worker in self.workers:
            while worker.ready:
                here = [live for live in self.jobs.values() if live.worker is worker]
                queued = self.queued
                again = [live for live in queued if live.row.attempt]  # first, so that a stream of others does not keep them
                live = self._fair.first(one for one in again or queued if self._fits(one, here))
                if live is None:
                    break
                try:
                    live.row = self.store.begin(live.row.id)
                except (sqlite3.Error, OSError) as error:
                    _log.error("the store cannot be written: %s", error)
                    return
                live.worker, live.began, live.charged = worker, time.monotonic(), 0.0
                row, place = live.row, self.store.place(live.row.id)
                uploads = {name: str(place / one.name) for name, one in self.store.inputs(row.id).items()}
                order = Order(model=row.model, fields=row.asked["fields"], files=uploads)
                worker.send(Run(job=row.id, order=order, folder=str(place), key=row.key, priority=row.priority))
                self._note("started", live)
                live.change()

    def _fits(self, live: Live, here: Sequence[Live]) -> bool:
        """Whether a worker that has the jobs `here` may be given one more: a few of different keys take turns, and of one key
        only as many as may share a batch. Jobs of a lower priority do not count: they wait whenever a better one is there.
        One that was there when a worker was lost is run alone: if it was the cause, it takes nobody with it again."""
        if here and (self.alone or live.row.attempt or any(one.row.attempt > 1 for one in here)):
            return False
        others = [one for one in here if one.priority >= live.priority]
        shares = {one.share for one in others} | {live.share}
        return sum(one.share == live.share for one in others) < self.batch and len(shares) <= self.together

    def _heard(self, worker: Worker, message: FromWorker) -> None:
        match message:
            case Progress():
                live = self.jobs.get(message.job)
                if live is None or live.worker is not worker:
                    return
                stage = live.progress is None or live.progress.stage != message.stage
                if message.references is None and live.progress is not None:
                    message.references = live.progress.references
                if message.preview is not None:
                    live.preview, message.preview = (message.step, message.preview), None
                self._charge(live, message.used)
                live.progress = message
                live.percent = max(live.percent, min(99, int(100 * message.done)))
                if stage:
                    self._note("stage", live)
                live.change()
            case Ended():
                live = self.jobs.get(message.job)
                if live is not None and live.worker is worker:
                    self._charge(live, message.used)
                    self._ended(live, message)
            case Ready():
                self.opened.set()
            case _:  # broken
                if all(one.broken for one in self.workers):
                    self.opened.set()
        self._pump()

    def _note(self, what: str, live: Live) -> None:
        """Tell the listener. What it raises (an exporter of spans may) must not keep a job from going on."""
        try:
            self._listener(what, live)
        except Exception:
            _log.exception("what became of %s could not be counted", live.row.id)

    def _charge(self, live: Live, used: float) -> None:
        self._fair.charge(live.share, max(0.0, used - live.charged))
        live.charged = max(live.charged, used)

    def _ended(self, live: Live, message: Ended) -> None:
        if message.outcome == "completed":
            self._over(live, "completed", result=message.result, files=message.files)
        elif message.outcome == "cancelled":
            self._over(live, "failed", error=CANCELLED)
        else:
            self._over(live, "failed", error=message.error)

    def _over(self, live: Live, status: str, **what: Any) -> None:
        """Store the end of a job, then tell; the first end that it has counts."""
        if not live.ending:
            live.ending = True
            self._store_end(live, status, **what)

    def _store_end(self, live: Live, status: str, **what: Any) -> None:
        """Again and again while the disk does not take it."""
        try:
            live.row = self.store.end(live.row.id, status, self.lifetime, **what)
        except (sqlite3.Error, OSError) as error:
            _log.error("the end of %s cannot be stored yet: %s", live.row.id, error)
            asyncio.get_running_loop().call_later(1.0, lambda: self._store_end(live, status, **what))
            return
        self.jobs.pop(live.row.id, None)
        self._note("ended", live)
        live.change()

    def _gone(self, worker: Worker) -> None:
        """A worker died: what it had is begun once more, or fails if that is what keeps killing workers."""
        for live in [live for live in self.jobs.values() if live.worker is worker]:
            live.leave()
            if live.ending:
                continue
            if live.cancelling:
                self._over(live, "failed", error=CANCELLED)
            elif live.row.attempt >= ATTEMPTS:
                self._over(live, "failed", error=_lost(live.row))
            else:
                with contextlib.suppress(sqlite3.Error, OSError):  # it is begun again all the same, and that is counted then
                    live.row = self.store.requeue(live.row.id)
                self._note("restarted", live)
                live.change()
        self._pump()

    async def cancel(self, job: str, seconds: float = 30.0) -> None:
        """Stop a job that is not over, and return when it has stopped; `Refused` (503) where that takes longer."""
        live = self.jobs[job]
        live.cancelling = True
        if live.worker is None:
            self._over(live, "failed", error=CANCELLED)
            if job in self.jobs:
                text = "the job will not be run, but the disk does not take that now. Ask again."
                raise Refused(503, "storage_full", text, headers={"Retry-After": "5"}, kind="server_error")
            return
        live.worker.send(Cancel(job))
        await stopped(self.jobs, job, seconds, ": it is in the middle of a step")

    def watch(self, job: str, after: int = -1) -> AsyncIterator[Live]:
        """See `live.watch`."""
        return watch(self.jobs, job, after, lambda live: self.draining and live.worker is None)

    # --- what is to be said of a job ----------------------------------------------------------------------------------

    def position(self, live: Live) -> int:
        """How many jobs go before a queued one, as things stand: those of a higher priority, and the key's own before it."""
        number, first = live.row.number, live.priority
        return sum(
            one.priority > first or one.priority == first and one.row.number < number for one in self.queued if one is not live
        )

    def left(self, live: Live) -> float | None:
        """Seconds until a job is done, by what was measured; None before anything was."""
        if live.worker is not None:
            beside = {one.share for one in self.jobs.values() if one.worker is live.worker and one.priority >= live.priority}
            left = live.row.expected if live.progress is None else live.progress.left
            return left * max(1, len(beside))
        work = sum(
            one.row.expected if one.progress is None else one.progress.left
            for one in self.jobs.values()
            if one is not live and (one.worker is not None or one.row.number < live.row.number or one.priority > live.priority)
        )
        return work / max(1, len(self.workers)) + live.row.expected

    # --- the end ------------------------------------------------------------------------------------------------------

    async def stop(self, drain: float = 30.0) -> None:
        """Begin nothing new; let running jobs end for so many seconds, then put them back into the queue; end the workers."""
        self.draining = True
        end = time.monotonic() + drain
        while (
            any(live.worker is not None for live in self.jobs.values()) and time.monotonic() < end and not self.hurry.is_set()
        ):
            await asyncio.sleep(0.02)
        for live in [*self.jobs.values()]:
            if live.worker is not None:
                live.leave()
                with contextlib.suppress(sqlite3.Error, OSError):  # else they are begun again at the next start all the same
                    live.row = self.store.requeue(live.row.id, counted=False)
            live.change()
        if self._looking is not None:
            self._looking.cancel()
        await asyncio.gather(*(worker.stop() for worker in self.workers))


CANCELLED = {"code": "cancelled", "message": "the job was cancelled."}


def _lost(row: JobRow) -> dict[str, str]:
    text = f"the worker was lost while it ran this job, {row.attempt} times; it is not begun again."
    return {"code": "worker_restarted", "message": text}
