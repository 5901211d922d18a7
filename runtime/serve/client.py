"""A client of the server, in the standard library alone: this one file can be copied into any program.

    client = Client("http://127.0.0.1:8420", key)                # or MOTIONRT_SERVER and MOTIONRT_API_KEY
    job = client.create("a red star moves in a circle", "star.png", seed=7, motion_scale=0.8)
    for job in client.events(job["id"]):
        print(job["motionrt"]["stage"], job["progress"])
    client.content(job["id"], "star.mp4")

A job is the JSON of the server as a dict. What the server refuses is a `ServerError`. A call is repeated where that can help:
after a lost connection and where the server says that it is busy. A job is never made twice by that: it goes out under an
Idempotency-Key.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SERVER = "http://127.0.0.1:8420"
_AGAIN = (408, 429, 500, 502, 503, 504)  # answers that another try may change
_LONGEST = 60.0  # seconds of Retry-After that are waited for


class ServerError(Exception):
    """The server refused, or cannot be reached. status: HTTP, 0 without an answer; code: a word for programs; param: the
    field at fault; again: seconds after which another try may help, None where none does."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, again: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.again = status, code, message, param, again


class Client:
    """See the module. key: "" sends none, whatever the environment says; timeout: seconds without a byte from the server, not
    of a whole call; tries: of one call, at most; patience: seconds that `events` and `wait` go on while the server cannot be
    reached, as when it is started anew."""

    def __init__(self, server: str | None = None, key: str | None = None, *, timeout: float = 60, tries: int = 4) -> None:
        self.server = (server or os.environ.get("MOTIONRT_SERVER") or SERVER).rstrip("/")
        if not self.server.startswith(("http://", "https://")):
            raise ServerError(0, "invalid_server", f"the server is {self.server!r}; it must begin with http:// or https://.")
        self._key = os.environ.get("MOTIONRT_API_KEY") if key is None else key
        self.timeout, self.tries, self.patience = timeout, max(1, tries), 120.0

    def create(self, prompt: str | None = None, image: str | Path | bytes | None = None, **fields: Any) -> dict[str, Any]:
        """A new job. image: a still, as a path, bytes or a data URL; fields: seed, n, steps, references, motion_scale and
        whatever else the bundle takes (`models` says what; its files as `Path`s); idempotency_key: of a job that may have been
        asked for before."""
        return self._make("videos", {"prompt": prompt, "input_reference": None if image is None else _url(image), **fields})

    def remix(self, job: str, **fields: Any) -> dict[str, Any]:
        """The same request again, with `fields` (prompt, seed …) in place of what it said."""
        return self._make(f"videos/{_part(job)}/remix", fields)

    def retrieve(self, job: str, wait: float | None = None) -> dict[str, Any]:
        """A job as it is now; with `wait` in seconds (the server takes 60 at most) when it is over, or that time is."""
        return self._json("GET", f"videos/{_part(job)}" + ("" if wait is None else f"?wait={wait:g}"))

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        """A job as it is now and whenever it changes, the last time when it is over. The server's stream of events is opened
        again where it breaks; in between the job is asked for, for there are proxies that let no stream through."""
        reached = time.monotonic()
        while True:
            try:
                for source in (self._stream, lambda job: [self.retrieve(job, wait=2)]):
                    for shown in source(job):
                        reached = time.monotonic()
                        yield shown
                        if shown["status"] in ("completed", "failed"):
                            return
            except ServerError as error:
                if error.again is None or time.monotonic() - reached > self.patience:
                    raise
                time.sleep(max(0.5, error.again))

    def wait(self, job: str) -> dict[str, Any]:
        """A job that is over. `ServerError` with the job's own code where it failed, status 409."""
        *_, last = self.events(job)
        if last["status"] == "failed":
            error = last["error"] or {"code": "failed", "message": "the job failed."}
            raise ServerError(409, error["code"], error["message"])
        return last

    def content(self, job: str, path: str | Path, variant: str = "video", index: int = 0) -> Path:
        """Write a variant (video, thumbnail, spritesheet, field) of the `index`-th seed to `path`, whole or not at all; OSError
        where it cannot be written."""
        query = urllib.parse.urlencode({"variant": variant, "index": index})
        data = self._again(lambda: self._bytes("GET", f"videos/{_part(job)}/content?{query}"))
        partial = Path(path).with_name(f".{secrets.token_hex(6)}.partial")
        try:
            partial.write_bytes(data)
            return partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def jobs(self, *, order: str = "desc", page: int = 100) -> Iterator[dict[str, Any]]:
        """All jobs of this key, newest first (order "asc": last), `page` of them a request."""
        after = ""
        while True:
            found = self._json("GET", f"videos?limit={page}&order={order}{after}")
            yield from found["data"]
            if not found["has_more"]:
                return
            after = f"&after={found['last_id']}"

    def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job, and keep what is known of it; it has stopped when this returns."""
        return self._json("POST", f"videos/{_part(job)}/cancel")

    def delete(self, job: str) -> None:
        """Stop a job if it is not over, and remove it with its files. One that is gone already is no error: a repeated call
        must not fail because the first one came through."""
        try:
            self._json("DELETE", f"videos/{_part(job)}")
        except ServerError as error:
            if error.status != 404:
                raise

    def record(self, job: str) -> dict[str, Any]:
        """What `motionrt replay` makes the same video from."""
        return self._json("GET", f"videos/{_part(job)}/record")

    def models(self) -> list[dict[str, Any]]:
        """The bundles that are served, each with what it takes and gives."""
        return list(self._json("GET", "models")["data"])

    # --- one request --------------------------------------------------------------------------------------------------

    def _make(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        key = fields.pop("idempotency_key", None) or secrets.token_hex(16)
        given = {n: _url(one) if isinstance(one, Path) else one for n, one in fields.items() if one is not None}
        return self._json("POST", path, given, {"Idempotency-Key": key})

    def _json(self, *request: Any) -> dict[str, Any]:
        data = self._again(lambda: self._bytes(*request))
        try:
            return dict(json.loads(data))
        except ValueError:
            text = f"what {self.server} answers is not JSON: is it a MotionRT server?"
            raise ServerError(200, "invalid_answer", text) from None

    def _again(self, call: Callable[[], bytes]) -> bytes:
        """What `call` gives, called again while that may help."""
        for tried in range(self.tries - 1):
            try:
                return call()
            except ServerError as error:
                if error.again is None:
                    raise
                time.sleep(max(error.again, min(8.0, 0.5 * 2**tried)))
        return call()

    def _bytes(self, *request: Any) -> bytes:
        with self._open(*request) as answer:
            return bytes(answer.read())

    def _stream(self, job: str) -> Iterator[dict[str, Any]]:
        """What each event of one connection says of the whole job; nothing where the answer is no stream of events."""
        with self._open("GET", f"videos/{_part(job)}/events") as answer:
            if answer.headers.get_content_type() == "text/event-stream":
                event = b""
                for line in answer:  # the line `data` is whole JSON; a comment begins with a colon
                    if line.startswith(b"event:"):
                        event = line[6:].strip()
                    elif line.startswith(b"data:") and line.endswith(b"\n") and event != b"preview":
                        yield json.loads(line[5:])

    @contextlib.contextmanager
    def _open(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}) -> Iterator[Any]:
        """The answer, open. `ServerError` also where it breaks off."""
        data = None if body is None else json.dumps(body).encode()
        said = {**headers, **({} if data is None else {"Content-Type": "application/json"})}
        request = urllib.request.Request(f"{self.server}/v1/{path}", data, said, method=method)
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")  # another host must not learn it
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                yield answer
        except urllib.error.HTTPError as refused:
            with refused:
                raise _refused(refused) from None
        except (OSError, http.client.HTTPException) as error:  # a connection that was not made, or broke
            text = f"{self.server} cannot be reached: {getattr(error, 'reason', None) or error or type(error).__name__}."
            raise ServerError(0, "unreachable", f"{text} Is it up? MOTIONRT_SERVER names another.", again=0.0) from error


def _refused(answer: urllib.error.HTTPError) -> ServerError:
    """The error of an answer; one that is not of our server (a proxy's page) is told by its status."""
    said: dict[str, Any] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        said = dict(json.loads(answer.read())["error"])
    message = said.get("message") or f"the server answered with status {answer.code}."
    after = answer.headers.get("Retry-After", "")
    again: float | None = float(after) if after.isdecimal() else 0.0
    if answer.code not in _AGAIN or answer.headers.get("x-should-retry") == "false" or (again or 0) > _LONGEST:
        again = None
    return ServerError(answer.code, str(said.get("code") or "http_error"), str(message), said.get("param"), again)


def _part(job: str) -> str:
    return urllib.parse.quote(job, safe="")


def _url(image: str | Path | bytes) -> str:
    """A still as a data URL; the server tells its kind by its bytes."""
    if isinstance(image, str) and image.startswith("data:"):
        return image
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
