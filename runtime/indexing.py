"""Indexing: video files to clips of a motion memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backend import Backend, Graph
from motionrt.runtime.bundle import Bundle
from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.manifest import sha256_of
from motionrt.runtime.memory import Clip, MotionMemory
from motionrt.runtime.video import DecodedClip, decode_clip

BATCH = 8  # clips through the encoders, and into the memory, at once


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
        """Load `text_query`, `motion` and `appearance` of `bundle`."""
        text_query, motion, appearance = (backend.load(bundle, name) for name in ("text_query", "motion", "appearance"))
        model = bundle.model
        return cls(
            lambda text: bundle.tokenize("text_query", text), text_query, motion, appearance,
            model.frames, model.height, model.width, model.fps,
        )  # fmt: skip


@dataclass
class IndexReport:
    """added: clips new in the memory; skipped: clips that it already had; failed: (path, reason) of the others."""

    added: int = 0
    skipped: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def index_clips(
    memory: MotionMemory,
    encoders: ClipEncoders,
    items: Iterable[tuple[str | Path, str, float | None]],
    progress: Callable[[int, str], None] | None = None,
) -> IndexReport:
    """Cut, encode and add clips: `items` of (video file, caption, start in seconds or None for 0).

    Each clip is the window that `decode_clip` cuts, so indexing is reproducible. A clip that the memory has (same
    bytes, start and caption) is skipped; one that cannot be read, or whose caption is empty or too long, is reported
    and the rest go on. progress(done, path) is called after each item. Clips are added in batches: after an error that
    concerns them all (a full disk, a failing backend) the earlier batches are there, the last is not.
    """
    report = IndexReport()
    pending: list[_Pending] = []
    for done, (path, caption, start) in enumerate(items, 1):
        try:
            prepared = _prepare(memory, encoders, Path(path), caption, float(start or 0), pending)
        except (MediaError, InputError) as error:
            report.failed.append((str(path), str(error)))
        else:
            pending += prepared
            report.skipped += not prepared
        if len(pending) == BATCH:
            _flush(memory, encoders, pending, report)
        if progress is not None:
            progress(done, str(path))
    _flush(memory, encoders, pending, report)
    memory.refresh()
    return report


@dataclass(frozen=True, eq=False)
class _Pending:
    path: Path
    caption: str
    sha256: str
    start: float
    decoded: DecodedClip
    embedding: NDArray[np.float32]


def _prepare(
    memory: MotionMemory, encoders: ClipEncoders, path: Path, caption: str, start: float, pending: list[_Pending]
) -> list[_Pending]:
    """The decoded clip, or nothing if the memory or the batch has it already."""
    if not isinstance(caption, str) or not caption.strip():
        raise InputError(f"the caption of {path} is {caption!r}; say in a few words what moves and how.")
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise MediaError(f"the video file {path} cannot be read: {error.strerror}. Check the path.") from error
    waiting = any((p.sha256, p.start, p.caption) == (sha256, start, caption) for p in pending)
    if waiting or memory.contains(sha256, start, caption):
        return []
    embedding = encoders.text_query(encoders.tokenize(caption))["embedding"]
    decoded = decode_clip(path, encoders.frames, encoders.height, encoders.width, encoders.fps, start)
    return [_Pending(path, caption, sha256, start, decoded, embedding.reshape(embedding.shape[1:]))]


def _flush(memory: MotionMemory, encoders: ClipEncoders, pending: list[_Pending], report: IndexReport) -> None:
    """Encode and add `pending`, and empty it."""
    if not pending:
        return
    videos = np.stack([item.decoded.video for item in pending])
    motion = encoders.motion({"video": videos})["motion"]
    appearance = encoders.appearance({"image": np.ascontiguousarray(videos[:, 0])})["appearance"]
    clips = []
    for row, item in enumerate(pending):
        if np.isfinite(motion[row]).all() and np.isfinite(appearance[row]).all() and np.isfinite(item.embedding).all():
            clips.append(
                Clip(
                    item.caption, str(item.path), item.start, item.decoded.duration, item.decoded.fps, item.sha256,
                    item.embedding, motion[row], appearance[row],
                )
            )  # fmt: skip
        else:
            report.failed.append((str(item.path), "the encoders gave NaN or infinite values; leave it out"))
    pending.clear()
    report.added += len(memory.add(clips))
