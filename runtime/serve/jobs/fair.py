"""Whose turn it is: the highest priority first, and among equals whoever has used the least.

Fair queueing by time used (Demers, Keshav and Shenker 1989, with seconds for bytes): a share that was away begins where the
least of those present is, so nobody saves up turns by being idle. The server chooses by it which job goes to a worker, and a
worker which job's call is run next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """Something of a share (an API key), of a priority."""

    @property
    def share(self) -> str: ...
    @property
    def priority(self) -> int: ...


Anyone = TypeVar("Anyone", bound=Waiting)


class Fair:
    """Seconds used by each share; see the module."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._floor = 0.0

    def charge(self, share: str, seconds: float) -> None:
        """Say that a share has used so many seconds."""
        self._used[share] = max(self._used.get(share, 0.0), self._floor) + seconds

    def first(self, waiting: Iterable[Anyone]) -> Anyone | None:
        """Whose turn it is among those that wait, in the order in which they came."""
        every = list(waiting)
        if not every:
            return None
        here = {item.share for item in every}
        self._floor = max(self._floor, min(self._used.get(share, self._floor) for share in here))
        self._used = {share: used for share, used in self._used.items() if used > self._floor}  # others begin at the floor
        return min(every, key=lambda item: (-item.priority, self._used.get(item.share, self._floor)))
