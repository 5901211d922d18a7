"""Indexing: video files to clips of a motion memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backends.seam import Backend, Graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.errors import InputError, MediaError, MemoryStoreError
from motionrt.runtime.indexing.hashes import FileHashes
from motionrt.runtime.indexing.sources import Item
from motionrt.runtime.media.video import SPANS, DecodedClip, decode_clip, span_start
from motionrt.runtime.memory.memory import Clip, MotionMemory

ENCODERS = ("text_query", "motion", "appearance")  # the graphs that index a clip
BATCH = 8  # clips through the encoders, and into the memory, at once
SAME_ENCODER = 0.98  # cosine of two vectors of one caption, above which one encoder made both (float16 costs 1e-3)


@dataclass(frozen=True)
class ClipEncoders:
    """The three graphs of a bundle that turn a captioned clip into what the memory keeps, and the clips they take."""

    tokenize: Callable[[str], Mapping[str, NDArray[np.int64]]]  # caption -> inputs of text_query, B = 1
    text_query: Graph
    motion: Graph
    appearance: Graph
    frames: int
    height: int
    width: int
    fps: float

    @classmethod
    def from_bundle(cls, bundle: Bundle, backend: Backend) -> ClipEncoders:
        """Load `ENCODERS` of `bundle`."""
        return cls.of(bundle, lambda name: backend.load(bundle, name))

    @classmethod
    def of(cls, bundle: Bundle, load: Callable[[str], Graph]) -> ClipEncoders:
        """From `ENCODERS` of `bundle` as `load` gives them, by name."""
        (text_query, motion, appearance), model = map(load, ENCODERS), bundle.model
        return cls(
            lambda text: bundle.tokenize("text_query", text), text_query, motion, appearance,
            model.frames, model.height, model.width, model.fps,
        )  # fmt: skip

    def embed(self, caption: str) -> NDArray[np.float32]:
        """The vector of a caption, float32 [E]. Raises InputError if it is too long."""
        embedding = self.text_query(self.tokenize(caption))["embedding"]
        return embedding.reshape(embedding.shape[1:])


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
    skipped. An item that cannot be used (damaged, too short, no caption or one too long) is reported and the rest go on.

    Vectors that come with the captions are kept if they have the memory's dimension, unless `reembed`: they must come from
    the bundle's own text encoder, and the first one is compared with it (MemoryStoreError if they differ).

    progress(done, path) is called after each item. Clips are added in batches: after a kill, or an error that concerns them
    all (a full disk, a failing backend), the earlier batches are there, the last is not, and the same call goes on from
    there; files that did not change meanwhile are not even read again (`resume.FileHashes`).
    """
    if span not in SPANS:
        raise InputError(f"the span rule is {span!r}; allowed are {', '.join(SPANS)}.")
    run = _Run(memory, encoders, span, reembed, FileHashes(memory.path / "resume.jsonl"))
    for done, item in enumerate(items, 1):
        run.take(Item(*item))
        if progress is not None:
            progress(done, str(item[0]))
    run.flush()
    memory.refresh()
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
        start = span_start(path, self.span, encoders.frames / encoders.fps, item.start, item.end)
        sha256 = self.hashes.sha256(path)
        waiting = any((p.sha256, p.start, p.item.caption) == (sha256, start, caption) for p in self.pending)
        if waiting or self.memory.contains(sha256, start, caption):
            return None
        embedding = self._embedding(item)
        decoded = decode_clip(path, encoders.frames, encoders.height, encoders.width, encoders.fps, start, item.end)
        return _Pending(item, start, sha256, decoded, embedding)

    def _embedding(self, item: Item) -> NDArray[np.float32]:
        given = item.embedding
        if self.reembed or given is None or [len(given)] != self.memory.dims["embedding"]:
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
            videos = np.stack([p.decoded.video for p in self.pending])
            motion = self.encoders.motion({"video": videos})["motion"]
            appearance = self.encoders.appearance({"image": np.ascontiguousarray(videos[:, 0])})["appearance"]
            self._check_sizes(embedding=self.pending[0].embedding, motion=motion[0], appearance=appearance[0])
            clips = [self._clip(p, motion[row], appearance[row]) for row, p in enumerate(self.pending)]
            added = self._add(self.pending, clips)
            self.report.added += len(added)
            self.report.vectors += sum(p.embedding is p.item.embedding for p in added)
            self.pending.clear()
        self.hashes.save()

    def _check_sizes(self, **arrays: NDArray[np.float32]) -> None:
        """Stop a run whose encoders are not the memory's: it could add nothing."""
        sizes = {name: list(array.shape) for name, array in arrays.items()}
        kept = {name: list(self.memory.dims[name]) for name in arrays}
        if sizes != kept:
            raise MemoryStoreError(
                f"the encoders give {sizes}; the motion memory {self.memory.path} keeps {kept}. Use the bundle that it was made"
                " for, or `motionrt memory create` another one."
            )

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

    def _clip(self, pending: _Pending, motion: NDArray[np.float32], appearance: NDArray[np.float32]) -> Clip:
        item, decoded = pending.item, pending.decoded
        limits = {"start_sec": item.start, "end_sec": item.end}
        rule = "explicit" if self.span == "start" and item.start is not None else self.span
        metadata = {**item.metadata, **{k: f"{v:.12g}" for k, v in limits.items() if v is not None}, "span": rule}
        return Clip(
            item.caption, str(item.video), pending.start, decoded.duration, decoded.fps, pending.sha256,
            pending.embedding, motion, appearance, metadata, item.dataset,
        )  # fmt: skip
