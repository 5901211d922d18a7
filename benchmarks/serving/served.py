"""A server in a process of its own, as `motionrt serve` starts it: for tests and questions about it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self


class Served:
    """A server on a port of this machine: `start` it, and use it as a context to have it stopped.

    store: folder of its jobs; options: more words of the command line, such as "--workers=0"; env: in place of variables of
    this process. url stays the same over restarts, log too: what it said on both outputs.
    """

    def __init__(
        self, store: Path, bundle: Path, memory: Path | None = None, options: Sequence[str] = (), *, env: Mapping[str, str] = {}
    ) -> None:
        self.store, self.log = store, store.with_suffix(".log")
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        words = [f"--bundle={bundle}", f"--store={store}", f"--port={port}", "--threads=1", *options]
        words += [] if memory is None else [f"--memory={memory}"]
        self._command = [sys.executable, "-m", "motionrt", "serve", *words]
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, *, ready: bool = True) -> Self:
        """Start it, also anew after `kill` or `stop`, and wait until it takes jobs unless not `ready`; RuntimeError where it
        does not."""
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self._env)
        if ready and not self.until_ready():
            self.stop()
            raise RuntimeError(f"the server does not become ready: {self.log.read_text(errors='replace')[-2000:]}")
        return self

    def until_ready(self, seconds: float = 60.0) -> bool:
        """Whether it takes jobs, waiting for that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health/ready", timeout=5):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)  # it does not listen yet, or says 503
        return False

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return [pid for pid in map(int, children.split()) if b"work.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        except OSError:  # it is gone, or a worker went between the two looks
            return []

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and its exit status; killed where it takes longer."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self.process.returncode)


def rss(pid: int) -> int:
    """Bytes of memory that a process has; 0 for one that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
