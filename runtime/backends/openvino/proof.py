"""A compiled graph is compared with ONNX Runtime once, before it is used: OpenVINO can be wrong without a word.

OpenVINO 2026.4 does that to the graph `extract` of MotionClone's demo: most of its weights of motion are wrong, although the
same operations alone come out right. What a comparison found is kept beside the compile cache, for the same graph,
precision, machine and versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.runtime.backends.seam import Checked, fetch
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.errors import BackendError
from motionrt.runtime.files import replacing

EXACT, ROUNDED = 1e-3, 0.15  # relative L2 distances up to which a graph counts as the same, in float32 and in less
LARGEST = 2**30  # bytes of weights above which nothing is compared: both would be in memory at once, and one call takes minutes


def made_up(spec: GraphSpec) -> dict[str, Any]:
    """Inputs of any values, at the sizes that a graph is tuned for: normal numbers, and 1 for each integer."""
    random, values = np.random.default_rng(0), dict[str, Any]()
    for port in spec.inputs:
        shape = tuple(dim.opt for dim in port.dims)
        values[port.name] = np.asarray(random.standard_normal(shape) if port.dtype == "float32" else np.ones(shape), port.dtype)
    return values


def distance(graph: Checked, other: Checked) -> float:
    """The largest relative L2 distance of an output of `graph` from that of `other`, for `made_up` inputs; infinite where it is
    not finite and the other is. Raises `BackendError` where one fails."""
    inputs, worst = made_up(graph.spec), 0.0
    got, want = graph.run(inputs), other.run(inputs)
    for name, value in want.items():
        wanted, ours = (np.asarray(fetch(one), np.float64) for one in (value, got[name]))
        there = np.isfinite(wanted)
        gap = np.linalg.norm((ours - wanted)[there]) / max(float(np.linalg.norm(wanted[there])), 1e-12)
        worst = max(worst, float(gap) if np.isfinite(gap) else float("inf"))
    return worst


def kept(file: Path, measure: Callable[[], float]) -> float:
    """What `measure` gives; where `file` holds it from an earlier time, that, and nothing is measured."""
    with contextlib.suppress(OSError, ValueError):
        return float(file.read_text())
    found = measure()
    with contextlib.suppress(BackendError), replacing(file, BackendError) as temporary:
        temporary.write_text(f"{found!r}\n")
    return found
