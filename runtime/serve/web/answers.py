"""What several routes answer with: a file, a stream of events, and that there is no room."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from motionrt.runtime.serve.jobs.dispatch import Dispatcher
from motionrt.runtime.serve.jobs.live import Live
from motionrt.runtime.serve.jobs.store import JobRow
from motionrt.runtime.serve.web.refusal import Refused, quoted, told

NO_STORE = {"cache-control": "no-store"}
_PING = 15.0  # seconds without news after which a comment keeps a stream of events open
_WAIT = 60.0  # seconds that one long poll may wait
_FULL = 0.95  # of the disk in use, from where on no new job is taken


def file_answer(request: Request, path: Path, sha256: str, kind: str, name: str, more: Mapping[str, str] = {}) -> Response:
    """A file of the media type `kind`, in ranges where they are asked for; 304 where the client has it. sha256: of what is in
    it, its ETag; name: what a client that keeps it may call it. OSError where it is gone."""
    headers = {
        "etag": f'"{sha256}"',
        "cache-control": "private, max-age=3600",
        "content-security-policy": "sandbox; default-src 'none'",
    } | dict(more)
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    status = path.stat()
    return FileResponse(
        path, media_type=kind, filename=name, content_disposition_type="inline", headers=headers, stat_result=status
    )


def events_answer(
    request: Request, live: Live | None, watch: Callable[[int], AsyncIterator[Live]], now: Callable[[], JobRow | None],
    shown: Callable[[JobRow], dict[str, Any]],
) -> Response:  # fmt: skip
    """Server-sent events: a job as it is, whenever it changed, `preview` with the step of a new one and its address, and `done`
    (or `stopping`) in the end.

    live: the job, None if it is over; watch: its changes behind the one of a number (`Last-Event-ID`); now: its row then, None
    where it was deleted meanwhile.
    """
    last = request.headers.get("last-event-id", "")
    after = int(last) if last.isdecimal() and len(last) < 10 else -1
    if live is not None and after > live.sequence:
        after = -1  # of a server before this one

    def said(event: str, number: int, what: dict[str, Any]) -> str:
        return f"id: {number}\nevent: {event}\ndata: {json.dumps(what)}\n\n"

    async def events() -> AsyncIterator[str]:
        news = watch(after).__aiter__()
        number, upcoming, seen = max(0, after), None, None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(news, None))
                done, _ = await asyncio.wait({upcoming}, timeout=_PING)
                if not done:
                    yield ": still here\n\n"
                    continue
                live, upcoming = upcoming.result(), None
                if live is None:
                    break
                number = live.sequence
                if not live.row.over:
                    job, look = shown(live.row), live.preview
                    yield said("progress", number, job)
                    if look is not None and look is not seen:
                        seen, link = look, job["motionrt"]["links"]["preview"]
                        yield said("preview", number, {"id": live.row.id, "step": look[0], "link": link})
        finally:
            if upcoming is not None:
                upcoming.cancel()
        if (row := now()) is not None:
            yield said("done" if row.over else "stopping", number + 1, shown(row))

    return StreamingResponse(events(), media_type="text/event-stream", headers=NO_STORE | {"x-accel-buffering": "no"})


async def waited(request: Request, over: Callable[[], Coroutine[Any, Any, Any]]) -> bool:
    """A long poll: with `wait` in seconds in the query, whether it was waited for, until `over` ends or that time does."""
    if (text := request.query_params.get("wait")) is None:
        return False
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise Refused(400, "invalid_request", f"wait is {quoted(text)}; it must be a number of seconds.", "wait")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over(), min(_WAIT, seconds))
    return True


def full(text: str) -> Refused:
    """There is no room on the disk, or it cannot be written."""
    headers = {"x-should-retry": "false", "Retry-After": "60"}
    return Refused(
        503, "storage_full", f"{told(text)} Delete finished videos, or try later.", headers=headers, kind="server_error"
    )


def check_open(dispatcher: Dispatcher) -> None:
    """`Refused` where the server is being stopped."""
    if dispatcher.draining:
        raise Refused(503, "stopping", "the server is being stopped.", headers={"Retry-After": "10"}, kind="server_error")


def check_disk(folder: Path) -> None:
    """`Refused` where the disk of `folder` is nearly full."""
    usage = shutil.disk_usage(folder)
    if usage.used > _FULL * (usage.used + usage.free):
        raise full(f"the disk of the store is more than {_FULL:.0%} full.")
