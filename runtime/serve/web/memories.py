"""The routes of `/v1/memories`: what there is, found and seen. Who may do what is checked in each, first."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from motionrt.runtime.serve.web.answers import NO_STORE, file_answer
from motionrt.runtime.serve.web.form import FormLimits, read_fields
from motionrt.runtime.serve.web.refusal import Refused, quoted

if TYPE_CHECKING:
    from motionrt.runtime.serve.app import Server

_PREVIEWS = 500  # small videos that are kept: some 10 MB
_SEARCH = FormLimits(body=256 << 10, files=0, file_fields=frozenset())
_WAIT = 60.0  # seconds for a preview, before which others may have to be written


class Memories:
    """See the module."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._previews = server.settings.store / "previews"
        self._making: dict[tuple[str, int], asyncio.Task[Path]] = {}

    def routes(self) -> list[Route]:
        return [
            Route("/memories", self.list, methods=["GET"]),
            Route("/memories/{memory}", self.retrieve, methods=["GET"]),
            Route("/memories/{memory}/search", self.search, methods=["POST"]),
            Route("/memories/{memory}/clips/{clip}/preview", self.preview, methods=["GET"]),
        ]

    # --- what there is ------------------------------------------------------------------------------------------------

    async def list(self, request: Request) -> Response:
        self.server.key(request, "read")
        data = await asyncio.gather(*(self._memory(name) for name in self.server.settings.memories))
        return JSONResponse({"object": "list", "data": data}, headers=NO_STORE)

    async def retrieve(self, request: Request) -> Response:
        self.server.key(request, "read")
        return JSONResponse(await self._memory(memory_of(self.server, request)), headers=NO_STORE)

    async def _memory(self, name: str) -> dict[str, Any]:
        stats = await self.server.dispatcher.ask("stats", {"memory": name})
        models = [model for model, about in self.server.dispatcher.models.items() if name in about["memories"]]
        return {
            "id": name, "object": "memory", "clips": stats["clips"], "datasets": stats["datasets"],
            "bytes": stats["bytes_db"] + stats["bytes_index"], "digest": stats["digest"], "models": models,
        }  # fmt: skip

    async def search(self, request: Request) -> Response:
        """The clips that a text finds, best first."""
        key = self.server.key(request, "read")
        name = memory_of(self.server, request)
        fields = await read_fields(request, _SEARCH, self.server.store.uploads)
        found = await self.server.dispatcher.ask("search", {"memory": name, "fields": fields.values})
        return JSONResponse({"object": "list", "data": self.server.linked(found, key)}, headers=NO_STORE)

    async def preview(self, request: Request) -> Response:
        """A clip's span as a small video; written when it is first asked for."""
        self.server.key(request, "read", signed=True)
        name, clip = memory_of(self.server, request), clip_of(request)
        task = self._making.get((name, clip))
        if task is None:
            task = self._making[name, clip] = asyncio.create_task(self._preview(name, clip))
            task.add_done_callback(lambda _: self._making.pop((name, clip), None))
        path = await asyncio.shield(task)  # others may wait for it too, when this client leaves
        try:
            # To be asked for anew each time: the clip may be removed, and the memory of this name another one tomorrow.
            anew = {"cache-control": "private, no-cache"}
            return file_answer(request, path, path.stem, "video/mp4", f"{name}-{clip}.mp4", anew)
        except FileNotFoundError:
            raise Refused(503, "busy", "too many previews were asked for at once; try again.", kind="server_error") from None

    async def _preview(self, name: str, clip: int) -> Path:
        about = {"memory": name, "id": clip, "folder": str(self._previews)}
        try:
            file = await self.server.dispatcher.ask("preview", about, _WAIT)
        except Refused as error:
            if error.code == "unknown_clip":
                raise no_clip(name, clip) from None
            if error.code == "invalid_media":
                raise Refused(404, "no_preview", error.message) from None
            raise
        await asyncio.to_thread(_keep_newest, self._previews)
        return self._previews / str(file)

    def forget_previews(self, sha256: str) -> None:
        """Remove the previews of clips of the file with this SHA-256. Blocks."""
        for path in self._previews.glob(f"{sha256[:16]}-*"):
            path.unlink(missing_ok=True)


def memory_of(server: Server, request: Request) -> str:
    """The memory that a path names; `Refused` (404) for one that this server has not."""
    name: str = request.path_params["memory"]
    if name not in server.settings.memories:
        names = ", ".join(server.settings.memories) or "no memory"
        raise Refused(404, "memory_not_found", f"memory is {quoted(name)}; this server has {names}.", "memory")
    return name


def clip_of(request: Request) -> int:
    """The id that a path names; `Refused` (404) for what is none."""
    text: str = request.path_params["clip"]
    if not text.isascii() or not text.isdecimal() or len(text) > 18:  # SQLite counts to 2^63
        raise Refused(404, "not_found", f"{quoted(text)} is no clip; an id is a number that a search gave.", "id")
    return int(text)


def no_clip(name: str, clip: int) -> Refused:
    """For an id that a memory has not, or not any more."""
    return Refused(404, "not_found", f"the memory {name} has no clip {clip}; it may have been removed.", "id")


def _keep_newest(folder: Path) -> None:
    """Remove the previews that were asked for longest ago, and what a kill has left among them."""
    with contextlib.suppress(OSError):
        files = [(path.stat().st_mtime, path) for path in folder.iterdir()]
        for _, path in sorted(files)[:-_PREVIEWS]:
            path.unlink(missing_ok=True)
