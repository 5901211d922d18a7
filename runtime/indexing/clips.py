"""Indexing: video files to clips of a motion memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import called, flag, instance, path_of, text_of
from motionrt.runtime.errors import InputError, MediaError, MemoryStoreError, MotionRTError, shown
from motionrt.runtime.files import here
from motionrt.runtime.indexing.describe import CAPTIONED, caption_of, facts_of, tags_of
from motionrt.runtime.indexing.encoders import ClipEncoders, check_moves, cut
from motionrt.runtime.indexing.fields import field_of
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.indexing.sources import Item
from motionrt.runtime.media.limits import LIMITS, Limits, check_limits
from motionrt.runtime.media.video import DecodedClip, check_span, span_start
from motionrt.runtime.memory.memory import Clip, MotionMemory
from motionrt.runtime.memory.rows import Layout

__all__ = ["BATCH", "ClipEncoders", "IndexReport", "index_clips"]

BATCH = 8  # clips through the encoders, and into the memory, at once
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
    describe: bool = False,
    limits: Limits = LIMITS,
) -> IndexReport:
    """Cut, encode and add clips: `items`, or the first fields of them (video file, caption, start in seconds or None).

    Each clip is the window that `span_start` places by the rule `span` ("start" or "centre") and `decode_clip` cuts, so
    indexing is reproducible; its metadata says `span` (start, centre, or explicit where the item gave the start) and the
    item's own start and end. What identifies a clip is the SHA-256 of its file, its start and its caption: one that the
    memory has is skipped. An item that cannot be used (damaged, no motion in its window, no caption or one too long) is
    reported and the rest go on; a window shows no motion if no pixel of it differs from its first frame by more than 4 of 255
    levels, or if its pictures change less than the bundle asks for (`check_moves`). Relative paths start where the process is
    at the call. limits: of decoding.

    Vectors that come with the captions are kept if they have the memory's dimension, unless `reembed`: they must come from
    the bundle's own text encoder, and the first one is compared with it (MemoryStoreError if they differ).

    describe: look at how the clips move (`describe.facts_of`, of their motion fields). Each gets `motion`, `path`, `camera` and
    `strength` as metadata, unless it brings them; one without a caption gets one that is made of them, and `captioned` says so.
    Such a clip is known by the SHA-256 of its file, its start and what `captioned` says, and is not looked at twice. A clip
    whose field is neither beside it nor can be found, for want of OpenCV, is reported.

    limits: of decoding. progress(done, path) is called after each item. Clips are added in batches: after a kill, or an error
    that concerns them all (a full disk, a failing backend), the earlier batches are there, the last is not (the error says
    how many clips are), and the same call goes on from there; files that did not change meanwhile are not even read again
    (`FileHashes`).

    For a memory that makes records on demand only captions are encoded: what is wrong with a record is said when it is used.
    """
    check_span(span)
    check_limits(limits)
    instance("the memory", memory, MotionMemory, "an open MotionMemory")
    instance("the encoders", encoders, ClipEncoders, "ClipEncoders.of(...)")
    called("progress", progress, "a number of items and a path")
    flag("reembed", reembed)
    flag("describe", describe)
    instance("items", items, Iterable, "a list, or the like, of Items or tuples of their first fields")
    run = _Run(memory, encoders, span, reembed, describe, limits, here(), FileHashes(memory.path / "resume.jsonl"))
    try:
        for done, given in enumerate(items, 1):
            item = _item(given)
            run.take(item)
            if progress is not None:
                progress(done, str(item.video))
        run.flush()
        memory.refresh()
    except MotionRTError as error:
        if not run.report.added:
            raise
        text = f"{error} The {run.report.added} clips that this run added before are there: the same call goes on from there."
        raise type(error)(text) from error
    run.hashes.finish()
    return run.report


def _item(given: Any) -> Item:
    """One of the items, or its first fields; InputError."""
    if not isinstance(given, tuple) or not 2 <= len(given) <= len(Item._fields):
        raise InputError(f"an item is {shown(given)}; allowed is an Item, or its first fields: a video, a caption, a start.")
    return Item(*given)


@dataclass(frozen=True, eq=False)
class _Pending:
    item: Item
    start: float
    sha256: str
    decoded: DecodedClip
    field: NDArray[np.float32] | None  # where records are made of it
    embedding: NDArray[np.float32]


@dataclass(eq=False)
class _Run:
    """One call of `index_clips`."""

    memory: MotionMemory
    encoders: ClipEncoders
    span: str
    reembed: bool
    describe: bool
    limits: Limits
    folder: Path  # where relative paths start, wherever the process goes meanwhile
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
        if text_of("the problem of an item", item.problem):
            raise InputError(item.problem)
        path = self.folder / path_of("the video of an item", item.video)
        caption, encoders = item.caption, self.encoders
        if not isinstance(item.metadata, Mapping):
            raise InputError(f"the metadata of {path} is {shown(item.metadata)}; allowed is a mapping from text to text.")
        if not isinstance(caption, str) or not (caption.strip() or self.describe):
            raise InputError(f"the caption of {path} is {shown(caption)}; say in a few words what moves and how.")
        try:
            f"{path}{caption}".encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the path and the caption {caption[:80]!r} must be valid text ({error}).") from None
        seconds = encoders.spec.clip.frames / encoders.spec.clip.fps
        start = span_start(path, self.span, seconds, item.start, item.end, limits=self.limits)
        sha256 = self.hashes.sha256(path)
        if self._there(sha256, start, caption) if caption.strip() else self._proposed(sha256, start):
            return None
        decoded = cut(encoders.spec, path, start, item.end, self.limits)
        check_moves(encoders.spec, path, decoded)
        motion = None if self.memory.layout.on_demand else encoders.field(decoded, path, self.limits)
        if self.describe:
            item = _described(item, decoded, field_of(decoded.video, path, start, self.limits) if motion is None else motion)
            if item.caption != caption and self._there(sha256, start, item.caption):
                return None
        return _Pending(item, start, sha256, decoded, motion, self._embedding(item))

    def _there(self, sha256: str, start: float, caption: str) -> bool:
        """Whether the memory or the batch has this clip."""
        waiting = any((p.sha256, p.start, p.item.caption) == (sha256, start, caption) for p in self.pending)
        return waiting or self.memory.contains(sha256, start, caption)

    def _proposed(self, sha256: str, start: float) -> bool:
        """Whether the memory or the batch has this span under a caption that was made of its motion."""
        waiting = [p.item.metadata for p in self.pending if (p.sha256, p.start) == (sha256, start)]
        there = self.memory.get(found) if (found := self.memory.find(sha256, start=start)) else []
        return any(CAPTIONED.items() <= metadata.items() for metadata in (*waiting, *(clip.metadata for clip in there)))

    def _embedding(self, item: Item) -> NDArray[np.float32]:
        given = item.embedding
        if given is not None and not (isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind == "f"):
            raise InputError(f"the vector of {item.video} is {shown(given)}; allowed is a float array [E], or None.")
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
                fields = [p.field for p in self.pending if p.field is not None]
                videos = np.stack([p.decoded.video for p in self.pending])
                records = encoders.records(videos, np.stack(fields) if fields else None)
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


def _described(item: Item, decoded: DecodedClip, motion: NDArray[np.float32]) -> Item:
    """`item` with what its motion field says as metadata and, if it has no caption, as its caption. What it brings stays."""
    facts = facts_of(motion, decoded.fps)
    if item.caption.strip():
        return item._replace(metadata={**tags_of(facts), **item.metadata})
    metadata = {**tags_of(facts), **CAPTIONED, **item.metadata}
    return item._replace(caption=caption_of(facts), metadata=metadata, embedding=None)


def _exact(seconds: float) -> str:
    """A number as short text that is read back as the same number."""
    short = f"{seconds:.12g}"
    return short if float(short) == seconds else repr(float(seconds))
