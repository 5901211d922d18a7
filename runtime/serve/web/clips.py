"""The routes of `/v1/memories/{memory}/clips` and `/jobs`: clips added, each by a job, and removed. All of it is for admins."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from motionrt.runtime.errors import UnknownClip
from motionrt.runtime.serve.jobs.additions import CLIP, KIND
from motionrt.runtime.serve.jobs.store import JobRow, new_id
from motionrt.runtime.serve.messages import ADDING, Written
from motionrt.runtime.serve.web.answers import NO_STORE, check_disk, check_open, events_answer, full, waited
from motionrt.runtime.serve.web.form import FormLimits, read_fields
from motionrt.runtime.serve.web.memories import clip_of, memory_of, no_clip
from motionrt.runtime.serve.web.protocol import expired, not_found
from motionrt.runtime.serve.web.refusal import Refused, told

if TYPE_CHECKING:
    from motionrt.runtime.serve.app import Server
    from motionrt.runtime.serve.web.keys import Key

_KINDS = {"mp4": "video/mp4", "mov": "video/quicktime", "webm": "video/webm"}
_SHOWN = 100  # jobs in a list: the newest


class Clips:
    """See the module."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def routes(self) -> list[Route]:
        return [
            Route("/memories/{memory}/clips", self.add, methods=["POST"]),
            Route("/memories/{memory}/clips/{clip}", self.remove, methods=["DELETE"]),
            Route("/memories/{memory}/jobs", self.list, methods=["GET"]),
            Route("/memories/{memory}/jobs/{job}", self.retrieve, methods=["GET"]),
            Route("/memories/{memory}/jobs/{job}/events", self.events, methods=["GET"]),
            Route("/memories/{memory}/jobs/{job}/cancel", self.cancel, methods=["POST"]),
        ]

    async def add(self, request: Request) -> Response:
        """A job that adds the span of a video, with its caption."""
        from motionrt.runtime.serve.work.changes import check_writable, clip_fields

        key, server = self.server.key(request, "admin"), self.server
        name = memory_of(server, request)
        path = Path(server.settings.memories[name]).absolute()
        check_open(server.dispatcher)
        bundle = next((model for model, about in server.dispatcher.models.items() if name in about["memories"]), None)
        if bundle is None:
            text = "no worker is ready yet; try again in a moment."
            raise Refused(503, "starting", text, headers={"Retry-After": "2"}, kind="server_error")
        self._room()
        await asyncio.to_thread(check_writable, path)
        limits = FormLimits(body=server.settings.clips, file_fields=frozenset({"video"}))
        fields = await read_fields(request, limits, server.store.uploads)
        try:
            video = fields.uploads.get("video")
            if video is None:
                raise Refused(400, "invalid_request", "video is missing: upload an mp4, mov or webm as `video`.", "video")
            if video.kind not in _KINDS:
                text = f"video is a {video.kind}; allowed are {', '.join(_KINDS)}."
                raise Refused(400, "unsupported_file", text, "video")
            asked = {"fields": clip_fields(fields.values), "bundle": bundle, "memory": str(path)}
            self._room()
            job = new_id(KIND)
            row = JobRow(id=job, key=key.id, kind=KIND, model=name, created=time.time(), asked=asked)
            file = Written(f"{job}.{video.kind}", CLIP, _KINDS[video.kind], video.size, video.sha256)
            try:
                row = server.store.create(row, [(video.path, file)])
            except (sqlite3.Error, OSError) as error:
                raise full(f"the job cannot be stored: {error}") from None
        finally:
            fields.discard()
        return self._job(server.additions.submit(row).row, key)

    def _room(self) -> None:
        waiting = len(self.server.additions.jobs)
        if waiting >= self.server.settings.queue:
            text = f"{waiting} clips are waiting to be added, which is all that may. Try again later."
            headers = {"Retry-After": "30", "x-should-retry": "false"}
            raise Refused(429, "queue_full", text, headers=headers, kind="rate_limit_error")
        check_disk(self.server.store.folder)

    async def remove(self, request: Request) -> Response:
        """Remove a clip at once, with its file if that came over HTTP. Jobs that have it already go on with it."""
        from motionrt.runtime.serve.work.changes import remove_clip

        self.server.key(request, "admin")
        name, clip = memory_of(self.server, request), clip_of(request)
        path = Path(self.server.settings.memories[name]).absolute()
        try:
            source, sha256 = await asyncio.to_thread(remove_clip, path, clip)
        except UnknownClip:
            raise no_clip(name, clip) from None
        await asyncio.to_thread(self.server.additions.removed, source)
        await asyncio.to_thread(self.server.memories.forget_previews, sha256)
        return JSONResponse({"id": clip, "memory": name, "deleted": True, "object": "memory.clip.deleted"}, headers=NO_STORE)

    # --- jobs ---------------------------------------------------------------------------------------------------------

    async def list(self, request: Request) -> Response:
        """The jobs of a memory that are known, the newest first."""
        key, name = self.server.key(request, "admin"), memory_of(self.server, request)
        rows, more = self.server.store.page(None, KIND, None, _SHOWN, True, model=name)
        data = [self._told(row, key) for row in rows]
        return JSONResponse({"object": "list", "data": data, "has_more": more}, headers=NO_STORE)

    async def retrieve(self, request: Request) -> Response:
        """A job; with `wait` in seconds only when it is over, or that time is."""
        key = self.server.key(request, "admin")
        row = self._row(request)
        if await waited(request, lambda: self._over(row.id)):
            row = self._row(request)
        return self._job(row, key)

    async def _over(self, job: str) -> None:
        async for _ in self.server.additions.watch(job):
            pass

    async def events(self, request: Request) -> Response:
        """Server-sent events: the job as it is now, whenever it changed, and `done` when it is over."""
        key = self.server.key(request, "admin", signed=True)
        row = self._row(request)
        store, additions = self.server.store, self.server.additions
        return events_answer(
            request, additions.jobs.get(row.id), lambda after: additions.watch(row.id, after), lambda: store.get(row.id),
            lambda row: self._told(row, key),
        )  # fmt: skip

    async def cancel(self, request: Request) -> Response:
        """Stop a job; nothing that it did stays. One that is over is what it was."""
        key = self.server.key(request, "admin")
        row = self._row(request)
        if row.id in self.server.additions.jobs:
            await self.server.additions.cancel(row.id)
        return self._job(self._row(request), key)

    def _row(self, request: Request) -> JobRow:
        """The job that a path names, whose ever it is: who comes here is an admin. `Refused` (404) for none of this memory."""
        row = self.server.store.get(request.path_params["job"])
        if row is None or row.kind != KIND or row.model != memory_of(self.server, request):
            raise not_found()
        if row.status == "expired":
            raise expired()
        return row

    def _job(self, row: JobRow, key: Key) -> Response:
        return JSONResponse(self._told(row, key), headers=NO_STORE)

    def _told(self, row: JobRow, key: Key) -> dict[str, Any]:
        """The JSON of a job. progress: stages that are behind it, in percent."""
        additions, result = self.server.additions, row.result or {}
        live = additions.jobs.get(row.id)
        row, stage = (row, row.status) if live is None else (live.row, live.stage)
        done = ADDING.index(stage) / len(ADDING) if stage in ADDING else row.status == "completed"
        events = f"/v1/memories/{row.model}/jobs/{row.id}/events"
        return {
            "id": row.id, "object": "memory.job", "memory": row.model, "status": row.status, "progress": int(100 * done),
            "stage": stage, "queue_position": None if live is None else additions.position(live), "attempt": row.attempt,
            "created_at": int(row.created), "completed_at": None if row.ended is None else int(row.ended),
            "expires_at": None if row.expires is None else int(row.expires),
            "clip": result.get("clip"), "added": result.get("added", False), "request": row.asked["fields"],
            "error": None if row.error is None else {"code": row.error["code"], "message": told(row.error["message"])},
            "links": {"events": self.server.keys.signed(events, key.id)},
        }  # fmt: skip
