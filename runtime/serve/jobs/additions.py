"""Jobs that add a clip to a memory: one after the other, each in a process of its own (adding.py), beside those of videos.

They are in the store like videos. The uploaded file lies in its job's folder and stays there as the clip's source, for as long
as the clip is there: such a job does not expire. Of one that failed or was cancelled nothing is left, in the memory either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sqlite3
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from motionrt.runtime.errors import MemoryStoreError
from motionrt.runtime.serve.jobs.dispatch import CANCELLED
from motionrt.runtime.serve.jobs.live import Live, stopped, watch
from motionrt.runtime.serve.jobs.store import ATTEMPTS, JobRow, Store
from motionrt.runtime.serve.jobs.workers import environment
from motionrt.runtime.serve.messages import Adding, Said, Written
from motionrt.runtime.serve.settings import Settings

_log = logging.getLogger(__name__)
KIND = "memory"  # of a job
CLIP = "clip"  # of its file
_READING = 60.0  # seconds that reading one video may take
_TRIES = 3  # to take back what a job added, where another process writes the memory


@dataclass(eq=False)
class Addition(Live):
    """A job that is not over. stage: queued, or one of `messages.ADDING`."""

    stage: str = "queued"


class Additions:
    """See the module. For one event loop, but for what says otherwise."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.jobs: dict[str, Addition] = {}
        self._store, self._settings = store, settings
        self._current: Addition | None = None
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake, self._stopping = asyncio.Event(), False

    async def start(self) -> None:
        """Take up what the store holds."""
        for row in self._store.waiting():
            if row.kind == KIND:
                with contextlib.suppress(sqlite3.Error, OSError):  # a full disk: it is begun again all the same
                    row = self._store.requeue(row.id) if row.status == "in_progress" else row
                self.jobs[row.id] = Addition(row)
        try:
            await asyncio.to_thread(self._forget)
        except (sqlite3.Error, OSError) as error:
            _log.error("files of clips that are gone cannot be removed yet: %s", error)
        self._task = asyncio.create_task(self._work())

    def submit(self, row: JobRow) -> Addition:
        """Let a job that is in the store be done."""
        live = self.jobs[row.id] = Addition(row)
        self._wake.set()
        return live

    def position(self, live: Addition) -> int | None:
        """How many jobs go before this one; None once it was begun."""
        return None if live is self._current else sum(one.row.number < live.row.number for one in self.jobs.values())

    def watch(self, job: str, after: int = -1) -> AsyncIterator[Live]:
        """See `live.watch`."""
        return watch(self.jobs, job, after, lambda live: self._stopping and live is not self._current)

    async def cancel(self, job: str, seconds: float = 30.0) -> None:
        """Stop a job that is not over, and return when nothing is left of it; `Refused` (503) where that takes longer."""
        live = self.jobs[job]
        live.cancelling = True
        if live is not self._current:
            await self._end(live, Said(error=CANCELLED))
            return
        if self._process is not None:
            self._kill(self._process)
        await stopped(self.jobs, job, seconds)

    async def stop(self, drain: float, hurry: asyncio.Event) -> None:
        """Begin nothing new; let the job that runs end for so many seconds, else it is done anew by the next server."""
        self._stopping = True
        self._wake.set()
        end = time.monotonic() + drain
        while self._current is not None and time.monotonic() < end and not hurry.is_set():
            await asyncio.sleep(0.02)
        if self._process is not None:
            self._kill(self._process)
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=5.0)
            self._task.cancel()
        for live in self.jobs.values():
            live.change()

    # --- one after the other ------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while not self._stopping:
            self._current = next((live for live in self.jobs.values() if not live.cancelling), None)
            if self._current is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await self._run(self._current)
            except (sqlite3.Error, OSError) as error:
                _log.error("a clip cannot be added yet: %s", error)
                await asyncio.sleep(1.0)
            finally:
                self._current = None

    async def _run(self, live: Addition) -> None:
        if live.row.attempt >= ATTEMPTS:
            text = f"the server was lost while it read this clip, {live.row.attempt} times; it is not begun again."
            await self._end(live, Said(error={"code": "worker_restarted", "message": text}))
            return
        live.row = self._store.begin(live.row.id)
        said = await self._read(live)
        if live.cancelling:
            said = Said(error=CANCELLED)
        if said is None and self._stopping:
            live.row, live.stage = self._store.requeue(live.row.id, counted=False), "queued"
            return
        lost = Said(error={"code": "worker_lost", "message": "the process that read this video was lost. Add it again."})
        await self._end(live, said or lost)

    async def _read(self, live: Addition) -> Said | None:
        """What the process says in the end; None if it was killed before."""
        written, asked = self._file(live.row), live.row.asked
        bundle = self._settings.bundles.get(asked["bundle"])
        if written is None or bundle is None:
            what = "the uploaded file" if written is None else f"the bundle {asked['bundle']}"
            return Said(error={"code": "failed", "message": f"{what} is not there any more; add the clip again."})
        task = Adding(
            memory=asked["memory"], bundle=str(Path(bundle).absolute()), video=str(self._source(live.row, written)),
            sha256=written.sha256, decoding=self._settings.decoding, threads=self._settings.run_options.get("threads"),
            **asked["fields"],
        )  # fmt: skip
        command = (sys.executable, "-m", "motionrt.runtime.serve.work.adding")
        process = self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment())
        assert process.stdin is not None and process.stdout is not None
        try:
            if live.cancelling or self._stopping:
                return None
            process.stdin.write(msgspec.json.encode(task) + b"\n")
            while True:
                limit = _READING if live.stage == "reading" else None
                line = await asyncio.wait_for(process.stdout.readline(), limit)
                if not line.endswith(b"\n"):
                    code = await process.wait()
                    why = signal.Signals(-code).name if code < 0 else f"status {code}"
                    _log.error("the process that read the clip of %s ended with %s", live.row.id, why)
                    return None
                said = msgspec.json.decode(line, type=Said)
                if said.stage is None:
                    return said
                live.stage = said.stage
                live.change()
        except TimeoutError:
            text = f"video took more than {_READING:.0f} s to read. Cut out what moves, or write it with key frames."
            return Said(error={"code": "invalid_clip", "message": text})
        finally:
            self._process = None
            self._kill(process)
            process.stdin.close()
            await process.wait()

    @staticmethod
    def _kill(process: Process) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            process.kill()

    async def _end(self, live: Addition, said: Said) -> None:
        """Take back what a job that failed has added, then store its end; again and again while the disk does not take it."""
        clean = said.error is None or await self._undo(live.row)
        job, lifetime = live.row.id, self._settings.lifetime
        while True:
            try:
                if said.error is not None:
                    live.row = self._store.end(job, "failed", lifetime, error=dict(said.error))
                else:
                    result = {"clip": said.clip, "added": said.added}
                    live.row = self._store.end(job, "completed", None if said.added else lifetime, result=result)
                if clean and not said.added:
                    self._store.discard(job)
                break
            except (sqlite3.Error, OSError) as error:
                _log.error("the end of %s cannot be stored yet: %s", job, error)
                await asyncio.sleep(1.0)
        self.jobs.pop(job, None)
        details = {"job": job, "key": live.row.key, "memory": live.row.model, "outcome": live.row.status}
        _log.info("added" if said.added else "not added", extra={"fields": details | {"error": live.row.error}})
        live.change()

    async def _undo(self, row: JobRow) -> bool:
        """Whether the memory has nothing of this job (any more); if not, its file is left to the clip until the job expires."""
        from motionrt.runtime.serve.work.changes import take_back

        written = self._file(row)
        if written is None or row.attempt == 0:
            return True
        for _ in range(_TRIES):
            try:
                await asyncio.to_thread(take_back, Path(row.asked["memory"]), self._source(row, written), written.sha256)
                return True
            except MemoryStoreError as error:
                _log.error("what %s added cannot be removed: %s", row.id, error)
                await asyncio.sleep(0.5)
        return False

    # --- files of clips -----------------------------------------------------------------------------------------------

    def _file(self, row: JobRow) -> Written | None:
        return self._store.files(row.id).get(CLIP)

    def _source(self, row: JobRow, written: Written) -> Path:
        return self._store.place(row.id) / written.name

    def removed(self, source: str) -> None:
        """A clip with this source was removed: so is its file, if it is one of ours. Any thread may call it."""
        row = self._store.get(Path(source).parent.name)
        if row is None or row.kind != KIND or not row.over:
            return
        written = self._file(row)
        if written is not None and str(self._source(row, written)) == source:
            self._store.delete(row.id)

    def _forget(self) -> None:
        """Remove the files of clips that were removed while no server ran, or by others. Only where their memory is still at
        its place, and can be read."""
        kept = self._store.kept()
        if not kept:
            return
        from motionrt.runtime.serve.work.changes import ids_of

        for path in {row.asked["memory"] for row in kept}:
            try:
                there = ids_of(Path(path))
            except MemoryStoreError as error:
                _log.warning("files of clips are kept: %s", error)
                continue
            for row in kept:
                if row.asked["memory"] == path and row.result is not None and row.result["clip"] not in there:
                    self._store.delete(row.id)
