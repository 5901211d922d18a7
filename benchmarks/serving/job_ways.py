"""Three ways to have a job done, for what compares them: by the pipeline itself, by the server's queue and worker without
HTTP, and over HTTP. Each keeps jobs that come while it is busy waiting, first in, first out."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from motionrt.runtime.files import sha256_of
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.client import Client
from motionrt.runtime.serve.jobs.dispatch import Dispatcher
from motionrt.runtime.serve.jobs.store import JobRow, Store, new_id
from motionrt.runtime.serve.messages import Opening, Written
from motionrt.runtime.serve.work.written import write_all

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Made:
    """A job that was done. started: when a worker had it, by `time.monotonic`; frames_sha256: of its first seed; stages:
    seconds of all its stages and of writing its files, by what did them."""

    started: float
    frames_sha256: str
    stages: float


class Way(Protocol):
    """`make` a video of a still and the fields of a request; any thread may call it. `stop`: begin a job, stop it once it has
    made a step, and give the seconds from the order to stop until nothing of it runs."""

    def make(self, still: Path, fields: Fields) -> Made: ...
    def stop(self, still: Path, fields: Fields) -> float: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...


class Direct:
    """The pipeline in this process, and the files that the server would write."""

    def __init__(self, bundle: Path, memory: Path) -> None:
        self._pipeline = MotionPipeline.from_bundle(bundle, memory, threads=1)
        self._thread = ThreadPoolExecutor(1)
        self._folder = Path(tempfile.mkdtemp(prefix="motionrt-direct-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()
        self._pipeline.close()
        shutil.rmtree(self._folder)

    def make(self, still: Path, fields: Fields) -> Made:
        return self._thread.submit(self._make, still, fields).result()

    def _make(self, still: Path, fields: Fields) -> Made:
        started = time.monotonic()
        result = self._pipeline(image=str(still), **fields)
        digest = hashlib.sha256(result.frames.tobytes()).hexdigest()
        write_all(self._folder, [result], "mp4")
        return Made(started, digest, time.monotonic() - started)

    def stop(self, still: Path, fields: Fields) -> float:
        begun, told = threading.Event(), threading.Event()

        def step(step: int, steps: int) -> bool:
            begun.set()
            return not told.is_set()

        running = self._thread.submit(lambda: self._pipeline(image=str(still), callback=step, **fields))
        begun.wait()
        start = time.monotonic()
        told.set()
        running.exception()
        return time.monotonic() - start


class Queued:
    """The server's store, queue and worker process, driven from an event loop of this process: all of it but HTTP."""

    def __init__(self, bundle: Path, memory: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="motionrt-queued-"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._opening = Opening(bundles={"it": str(bundle)}, memories={"it": str(memory)}, run_options={"threads": 1})

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> Self:
        async def begin() -> None:
            self._store = Store(self._folder / "store")
            self._dispatcher = Dispatcher(self._store, [self._opening])
            await self._dispatcher.start()
            await self._dispatcher.opened.wait()

        self._run(begin())
        return self

    def __exit__(self, *exception: object) -> None:
        self._run(self._dispatcher.stop())
        self._store.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self._folder)

    async def _submit(self, still: Path, fields: Fields) -> str:
        upload = self._store.uploads / new_id("upload")
        shutil.copyfile(still, upload)
        about = {"model": "it", "fields": dict(fields), "files": {"input_reference": str(upload)}}
        asked = await self._dispatcher.ask("check", about)
        expected = asked.pop("expected")
        written = Written("input.png", "input-input_reference", "image/png", upload.stat().st_size, sha256_of(upload))
        row = JobRow(id=new_id(), key="one", model="it", created=time.time(), expected=expected, asked=asked)
        return self._dispatcher.submit(self._store.create(row, [(upload, written)])).row.id

    def make(self, still: Path, fields: Fields) -> Made:
        async def run() -> Made:
            job, started = await self._submit(still, fields), 0.0
            async for live in self._dispatcher.watch(job):
                if not started and live.worker is not None:
                    started = time.monotonic()
            done = self._store.get(job)
            assert done is not None and done.status == "completed" and done.result is not None, done
            result = done.result
            self._store.delete(job)
            return Made(started or time.monotonic(), result["frames_sha256"][0], sum(result["seconds"].values()))

        made: Made = self._run(run())
        return made

    def stop(self, still: Path, fields: Fields) -> float:
        async def run() -> float:
            job = await self._submit(still, fields)
            async for live in self._dispatcher.watch(job):
                if live.progress is not None and live.progress.step > 0:
                    break
            start = time.monotonic()
            await self._dispatcher.cancel(job)
            return time.monotonic() - start

        return float(self._run(run()))


class OverHttp:
    """A server, and a client with a stream of events for each job."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def make(self, still: Path, fields: Fields) -> Made:
        job, started = self._client.create(image=still, **fields)["id"], 0.0
        for shown in self._client.events(job):
            if not started and shown["motionrt"]["stage"] != "queued":
                started = time.monotonic()
        assert shown["status"] == "completed", shown
        told = shown["motionrt"]
        return Made(started, told["frames_sha256"][0], sum(told["seconds"].values()))

    def stop(self, still: Path, fields: Fields) -> float:
        job = self._client.create(image=still, **fields)["id"]
        for shown in self._client.events(job):
            if shown["motionrt"]["step"] > 0:
                break
        start = time.monotonic()
        self._client.cancel(job)
        return time.monotonic() - start
