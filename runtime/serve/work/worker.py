"""A worker: one engine behind a pipe, in a process of its own (`python -m motionrt.runtime.serve.work.worker FD`) or a thread.

It ends with the server: a pipe that is closed is the order to leave, also where the server was killed.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from motionrt.runtime.errors import MediaError, MotionRTError
from motionrt.runtime.serve.messages import Alive, Answer, Ask, Broken, Cancel, FromWorker, Line, Ready, Run, ToWorker

if TYPE_CHECKING:
    from motionrt.runtime.serve.work.engine import Engine

_log = logging.getLogger(__name__)
BEAT = 2.0  # seconds between two signs of life
_PAGE = os.sysconf("SC_PAGE_SIZE")


def work(line: Line) -> None:
    """Open what the server says, then do what it asks until it says `Stop` or is gone."""
    leaving = threading.Event()
    threading.Thread(target=_beat, args=(line, leaving), daemon=True, name="motionrt-alive").start()
    try:
        opened = _open(line)
        if opened is not None:
            with opened:
                _serve(line, opened)
    except (EOFError, OSError):
        pass  # the server is gone: nobody is left to tell
    finally:
        leaving.set()
        line.close()


def _open(line: Line) -> Engine | None:
    opening, start = line.opening(), time.monotonic()
    try:
        from motionrt.runtime.serve.work.engine import Engine

        kind = Engine
        if opening.replicas:
            from motionrt.runtime.serve.replicas.relay import Relay

            kind = Relay
        engine = kind(opening, lambda message: _say(line, message))
    except Exception as error:
        if not isinstance(error, MotionRTError):
            _log.exception("a worker cannot start")
        line.send(Broken(str(error) if isinstance(error, MotionRTError) else f"{type(error).__name__}: {error}"))
        return None
    line.send(Ready(engine.describe(), time.monotonic() - start))
    return engine


def _serve(line: Line, engine: Engine) -> None:
    """Graphs are run here; what is asked comes in from a thread that waits at the pipe; pictures are read in a third, and
    previews written in a fourth: a long clip keeps no job waiting."""
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()  # messages, prepared jobs, and None for the end
    with ThreadPoolExecutor(1, "motionrt-read") as reading, ThreadPoolExecutor(1, "motionrt-preview") as showing:
        heard = (line, engine, todo, reading, showing)
        threading.Thread(target=_receive, args=heard, daemon=True, name="motionrt-pipe").start()
        while True:
            try:
                item = todo.get(block=not engine.busy)
            except queue.Empty:
                engine.turn()
                continue
            match item:
                case None:
                    for pool in (reading, showing):
                        pool.shutdown(wait=False, cancel_futures=True)
                    return
                case Cancel(job):
                    engine.cancel(job)
                case Ask():
                    _answer(line, engine, item)
                case _:
                    engine.enter(item)


def _receive(
    line: Line, engine: Engine, todo: queue.SimpleQueue[Any], reading: ThreadPoolExecutor, showing: ThreadPoolExecutor
) -> None:
    def prepare(run: Run) -> None:
        if (prepared := engine.prepare(run)) is not None:
            todo.put(prepared)

    try:
        while True:
            message: ToWorker = line.ordered()
            match message:
                case Run():
                    reading.submit(prepare, message)
                case Ask(_, "check" | "stats"):  # no graph is run for these
                    reading.submit(_answer, line, engine, message)
                case Ask(_, "preview"):
                    showing.submit(_answer, line, engine, message)
                case Cancel() | Ask():
                    todo.put(message)
                case _:
                    break
    except (EOFError, OSError, RuntimeError):  # the last: no thread takes work any more
        pass
    todo.put(None)


def _answer(line: Line, engine: Engine, ask: Ask) -> None:
    from motionrt.runtime.serve.work.engine import failure

    try:
        answer = Answer(ask.number, engine.answer(ask))
    except Exception as error:
        refused: dict[str, Any] = dict(failure(error))
        refused |= {"theirs": isinstance(error, MotionRTError), "media": isinstance(error, MediaError)}
        answer = Answer(ask.number, refused=refused | {"field": engine.field(ask, refused["message"])})
    _say(line, answer)


def _say(line: Line, message: FromWorker) -> None:
    try:
        line.send(message)
    except OSError:
        pass  # the server is gone; whoever waits at the pipe sees that and leaves


def _beat(line: Line, leaving: threading.Event) -> None:
    while not leaving.wait(BEAT):
        try:
            with open("/proc/self/statm") as file:
                rss = int(file.read().split()[1]) * _PAGE
            line.send(Alive(rss))
        except (OSError, ValueError):
            return


def main() -> None:
    """A worker in this process, at the other end of the socket whose number is the argument."""
    from motionrt.runtime.serve.logs import to_standard_error

    for name in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and service managers send them to all processes: the server decides
        signal.signal(name, signal.SIG_IGN)
    to_standard_error()
    work(Line(Connection(int(sys.argv[1]))))
    os._exit(0)  # threads inside libraries must not keep a worker whose server is gone


if __name__ == "__main__":
    main()
