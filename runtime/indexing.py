"""Indexing: video files to clips of a motion memory, and the vector index that a large memory derives from itself."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backend import Backend, Graph
from motionrt.runtime.bundle import Bundle
from motionrt.runtime.errors import InputError, MediaError, MemoryStoreError, MotionRTError
from motionrt.runtime.manifest import sha256_of
from motionrt.runtime.memory import Clip, MotionMemory
from motionrt.runtime.video import DecodedClip, decode_clip, replacing

BATCH = 8  # clips through the encoders, and into the memory, at once
_log = logging.getLogger(__name__)


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


def vector_index(
    directory: Path,
    wanted: Mapping[str, object],
    load: Callable[[], tuple[NDArray[np.int64], NDArray[np.float32]]],
    readonly: bool,
) -> Any:
    """The USearch index (HNSW, cosine, float16) of the memory in `directory`: the stored one if sound, else a new one.

    wanted: what the sidecar must say (generation, content, count); load: ids [N] and unit vectors [N,E] for a new one.
    A stored index is trusted by its SHA-256 alone, checked before USearch sees the file: flipped bytes crash it. A new
    one is stored by renaming, because others may have the old one mapped; where that fails it serves from memory.
    """
    file, sidecar = directory / "index.usearch", directory / "index.json"
    stored = _stored_index(file, sidecar, wanted)
    if stored is not None:
        return stored
    ids, vectors = load()
    index = _usearch().Index(
        ndim=vectors.shape[1], metric="cos", dtype="f16", connectivity=16, expansion_add=128, expansion_search=64
    )
    index.add(ids, vectors, threads=1)  # one thread: the graph, and so every answer, depends on the clips alone
    if readonly:
        return index
    try:
        with replacing(file, MemoryStoreError) as temporary:
            try:
                index.save(str(temporary))
            except RuntimeError as error:  # USearch's word for a full disk
                raise OSError(str(error)) from error
            record = {"format": 1, **wanted, "sha256": sha256_of(temporary)}
        with replacing(sidecar, MemoryStoreError) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except MotionRTError as error:
        _log.warning("the vector index is used but could not be kept: %s", error)
    return index


def _stored_index(file: Path, sidecar: Path, wanted: Mapping[str, object]) -> Any:
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        if record != {"format": 1, **wanted, "sha256": record["sha256"]} or sha256_of(file) != record["sha256"]:
            return None
        index = _usearch().Index.restore(str(file), view=True)  # never added to: USearch crashes on adding to a view
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return index if index is not None and len(index) == wanted["count"] else None


def _usearch() -> Any:
    # USearch's Linux wheels export their own copy of libstdc++: an ONNX Runtime that is imported after them segfaults
    # (2.26.6 with 1.31.1), the other order is sound. So it goes first, where it is installed.
    with contextlib.suppress(ImportError):
        import onnxruntime  # noqa: F401
    import usearch.index

    return usearch.index
