"""A real Triton Inference Server on the CPU: the binary that the wheel nvidia-pytriton carries (make .venv-triton/.installed).

    .venv-triton/bin/python tests/helpers/tritonserver.py out/repository      # ports 8000 and 8001, until Ctrl-C

What it takes, besides the wheel: the part of the Python backend that holds the interpreter lies in the folder of the backend,
in the version of that interpreter; `PATH` begins with the environment, by which the interpreter finds its packages
(`PYTHONPATH` is not read); and `LD_LIBRARY_PATH` has the interpreter's own library. That backend is of 2024 and takes NumPy 1
alone, so the environment has that, and the one function of NumPy 2 that the run side needs is made here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-triton"
_VECDOT = '\nif not hasattr(np, "vecdot"):\n    np.vecdot = lambda a, b: np.einsum("...i,...i->...", a, b)\n'


@dataclass
class Running:
    """`http`, `grpc`: addresses. `log`: what it has said; `wait` for a line of it."""

    http: str
    grpc: str
    log: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    ended: bool = False

    def wait(self, words: str, seconds: float = 60) -> str:
        """The first line with `words`, once it is there; AssertionError where it does not come in time, or the server ends."""
        found = lambda: next((line for line in self.log if words in line), None)  # noqa: E731
        with self.changed:
            self.changed.wait_for(lambda: found() is not None or self.ended, seconds)
        line = found()
        assert line is not None, f"{words!r} is not said: {''.join(self.log)[-4000:]}"
        return line


@contextmanager
def triton(repository: Path, folder: Path, ports: tuple[int, int] | None = None) -> Iterator[Running]:
    """A server of `repository`, ready; `folder`: empty, for its backends; `ports`: of HTTP and gRPC, free ones if not given. It
    is ended by SIGTERM, else by SIGKILL."""
    version = sysconfig.get_python_version()
    (packages,) = ENVIRONMENT.glob("lib/python*/site-packages")
    server, backend = packages / "pytriton/tritonserver", folder / "backends/python"
    shutil.copytree(server / "backends/python", backend)
    shutil.copy(server / f"python_backend_stubs/{version}/triton_python_backend_stub", backend)
    with (backend / "triton_python_backend_utils.py").open("a") as file:
        file.write(_VECDOT)
    libraries = [sysconfig.get_config_var("LIBDIR"), str(packages / "nvidia_pytriton.libs")]
    environment = {
        **os.environ, "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": ":".join(libraries),
    }  # fmt: skip
    http, grpc = ports or (_free_port(), _free_port())
    command = [
        str(server / "bin/tritonserver"), f"--model-repository={repository}", f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--allow-metrics=false", "--exit-timeout-secs=5",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running = Running(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    reader = threading.Thread(target=_read, args=(process, running), daemon=True)
    reader.start()
    try:
        running.wait("Started HTTPService")
        _connect(http)  # it says so a moment before it listens
        yield running
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()


def _read(process: subprocess.Popen[str], running: Running) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with running.changed:
            running.log.append(line)
            running.changed.notify_all()
    with running.changed:
        running.ended = True
        running.changed.notify_all()


def _connect(port: int, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, triton(Path(sys.argv[1]), Path(place), (8000, 8001)) as server:
        print(f"ready: HTTP at {server.http}, gRPC at {server.grpc}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
