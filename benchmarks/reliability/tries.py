"""Many tries of something that may go wrong, in processes of their own: what came of each, counted; a crash is an outcome too.

    found = run("motionrt.benchmarks.reliability.damage:attempts", {"memory.sqlite": 500}, first=0)
    found["memory.sqlite"].outcomes               # {"error": 261, "same": 239}

A try is a number, from which all that is random in it is drawn: the number repeats it.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

SECONDS = 120.0  # that one try may take: the largest picture that the limits of media allow takes some
ROOM = 6 << 30  # bytes that a process may ask for on top of what it has when all is prepared: those limits are 4 GiB
FINE = ("error", "same", "answer")  # and a kind's own word for another picture or text, where nothing could notice
BAD = ("wrong", "raw", "crash", "hang")

Outcome = tuple[str, str]  # what came of a try, and a sentence where it is not fine
Attempt = Callable[[int], Iterable[Outcome]]  # a number -> what came of the try, or of the few tries, that it stands for


@dataclass
class Found:
    """What came of the tries of one kind. bad: the numbers that are not fine, and why; seconds; peak: MiB resident, at most."""

    outcomes: Counter[str] = field(default_factory=Counter)
    bad: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0

    @property
    def tries(self) -> int:
        return self.outcomes.total()

    def add(self, number: int, outcome: str, text: str) -> None:
        self.outcomes[outcome] += 1
        if outcome in BAD:
            self.bad[number] = f"{outcome}: {text}"


def run(maker: str, kinds: Mapping[str, int], first: int = 0, *, seconds: float = SECONDS) -> dict[str, Found]:
    """The tries `first`, `first` + 1, ... of each kind, as many as `kinds` says.

    maker: "module:function" that gives the `Attempt` of a kind in an empty folder, in the process that tries. One that
    crashes, or takes longer than `seconds` for a try, is counted, and the tries behind it go on in another process.
    """
    found = {kind: Found() for kind in kinds}
    left = {kind: (first, first + count) for kind, count in kinds.items() if count}
    context = multiprocessing.get_context("spawn")  # native libraries do not survive a fork
    while left:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(maker, left, theirs), daemon=True)
        process.start()
        theirs.close()
        kind, number, since = next(iter(left)), -1, time.perf_counter()
        try:
            while True:
                if not ours.poll(seconds if number >= 0 else 10 * SECONDS):
                    process.kill()
                    raise TimeoutError
                kind, number, outcomes, peak = ours.recv()
                for outcome, text in outcomes:
                    found[kind].add(number, outcome, text)
                found[kind].peak = max(found[kind].peak, peak)
                if number >= 0 and outcomes:
                    left[kind] = (number + 1, left[kind][1])
                    found[kind].seconds += time.perf_counter() - since
                since = time.perf_counter()
        except TimeoutError:
            found[kind].add(number, "hang", f"no answer in {seconds:g} s")
        except EOFError:
            process.join()
            if process.exitcode == 0:
                return found
            if number < 0 or (process.exitcode or 0) > 0:
                raise RuntimeError(f"the tries of {kind} could not be made; see above") from None
            found[kind].add(number, "crash", signal.Signals(-(process.exitcode or 0)).name)
        left[kind] = (number + 1, left[kind][1])
        left = {name: span for name, span in left.items() if span[0] < span[1]}
    return found


def _work(maker: str, left: Mapping[str, tuple[int, int]], connection: Connection) -> None:
    """Every try of `left`: what begins, then what came of it."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    module, _, function = maker.partition(":")
    make = getattr(importlib.import_module(module), function)
    for kind, (start, stop) in left.items():
        if start >= stop:
            continue
        connection.send((kind, -1, [], 0))
        with tempfile.TemporaryDirectory(prefix="motionrt-tries-") as folder:
            attempt: Attempt = make(kind, Path(folder))
            _limit(ROOM)
            for number in range(start, stop):
                connection.send((kind, number, [], 0))
                outcomes = list(attempt(number))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                connection.send((kind, number, outcomes, peak))
            _limit(None)


def _limit(room: int | None) -> None:
    """Let the process have so many bytes of addresses more than it has now; None: as many as it likes."""
    with suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = resource.RLIM_INFINITY if room is None else used + room
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
