"""Jobs that are not over, for those who watch one, or wait until it was stopped: of videos and of clips alike."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from motionrt.runtime.serve.jobs.store import JobRow
from motionrt.runtime.serve.messages import Progress
from motionrt.runtime.serve.web.refusal import Refused

if TYPE_CHECKING:
    from motionrt.runtime.serve.jobs.workers import Worker


@dataclass(eq=False)
class Live:
    """A job that is not over, as those who watch it see it. sequence: of its last change; ending: how it ended
    is known, and perhaps not stored yet. preview: the last one, an animated webp, and the step that it is of."""

    row: JobRow
    worker: Worker | None = None
    progress: Progress | None = None
    preview: tuple[int, bytes] | None = None
    sequence: int = 0
    percent: int = 0
    cancelling: bool = False
    ending: bool = False
    charged: float = 0.0
    began: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def share(self) -> str:
        return self.row.key

    @property
    def priority(self) -> int:
        return self.row.priority

    def leave(self) -> None:
        """No worker has it any more."""
        self.worker, self.progress, self.preview = None, None, None

    def change(self) -> None:
        self.sequence += 1
        self.changed.set()
        self.changed = asyncio.Event()


async def watch(jobs: Mapping[str, Live], job: str, after: int, parked: Callable[[Live], bool]) -> AsyncIterator[Live]:
    """A job whenever it changed, until it is over: its end is told to those who wait then. Nothing for one that is over.

    after: the change that is known already; parked: whether a job waits for the next server.
    """
    live = jobs.get(job)
    while live is not None:
        changed = live.changed
        if live.sequence > after:
            after = live.sequence
            yield live
        if job not in jobs or parked(live):
            return
        await changed.wait()


async def stopped(jobs: Mapping[str, Live], job: str, seconds: float, why: str = "") -> None:
    """Return when a job that was told to stop is over; `Refused` (503) where that takes longer. why: ends the sentence."""
    live, end = jobs[job], time.monotonic() + seconds
    while job in jobs and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(live.changed.wait(), left)
    if job in jobs:
        text = f"the job was told to stop and has not yet{why}. Ask again."
        raise Refused(503, "not_stopped_yet", text, headers={"Retry-After": "5"}, kind="server_error")
