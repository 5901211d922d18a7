"""What stands before the routes: who may address the server and from which page, bodies that are too large or too slow, and
the headers that keep a browser careful.

The HTTP server has no time limit for a body. Starlette can bound its size (`max_body_size`), but answers in plain text where
the length was declared, and clients read JSON. What only the server of connections can bound is in connections.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from motionrt.runtime.errors import InputError
from motionrt.runtime.serve.settings import Settings
from motionrt.runtime.serve.web.refusal import Refused, quoted

_log = logging.getLogger(__name__)
# Of the page; of everything else, which is never meant to be a page.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:;"
    " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
OTHER_POLICY = "sandbox; default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class Pace:
    """How slow a client may be. grace: seconds of a body that may take any time; rate: bytes a second that it must have on
    average afterwards; total: seconds of a body, and one more for each MiB. drain, drained: seconds and bytes of a body that is
    still read when the answer is there already, so that a client that is busy sending gets to see it."""

    grace: float = 10.0
    rate: float = 16384.0
    total: float = 120.0
    drain: float = 5.0
    drained: int = 64 << 20


class Watcher(Protocol):
    """Who is told of each request: the template of its route, the status, and the seconds until the answer began."""

    def requested(self, route: str, code: int, seconds: float) -> None: ...


def guarded(settings: Settings, metrics: Watcher, pace: Pace = Pace()) -> list[Middleware]:
    """The layers around the routes, the outermost first. Raises InputError for an origin that is none."""
    origins = [origin.lower().rstrip("/") for origin in settings.origins]
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or "*" in origin:
            raise InputError(
                f"the origin {origin!r} is none; allowed is a scheme and a host, such as https://example.org:8000."
            )
    layers = [
        Middleware(Measured, watcher=metrics),
        Middleware(Careful, foreign=bool(origins)),
        Middleware(Addressed, hosts=settings.hosts, origins=origins, keyless=settings.keys is None),
    ]
    if origins:
        exposed = ("openai-poll-after-ms", "retry-after", "x-should-retry", "x-motionrt-video-id", "etag")
        methods = ("GET", "POST", "DELETE")
        layers.append(
            Middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers="*", expose_headers=exposed)
        )
    return [*layers, Middleware(Patient, body=max(settings.body, settings.clips), pace=pace)]


class Measured:
    """Tells the watcher of each request."""

    def __init__(self, app: ASGIApp, watcher: Watcher) -> None:
        self._app, self._watcher = app, watcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, prefix, status, seconds = time.perf_counter(), scope.get("root_path", ""), 0, 0.0

        async def noting(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                status, seconds = message["status"], time.perf_counter() - start
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = status or 500
            raise
        finally:
            # By its template: a path that was made up would make a series of its own.
            route = scope.get("route")
            template = scope.get("root_path", "").removeprefix(prefix) + (route.path if isinstance(route, Route) else "")
            self._watcher.requested(template or "other", status or 499, seconds or time.perf_counter() - start)


class Careful:
    """Headers for browsers, where the answer does not set them itself. foreign: pages of other origins may use the server."""

    def __init__(self, app: ASGIApp, foreign: bool) -> None:
        self._app = app
        self._headers = {
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "cross-origin" if foreign else "same-origin",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                page = headers.get("content-type", "").startswith("text/html")
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                if message["status"] != 304:  # which has no content type: a browser would give the page this policy
                    headers.setdefault("content-security-policy", PAGE_POLICY if page else OTHER_POLICY)
            await send(message)

        await self._app(scope, receive, adding if scope["type"] == "http" else send)


class Addressed:
    """Refuses requests that address the server by a foreign name, and those that a foreign page sends.

    The first stops a page whose name was made to lead to this machine (DNS rebinding): an address in figures cannot be such a
    name, nor can one without a dot, which no stranger can own. hosts: the other names that may be used; where there are none,
    any with keys (a foreign page has no key), and none without. The second stops a form that a page elsewhere sends here.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str], keyless: bool) -> None:
        self._app, self._origins, self._keyless = app, frozenset(origins), keyless
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refused := self._refused(scope["method"], Headers(scope=scope))) is not None:
            return await refused.response()(scope, receive, send)
        await self._app(scope, receive, send)

    def _refused(self, method: str, headers: Headers) -> Refused | None:
        hosts, origin = headers.getlist("host"), headers.get("origin", "").lower()
        if len(hosts) != 1 or not self._may_be(hosts[0].lower()):
            text = (
                f"the server is not known as {quoted(', '.join(hosts))}. Name the host when it is started: --allow-host NAME."
            )
            return Refused(403, "host_not_allowed", text, kind="permission_error")
        foreign = origin and origin not in self._origins and origin.partition("://")[2] != hosts[0].lower()
        if foreign and method not in ("GET", "HEAD", "OPTIONS"):
            text = (
                f"pages of {quoted(origin)} may not use this server. Name the origin when it is started: --cors-origin ORIGIN."
            )
            return Refused(403, "origin_not_allowed", text, kind="permission_error")
        return None

    def _may_be(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        ours = bool(name) and ("." not in name or name.endswith(".localhost"))
        return ours or name in self._hosts or not self._hosts and not self._keyless


class Patient:
    """Bodies: of at most `body` bytes, and not slower than `pace` allows. A client that leaves is no fault of anybody."""

    def __init__(self, app: ASGIApp, body: int, pace: Pace = Pace()) -> None:
        self._app, self._body, self._pace = app, body, pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        watched = _Body(Headers(scope=scope), receive, send, self._body, self._pace)
        try:
            if watched.declared > self._body:
                raise _too_large(self._body)
            await self._app(scope, watched.receive, watched.send)
        except ClientDisconnect:
            _log.debug("a client left while it sent a body")
        except Refused as refused:
            if watched.answered:
                raise
            await refused.response()(scope, watched.receive, watched.send)


class _Body:
    """One request's body as it arrives, and what is left of it when the answer is there."""

    def __init__(self, headers: Headers, receive: Receive, send: Send, most: int, pace: Pace) -> None:
        self._receive, self._send, self._most, self._pace = receive, send, most, pace
        length = headers.get("content-length", "")
        self.declared = int(length) if length.isdecimal() and len(length) < 20 else 0
        self.answered = False
        self._ended = not self.declared and "transfer-encoding" not in headers
        self._waits = headers.get("expect", "").lower() == "100-continue"  # sends nothing before it is asked to
        self._size, self._start = 0, 0.0

    async def receive(self) -> Message:
        if self._ended:
            return await self._receive()
        now, pace = time.monotonic(), self._pace
        self._start, self._waits = self._start or now, False
        until = self._start + min(pace.total + self._size / (1 << 20), pace.grace + self._size / pace.rate)
        try:
            async with asyncio.timeout(max(0.0, until - now)):
                message = await self._receive()
        except TimeoutError:
            self._ended = True  # nothing more is read, so that the connection is closed
            text = f"{self._size} bytes of the body came in {time.monotonic() - self._start:.0f} s, which is too slow."
            headers = {"connection": "close", "x-should-retry": "false"}
            raise Refused(408, "upload_too_slow", text, headers=headers) from None
        self._size += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._size > self._most:
            raise _too_large(self._most)
        return message

    async def send(self, message: Message) -> None:
        self.answered = True
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last and not self._ended and not self._waits and self.declared <= self._pace.drained:
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drain(self) -> None:
        """Read on: a server that closes while its client still sends takes the answer away from it, with what is unread."""
        read = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pace.drain):
                while not self._ended and read <= self._pace.drained:
                    message = await self._receive()
                    read += len(message.get("body", b""))
                    self._ended = not message.get("more_body", False)


def _too_large(most: int) -> Refused:
    return Refused(413, "body_too_large", f"the body is larger than {most} bytes, which is what is taken.")
