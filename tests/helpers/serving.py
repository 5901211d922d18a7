"""A server in a process of its own, and a client of the standard library that says what came back: for tests."""

from __future__ import annotations

import copy
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from motionrt.benchmarks.serving import served

BOUNDARY = "boundary-of-a-test"


@dataclass
class Reply:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


class Served(served.Served):
    """A running server. `call("POST", "/v1/videos", form={...}, files={...})`; key: sent with each call."""

    key: str | None = None

    def of(self, key: str) -> Served:
        """The same server, asked with another key."""
        other = copy.copy(self)
        other.key = key
        return other

    def call(
        self, method: str, path: str, *, form: dict[str, Any] | None = None, files: dict[str, Path] | None = None,
        body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60,
    ) -> Reply:  # fmt: skip
        data, given = None, dict(headers or {})
        if self.key is not None:
            given.setdefault("Authorization", f"Bearer {self.key}")
        if form is not None or files is not None:
            data = multipart(form or {}, files or {})
            given["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
        elif body is not None:
            data, given["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Reply(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def create(self, still: Path, **form: Any) -> dict[str, Any]:
        """A job that must be taken."""
        reply = self.call("POST", "/v1/videos", form={"prompt": "a red ball moves", **form}, files={"input_reference": still})
        assert reply.status == 200, reply.body
        video: dict[str, Any] = reply.json
        return video

    def get(self, video: str) -> dict[str, Any]:
        got: dict[str, Any] = self.call("GET", f"/v1/videos/{video}").json
        return got

    def until(self, video: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        """The job once it has one of these states."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (got := self.get(video))["status"] in statuses:
                return got
            time.sleep(0.02)
        raise AssertionError(f"{video} is {got['status']} after {seconds} s: {got}; {self.log.read_text()[-2000:]}")


class Answering:
    """An HTTP server on this machine that answers as `handler` says and prints nothing, until it is closed."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        quiet = type("Quiet", (handler,), {"log_message": lambda *words: None})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def multipart(form: dict[str, Any], files: dict[str, Path]) -> bytes:
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in form.items()]
    for name, path in files.items():
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'
        parts.append(head.encode() + path.read_bytes() + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@contextmanager
def serving(
    store: Path, bundle: Path, memory: Path | None = None, *options: str, key: str | None = None, ready: bool = True
) -> Iterator[Served]:
    """`motionrt serve` on a free port, ready unless not `ready`; ended by SIGTERM, or SIGKILL where that takes too long."""
    with Served(store, bundle, memory, options) as running:
        running.key = key
        yield running.start(ready=ready)
