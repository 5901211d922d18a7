"""The server inside an application of somebody else, with its worker in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from serving import BOUNDARY, multipart
from starlette.applications import Starlette
from starlette.routing import Mount

import motionrt.serve
from motionrt.runtime.serve.jobs.additions import Additions
from motionrt.runtime.serve.jobs.store import Store


async def call(application: Any, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
    """One request to an ASGI application, without a network."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path.partition("?")[0],
        "raw_path": path.encode(), "query_string": path.partition("?")[2].encode(), "root_path": "", "scheme": "http",
        "headers": [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())],
        "server": ("localhost", 80), "client": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    sent: list[Any] = []
    gone = asyncio.Event()
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if given:
            return given.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_it_is_mounted_with_a_worker_in_a_thread(fake_bundle: Path, fake_memory: Path, picture: Path, tmp_path: Path) -> None:
    """No uvicorn, no command, no other process: what a small box runs inside its own application."""
    service = motionrt.serve.app(
        fake_bundle, tmp_path / "store", fake_memory, workers=0, run_options={"threads": 1}, page=False
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.router.lifespan_context(service):
            yield

    application = Starlette(routes=[Mount("/motion", service)], lifespan=lifespan)

    async def use() -> None:
        async with application.router.lifespan_context(application):
            for _ in range(1000):
                if (await call(application, "GET", "/motion/health/ready"))[0] == 200:
                    break
                await asyncio.sleep(0.01)
            form = multipart({"prompt": "a red ball", "seed": 3, "steps": 3}, {"input_reference": picture})
            status, body = await call(
                application, "POST", "/motion/v1/videos", form, f"multipart/form-data; boundary={BOUNDARY}"
            )
            assert status == 200, body
            job = json.loads(body)["id"]
            for _ in range(1000):
                video = json.loads((await call(application, "GET", f"/motion/v1/videos/{job}"))[1])
                if video["status"] in ("completed", "failed"):
                    break
                await asyncio.sleep(0.01)
            assert video["status"] == "completed", video
            status, data = await call(application, "GET", f"/motion/v1/videos/{job}/content")
            assert status == 200 and data[4:8] == b"ftyp"
            assert (await call(application, "GET", "/v1/videos"))[0] == 404

    asyncio.run(use())


def test_a_start_that_fails_leaves_nothing_open(fake_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application that mounts it may go on, or try again."""

    async def failing(additions: Additions) -> None:
        raise OSError("no")

    monkeypatch.setattr(Additions, "start", failing)
    service = motionrt.serve.app(fake_bundle, tmp_path / "store", workers=0, run_options={"threads": 1}, page=False)

    async def begin() -> None:
        with pytest.raises(OSError, match="no"):
            async with service.router.lifespan_context(service):
                pass

    asyncio.run(begin())
    assert not any(worker.ready or not worker.closing for worker in service.state.server.dispatcher.workers)
    Store(tmp_path / "store").close()  # it is no longer another server's
