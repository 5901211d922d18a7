"""A replica: a worker of its own behind HTTP. Whatever runs it (Ray Serve) gives it a device and hands it one job at a time.

A job comes as `Sent` and is answered with what the worker reports, JSON, a line each; an empty line is a sign of life, and the
first of them says that the job is here. Behind `Ended` follow the bytes of its files, in their order. Who hangs up stops the
job, within a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Send

from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.serve.jobs.workers import Worker
from motionrt.runtime.serve.messages import Broken, Cancel, Ended, FromWorker, Opening, Progress, Ready, Sent
from motionrt.runtime.serve.work.worker import BEAT

_CHUNK = 1 << 20  # bytes of a file that are sent at once
_sent = msgspec.msgpack.Decoder(Sent)


class _Job:
    """A job that the worker has. Its folder is there until the worker and who asked for the job have both let go of it."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[Progress | Ended | None] = asyncio.Queue()  # None: the worker died
        self.folder = TemporaryDirectory(prefix="motionrt-replica-")
        self.over, self.left = False, False


class Replica:
    """openings: what to open for each bundle, by name, as the fields of `Opening`. One bundle is open at a time: the first one
    after `reconfigure`, later that of the job that came last. name: what the jobs that it made say it was made by."""

    def __init__(self, openings: Mapping[str, Mapping[str, Any]]) -> None:
        self._openings = {name: msgspec.convert(dict(fields), Opening) for name, fields in openings.items()}
        self.name = secrets.token_hex(4)
        self._worker: Worker | None = None
        self._ready: asyncio.Future[Worker]
        self._jobs: dict[str, _Job] = {}
        self._names = map(str, itertools.count())  # a job that comes again may still be in the middle of a step here

    async def reconfigure(self, config: object) -> None:
        """Called before the first job. Raises `MotionRTError` where the first bundle cannot be opened."""
        await self._at_work(next(iter(self._openings)))

    async def _at_work(self, name: str) -> Worker:
        """The worker that has a bundle open, once it takes jobs."""
        await self.opened(name)
        return await self._ready

    async def opened(self, name: str) -> None:
        """Let the worker of a bundle take the place of one that has another open."""
        if self._worker is not None:
            if name in self._worker.opening.bundles:
                return
            await self._worker.stop()
            self._lose_jobs()
        self._ready = asyncio.get_running_loop().create_future()
        self._worker = Worker(0, self._openings[name], self._heard, self._gone, thread=True)
        self._worker.start()

    def check_health(self) -> None:
        """Called every few seconds. Raises `MotionRTError` where the worker cannot open what it should."""
        if self._ready.done():
            self._ready.result()

    def _heard(self, worker: Worker, message: FromWorker) -> None:
        match message:
            case Ready() if not self._ready.done():
                self._ready.set_result(worker)
            case Broken(why) if not self._ready.done():
                worker.closing = True  # whoever runs this replica starts another
                self._ready.set_exception(MotionRTError(why))
            case Progress() | Ended():
                self._tell(message.job, message)

    def _gone(self, worker: Worker) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._lose_jobs()

    def _lose_jobs(self) -> None:
        for name in [*self._jobs]:
            self._tell(name, None)

    def _tell(self, name: str, said: Progress | Ended | None) -> None:
        if (job := self._jobs.get(name)) is not None:
            job.said.put_nowait(said)
            job.over = job.over or not isinstance(said, Progress)
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        if self._jobs[name].over and self._jobs[name].left:
            self._jobs.pop(name).folder.cleanup()

    async def __call__(self, request: Request) -> Response:
        """The answer to a POST of `Sent`, in MessagePack."""
        return _Closed(self.carry(await request.body()), media_type="application/x-ndjson")

    async def carry(self, sent: bytes) -> AsyncIterator[bytes]:
        """Lines and files of a job, as the module says; closing it stops the job. `MotionRTError` where the worker died."""
        asked = _sent.decode(sent)
        yield b"\n"
        model, name = asked.run.order.model, next(self._names)
        worker: Worker | None = None
        if model in self._openings:
            opening = asyncio.ensure_future(self._at_work(model))
            while not (await asyncio.wait({opening}, timeout=BEAT))[0]:
                yield b"\n"
            worker = opening.result()
        if worker is None or worker.models[model]["bundle_digest"] != asked.digest:
            text = f"the replicas have no bundle '{model}' that is the server's; deploy that one."
            yield _line(Ended(job=name, outcome="failed", error={"code": "other_bundle", "message": text}))
            return
        job = self._jobs[name] = _Job()
        folder = Path(job.folder.name)
        try:
            order = msgspec.structs.replace(asked.run.order, files=dict(_written(folder, asked.files)))
            worker.send(msgspec.structs.replace(asked.run, job=name, order=order, folder=str(folder)))
            said: Progress | Ended | None = None
            while not isinstance(said, Ended):
                try:
                    said = await asyncio.wait_for(job.said.get(), BEAT)
                except TimeoutError:
                    yield b"\n"
                    continue
                if said is None:
                    raise MotionRTError(f"the worker of '{model}' died; its log says why.")
                if isinstance(said, Ended):
                    said.result["replica"] = self.name
                yield _line(said)
            for file in said.files:
                with open(folder / file.name, "rb") as opened:
                    while piece := opened.read(_CHUNK):
                        yield piece
        finally:
            job.left = True
            if not job.over:
                worker.send(Cancel(name))
            self._let_go(name)


class _Closed(StreamingResponse):
    """A stream that is closed whenever it is not sent any further."""

    async def listen_for_disconnect(self, receive: Receive) -> None:
        with contextlib.suppress(Exception):  # Ray says it so
            await super().listen_for_disconnect(receive)

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(cast(Any, self.body_iterator)):
            await super().stream_response(send)


def _line(message: Progress | Ended) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def _written(folder: Path, files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Write uploads into `folder`; (field, path) of each."""
    for place, (name, data) in enumerate(files.items()):
        path = folder / f"upload-{place}"
        path.write_bytes(data)
        yield name, str(path)
