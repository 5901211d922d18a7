"""The server's worker where replicas make the videos: it sends them jobs, and answers what is asked about orders and memories.

Which replica has a job, how many there are and that a dead one is started again is the business of who runs them (Ray Serve),
at one URL. A job that no replica has begun waits here. One whose replica died ends this process, as a worker that dies takes
its job along: the server begins it once more.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import msgspec

from motionrt.runtime.errors import BackendError, MediaError
from motionrt.runtime.files import replacing
from motionrt.runtime.serve.messages import Ended, FromWorker, Opening, Progress, Sent
from motionrt.runtime.serve.work.engine import Engine, Running, failure

_log = logging.getLogger(__name__)
_AGAIN = 0.5  # seconds until a job that no replica took is sent again
_SILENCE = 60.0  # seconds without a line after which a replica that began a job is taken for dead
_CONNECT = 10.0  # seconds that a connection may take
_CHUNK = 1 << 20  # bytes of a file that are read at once
_said: msgspec.json.Decoder[Progress | Ended] = msgspec.json.Decoder(Progress | Ended)


class _Lost(Exception):
    """A replica that had begun a job says no more."""


class _Sending:
    """A job on its way: the socket that it is sent over, and whether it was cancelled."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.left = threading.Event()

    def leave(self) -> None:
        """Hang up."""
        self.left.set()
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


class Relay(Engine):
    """See the module."""

    def __init__(self, opening: Opening, tell: Callable[[FromWorker], None]) -> None:
        """Raises what `Engine` does, and BackendError where no replicas of a bundle are at the URL."""
        super().__init__(msgspec.structs.replace(opening, self_test=False), tell)
        self._url, self._sending = opening.replicas.rstrip("/"), dict[str, _Sending]()
        try:
            with urllib.request.urlopen(f"{self._url}/-/routes", timeout=_CONNECT) as answer:
                routes = set(json.load(answer))
        except (OSError, ValueError) as error:
            raise BackendError(f"no replicas answer at {self._url}: {error}. Start them: `motionrt deploy ray`.") from None
        if missing := [name for name in self.models if not {"/", f"/{name}"} & routes]:
            raise BackendError(f"{self._url} has no replicas of {', '.join(missing)}. Deploy them: `motionrt deploy ray`.")

    def describe(self) -> dict[str, dict[str, object]]:
        return {name: about | {"backend": "replicas"} for name, about in super().describe().items()}

    def cancel(self, name: str) -> None:
        super().cancel(name)
        if (sending := self._sending.get(name)) is not None:
            sending.leave()

    def _begin(self, running: Running) -> None:
        running.writing = True  # no turn of it is taken here
        self._sending[running.run.job] = _Sending()
        threading.Thread(target=self._relay, args=(running,), daemon=True, name="motionrt-relay").start()

    def _relay(self, running: Running) -> None:
        """One job, from here to a replica and back; in a thread of its own."""
        name = running.run.job
        try:
            ended = self._made(running, self._sending[name])
        except _Lost:
            if not running.cancelled:
                _log.error("the replica that had begun %s is gone", name)
                os._exit(1)
            ended = Ended(job=name, outcome="cancelled")
        except Exception as error:
            ended = Ended(job=name, outcome="failed", error=failure(error), used=running.used)
        del self._sending[name]
        self._over(running, ended)

    def _made(self, running: Running, sending: _Sending) -> Ended:
        """Send a job until a replica begins it, and read what comes. Raises `_Lost`, also of one that was cancelled."""
        order = running.run.order
        files = {name: Path(path).read_bytes() for name, path in order.files.items()}
        body = msgspec.msgpack.encode(Sent(run=running.run, files=files, digest=running.model.digest))
        while not sending.left.is_set():
            with contextlib.closing(self._connection()) as connection:
                path = f"{urlsplit(self._url).path}/{quote(order.model)}"
                if (answer := _begun(connection, sending, path, order.model, body)) is not None:
                    return self._read(running, answer)
            sending.left.wait(_AGAIN)
        raise _Lost

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.startswith("https:") else http.client.HTTPConnection
        return kind(urlsplit(self._url).netloc, timeout=_CONNECT)

    def _read(self, running: Running, answer: http.client.HTTPResponse) -> Ended:
        name, folder = running.run.job, Path(running.run.folder)
        while True:
            with _losing():
                line = answer.readline()
                said = _said.decode(line) if line != b"\n" else None
            match said:
                case Progress():
                    running.used = said.used
                    self._tell(msgspec.structs.replace(said, job=name))
                case Ended():
                    for file in said.files:
                        with replacing(folder / Path(file.name).name, MediaError) as partial, open(partial, "wb") as kept:
                            for piece in _pieces(answer, file.size):
                                kept.write(piece)
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        answer.read()  # to its end: who hangs up before it is taken to have left
                    for graph, seconds in said.result.get("seconds", {}).items():  # what the next ones are expected to take
                        if count := running.calls.get(graph):
                            running.model.timing.measured(graph, seconds / count)
                    return msgspec.structs.replace(said, job=name)


def _begun(
    connection: http.client.HTTPConnection, sending: _Sending, path: str, model: str, body: bytes
) -> http.client.HTTPResponse | None:
    """The answer to a job, once a replica has begun it, which may take as long as others do; None where none will."""
    headers = {"Content-Type": "application/msgpack", "serve_multiplexed_model_id": model}
    try:
        connection.connect()
        sending.socket = connection.sock
        connection.sock.settimeout(None)
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sending.left.is_set():  # before there was a socket to hang up
            return None
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        if answer.status == 200 and answer.readline() == b"\n":
            sending.socket.settimeout(_SILENCE)
            return answer
        why = f"{answer.status} {answer.reason}"
    except (OSError, http.client.HTTPException) as error:
        why = str(error)
    if not sending.left.is_set():
        _log.warning("no replica of %s takes a job yet: %s", model, why)
    return None


@contextlib.contextmanager
def _losing() -> Iterator[None]:
    """What goes wrong while a replica is listened to, as `_Lost`."""
    try:
        yield
    except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise _Lost from error


def _pieces(answer: http.client.HTTPResponse, size: int) -> Iterator[bytes]:
    while size:
        with _losing():
            piece = answer.read(min(size, _CHUNK))
        if not piece:
            raise _Lost
        size -= len(piece)
        yield piece
