"""Several devices for one request: calls that a step makes ahead of it (`Loop.ahead`) run side by side, one on each."""

from __future__ import annotations

from collections.abc import Sequence

from motionrt.runtime.backends.seam import Backend, Checked
from motionrt.runtime.bundle.bundle import Bundle

JOINT = "+"  # between the devices of one request, as a user writes them


class SideBySide:
    """The first of `backends` for everything, and `beside`, the others, for a share of what may run at the same time."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.first, self.beside = backends[0], tuple(backends[1:])
        self.label = " + ".join(one.label for one in backends)
        self.precision, self.parallel_load = self.first.precision, self.first.parallel_load

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Graph `name` on the first device; `BackendError` or `BundleError` where that fails."""
        return self.first.load(bundle, name)
