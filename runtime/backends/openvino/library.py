"""The package `openvino`, imported so that it tells nobody.

`import openvino` imports its conversion tools, and these send an event to a web analytics service through `openvino_telemetry`,
unless the user has opted out before: on a machine where nobody was asked, the import alone is reported, and an identifier is
written to the home folder. Where that package is not there, OpenVINO takes an empty stand-in of its own. So it is not there
while `openvino` is imported here. A program that imports `openvino` before us has sent what it sends.

Only the standard library here: `kinds.py` asks as well.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any

_TELEMETRY = "openvino_telemetry"
_lock = threading.Lock()


def load_library() -> Any:
    """The module `openvino`. Raises ImportError where it is not installed or does not load."""
    with _lock:
        if "openvino" in sys.modules:
            return sys.modules["openvino"]
        held = sys.modules.get(_TELEMETRY)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # an import of it is refused
        try:
            return importlib.import_module("openvino")
        finally:
            del sys.modules[_TELEMETRY]
            if held is not None:
                sys.modules[_TELEMETRY] = held


def said(error: BaseException) -> str:
    """What an exception of OpenVINO says, in one line: its first lines only name files of its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "FrontEnd API failed"))]
    return " ".join(told or [line for line in lines if line] or [type(error).__name__])[:300]
