"""The process that builds one engine: started, listened to, and its end, whichever it is, told in plain words."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrt.export.engines import from_onnx as engine_from_onnx
from motionrt.runtime.backends.tensorrt.estimate import Estimate
from motionrt.runtime.errors import EngineError

KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH",)  # of a builder that must repeat its bytes; see engine_from_onnx
HINTS = (  # by what the builder logs; the first that fits
    (
        "decomposable|dedicated kernel",
        "Its attention has no fused kernel at this dtype: use another --dtype, or run this graph in ONNX Runtime.",
    ),
    (
        "out of memory|OutOfMemory|bad_alloc",
        "Close other programs, build fewer graphs at a time, or build on a larger machine.",
    ),
    ("importer|[Uu]nsupported|not supported", "Build the other graphs with --graphs, and run this one in ONNX Runtime."),
    ("rofile", "Ask for smaller sizes with --profile, or leave it away."),
)
NO_HINT = "Build one graph alone with --graphs to see which; --dtype float32 tells whether precision is the reason."


@dataclass(frozen=True)
class Event:
    """Progress: `graph`, what is done (`phase`), and how far, 0 to 0 where nobody knows."""

    graph: str
    phase: str
    done: int = 0
    total: int = 0


Listener = Callable[[Event], None]


def run_builder(
    name: str, job: Mapping[str, Any], place: Path, needed: Estimate | None = None, listen: Listener = lambda event: None
) -> dict[str, Any]:
    """Run engine_from_onnx.py in `place`, which holds `graph.onnx`; its result. `EngineError` however it fails."""
    library = sys.modules[engine_from_onnx.LIBRARIES[str(job["flavor"])]]
    site = str(Path(str(library.__file__)).parent.parent)
    (place / "job.json").write_text(json.dumps({**job, "site": site}), encoding="utf-8")
    environment = dict(os.environ)
    if job["flavor"] == "rtx":
        environment = {key: os.environ[key] for key in KEPT_ENVIRONMENT if key in os.environ} | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-I", str(Path(engine_from_onnx.__file__).resolve())]
    result: dict[str, Any] | None = None
    failure = ""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = _message(line)
                if "progress" in message:
                    phase, done, total = message["progress"]
                    listen(Event(name, str(phase), int(done), int(total)))
                result = message.get("result", result)
                failure = str(message.get("error", failure))
                if message.get("errno") in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    failure += " (the disk is full)"
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        errors.seek(0)
        said = errors.read()[-2000:].decode(errors="replace").strip()
    if status == 0 and result is not None:
        return result
    raise EngineError(_failure_text(name, status, failure, said, needed))


def _failure_text(name: str, status: int, failure: str, said: str, needed: Estimate | None) -> str:
    kept = "The previous engine, if there was one, is still in place."
    if failure:
        text = f"{failure}\n{said}"
        hint = next((hint for pattern, hint in HINTS if re.search(pattern, text)), NO_HINT)
        if "the disk is full" in failure:
            hint = "Free some space and build again."
        return f"graph '{name}' cannot be built: {failure[:1500].rstrip('.')}. {hint} {kept}"
    if status < 0:
        died = signal.Signals(-status).name
        hint = f"The machine ran out of memory, most likely: it takes {needed}. Free some, or use a larger machine."
        if -status != signal.SIGKILL:
            hint = "That is a fault of the library's. Build the other graphs with --graphs, and run this one in ONNX Runtime."
        return f"graph '{name}' cannot be built: the builder died with {died}: {said or 'it said nothing'}. {hint} {kept}"
    return (
        f"graph '{name}' cannot be built: the builder ended with status {status}: {said or 'it said nothing'}. {NO_HINT} {kept}"
    )


def _message(line: str) -> dict[str, Any]:
    """One line of the builder's; what is not ours (a library that prints) counts for nothing."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
