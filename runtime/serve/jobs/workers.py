"""The server's end of a worker: it is started, listened to, and started anew when it dies or goes silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from motionrt.runtime.serve.messages import Alive, Answer, Ask, Broken, FromWorker, Line, Opening, Ready, Stop, ToWorker
from motionrt.runtime.serve.web.refusal import Refused, told

_log = logging.getLogger(__name__)
SILENCE = 60.0  # seconds without a sign of life after which a worker is taken for dead
_TAKES = 5.0  # seconds in which it must take something of what it is sent: the server waits for that
_WAITS = (0.2, 1.0, 5.0, 30.0)  # seconds before it is started again: the longer, the more often it died before it was ready
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def environment() -> dict[str, str]:
    """The environment of this process, without what is named like a secret: who decodes strangers' files needs none."""
    return {name: value for name, value in os.environ.items() if not _SECRET.search(name)}


class Worker:
    """A worker process (or, with `thread`, a thread of this one). All methods are for the event loop that `start` ran in.

    on_message and on_gone are called in that loop: the first with each report, the second when the worker died; it is then
    started again. `broken`: why it could not open what it should, the last time; `models`: what it said when it was ready.
    """

    def __init__(
        self, number: int, opening: Opening, on_message: Callable[[Worker, FromWorker], None],
        on_gone: Callable[[Worker], None], thread: bool = False,
    ) -> None:  # fmt: skip
        self.number, self.opening, self.thread = number, opening, thread
        self._on_message, self._on_gone = on_message, on_gone
        self.ready, self.closing = False, False
        self.broken: str | None = None
        self.models: dict[str, dict[str, Any]] = {}
        self.restarts, self.rss, self.heard = 0, 0, 0.0
        self._line: Line | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the worker; `on_message` hears of it."""
        loop = asyncio.get_running_loop()
        self._line, self.heard = self._begin(), time.monotonic()
        threading.Thread(
            target=self._listen, args=(loop, self._line), daemon=True, name=f"motionrt-worker-{self.number}"
        ).start()
        self.send(self.opening)

    def _begin(self) -> Line:
        if self.thread:
            from motionrt.runtime.serve.work.worker import work

            ours, theirs = Pipe()
            threading.Thread(target=work, args=(Line(theirs),), daemon=True, name="motionrt-work").start()
            return Line(ours)
        here, there = socket.socketpair()
        bound = struct.pack("ll", int(_TAKES), int(_TAKES % 1 * 1e6))
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
        with there:
            command = [sys.executable, "-m", "motionrt.runtime.serve.work.worker", str(there.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env=environment())
        return Line(Connection(here.detach()))

    def _listen(self, loop: asyncio.AbstractEventLoop, line: Line) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = line.reported()
                loop.call_soon_threadsafe(self._heard, line, message)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._lost, line)

    def _heard(self, line: Line, message: FromWorker) -> None:
        if line is not self._line:
            return  # of a process before this one
        self.heard = time.monotonic()
        match message:
            case Alive(rss):
                self.rss = rss
                return
            case Ready(models):
                self.ready, self.broken, self.models, self._failures = True, None, models, 0
            case Broken(why):
                self.broken = why
            case Answer(number):
                future = self._asked.pop(number, None)
                if future is not None and not future.done():
                    future.set_result(message)
                return
        self._on_message(self, message)

    def _lost(self, line: Line) -> None:
        if line is not self._line:
            return
        was_ready, self.ready, self._line = self.ready, False, None
        line.close()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(Refused(503, "worker_lost", "the worker was lost while it looked at this; try again."))
        self._asked.clear()
        self._end_process()
        if self.closing:
            return
        self.restarts += 1
        wait = _WAITS[min(self._failures, len(_WAITS) - 1)]
        self._failures = 0 if was_ready else self._failures + 1
        _log.error("worker %d is gone; it is started again in %.1f s", self.number, wait)
        self._on_gone(self)
        asyncio.get_running_loop().call_later(wait, self._again)

    def _again(self) -> None:
        if self.closing:
            return
        try:
            self.start()
        except OSError as error:  # there is no memory, or no process, to be had now
            _log.error("worker %d cannot be started yet: %s", self.number, error)
            asyncio.get_running_loop().call_later(_WAITS[-1], self._again)

    def look(self) -> None:
        """Kill a worker that has been silent for too long; it is started again like any that dies."""
        if self._line is not None and not self.thread and time.monotonic() - self.heard > SILENCE:
            _log.error("worker %d has been silent for %.0f s", self.number, SILENCE)
            self._end_process()

    def send(self, message: ToWorker | Opening) -> None:
        """Say something; a worker that dies meanwhile is noticed by whoever listens, and one that takes nothing is killed."""
        if self._line is not None:
            try:
                self._line.send(message)
            except OSError:
                self._end_process()

    async def ask(self, what: Any, about: dict[str, Any], seconds: float) -> Any:
        """The answer to a question. Raises `Refused`: what the worker said, or that it did not answer in time."""
        self._numbers += 1
        number, future = self._numbers, asyncio.get_running_loop().create_future()
        self._asked[number] = future
        self.send(Ask(number, what, about))
        try:
            answer: Answer = await asyncio.wait_for(future, seconds)
        except TimeoutError:
            raise Refused(503, "busy", "no worker answered in time; try again.", headers={"Retry-After": "5"}) from None
        finally:
            self._asked.pop(number, None)
        if answer.refused is not None:
            status = 400 if answer.refused["theirs"] else 500
            raise Refused(status, answer.refused["code"], told(answer.refused["message"]), answer.refused["field"])
        return answer.value

    async def stop(self, seconds: float = 5.0) -> None:
        """Have it leave; killed when it takes longer."""
        self.closing = True
        self.send(Stop())
        end = time.monotonic() + seconds
        while self._line is not None and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if self._line is not None:
            self._line.close()
        self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
