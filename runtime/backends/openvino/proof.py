"""The first call of a graph is computed in ONNX Runtime too, and compared: OpenVINO can be wrong without a word.

OpenVINO 2026.4 does that in float32 to two graphs of MotionClone's demo, `extract` and `step_guided`, although the operations
alone come out right. It needs the inputs of a request: made-up ones hide the second. What was found is kept beside the compile
cache, for the same graph, precision, machine and versions, so that a graph is compared once as it was compiled, and once as it
came back from the cache.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.runtime.backends.seam import Executor
from motionrt.runtime.errors import BackendError, BackendWarning
from motionrt.runtime.files import replacing

log = logging.getLogger("motionrt")
EXACT, ROUNDED = 1e-3, 0.15  # relative L2 distances up to which a graph counts as the same, in float32 and in less
LARGEST = 2**30  # bytes of weights above which nothing is compared: both would be in memory at once, and one call takes minutes


def distance(got: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    """The largest relative L2 distance of an output; infinite where it is not finite and the wanted one is."""
    worst = 0.0
    for name, value in want.items():
        wanted, ours = (np.asarray(one, np.float64) for one in (value, got[name]))
        there = np.isfinite(wanted)
        with np.errstate(all="ignore"):
            gap = np.linalg.norm((ours - wanted)[there]) / max(float(np.linalg.norm(wanted[there])), 1e-12)
        worst = max(worst, float(gap) if np.isfinite(gap) else float("inf"))
    return worst


def _finding(file: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return float(file.read_text())
    return None


class ProvenExecutor(Executor):
    """`ours`, of OpenVINO, whose first call is compared; or what `reference` gives, where it is not within `allowed` of that.

    name: of the graph, for sentences. reference: loads the same graph in ONNX Runtime. file: where the finding is kept; before:
    where one of the same graph may be, which counts if it is bad. Raises `BackendError` where an earlier finding says that the
    reference must run, and it cannot be loaded.
    """

    def __init__(
        self, name: str, ours: Executor, reference: Callable[[], Executor], file: Path, allowed: float, before: Path
    ) -> None:
        self.name, self.ours, self.file, self.allowed = name, ours, file, allowed
        self._reference: Callable[[], Executor] | None = reference
        self._lock = threading.Lock()
        self.runs, self.library = ours, ours.library
        known = {path: found for path in (before, file) if (found := _finding(path)) is not None}
        if file in known or any(not found <= allowed for found in known.values()):
            self._settle(max(known.values()), reference)

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`."""
        if self._reference is not None:
            with self._lock:
                if (reference := self._reference) is not None:
                    return self._compare(inputs, reference)
        return self.runs.execute(inputs)

    def _compare(self, inputs: Mapping[str, Any], reference: Callable[[], Executor]) -> dict[str, Any]:
        got = self.ours.execute(inputs)
        try:
            other = reference()
            want = other.execute(inputs)
        except Exception as error:  # it is not installed, has no room, or cannot take these inputs
            log.info("graph '%s' of OpenVINO was not compared with ONNX Runtime: %s", self.name, error)
            self._reference = None
            return got
        found = distance(got, want)
        with contextlib.suppress(BackendError), replacing(self.file, BackendError) as temporary:
            temporary.write_text(f"{found!r}\n")
        self._settle(found, lambda: other)
        return got if self.runs is self.ours else want

    def _settle(self, found: float, reference: Callable[[], Executor]) -> None:
        if not found <= self.allowed:
            self.runs = reference()
            self.library = self.runs.library
            text = f"OpenVINO computes graph '{self.name}' wrongly (off by {found:.2g} of it): it runs in ONNX Runtime instead."
            warnings.warn(text, BackendWarning, stacklevel=6)
        self._reference = None
