"""What a job takes on this worker, by what earlier ones took: the ground of progress and of "seconds left"."""

from __future__ import annotations

from collections.abc import Mapping

_KEEP = 0.7  # of what was known, when something new is measured


class Timing:
    """Seconds of a call of each graph of one bundle, as a running mean."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def measured(self, graph: str, seconds: float) -> None:
        known = self._seconds.get(graph)
        self._seconds[graph] = seconds if known is None else _KEEP * known + (1 - _KEEP) * seconds

    def expected(self, calls: Mapping[str, int]) -> float:
        """Seconds of so many calls of each graph; one that was never run counts as the mean of those that were."""
        known = self._seconds
        other = sum(known.values()) / len(known) if known else 1.0
        return sum(count * known.get(graph, other) for graph, count in calls.items() if count > 0)
