"""The dispatcher while the disk takes nothing: what has ended is stored once it can be, and is not run a second time."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from motionrt.runtime.serve.jobs.dispatch import Dispatcher
from motionrt.runtime.serve.jobs.store import JobRow, Store, new_id
from motionrt.runtime.serve.messages import Broken, Ended, Opening, Run
from motionrt.runtime.serve.web.refusal import Refused


class Idle:
    """A worker that takes what it is given and does nothing."""

    number, models = 0, {}

    def __init__(self) -> None:
        self.ready, self.broken = True, ""
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def runs(self) -> list[str]:
        return [message.job for message in self.sent if isinstance(message, Run)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()


@pytest.fixture
def full(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the disk is full."""
    takes = {name: getattr(store, name) for name in ("begin", "end", "requeue")}

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    def switch(is_full: bool) -> None:
        for name, take in takes.items():
            monkeypatch.setattr(store, name, refuse if is_full else take)

    return switch


def asked(store: Store, key: str = "one") -> JobRow:
    fields = {"fields": {}, "seeds": [1], "steps": 1, "size": "1x1", "seconds": 1.0}
    return store.create(JobRow(id=new_id(), key=key, model="a", created=time.time(), asked=fields))


def dispatcher(store: Store) -> tuple[Dispatcher, Idle]:
    made, worker = Dispatcher(store, [Opening(bundles={"a": "nowhere"})]), Idle()
    made.workers[:] = [worker]  # type: ignore[list-item]
    return made, worker


def test_a_job_that_ended_on_a_full_disk_is_not_run_again_when_its_worker_dies(
    store: Store, full: Callable[[bool], None]
) -> None:
    async def run() -> None:
        made, worker = dispatcher(store)
        row = made.submit(asked(store)).row
        assert worker.runs() == [row.id]
        full(True)
        made._heard(worker, Ended(job=row.id, outcome="completed", result={"of": "the first"}))  # type: ignore[arg-type]
        made._gone(worker)  # type: ignore[arg-type]
        full(False)
        made._pump()
        await asyncio.sleep(1.1)
        stored = store.get(row.id)
        assert stored is not None and (stored.status, stored.result, stored.attempt) == ("completed", {"of": "the first"}, 1)
        assert worker.runs() == [row.id] and not made.jobs

    asyncio.run(run())


def test_a_cancel_on_a_full_disk_is_not_said_to_be_done_and_holds_all_the_same(
    store: Store, full: Callable[[bool], None]
) -> None:
    async def run() -> None:
        made, worker = dispatcher(store)
        running, waiting = made.submit(asked(store)).row, made.submit(asked(store)).row
        full(True)
        for _ in range(2):
            with pytest.raises(Refused) as caught:
                await made.cancel(waiting.id)
            assert (caught.value.status, caught.value.code) == (503, "storage_full")
        full(False)
        made._heard(worker, Ended(job=running.id, outcome="completed"))  # type: ignore[arg-type]
        await asyncio.sleep(1.1)
        stored = store.get(waiting.id)
        assert stored is not None and stored.error == {"code": "cancelled", "message": "the job was cancelled."}
        assert worker.runs() == [running.id] and not made.jobs

    asyncio.run(run())


def test_a_worker_that_dies_on_a_full_disk_costs_no_job(store: Store, full: Callable[[bool], None]) -> None:
    async def run() -> None:
        made, worker = dispatcher(store)
        row = made.submit(asked(store)).row
        full(True)
        made._gone(worker)  # type: ignore[arg-type]
        full(False)
        made._pump()
        made._heard(worker, Ended(job=row.id, outcome="completed"))  # type: ignore[arg-type]
        stored = store.get(row.id)
        assert stored is not None and (stored.status, stored.attempt) == ("completed", 2)
        assert worker.runs() == [row.id] * 2

    asyncio.run(run())


def test_what_loses_two_workers_takes_nobody_with_it(store: Store) -> None:
    """Jobs of several keys share a worker, and which of them killed it is not known: each is tried again alone."""

    async def run() -> None:
        made, worker = dispatcher(store)
        rows = [made.submit(asked(store, key)).row.id for key in ("deadly", "one", "two")]
        made._gone(worker)  # type: ignore[arg-type]
        later = made.submit(asked(store, "three")).row.id
        assert worker.runs() == [*rows, rows[0]]
        made._gone(worker)  # type: ignore[arg-type]
        for place in (1, 2):
            assert worker.runs()[4:] == rows[1 : place + 1]
            made._heard(worker, Ended(job=rows[place], outcome="completed"))  # type: ignore[arg-type]
        assert worker.runs()[-1] == later
        stored = [store.get(name) for name in rows]
        assert [row and row.status for row in stored] == ["failed", "completed", "completed"]

    asyncio.run(run())


def test_one_device_that_is_broken_does_not_end_a_server_whose_other_is_still_opening(store: Store) -> None:
    async def run() -> None:
        made, worker = dispatcher(store)
        other = Idle()
        made.workers.append(other)  # type: ignore[arg-type]
        for broken, over in ((worker, False), (other, True)):
            broken.ready, broken.broken = False, "no such device"
            made._heard(broken, Broken("no such device"))  # type: ignore[arg-type]
            assert made.opened.is_set() is over

    asyncio.run(run())


def test_who_waits_for_a_job_hears_of_its_end_whatever_those_who_count_do(store: Store) -> None:
    async def run() -> None:
        def count(what: str, live: Any) -> None:
            raise RuntimeError("an exporter of spans")

        made, worker = dispatcher(store)
        made._listener = count
        row = made.submit(asked(store)).row
        watching = made.watch(row.id, after=made.jobs[row.id].sequence)
        upcoming = asyncio.ensure_future(anext(watching))
        await asyncio.sleep(0)
        made._heard(worker, Ended(job=row.id, outcome="completed"))  # type: ignore[arg-type]
        assert (await asyncio.wait_for(upcoming, 1.0)).row.status == "completed"

    asyncio.run(run())
