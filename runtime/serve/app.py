"""The server as an ASGI application: `app(...)` makes one, to be run by uvicorn or mounted into another application.

The process that answers HTTP opens no bundle and runs no graph: workers do (worker.py). It keeps the jobs (store.py), hands
them out (dispatch.py, additions.py) and answers (videos.py, memories.py, clips.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route

import motionrt
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.serve.jobs.additions import Additions
from motionrt.runtime.serve.jobs.dispatch import Dispatcher
from motionrt.runtime.serve.jobs.live import Live
from motionrt.runtime.serve.jobs.store import Store
from motionrt.runtime.serve.logs import prompts
from motionrt.runtime.serve.messages import Opening
from motionrt.runtime.serve.metrics import Metrics
from motionrt.runtime.serve.page import page_routes
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.tracing import Traces
from motionrt.runtime.serve.web.answers import NO_STORE
from motionrt.runtime.serve.web.clips import Clips
from motionrt.runtime.serve.web.keys import Key, Keys
from motionrt.runtime.serve.web.limits import guarded
from motionrt.runtime.serve.web.memories import Memories
from motionrt.runtime.serve.web.protocol import VARIANTS
from motionrt.runtime.serve.web.refusal import Refused
from motionrt.runtime.serve.web.videos import Videos

_log = logging.getLogger(__name__)
_SWEEP = 30.0  # seconds between two looks for what has expired


class Server:
    """Everything that the routes share. Use `app`."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.started = settings, time.time()
        self.keys = Keys.open(settings.keys)
        self.metrics = Metrics(motionrt.__version__, list(settings.bundles))
        self.traces = Traces()
        self._store: Store | None = None
        self.dispatcher: Dispatcher
        self.additions: Additions
        self.memories = Memories(self)
        self._used: dict[tuple[int, str], float] = {}

    @property
    def store(self) -> Store:
        """Opened when it is first used. Raises `MotionRTError` where it cannot be, or is another server's."""
        if self._store is None:
            try:
                self._store = Store(self.settings.store)
            except (OSError, sqlite3.Error) as error:
                raise MotionRTError(f"the store {self.settings.store} cannot be opened: {error}. Choose another.") from None
        return self._store

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The server while it is up: store and workers, and at the end jobs that are given time to end."""
        self.dispatcher = Dispatcher(
            self.store, _openings(self.settings), thread=self.settings.workers == 0, lifetime=self.settings.lifetime,
            listener=self._noted,
        )  # fmt: skip
        self.additions = Additions(self.store, self.settings)
        sweeping: asyncio.Task[None] | None = None
        try:
            await self.dispatcher.start()
            await self.additions.start()
            sweeping = asyncio.create_task(self._sweep())
            yield
        finally:  # of a start that fails too: an application that mounts this may go on
            if sweeping is not None:
                sweeping.cancel()
            await self.stop()
            self.store.close()
            self._store = None

    async def stop(self) -> None:
        """Drain, once."""
        if not self.dispatcher.draining:
            drain, hurry = self.settings.drain, self.dispatcher.hurry
            await asyncio.gather(self.dispatcher.stop(drain), self.additions.stop(drain, hurry))

    async def _sweep(self) -> None:
        while True:
            try:
                gone = await asyncio.to_thread(self.store.expire, self.settings.storage)
                self.store.forget_keys(time.time() - 86400.0)
                self.metrics.expired(len(gone))
            except (sqlite3.Error, OSError) as error:
                _log.error("what expired cannot be removed yet: %s", error)
            await asyncio.sleep(_SWEEP)

    # --- who asks -----------------------------------------------------------------------------------------------------

    def key(self, request: Request, role: str, *, signed: bool = False) -> Key:
        """Whose request this is; `Refused` (401, 403) unless a key with this role was sent, or (`signed`) a signed path."""
        return self.keys.of(request, role, signed=signed)

    def shown(self, video: dict[str, Any], key: Key) -> dict[str, Any]:
        """The JSON of a job with `links` for those who cannot send a header: a `<video>` and an EventSource."""
        base = f"/v1/videos/{video['id']}"
        paths, about = {"events": f"{base}/events"}, self.dispatcher.models.get(video["model"])
        if about and any(spec["kind"] == "image" for spec in about["inputs"].values()):
            paths["input"] = f"{base}/input"
        if (step := video["motionrt"].get("preview")) is not None:
            paths["preview"] = f"{base}/preview?step={step}"  # another address for each: a browser would not ask again
        if video["status"] == "completed":
            variants = [name for name in VARIANTS if name != "field" or video["motionrt"].get("field")]
            for index in range(len(video["motionrt"]["seeds"])):
                for variant in variants:
                    paths[f"{variant}-{index}"] = f"{base}/content?variant={variant}&index={index}"
        video["motionrt"]["references"] = self.linked(video["motionrt"]["references"], key)
        video["motionrt"]["links"] = {name: self.keys.signed(path, key.id) for name, path in paths.items()}
        return video

    def linked(self, references: Sequence[Mapping[str, Any]], key: Key) -> list[dict[str, Any]]:
        """Retrieved clips, each with a link to its preview; where their memory is not served any more, without."""
        told = []
        for one in references:
            path = f"/v1/memories/{quote(one['memory'])}/clips/{one['id']}/preview"
            links = {"preview": self.keys.signed(path, key.id)} if one["memory"] in self.settings.memories else {}
            told.append({**one, "links": links})
        return told

    def used(self, key: Key) -> float:
        """Seconds that a key's jobs have run today (UTC), since the server was started."""
        return self._used.get((int(time.time() // 86400), key.id), 0.0)

    def _noted(self, what: str, live: Live) -> None:
        """Metrics, spans and the log of what became of a job."""
        row, now = live.row, time.time()
        details: dict[str, Any] = {"job": row.id, "key": row.key, "model": row.model, "attempt": row.attempt}
        details["ms"] = round(1000 * (now - row.created))  # since it was asked for
        match what:
            case "queued":
                details |= prompts(row.asked["fields"], self.settings.log_prompts)
            case "started":
                self.metrics.started(row.model, now - row.created)
                self.traces.stage(row, "starting")
            case "restarted":
                self.metrics.restarted()
                self.traces.stage(row, "queued")
            case "stage":
                details["stage"] = live.progress.stage if live.progress else None
                self.traces.stage(row, str(details["stage"]))
                if details["stage"] == "denoising":
                    self.metrics.stepping(row.model, now - row.created)
            case "ended":
                day = int(now // 86400)
                self._used = {when: used for when, used in self._used.items() if when[0] == day}
                self._used[day, row.key] = self._used.get((day, row.key), 0.0) + live.charged
                outcome = row.status if row.error is None or row.error["code"] != "cancelled" else "cancelled"
                self.metrics.ended(row.model, outcome, now - row.created, row.result or {}, self.dispatcher.models)
                self.traces.ended(row, outcome)
                details |= {"outcome": outcome, "error": row.error}
        _log.info(what, extra={"fields": details})

    # --- what is not about a job ----------------------------------------------------------------------------------------

    def routes(self) -> list[BaseRoute]:
        inner: list[BaseRoute] = [
            *Videos(self).routes(), *self.memories.routes(), *Clips(self).routes(),
            Route("/models", self.models), Route("/models/{model}", self.model),
        ]  # fmt: skip
        return [
            Mount("/v1", routes=inner), Route("/health", self.ready), Route("/health/live", self.live),
            Route("/health/ready", self.ready), Route("/health/startup", self.startup), Route("/metrics", self.measured),
            *(page_routes(self.settings.examples) if self.settings.page else []),
        ]  # fmt: skip

    async def models(self, request: Request) -> Response:
        self.key(request, "read")
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.settings.bundles]}, headers=NO_STORE)

    async def model(self, request: Request) -> Response:
        self.key(request, "read")
        name = request.path_params["model"]
        if name not in self.settings.bundles:
            raise Refused(404, "model_not_found", f"this server has {', '.join(self.settings.bundles)}.", "model")
        return JSONResponse(self._model(name), headers=NO_STORE)

    def _model(self, name: str) -> dict[str, Any]:
        about = self.dispatcher.models.get(name)
        return {"id": name, "object": "model", "created": int(self.started), "owned_by": "motionrt", "motionrt": about}

    async def live(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"}, headers=NO_STORE)

    async def ready(self, request: Request) -> Response:
        """200 when a worker can take a job now; else 503, and why."""
        dispatcher = self.dispatcher
        broken = any(worker.broken for worker in dispatcher.workers)
        why = "ready" if dispatcher.ready else "stopping" if dispatcher.draining else "broken" if broken else "starting"
        return JSONResponse({"status": why}, 200 if dispatcher.ready else 503, NO_STORE)

    async def startup(self, request: Request) -> Response:
        """200 from the first time on that a worker was ready."""
        done = bool(self.dispatcher.models)
        return JSONResponse({"status": "started" if done else "starting"}, 200 if done else 503, NO_STORE)

    async def measured(self, request: Request) -> Response:
        self.key(request, "admin")
        self.metrics.look(self.dispatcher, self.store)
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4")


def app(
    bundles: Mapping[str, str | Path] | str | Path, store: str | Path, memories: Mapping[str, str | Path] | str | Path = (),  # type: ignore[assignment]
    *, settings: Settings | None = None, **options: Any,
) -> Starlette:  # fmt: skip
    """An ASGI application that serves `bundles` (by name, or one, named by its folder) with `memories`, and keeps jobs in
    `store`. options: the other fields of `Settings`. An application that mounts it must run its lifespan too."""
    if settings is None:
        settings = Settings(_named(bundles), Path(store).absolute(), _named(memories) if memories else {}, **options)
    server = Server(settings)

    @contextlib.asynccontextmanager
    async def lifespan(application: Starlette) -> AsyncIterator[None]:
        async with server.running():
            yield

    handlers: dict[Any, Any] = {Refused: _refused, HTTPException: _http, ClientDisconnect: _left, Exception: _fault}
    made = Starlette(
        routes=server.routes(), lifespan=lifespan, exception_handlers=handlers, middleware=guarded(settings, server.metrics)
    )
    made.state.server = server
    return made


def _openings(settings: Settings) -> list[Opening]:
    """One for each worker."""
    paths = {name: str(Path(path).absolute()) for name, path in settings.bundles.items()}
    memories = {name: str(Path(path).absolute()) for name, path in settings.memories.items()}
    one = Opening(
        bundles=paths, memories=memories, run_options=dict(settings.run_options), low_memory=settings.low_memory,
        batch=settings.batch, inexact=settings.batch_rounding, self_test=settings.self_test, preview=settings.preview,
        replicas=settings.replicas,
    )  # fmt: skip
    if settings.devices:
        from msgspec.structs import replace as other

        return [other(one, run_options=one.run_options | {"device": device}) for device in settings.devices]
    return [one] * max(1, settings.workers)


def _named(given: Mapping[str, str | Path] | str | Path) -> dict[str, Path]:
    return (
        {Path(given).absolute().name: Path(given)}
        if isinstance(given, str | Path)
        else {name: Path(path) for name, path in given.items()}
    )


async def _refused(request: Request, error: Refused) -> Response:
    return error.response()


async def _http(request: Request, error: HTTPException) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return Refused(error.status_code, code, str(error.detail), headers=error.headers).response()


async def _left(request: Request, error: ClientDisconnect) -> Response:
    return PlainTextResponse("", 400)  # nobody reads it


async def _fault(request: Request, error: Exception) -> Response:
    _log.error("a fault while a request was answered", exc_info=error)
    return Refused(
        500, "internal_error", f"a fault of the server ({type(error).__name__}); its log says more.", kind="server_error"
    ).response()
