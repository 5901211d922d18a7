"""What a motion memory derives from its embeddings to search them fast: a USearch index file, and a matrix of newer rows.

The index (HNSW, cosine) is never changed in place: `index-<digest>.usearch` is written beside and renamed, then the
sidecar `index.json` is renamed to name it. The sidecar says which state of the memory it knows. Clips added later are
searched exactly, in a matrix, until a new index takes them in; clips removed later are left out when they are found.

After what USearch wrote, the file holds a row for each of its keys 0, 1, ...: the clip's id int64 and its unit vector
float32 [E], little-endian. Candidates are scored with these; SQLite would copy a page of 8 KiB for each of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import MemoryStoreError, MotionRTError
from motionrt.runtime.files import is_sealed, replacing, sealed, sha256_of, stamp_of
from motionrt.runtime.memory.state import State

SIDECAR = "index.json"
_FORMAT = 6
# A search waits for memory, so the vectors are kept in 8 bits, each scaled to its own largest component (USearch's own
# conversion uses 6 of them at 384 dimensions). What that misorders is put right with the float32 rows.
_DTYPE, _CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = "i8", 32, 200, 64
_CHUNK = 4096  # rows that are copied at once
_STALE = 3600.0  # seconds after which a half-written file is a dead writer's
_log = logging.getLogger(__name__)

Chunks = Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]  # ids [n] rising, unit vectors [n,E]


@dataclass(frozen=True, eq=False)
class Base:
    """An index and what it knows: `count` clips with ids up to `last`, of the state `generation`, `content`.

    file: what it is mapped from; None for one that could not be stored. ids int64 [count] and, of a stored one, unit vectors
    float32 [count,E]: by key.
    """

    index: Any
    file: Path | None
    stamp: tuple[int, ...]
    ids: NDArray[np.int64]
    vectors: NDArray[np.float32] | None
    generation: int
    content: str
    last: int
    count: int

    def intact(self) -> bool:
        """Whether the file is the one that was mapped: reading what was overwritten ends the process."""
        try:
            return self.file is None or stamp_of(self.file) == self.stamp
        except OSError:
            return False

    def key(self, number: int) -> int | None:
        """The key of the clip of this id, if it is there: ids rise by 1 and, where clips were removed, by more."""
        first, last = self._ends
        low, high = max(self.count - 1 - last + number, 0), min(number - first, self.count - 1)
        key = bisect_left(self.ids, number, low, high) if low < high else low
        return key if key <= high and self.ids[key] == number else None

    @cached_property
    def _ends(self) -> tuple[int, int]:
        return (int(self.ids[0]), int(self.ids[-1])) if self.count else (1, 0)

    def nearest(self, query: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """Ids [n] and, if they were stored, unit vectors [n,E] of about the `count` nearest clips, removed ones among them."""
        count = min(count, self.count)
        self.index.expansion_search = max(count, _EXPANSION_SEARCH)
        keys = self.index.search(_in_bytes(query), count, threads=1).keys
        return self.ids[keys], None if self.vectors is None else self.vectors[keys]


class Recent:
    """The rows after an index (all rows where there is none), in memory: ids int64 [n] rising, unit vectors float32 [n,E]."""

    def __init__(self, size: int) -> None:
        self.after = self.seen = 0
        self.wrong: dict[int, str] = {}  # the rows that are damaged, and why
        self.ids, self.vectors = np.empty(0, np.int64), np.empty((0, size), np.float32)

    def update(self, after: int, state: State, load: Callable[[int, dict[int, str]], Chunks]) -> None:
        """Hold the rows with ids above `after`; load(id, wrong) gives those above an id, and in `wrong` what is damaged.

        Removed rows may stay for a while.
        """
        all_of = after == 0 and len(self.ids) > state.clips  # rows were removed: begin again
        if after < self.after or state.last < self.seen or all_of:
            self.__init__(self.vectors.shape[1])  # type: ignore[misc]
        if after > self.after:
            keep = self.ids > after
            self.ids, self.vectors = self.ids[keep], self.vectors[keep]
        self.after = after
        if state.last > self.seen:
            chunks = list(load(max(after, self.seen), self.wrong))
            self.ids = np.concatenate([self.ids, *(ids for ids, _ in chunks)])
            self.vectors = np.concatenate([self.vectors, *(vectors for _, vectors in chunks)])
            self.seen = state.last

    def nearest(self, query: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids [n] and vectors [n,E] of the `count` nearest rows, of equal ones the lowest ids."""
        if count < len(self.ids):
            scores = self.vectors @ query
            least = np.partition(scores, len(scores) - count)[len(scores) - count]
            rows = np.flatnonzero(scores >= least)
            rows = rows[np.argsort(-scores[rows], kind="stable")[:count]]
            return self.ids[rows], self.vectors[rows]
        return self.ids, self.vectors


def signature(directory: Path) -> tuple[int, ...] | None:
    """Changes whenever the sidecar does; None where there is none."""
    try:
        return stamp_of(f"{directory}/{SIDECAR}")
    except OSError:
        return None


def open_base(directory: Path, readonly: bool) -> Base | None:
    """The stored index, mapped read-only, or None where there is none that is sound.

    Flipped bytes crash USearch, so it only sees a file whose SHA-256 is the sidecar's. An unchanged file is not hashed
    again: the sidecar holds the inode, size, mtime and ctime that it had when it was last hashed, and no program can set
    a ctime. What that misses is a disk that changes bytes by itself (`MotionMemory.verify` always reads them all).
    """
    for _ in range(3):  # a writer may replace the index between reading the sidecar and opening the file
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
            record = _record(directory)
            file = directory / str(record["file"])
            stamp = list(stamp_of(file))
            if stamp != record["stamp"]:
                if sha256_of(file) != record["sha256"]:
                    if _record(directory) == record:
                        return None
                    continue
                if not readonly:
                    _write_record(directory, {**record, "stamp": stamp})
            # Never added to: USearch crashes on adding to a view. No table of keys: opening stays cheap.
            index = _usearch().Index.restore(str(file), view=True, enable_key_lookups=False)
            if index is None or len(index) != record["count"]:
                return None
            rows = _mapped(file, record["rows_at"], record["count"], index.ndim)
            known = (record[name] for name in ("generation", "content", "last", "count"))
            return Base(index, file, tuple(stamp), rows["id"], rows["vector"], *known)
        if signature(directory) is None:
            return None
        time.sleep(0.01)
    return None


def sound(directory: Path) -> bool:
    """Whether the stored index is, byte for byte, what was written."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        record = _record(directory)
        return bool(sha256_of(directory / str(record["file"])) == record["sha256"])
    return False


def make_base(directory: Path, state: State, scan: Callable[[int], Chunks], size: int, threads: int, base: Base | None) -> Base:
    """An index of `state`, stored: of all clips, or a copy of `base` with those after it added. scan(id): those after an id.

    With one thread it depends on the clips alone. Where it cannot be stored, a warning says so and it serves from memory.
    """
    options = {"expansion_add": _EXPANSION_ADD, "connectivity": _CONNECTIVITY}
    index, known = _usearch().Index(ndim=size, metric="cos", dtype=_DTYPE, **options), np.empty(0, np.int64)
    if base is not None:
        try:
            index.load(str(base.file))
        except RuntimeError as error:
            text = f"the index of {directory} was replaced by another process ({error}); try again."
            raise MemoryStoreError(text) from error
        known = np.array(base.ids)
    after, ids = 0 if base is None else base.last, [known]
    for some, vectors in scan(after):
        index.add(np.arange(len(index), len(index) + len(some)), _in_bytes(vectors), threads=threads)
        ids.append(some)

    def rows() -> Chunks:
        """What the index was made of, once more: to be written behind it."""
        if base is not None and base.vectors is not None:
            for start in range(0, base.count, _CHUNK):
                yield base.ids[start : start + _CHUNK], base.vectors[start : start + _CHUNK]
        yield from scan(after)

    every = np.concatenate(ids)
    made = Base(index, None, (), every, None, state.generation, state.content, state.last, len(every))
    try:
        _save(directory, made, rows())
    except MotionRTError as error:
        _log.warning("the vector index is used but could not be kept: %s", error)
        return made
    return open_base(directory, True) or made


def tidy(directory: Path) -> None:
    """Remove index files that no sidecar names, and what writers left half-written an hour ago or more."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        keep = str(_record(directory)["file"])
        for file in directory.glob("index-*.usearch"):
            if file.name != keep:
                file.unlink(missing_ok=True)
    for file in directory.glob(".*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _STALE:
                file.unlink(missing_ok=True)


def stored_bytes(directory: Path) -> int:
    """Bytes of the index on disk."""
    return sum(file.stat().st_size for file in [*directory.glob("index-*.usearch"), *directory.glob(SIDECAR)])


def _save(directory: Path, base: Base, rows: Chunks) -> None:
    file = directory / f"index-{base.content[:16]}.usearch"
    with replacing(file, MemoryStoreError) as temporary:
        try:
            base.index.save(str(temporary))
        except RuntimeError as error:  # USearch's word for a full disk
            raise OSError(str(error)) from error
        at = temporary.stat().st_size
        if at != base.index.serialized_length:
            raise OSError(errno.ENOSPC, "the index was written in part")
        with temporary.open("ab") as target:
            for ids, vectors in rows:
                records = np.empty(len(ids), _row(vectors.shape[1]))
                records["id"], records["vector"] = ids, vectors
                target.write(records.tobytes())
        sha256 = sha256_of(temporary)
    record = {"format": _FORMAT, "file": file.name, "sha256": sha256, "stamp": list(stamp_of(file)), "rows_at": at}
    known = {"generation": base.generation, "content": base.content, "last": base.last, "count": base.count}
    _write_record(directory, record | known)
    tidy(directory)


def _record(directory: Path) -> dict[str, Any]:
    """The sidecar; ValueError for one of another format, or that is not what was written."""
    record = json.loads((directory / SIDECAR).read_text(encoding="utf-8"))
    if record["format"] != _FORMAT or not is_sealed(record) or Path(record["file"]).name != record["file"]:
        raise ValueError("another format")
    return dict(record)


def _write_record(directory: Path, record: dict[str, Any]) -> None:
    with replacing(directory / SIDECAR, MemoryStoreError) as temporary:
        temporary.write_text(json.dumps(sealed(record), indent=1) + "\n", encoding="utf-8")


def _in_bytes(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Vectors [...,E] in 8 bits, the largest component of each 127: the same direction but for rounding."""
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.asarray(np.rint(vectors * (127 / largest)), np.int8)


def _mapped(file: Path, at: int, count: int, size: int) -> NDArray[np.void]:
    """The rows behind an index; ValueError for another number of them."""
    kind = _row(size)
    if file.stat().st_size != at + count * kind.itemsize:
        raise ValueError("another number of rows")
    return np.asarray(np.memmap(file, kind, "r", at, (count,)))


def _row(size: int) -> np.dtype[np.void]:
    return np.dtype([("id", "<i8"), ("vector", "<f4", (size,))])


def _usearch() -> Any:
    # USearch's Linux wheels export their own copy of libstdc++: an ONNX Runtime that is imported after them segfaults
    # (2.26.6 with 1.31.1), the other order is sound. So it goes first, where it is installed.
    with contextlib.suppress(ImportError):
        import onnxruntime  # noqa: F401
    import usearch.index

    return usearch.index
