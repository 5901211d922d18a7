"""What reaches a terminal or a pipe: text without control characters, in whatever encoding; and Ctrl-C, as one line."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from motionrt.__main__ import INTERRUPTED, stop
from motionrt.runtime.errors import BackendWarning

# Escapes, line ends, what turns the direction of text, and halves of characters (file names that are no valid text).
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_DRAWN = {"─": "-", "│": "|", "┌": "+", "└": "+", "▶": ">", "→": "->", "…": "..."}  # where an encoding has none of them


def visible(text: str) -> str:
    """`text` with control characters written out (`\\x1b`): a caption or a file's name must not steer a terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def echo(text: str, err: bool = False) -> None:
    """Print one line, without control characters."""
    print(visible(text), file=sys.stderr if err else sys.stdout)


class _Lines(logging.Handler):
    """What we log, from warnings on, as lines of the command called `command`."""

    def __init__(self, command: str) -> None:
        super().__init__(logging.WARNING)
        self.command = command

    def emit(self, record: logging.LogRecord) -> None:
        echo(f"{self.command}: {record.getMessage()}", err=True)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks as `\\u00e9`, which JSON reads as well; lines of drawings as the nearest of ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_DRAWN.get(character) or json.dumps(character)[1:-1] for character in lacking), error.end


codecs.register_error("motionrt", _spelled)


@contextlib.contextmanager
def ready(name: str) -> Iterator[None]:
    """For the time of a command called `name`: output in any encoding, our warnings, what we log and Ctrl-C as one line.

    Ctrl-C ends the command with `SystemExit(130)`, so that nothing is left half written; a second one ends it at once. It is
    left to others where they took it (an ignored one in the background, a program that runs the command in itself).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="motionrt")
    format_before = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *more: Any, **named: Any) -> str:
        ours = issubclass(category, BackendWarning)
        return f"{name}: {visible(str(message))}\n" if ours else format_before(message, category, *more, **named)

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, stop)
        with contextlib.suppress(OSError):  # standard error may be closed
            os.write(2, f"{name}: interrupted.\n".encode())
        raise SystemExit(INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    takes = threading.current_thread() is threading.main_thread() and before in (stop, signal.default_int_handler)
    warnings.formatwarning = one_line
    log, lines = logging.getLogger("motionrt"), _Lines(name)
    if not log.hasHandlers():
        log.addHandler(lines)
    if takes:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        log.removeHandler(lines)
        if takes:
            signal.signal(signal.SIGINT, before)
