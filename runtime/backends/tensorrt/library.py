"""TensorRT-RTX or full TensorRT in this process: found, imported, and its runtime with the log that explains a refusal."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

from motionrt.runtime.backends.kinds import MODULES
from motionrt.runtime.backends.tensorrt.engine_file import FLAVORS, EngineFile
from motionrt.runtime.errors import BackendError, install

log = logging.getLogger("motionrt")


def installed() -> list[str]:
    """The flavors whose packages are here, the preferred one first; nothing is imported."""
    return [flavor for flavor, module in MODULES.items() if importlib.util.find_spec(module) is not None]


def load_module(flavor: str) -> ModuleType:
    """The TensorRT of `flavor`; `BackendError` if it is not installed or cannot be loaded."""
    try:
        return importlib.import_module(MODULES[flavor])
    except (ImportError, OSError) as error:  # an OSError: its own libraries are missing
        reason = (str(error).splitlines() or [""])[0][:200]
        raise BackendError(f"this engine needs {FLAVORS[flavor]}: {install(flavor)} ({reason}).") from None


class Library:
    """One flavor: its `module`, `name` and `version`. Used by one thread at a time."""

    def __init__(self, flavor: str, module: Any) -> None:
        self.module, self.name, self.version = module, FLAVORS[flavor], str(module.__version__)
        self.log = make_log(module)
        self._runtime: Any = None

    def deserialize(self, file: EngineFile) -> Any:
        """The engine of a sidecar that was checked; `EngineError` with TensorRT's own words if it refuses."""
        if self._runtime is None:
            self._runtime = self.module.Runtime(self.log)
        self.log.lines.clear()
        engine = self._runtime.deserialize_cuda_engine(file.engine_path.read_bytes())
        if engine is None:
            raise file.refuse(f"is refused by {self.name} {self.version}: {self.log.text()}")
        return engine


def make_log(library: Any) -> Any:
    """A TensorRT logger that keeps the last errors for sentences; warnings go to Python's log."""

    class Log(library.ILogger):  # type: ignore[misc, name-defined, unused-ignore]  # the class of whichever flavor
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.lines.append(" ".join(str(message).split()))
                del self.lines[:-4]
            elif severity == library.ILogger.WARNING:
                log.info("TensorRT: %s", message)

        def text(self) -> str:
            """What was said since it was last cleared."""
            return "; ".join(self.lines).rstrip(".")[:500] or "it says nothing more"

    return Log()
