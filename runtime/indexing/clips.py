"""Indexing: video files to clips of a motion memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError, MediaError, MemoryStoreError, MotionRTError
from motionrt.runtime.indexing.encoders import ClipEncoders, cut
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.indexing.sources import Item
from motionrt.runtime.media.video import SPANS, DecodedClip, span_start
from motionrt.runtime.memory.memory import Clip, MotionMemory
from motionrt.runtime.memory.rows import Layout

__all__ = ["BATCH", "ClipEncoders", "IndexReport", "index_clips"]

BATCH = 8  # clips through the encoders, and into the memory, at once
STILL = 4 / 127.5  # of values in [-1, 1]: up to 4 of 255 levels a still changes by being coded as a video
SAME_ENCODER = 0.98  # cosine of two vectors of one caption, above which one encoder made both (float16 costs 1e-3)


@dataclass
class IndexReport:
    """added: clips new in the memory; skipped: clips that it already had; failed: the other items, and why.

    vectors: how many of the added clips kept the vector that came with their caption.
    """

    added: int = 0
    skipped: int = 0
    failed: list[tuple[Item, str]] = field(default_factory=list)
    vectors: int = 0


def index_clips(
    memory: MotionMemory,
    encoders: ClipEncoders,
    items: Iterable[Item | tuple[str | Path, str, float | None]],
    progress: Callable[[int, str], None] | None = None,
    *,
    span: str = "start",
    reembed: bool = False,
) -> IndexReport:
    """Cut, encode and add clips: `items`, or the first fields of them (video file, caption, start in seconds or None).

    Each clip is the window that `span_start` places by the rule `span` ("start" or "centre") and `decode_clip` cuts, so
    indexing is reproducible; its metadata says `span` (start, centre, or explicit where the item gave the start) and the
    item's limits. What identifies a clip is the SHA-256 of its file, its start and its caption: one that the memory has is
    skipped. An item that cannot be used (damaged, no motion in its window, no caption or one too long) is reported and the
    rest go on; a window shows no motion if no pixel of it differs from its first frame by more than 4 of 255 levels.

    Vectors that come with the captions are kept if they have the memory's dimension, unless `reembed`: they must come from
    the bundle's own text encoder, and the first one is compared with it (MemoryStoreError if they differ).

    progress(done, path) is called after each item. Clips are added in batches: after a kill, or an error that concerns them
    all (a full disk, a failing backend), the earlier batches are there, the last is not (the error says how many clips are),
    and the same call goes on from there; files that did not change meanwhile are not even read again (`FileHashes`).

    For a memory that makes records on demand only captions are encoded: what is wrong with a record is said when it is used.
    """
    if span not in SPANS:
        raise InputError(f"the span rule is {span!r}; allowed are {', '.join(SPANS)}.")
    run = _Run(memory, encoders, span, reembed, FileHashes(memory.path / "resume.jsonl"))
    try:
        for done, item in enumerate(items, 1):
            run.take(Item(*item))
            if progress is not None:
                progress(done, str(item[0]))
        run.flush()
        memory.refresh()
    except MotionRTError as error:
        if not run.report.added:
            raise
        text = f"{error} The {run.report.added} clips that this run added before are there: the same call goes on from there."
        raise type(error)(text) from error
    run.hashes.finish()
    return run.report


@dataclass(frozen=True, eq=False)
class _Pending:
    item: Item
    start: float
    sha256: str
    decoded: DecodedClip
    embedding: NDArray[np.float32]


@dataclass(eq=False)
class _Run:
    """One call of `index_clips`."""

    memory: MotionMemory
    encoders: ClipEncoders
    span: str
    reembed: bool
    hashes: FileHashes
    report: IndexReport = field(default_factory=IndexReport)
    pending: list[_Pending] = field(default_factory=list)
    trusted: bool = False  # whether the vectors that come with the captions are of the bundle's encoder

    def take(self, item: Item) -> None:
        """Skip or report `item`, or decode it; a full batch is added."""
        try:
            prepared = self._prepare(item)
        except (MediaError, InputError, MemoryError) as error:
            self.report.failed.append((item, str(error) or "it is too large for the memory of this machine."))
            return
        if prepared is None:
            self.report.skipped += 1
            return
        self.pending.append(prepared)
        if len(self.pending) == BATCH:
            self.flush()

    def _prepare(self, item: Item) -> _Pending | None:
        """The decoded clip, or nothing if the memory or the batch has it already."""
        if item.problem:
            raise InputError(item.problem)
        path, caption, encoders = Path(item.video), item.caption, self.encoders
        if not isinstance(caption, str) or not caption.strip():
            raise InputError(f"the caption of {path} is {caption!r}; say in a few words what moves and how.")
        try:
            f"{path}{caption}".encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the path and the caption {caption[:80]!r} must be valid text ({error}).") from None
        seconds = encoders.spec.clip.frames / encoders.spec.clip.fps
        start = span_start(path, self.span, seconds, item.start, item.end)
        sha256 = self.hashes.sha256(path)
        waiting = any((p.sha256, p.start, p.item.caption) == (sha256, start, caption) for p in self.pending)
        if waiting or self.memory.contains(sha256, start, caption):
            return None
        decoded = cut(encoders.spec, path, start, item.end)
        if len(decoded.video) > 1 and np.abs(decoded.video - decoded.video[:1]).max() <= STILL:
            raise MediaError(
                f"{path} shows one picture from {start:g} to {start + decoded.duration:g} s, which is no motion. Leave it out,"
                " or choose a part that moves."
            )
        return _Pending(item, start, sha256, decoded, self._embedding(item))

    def _embedding(self, item: Item) -> NDArray[np.float32]:
        given = item.embedding
        if self.reembed or given is None or len(given) != self.memory.layout.embedding:
            return self.encoders.embed(item.caption)
        if not np.isfinite(given).all() or not given.any():
            raise InputError(f"the vector of {item.video} is all zeros or not finite; use --reembed.")
        if not self.trusted:
            own = self.encoders.embed(item.caption)
            cosine = float(own @ given / (np.linalg.norm(own) * np.linalg.norm(given)))
            if cosine < SAME_ENCODER:
                raise MemoryStoreError(
                    f"the vector that comes with {item.caption[:80]!r} has a cosine of {cosine:.3f} with the bundle's own"
                    f" (needed: {SAME_ENCODER}): another text encoder made it. Embed the captions anew: --reembed."
                )
            self.trusted = True
        return given

    def flush(self) -> None:
        """Encode and add what is pending."""
        if self.pending:
            layout, encoders = self.memory.layout, self.encoders
            given = Layout(len(self.pending[0].embedding), encoders.spec.record, "")
            if str(given) != str(layout):  # this run could add nothing
                raise MemoryStoreError(
                    f"the encoders give {given}; the motion memory {self.memory.path} keeps {layout}. Use the bundle that it"
                    " was made for, or `motionrt memory create` another one."
                )
            records: list[dict[str, NDArray[Any]]] = [{} for _ in self.pending]
            if not layout.on_demand:
                records = encoders.records(np.stack([p.decoded.video for p in self.pending]))
            clips = [self._clip(p, record) for p, record in zip(self.pending, records, strict=True)]
            added = self._add(self.pending, clips)
            self.report.added += len(added)
            self.report.vectors += sum(p.embedding is p.item.embedding for p in added)
            self.pending.clear()
        self.hashes.save()

    def _add(self, pending: list[_Pending], clips: list[Clip]) -> list[_Pending]:
        """Add clips at once, or one by one if the memory refuses one of them; those that were added."""
        try:
            self.memory.add(clips)
            return list(pending)
        except InputError as error:
            if len(clips) > 1:
                return [p for one, clip in zip(pending, clips, strict=True) for p in self._add([one], [clip])]
            self.report.failed.append((pending[0].item, f"{error} Leave it out."))
            return []

    def _clip(self, pending: _Pending, record: Mapping[str, NDArray[Any]]) -> Clip:
        item, decoded = pending.item, pending.decoded
        limits = {"start_sec": item.start, "end_sec": item.end}
        metadata = {key: text for key, text in item.metadata.items() if key not in limits}
        metadata |= {key: _exact(value) for key, value in limits.items() if value is not None}
        metadata["span"] = "explicit" if self.span == "start" and item.start is not None else self.span
        return Clip(
            item.caption, str(item.video), pending.start, decoded.duration, decoded.fps, pending.sha256,
            pending.embedding, record, metadata, item.dataset,
        )  # fmt: skip


def _exact(seconds: float) -> str:
    """A number as short text that is read back as the same number."""
    short = f"{seconds:.12g}"
    return short if float(short) == seconds else repr(float(seconds))
