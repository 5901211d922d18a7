"""A mixed load on a server, with a ledger that misses nothing: every job that was ever taken, what was done to it, and what
is wrong with what became of it."""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av

from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.client import Client, ServerError

TRIES = 40  # of a call: a server that is killed is back sooner
LATER = 0.2  # of finished jobs are kept to the end, and looked at once more then


@dataclass(frozen=True)
class Asked:
    """A request of few that there are, so that each one's frames are computed once."""

    still: Path
    seed: int
    n: int
    steps: int

    @classmethod
    def drawn(cls, choose: random.Random, stills: list[Path]) -> Asked:
        return cls(choose.choice(stills), choose.randrange(4), choose.choice([1, 1, 2]), choose.choice([4, 8, 16]))

    @property
    def fields(self) -> dict[str, Any]:
        return {"prompt": self.still.stem.replace("_", " "), "steps": self.steps}


@dataclass
class Ledger:
    """What happened. wrong: sentences; kept: jobs that must be there at the end, with their frames' digests, by key;
    outages: (begin, end) of what was done to the server, by `time.monotonic`; waits: of the quiet key, (order, start)."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kept: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {"flood": {}, "quiet": {}})
    made: list[tuple[str, Asked, list[str]]] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    outages: list[tuple[str, float, float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> int:
        """One more of what happened; how many there are then."""
        with self.lock:
            self.counts[what] += 1
            return self.counts[what]

    def note(self, kind: Counter[str], code: str) -> None:
        with self.lock:
            kind[code] += 1

    def unaccounted(self) -> int:
        """Jobs that were taken and whose end no client saw."""
        return self.counts["created"] - sum(self.counts[end] for end in ("completed", "failed", "cancelled", "deleted"))

    def say(self, sentence: str) -> None:
        with self.lock:
            self.wrong.append(sentence)
            print(f"WRONG: {sentence}", flush=True)

    def during(self, begin: float, end: float, *kinds: str) -> bool:
        """Whether something of these kinds, or of any, was done to the server in that time."""
        spans = [span for span in self.outages if not kinds or span[0] in kinds]
        return any(start < end and begin < stop for _, start, stop in spans)


class Load:
    """A client of the key `name`: `run` makes one job after the other until `over` is set."""

    def __init__(self, name: str, client: Client, ledger: Ledger, stills: list[Path], over: threading.Event, seed: int) -> None:
        self.name, self.client, self.ledger, self.stills, self.over = name, client, ledger, stills, over
        self.choose = random.Random(seed)

    def run(self, pause: float) -> None:
        try:
            while not self.over.is_set():
                self.job()
                self.over.wait(pause)
        except Exception as error:  # a thread that ends is a load that is missing
            self.ledger.say(f"a client of {self.name} ended: {type(error).__name__}: {error}")

    def job(self) -> None:
        """One job from its order to its end, with one of several things done to it."""
        asked, ledger, order = Asked.drawn(self.choose, self.stills), self.ledger, time.monotonic()
        try:
            job = self.client.create(image=asked.still, seed=asked.seed, n=asked.n, **asked.fields)["id"]
        except ServerError as error:
            ledger.note(ledger.refused, error.code)
            if error.code != "storage_full":
                ledger.say(f"an order was refused: {error.code}: {error}")
            self.over.wait(1.0)
            return
        ledger.count("created")
        fate = self.choose.choices(["watched", "polled", "cancelled", "deleted"], [5, 3, 1, 1])[0]
        if self.name == "quiet":
            fate = "watched"
        if fate in ("cancelled", "deleted"):
            self.over.wait(self.choose.uniform(0, 1.5))
            self._stopped(job, fate, asked, order)
        else:
            self._followed(job, fate, asked, order)

    def _stopped(self, job: str, fate: str, asked: Asked, order: float) -> None:
        ledger = self.ledger
        if fate == "deleted":
            self._delete(job)
            ledger.count("deleted")
            return
        shown = self._until(lambda: self.client.cancel(job))
        if (shown["error"] or {}).get("code") == "cancelled":
            ledger.count("cancelled")
            with ledger.lock:
                ledger.kept[self.name][job] = []
        else:
            self._ended(shown, asked, order)  # it was over before

    def _delete(self, job: str) -> None:
        """Delete it, and see that it is gone; what stops a job answers 503 while the worker is being started again."""
        self._until(lambda: self.client.delete(job))
        try:
            shown = self.client.retrieve(job)
            self.ledger.say(f"{job} was deleted and is {shown['status']}")
        except ServerError as error:
            if error.code != "not_found":
                self.ledger.say(f"{job} was deleted: {error}")

    def _until(self, call: Callable[[], Any], seconds: float = 120.0) -> Any:
        """What a call gives that may have to be made again while the disk is full."""
        end = time.monotonic() + seconds
        while True:
            try:
                return call()
            except ServerError as error:
                if error.code not in ("storage_full", "not_stopped_yet") or time.monotonic() > end:
                    raise
                self.ledger.note(self.ledger.refused, error.code)
                time.sleep(1.0)

    def _followed(self, job: str, fate: str, asked: Asked, order: float) -> None:
        started, progress, shown = 0.0, 0, dict[str, Any]()
        for shown in self.client.events(job) if fate == "watched" else self._polls(job):
            if not started and shown["motionrt"]["stage"] not in ("queued",):
                started = time.monotonic()
            back = shown["progress"] < progress and shown["status"] != "failed"  # which has none any more
            if back and not self.ledger.during(order, time.monotonic(), "server"):
                self.ledger.say(f"{job} went back from {progress} to {shown['progress']} %")
            progress = shown["progress"]
        if self.name == "quiet":
            self.ledger.waits.append((order, started))
        self._ended(shown, asked, order)

    def _polls(self, job: str) -> Iterator[dict[str, Any]]:
        while True:
            shown = self.client.retrieve(job, wait=self.choose.choice([0, 0.5]))
            yield shown
            if shown["status"] in ("completed", "failed"):
                return
            time.sleep(0.1)

    def _ended(self, shown: dict[str, Any], asked: Asked, order: float) -> None:
        """Note what became of a job that nobody stopped, and throw most of them away."""
        ledger, job, told = self.ledger, shown["id"], shown["motionrt"]
        number = ledger.count(shown["status"])
        if shown["status"] == "completed":
            with ledger.lock:
                ledger.made.append((job, asked, told["frames_sha256"]))
                ledger.work.append(sum(told["seconds"].values()))
            if number % 10 == 0:
                self._fetch(job, told["frames"])
        else:
            code = shown["error"]["code"]
            ledger.note(ledger.failed, code)
            if not ledger.during(order, time.monotonic(), "disk") and code != "worker_restarted":
                ledger.say(f"{job} failed and nothing was done to it: {shown['error']}")
        if self.choose.random() > LATER:
            self._delete(job)
        else:
            with ledger.lock:
                ledger.kept[self.name][job] = told.get("frames_sha256", [])

    def _fetch(self, job: str, frames: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            with av.open(str(self.client.content(job, Path(folder) / "video.mp4"))) as video:
                found = sum(1 for _ in video.decode(video=0))
        self.ledger.count("fetched")
        if found != frames:
            self.ledger.say(f"{job}: its file has {found} frames of {frames}")


def check_frames(ledger: Ledger, bundle: Path, memory: Path) -> int:
    """Compare the frames of all jobs that were made with the pipeline's; how many kinds of request there were."""
    known: dict[tuple[Path, int, int], str] = {}
    with MotionPipeline.from_bundle(bundle, memory, threads=1) as pipeline:
        for job, asked, digests in ledger.made:
            for index, digest in enumerate(digests):
                kind = (asked.still, asked.steps, asked.seed + index)
                if kind not in known:
                    frames = pipeline(image=str(asked.still), seed=kind[2], **asked.fields).frames
                    known[kind] = hashlib.sha256(frames.tobytes()).hexdigest()
                if digest != known[kind]:
                    ledger.say(f"{job}: its frames of seed {kind[2]} are not the pipeline's")
            if len(digests) != asked.n:
                ledger.say(f"{job} has {len(digests)} videos of {asked.n}")
    return len(known)


def check_kept(ledger: Ledger, clients: dict[str, Client]) -> int:
    """Look for every job that was neither deleted nor refused, and for any that nobody asked for; how many are lost."""
    lost = 0
    for name, client in clients.items():
        there = {shown["id"]: shown["motionrt"].get("frames_sha256", []) for shown in client.jobs()}
        for job, digests in ledger.kept[name].items():
            if there.pop(job, None) != digests:
                lost += 1
                ledger.say(f"{job} of {name} is lost, or not as it was")
        for job in there:
            ledger.say(f"{job} of {name} was made, and nobody asked for it")
    return lost


@contextlib.contextmanager
def outage(ledger: Ledger, kind: str, after: float = 1.0) -> Iterator[None]:
    """Note that something is done to the server while this is open, and for a moment after."""
    begin = time.monotonic()
    ledger.outages.append((kind, begin, float("inf")))
    place = len(ledger.outages) - 1
    try:
        yield
    finally:
        ledger.outages[place] = (kind, begin, time.monotonic() + after)
