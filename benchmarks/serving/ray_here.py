"""Ray Serve on this machine with replicas of a bundle, as `motionrt deploy ray --run` starts it: for tests and questions."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

MOTIONRT = Path(__file__).resolve().parents[2] / ".venv-ray" / "bin" / "motionrt"  # `make .venv-ray/.installed` makes it


class RayHere:
    """Use it as a context; at its end Ray and all its processes are gone.

    folder: of its config and log; options: more words of `motionrt deploy ray`; env: in place of variables of this process.
    """

    def __init__(
        self, folder: Path, bundle: Path, memory: Path | None = None, options: Sequence[str] = (), *,
        env: Mapping[str, str] = {},
    ) -> None:  # fmt: skip
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = int(sock.getsockname()[1])
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "ray.log"
        words = [f"--bundle={bundle}", f"--port={port}", f"--out={folder / 'ray.yaml'}", "--run", *options]
        words += [] if memory is None else [f"--memory={memory}"]
        command, env = [str(MOTIONRT), "deploy", "ray", *words], {**os.environ, **env}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env)

    def __enter__(self) -> Self:
        """Wait until it takes jobs; RuntimeError where it does not."""
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/-/healthz", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(f"Ray does not become ready: {self.log.read_text(errors='replace')[-2000:]}")

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for pid in (*family(self.process.pid), self.process.pid):
                os.kill(pid, 9)
            self.process.wait()

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        return [pid for pid in family(self.process.pid) if words(pid).startswith(b"ray::ServeReplica")]


def family(pid: int) -> list[int]:
    """Process ids of the children of a process, of theirs, and so on."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:  # it is gone
            continue
        for child in children:
            found += [child, *family(child)]
    return found


def words(pid: int) -> bytes:
    """The command line of a process; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
