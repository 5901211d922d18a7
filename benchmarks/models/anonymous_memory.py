"""Memory that a process holds beyond the page cache, watched from outside while it works.

    with AnonymousMemory() as memory:
        work()
        most = memory.peak()        # bytes, since the last call (or the beginning); starts a new stretch

What is counted: `RssAnon` and `RssShmem` of `/proc/PID/status`, every 20 ms, by a process of its own, because a thread would
stand still whenever a library holds the interpreter's lock. Pages of mapped files are not counted: they are page cache, which
the system takes back when it needs them. `ru_maxrss` has them, so it is an upper bound that no peak between two looks escapes.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from pathlib import Path
from types import TracebackType

_INTERVAL = 0.02  # seconds


def anonymous(pid: int | str = "self") -> int:
    """Bytes of anonymous and shared memory that a process has in RAM now."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class AnonymousMemory:
    """Watches the process that makes it. ChildProcessError if the watcher ends before it is told to."""

    def __enter__(self) -> AnonymousMemory:
        command = [sys.executable, "-S", __file__, str(os.getpid())]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.peak()  # waits until it looks
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watcher.communicate()  # the end of its input is the end of it

    def peak(self) -> int:
        """The most bytes that were seen since the last call."""
        assert self._watcher.stdin is not None and self._watcher.stdout is not None
        self._watcher.stdin.write("\n")
        line = self._watcher.stdout.readline()
        if not line:
            raise ChildProcessError("the process that watches memory has ended")
        return int(line)


def _watch(pid: str) -> None:
    most = 0
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    while True:
        try:
            most = max(most, anonymous(pid))
        except OSError:  # it is gone
            return
        if selector.select(_INTERVAL):
            if not os.read(sys.stdin.fileno(), 64):
                return
            print(max(most, anonymous(pid)), flush=True)  # what is there when it is asked is never missed
            most = 0


if __name__ == "__main__":
    _watch(sys.argv[1])
