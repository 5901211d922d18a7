"""The routes of `/v1/videos`: made, looked at, listed, stopped, fetched. Who may do what is checked in each, first."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from motionrt.runtime.serve.jobs.live import Live
from motionrt.runtime.serve.jobs.store import INPUT, JobRow, new_id
from motionrt.runtime.serve.messages import PRIORITIES, Written
from motionrt.runtime.serve.tracing import PARENT, parent_of
from motionrt.runtime.serve.web.answers import NO_STORE, check_disk, check_open, events_answer, file_answer, full, waited
from motionrt.runtime.serve.web.form import Fields, FormLimits, Upload, read_fields
from motionrt.runtime.serve.web.protocol import VARIANTS, expired, no_preview, not_found, not_ready, poll_after, video
from motionrt.runtime.serve.web.refusal import Refused, named, quoted

if TYPE_CHECKING:
    from motionrt.runtime.serve.app import Server
    from motionrt.runtime.serve.web.keys import Key

_AGAIN = 600.0  # seconds in which a request that says it is a retry is taken for the one before it
_RETRY = 8.0  # seconds of waiting up to which a client's blind retry, with its picture, is worth it
_KINDS = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "gif": "image/gif", "npy": "application/octet-stream",
}  # fmt: skip
_VALUES = 4096  # of a request as JSON: the numbers of drags are many


class Videos:
    """See the module."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._making: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()  # for as long as one waits

    def routes(self) -> list[Route]:
        return [
            Route("/videos", self.create, methods=["POST"]),
            Route("/videos", self.list, methods=["GET"]),
            Route("/videos/sync", self.sync, methods=["POST"]),
            Route("/videos/edits", self.unsupported, methods=["POST"]),
            Route("/videos/extensions", self.unsupported, methods=["POST"]),
            Route("/videos/characters", self.unsupported, methods=["POST"]),
            Route("/videos/characters/{character}", self.unsupported, methods=["GET"]),
            Route("/videos/{video}", self.retrieve, methods=["GET"]),
            Route("/videos/{video}", self.delete, methods=["DELETE"]),
            Route("/videos/{video}/content", self.content, methods=["GET"]),
            Route("/videos/{video}/input", self.input, methods=["GET"]),
            Route("/videos/{video}/preview", self.preview, methods=["GET"]),
            Route("/videos/{video}/events", self.events, methods=["GET"]),
            Route("/videos/{video}/record", self.record, methods=["GET"]),
            Route("/videos/{video}/cancel", self.cancel, methods=["POST"]),
            Route("/videos/{video}/remix", self.remix, methods=["POST"]),
        ]

    # --- making -------------------------------------------------------------------------------------------------------

    async def create(self, request: Request) -> Response:
        key = self.server.key(request, "generate")
        async with self._fields(request) as fields:
            return self._job(await self._make(request, key, fields), key)

    async def sync(self, request: Request) -> Response:
        """The video itself as the answer; the job is stopped when the client goes."""
        key = self.server.key(request, "generate")
        async with self._fields(request) as fields:
            row = await self._make(request, key, fields)
        over = asyncio.create_task(self._over(row.id))
        gone = asyncio.create_task(self._disconnected(request))
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            over.cancel()
            if row.id in self.server.dispatcher.jobs:
                await self.server.dispatcher.cancel(row.id)
            return Response(status_code=499)
        gone.cancel()
        return await self._content(request, self._row(row.id, key), "video", 0, {"x-motionrt-video-id": row.id})

    async def remix(self, request: Request) -> Response:
        """The same request again, with what the body says in place of what was said."""
        key = self.server.key(request, "generate")
        before = self._row(request.path_params["video"], key)
        files = self.server.store.inputs(before.id)
        async with self._fields(request) as fields:
            given = set(fields.values) | set(fields.uploads)
            values = {
                name: value for name, value in before.asked["fields"].items() if name not in ("seed", *given)
            } | fields.values
            values.setdefault("model", before.model)
            uploads, copies = dict(fields.uploads), list[tuple[Path, Path]]()
            for name, written in files.items():
                if name not in given:
                    path = self.server.store.uploads / new_id("again")
                    copies.append((self.server.store.place(before.id) / written.name, path))
                    uploads[name] = Upload(path, written.size, written.sha256, written.name.rpartition(".")[2])
            digest = hashlib.sha256(f"{before.id} {fields.digest}".encode()).hexdigest()
            again = Fields(values, uploads, digest)
            try:
                for source, path in copies:
                    await asyncio.to_thread(_copy, source, path)
                return self._job(await self._make(request, key, again, remixed=before.id), key)
            finally:
                again.discard()

    @contextlib.asynccontextmanager
    async def _fields(self, request: Request) -> AsyncIterator[Fields]:
        """The fields of a body; files that became part of no job are removed."""
        check_open(self.server.dispatcher)
        files = {
            name
            for model in self.server.dispatcher.models.values()
            for name, spec in model["inputs"].items()
            if spec["kind"] in ("image", "mask", "field")
        }
        limits = FormLimits(
            body=self.server.settings.body, values=_VALUES, files=4, file_fields=frozenset({"input_reference", *files})
        )
        fields = await read_fields(request, limits, self.server.store.uploads)
        try:
            yield fields
        finally:
            fields.discard()

    async def _make(self, request: Request, key: Key, fields: Fields, remixed: str | None = None) -> JobRow:
        """A job in the store, and in the queue; the one that is there already if this is the same request again."""
        idempotency = request.headers.get("idempotency-key")
        if idempotency is not None and not 0 < len(idempotency) <= 255:
            raise Refused(400, "invalid_idempotency_key", "an Idempotency-Key has 1 to 255 characters.")
        name = (key.id, idempotency or fields.digest)
        lock = self._making.setdefault(name, asyncio.Lock())
        async with lock:  # a retry may come while the first is still looked at
            before = self._before(request, key, idempotency, fields)
            trace = parent_of(request.headers.get(PARENT))
            return before or await self._new(key, idempotency, fields, remixed, trace)

    def _before(self, request: Request, key: Key, idempotency: str | None, fields: Fields) -> JobRow | None:
        retried = request.headers.get("x-stainless-retry-count", "0") not in ("", "0")
        if idempotency is None and not retried:
            return None
        row = self.server.store.again(key.id, idempotency, fields.digest, time.time() - _AGAIN)
        if row is not None and row.digest != fields.digest:
            text = "this Idempotency-Key was sent with another request; use a new one for each."
            raise Refused(409, "idempotency_mismatch", text, headers={"x-should-retry": "false"})
        return row

    async def _new(
        self, key: Key, idempotency: str | None, fields: Fields, remixed: str | None, trace: dict[str, str]
    ) -> JobRow:
        server, values = self.server, dict(fields.values)
        self._room(key)
        model = values.pop("model", None) or (
            next(iter(server.settings.bundles)) if len(server.settings.bundles) == 1 else None
        )
        if not isinstance(model, str) or model not in server.settings.bundles:
            names = ", ".join(server.settings.bundles)
            text = f"model is {quoted(model)}; this server has {names}." if model is not None else f"say which model: {names}."
            raise Refused(404, "model_not_found", text, "model")
        usual = min("normal", key.quota.priority, key=PRIORITIES.index)  # a key that may only ask for low asks for that
        priority, metadata = values.pop("priority", None) or usual, values.pop("metadata", None)
        metadata = {} if metadata is None or metadata == "" else metadata
        if priority not in PRIORITIES:
            raise Refused(
                400, "invalid_request", f"priority is {quoted(priority)}; allowed are {', '.join(PRIORITIES)}.", "priority"
            )
        if not isinstance(metadata, dict) or len(metadata) > 16 or not all(isinstance(v, str) for v in metadata.values()):
            raise Refused(400, "invalid_request", "metadata must be up to 16 names, each with a text.", "metadata")
        key.check_request(priority, values.get("n"))
        uploads = {name: str(upload.path) for name, upload in fields.uploads.items()}
        if wrong := next((name for name, upload in fields.uploads.items() if upload.kind not in _KINDS), None):
            raise Refused(
                400,
                "invalid_media",
                f"{named(wrong)} is a {fields.uploads[wrong].kind}; pictures are png, jpeg, webp or gif, and fields npy.",
                wrong,
            )
        asked = await server.dispatcher.ask("check", {"model": model, "fields": values, "files": uploads})
        promised = sum(live.row.expected for live in server.dispatcher.jobs.values() if live.row.key == key.id)
        key.check_seconds(asked["expected"], server.used(key) + promised)
        self._room(key)
        files = [
            (one.path, Written(f"{INPUT}{name}.{one.kind}", f"{INPUT}{name}", _KINDS[one.kind], one.size, one.sha256))
            for name, one in fields.uploads.items()
        ]
        row = JobRow(
            id=new_id(), key=key.id, model=model, priority=PRIORITIES.index(priority), created=time.time(),
            expected=asked.pop("expected"), asked=asked | trace | {"files": [*uploads]}, digest=fields.digest,
            idempotency=idempotency, remixed=remixed, metadata=metadata,
        )  # fmt: skip
        try:
            row = server.store.create(row, files)
        except (sqlite3.Error, OSError) as error:
            raise full(f"the job cannot be stored: {error}") from None
        return server.dispatcher.submit(row).row

    def _room(self, key: Key) -> None:
        """Refuse what there is no room for: in the queue, for this key, on the disk."""
        server, dispatcher = self.server, self.server.dispatcher
        queued = dispatcher.queued
        mine = sum(live.row.key == key.id for live in dispatcher.jobs.values())
        if len(queued) >= server.settings.queue:
            wait = min((dispatcher.left(live) or 1.0 for live in dispatcher.jobs.values()), default=1.0)
            raise _later("queue_full", f"{len(queued)} jobs are waiting, which is all that may.", wait)
        if (most := key.quota.waiting) is not None and mine >= most:
            wait = min(
                (dispatcher.left(live) or 1.0 for live in dispatcher.jobs.values() if live.row.key == key.id), default=1.0
            )
            raise _later("too_many_jobs", f"{mine} jobs of this key are not over, and it may have {most}.", wait)
        check_disk(server.store.folder)

    # --- looking ------------------------------------------------------------------------------------------------------

    async def retrieve(self, request: Request) -> Response:
        """A job; with `wait` in seconds only when it is over, or that time is."""
        key = self.server.key(request, "read")
        row = self._row(request.path_params["video"], key)
        if await waited(request, lambda: self._over(row.id)):
            row = self._row(row.id, key)
        return self._job(row, key)

    async def list(self, request: Request) -> Response:
        key, query = self.server.key(request, "read"), request.query_params
        try:
            limit = int(query.get("limit", "20"))
        except ValueError:
            limit = 0
        if not 1 <= limit <= 100:
            raise Refused(400, "invalid_request", f"limit is {quoted(query.get('limit'))}; allowed is 1 to 100.", "limit")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Refused(400, "invalid_request", f"order is {quoted(order)}; allowed are asc and desc.", "order")
        of = None if key.may("admin") and query.get("all") == "true" else key.id
        rows, more = self.server.store.page(of, "video", query.get("after") or None, limit, order == "desc")
        data = [self.server.shown(video(row, self.server.dispatcher), key) for row in rows]
        ids = [row.id for row in rows]
        ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
        return JSONResponse({"object": "list", "data": data, "has_more": more, **ends}, headers=NO_STORE)

    async def events(self, request: Request) -> Response:
        """Server-sent events: the job as it is now, whenever it changed, and `done` when it is over."""
        key = self.server.key(request, "read", signed=True)
        row = self._row(request.path_params["video"], key)

        def now() -> JobRow | None:
            with contextlib.suppress(Refused):
                return self._row(row.id, key)
            return None

        dispatcher, shown = self.server.dispatcher, self.server.shown
        return events_answer(
            request, dispatcher.jobs.get(row.id), lambda after: dispatcher.watch(row.id, after), now,
            lambda row: shown(video(row, dispatcher), key),
        )  # fmt: skip

    async def preview(self, request: Request) -> Response:
        """The last look at a job that runs: a small animated webp."""
        key = self.server.key(request, "read", signed=True)
        live = self.server.dispatcher.jobs.get(self._row(request.path_params["video"], key).id)
        if live is None or live.preview is None:
            raise no_preview()
        step, picture = live.preview
        return Response(picture, media_type="image/webp", headers=NO_STORE | {"x-motionrt-step": str(step)})

    async def content(self, request: Request) -> Response:
        key, query = self.server.key(request, "read", signed=True), request.query_params
        variant, index = query.get("variant", "video"), query.get("index", "0")
        if variant not in VARIANTS:
            raise Refused(
                400, "invalid_request", f"variant is {quoted(variant)}; allowed are {', '.join(VARIANTS)}.", "variant"
            )
        if not index.isdecimal() or len(index) > 3:
            raise Refused(400, "invalid_request", f"index is {quoted(index)}; it counts seeds from 0.", "index")
        return await self._content(request, self._row(request.path_params["video"], key), variant, int(index))

    async def _content(self, request: Request, row: JobRow, variant: str, index: int, more: Mapping[str, str] = {}) -> Response:
        if row.status != "completed":
            raise not_ready(row)
        written = self.server.store.files(row.id).get(f"{variant}-{index}")
        if written is None and variant == "field" and index < len(row.asked["seeds"]):
            raise Refused(404, "not_found", f"'{row.model}' shows no motion field.", "variant")
        if written is None:
            raise Refused(404, "not_found", f"the job has {len(row.asked['seeds'])} videos, counted from 0.", "index")
        return self._file(request, row, written, more)

    async def input(self, request: Request) -> Response:
        """A file that the request brought: the picture, unless `name` says which."""
        key = self.server.key(request, "read", signed=True)
        row, name = self._row(request.path_params["video"], key), request.query_params.get("name", "")
        files = self.server.store.inputs(row.id)
        written = files.get(name) if name else next(iter(files.values()), None)
        if written is None:
            raise Refused(404, "not_found", "the request brought no such file.")
        return self._file(request, row, written)

    def _file(self, request: Request, row: JobRow, written: Written, more: Mapping[str, str] = {}) -> Response:
        path = self.server.store.place(row.id) / written.name
        try:
            return file_answer(request, path, written.sha256, written.type, f"{row.id}-{written.name}", more)
        except FileNotFoundError:
            raise expired() from None

    async def record(self, request: Request) -> Response:
        """Everything that `motionrt replay` needs to make the same video and to show that it is the same."""
        from base64 import b64encode

        key = self.server.key(request, "read")
        row = self._row(request.path_params["video"], key)
        if row.status != "completed" or row.result is None:
            raise not_ready(row)
        place, inputs = self.server.store.place(row.id), {}
        for name, one in self.server.store.inputs(row.id).items():
            try:
                data = await asyncio.to_thread((place / one.name).read_bytes)
            except FileNotFoundError:
                raise expired() from None
            inputs[name] = f"data:{one.type};base64,{b64encode(data).decode()}"
        same = ("bundle_digest", "memory_digest", "frames_sha256", "backend", "batch")
        record = {"motionrt_record": 1, "id": row.id, "model": row.model, "fields": row.asked["fields"], "files": inputs}
        record |= {name: row.result[name] for name in same} | {"references": [one["id"] for one in row.result["references"]]}
        disposition = {"content-disposition": f'attachment; filename="{row.id}.json"'}
        return JSONResponse(record, headers=NO_STORE | disposition)

    # --- stopping -----------------------------------------------------------------------------------------------------

    async def cancel(self, request: Request) -> Response:
        """Stop a job and keep what is known of it."""
        key = self.server.key(request, "generate")
        row = self._row(request.path_params["video"], key)
        if row.id in self.server.dispatcher.jobs:
            await self.server.dispatcher.cancel(row.id)
        return self._job(self._row(row.id, key), key)

    async def delete(self, request: Request) -> Response:
        """Stop a job if it is not over, and remove it with its files."""
        key = self.server.key(request, "generate")
        row = self._row(request.path_params["video"], key, gone=True)
        if row.id in self.server.dispatcher.jobs:
            await self.server.dispatcher.cancel(row.id)
        try:
            await asyncio.to_thread(self.server.store.delete, row.id)
        except sqlite3.Error as error:
            raise full(f"the job cannot be removed: {error}") from None
        return JSONResponse({"id": row.id, "deleted": True, "object": "video.deleted"}, headers=NO_STORE)

    async def unsupported(self, request: Request) -> Response:
        what = request.url.path.split("/videos/")[1].split("/")[0]
        text = f"{what} are not supported; there are create, retrieve, list, delete, content, remix, cancel, events and sync."
        raise Refused(404, "not_supported", text)

    # --- what they share ----------------------------------------------------------------------------------------------

    def _row(self, job: str, key: Key, gone: bool = False) -> JobRow:
        """A job that `key` may see; `Refused` (404) for any other, and for one that expired."""
        row = self.server.store.get(job, None if key.may("admin") else key.id)
        if row is None or row.kind != "video":
            raise not_found()
        if row.status == "expired" and not gone:
            raise expired()
        return row

    def _job(self, row: JobRow, key: Key) -> Response:
        dispatcher = self.server.dispatcher
        return JSONResponse(self.server.shown(video(row, dispatcher), key), headers=NO_STORE | poll_after(row, dispatcher))

    async def _over(self, job: str) -> Live | None:
        """Wait until a job is over."""
        last = None
        async for live in self.server.dispatcher.watch(job):
            last = live
        return last

    @staticmethod
    async def _disconnected(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass


def _later(code: str, text: str, wait: float) -> Refused:
    seconds = max(1, int(wait + 0.999))
    headers = {"Retry-After": str(seconds)} | ({} if seconds <= _RETRY else {"x-should-retry": "false"})
    return Refused(429, code, f"{text} Try again in {seconds} s.", headers=headers, kind="rate_limit_error")


def _copy(source: Path, path: Path) -> None:
    """A picture of a job for another one. `Refused` where it is gone meanwhile, or there is no room."""
    try:
        shutil.copyfile(source, path)
    except FileNotFoundError:
        raise expired() from None
    except OSError as error:
        raise full(f"the picture cannot be copied: {error.strerror}.") from None
