"""The motion memory: reference clips with captions, vectors and tokens, found by the meaning of a prompt.

A directory. `memory.sqlite` is the truth, one clean file once it is closed; `index.usearch` with sidecar `index.json`
is derived from it, for large memories only, and made again when it is missing, stale or damaged. Searching writes
nothing else, so a memory can be committed, mounted read-only or copied. E embedding size, M tokens of width D.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.video import replacing

SCHEMA = 1
INDEX_THRESHOLD = 20_000  # clips up to which exact search is as fast as an index (shared/FACTS.md, USearch)
_APPLICATION = 0x4D52544D  # "MRTM", marks the SQLite file as ours
_LARGEST = float(np.finfo(np.float16).max)
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE clips (id INTEGER PRIMARY KEY, caption TEXT NOT NULL, source TEXT NOT NULL, start REAL NOT NULL,
    duration REAL NOT NULL, fps REAL NOT NULL, source_sha256 TEXT NOT NULL, metadata TEXT NOT NULL,
    embedding BLOB NOT NULL, motion BLOB NOT NULL, appearance BLOB NOT NULL);
CREATE INDEX clips_source ON clips (source);
CREATE INDEX clips_sha256 ON clips (source_sha256);
"""


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip to add; times in seconds. embedding: float32 [E]; motion, appearance: float32 [M,D], kept as float16."""

    caption: str
    source: str
    start: float
    duration: float
    fps: float
    source_sha256: str
    embedding: NDArray[np.float32]
    motion: NDArray[np.float32]
    appearance: NDArray[np.float32]
    metadata: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""


@dataclass(frozen=True, eq=False)
class Reference:
    """A retrieved clip. score: cosine of caption and query in [-1,1]; motion and appearance: float32 [M,D]."""

    id: int
    score: float
    caption: str
    source: str
    start: float
    duration: float
    motion: NDArray[np.float32]
    appearance: NDArray[np.float32]


class MotionMemory:
    """An open motion memory; use `create` or `open`, then `close` or a `with` block. Safe to share between threads."""

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool, index_threshold: int) -> None:
        self.path, self.readonly, self.index_threshold = path, readonly, index_threshold
        self._db: sqlite3.Connection | None = db
        self._lock = threading.RLock()
        self._vectors: tuple[str, NDArray[np.int64], NDArray[np.float32]] | None = None
        self._index: tuple[str, Any] | None = None
        with self._transaction() as connection:
            if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
                raise MemoryStoreError(f"{path / 'memory.sqlite'} is not a motion memory; choose another directory.")
            schema = connection.execute("PRAGMA user_version").fetchone()[0]
            if schema > SCHEMA:
                raise MemoryStoreError(
                    f"the motion memory {path} has schema {schema}; this MotionRT reads up to {SCHEMA}. Upgrade it."
                )
            try:
                meta = dict(connection.execute("SELECT key, value FROM meta"))
                self.dims, self.digests = _check_dims(json.loads(meta["dims"])), dict(json.loads(meta["digests"]))
            except (KeyError, ValueError, TypeError) as error:
                raise _damaged(path, f"its description cannot be read: {error!r}") from error

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, digests: Mapping[str, str], dims: Mapping[str, int | Sequence[int]],
        index_threshold: int = INDEX_THRESHOLD,
    ) -> MotionMemory:  # fmt: skip
        """Make an empty memory in the directory `path` and open it.

        digests: of the graphs whose outputs it will hold (`check` compares them); dims: {"embedding": E,
        "motion": [M,D], "appearance": [M,D]}. MemoryStoreError if there is one already or no place; InputError.
        """
        directory, sizes = Path(path), _check_dims(dims)
        if not all(isinstance(text, str) for pair in digests.items() for text in pair):
            raise InputError("the digests of a motion memory map graph names to hex strings; pass `bundle.digests`.")
        file = directory / "memory.sqlite"
        if file.exists():
            raise MemoryStoreError(f"{directory} already holds a motion memory; open it, or choose another directory.")
        with _plain_errors(directory), replacing(file, MemoryStoreError) as temporary:
            db = sqlite3.connect(temporary, isolation_level=None)
            try:
                db.executescript(
                    f"PRAGMA journal_mode=MEMORY; PRAGMA application_id={_APPLICATION}; PRAGMA user_version={SCHEMA};"
                    f"BEGIN; {_TABLES}"
                )
                content = hashlib.sha256(json.dumps([sizes, dict(digests)], sort_keys=True).encode()).hexdigest()
                meta = {"dims": json.dumps(sizes), "digests": json.dumps(dict(digests)), "generation": "0"}
                db.executemany("INSERT INTO meta VALUES (?, ?)", (meta | {"content": content}).items())
                db.execute("COMMIT")
            finally:
                db.close()
        return cls.open(directory, index_threshold=index_threshold)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], readonly: bool = False, *, index_threshold: int = INDEX_THRESHOLD
    ) -> MotionMemory:
        """Open the memory in the directory `path`, read-only if asked to or if it cannot be written.

        Raises MemoryStoreError if it is missing, damaged or of a newer schema.
        """
        directory = Path(path)
        file = directory / "memory.sqlite"
        if not file.is_file():
            raise MemoryStoreError(
                f"there is no motion memory at {directory} (no memory.sqlite). Check the path, or make one with"
                f" `motionrt memory create {directory}`."
            )
        with _plain_errors(directory):
            with file.open("rb") as stream:
                head = stream.read(20)
            if not head.startswith(b"SQLite format 3\0"):
                raise _damaged(directory, "memory.sqlite is not an SQLite file")
            effective = os.access in os.supports_effective_ids
            readonly |= not all(os.access(place, os.W_OK, effective_ids=effective) for place in (directory, file))
            log = file.with_name("memory.sqlite-wal")
            # SQLite cannot share a WAL-mode file that it may not write beside; without a log nobody else has it open.
            alone = head[18:20] == b"\2\2" and not (log.exists() and log.stat().st_size)
            mode = "rw" if not readonly else "ro&immutable=1" if alone else "ro"
            uri = f"{file.absolute().as_uri()}?mode={mode}"
            db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            return cls(directory, db, readonly, index_threshold)
        except BaseException:
            db.close()
            raise

    def __enter__(self) -> MotionMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._transaction() as db:
            return int(db.execute("SELECT COUNT(*) FROM clips").fetchone()[0])

    def close(self) -> None:
        """Fold the write-ahead log into memory.sqlite and close; a second call does nothing."""
        with self._lock, _plain_errors(self.path):
            db, self._db, self._index, self._vectors = self._db, None, None, None
            if db is None:
                return
            try:
                if not self.readonly and db.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
                    db.execute("PRAGMA busy_timeout=0")
                    db.execute("PRAGMA journal_mode=DELETE")
            except sqlite3.OperationalError as error:
                if not error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                    raise  # busy: another process has it open, and the last one to close tidies up
            finally:
                db.close()

    def check(self, digests: Mapping[str, str]) -> None:
        """Raise MemoryStoreError unless this memory was made with the graphs of these digests (a bundle's)."""
        for name in sorted(self.digests.keys() | digests.keys()):
            mine, other = self.digests.get(name, "none"), digests.get(name, "none")
            if mine != other:
                raise MemoryStoreError(
                    f"the motion memory {self.path} was made with `{name}` {mine[:12]}; this bundle has {other[:12]}."
                    " Use the bundle it was made with, or `motionrt memory create` and `add` a new one."
                )

    def contains(self, source_sha256: str, start: float, caption: str) -> bool:
        """Whether the span at `start` of the file of this SHA-256 is there under this caption."""
        question = "SELECT 1 FROM clips WHERE source_sha256 = ? AND start = ? AND caption = ? LIMIT 1"
        with self._transaction() as db:
            return db.execute(question, (source_sha256, start, caption)).fetchone() is not None

    def add(self, entries: Iterable[Clip]) -> list[int]:
        """Add clips, all or none, and return their ids. Raises InputError (shape, NaN, …) and MemoryStoreError."""
        rows = [self._row(number, clip) for number, clip in enumerate(entries)]
        if self.readonly:
            raise MemoryStoreError(f"the motion memory {self.path} is read-only; copy it to a place of your own.")
        ids: list[int] = []
        with self._lock:
            if self._db is not None and rows:
                with _plain_errors(self.path):
                    self._db.execute("PRAGMA journal_mode=WAL")  # others can read while this writes
            with self._transaction("BEGIN IMMEDIATE") as db:
                generation, content = _state(db, self.path)
                for row in rows:
                    ids += [int(db.execute(f"INSERT INTO clips VALUES (NULL{', ?' * 10})", row).lastrowid or 0)]
                    content = hashlib.sha256(f"{content} {ids[-1]} ".encode() + row[7]).hexdigest()
                if rows:
                    state = [(str(generation + 1), "generation"), (content, "content")]
                    db.executemany("UPDATE meta SET value = ? WHERE key = ?", state)
        return ids

    def search(self, embedding: NDArray[Any], k: int, exclude_source: str | None = None) -> list[Reference]:
        """The `k` clips whose captions are nearest to `embedding` [E] by cosine, nearest first, equal ones by id.

        exclude_source: leave out clips of this source. MemoryStoreError if fewer than `k` are there; InputError.
        """
        query = _unit(_array("the query embedding", embedding, (self.dims["embedding"][0],)))
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"the number of references is {k!r}; allowed is a whole number from 1 on.")
        with self._transaction() as db:
            total = int(db.execute("SELECT COUNT(*) FROM clips").fetchone()[0])
            excluded = {row[0] for row in db.execute("SELECT id FROM clips WHERE source = ?", (exclude_source,))}
            if k > total - len(excluded):
                raise MemoryStoreError(
                    f"{k} references were asked for; the motion memory {self.path} holds {total or 'no'} clips"
                    + (f", {len(excluded)} of them from the excluded {exclude_source}" if excluded else "")
                    + f". Ask for fewer, or add clips: `motionrt memory add {self.path} clip.mp4`."
                )
            ids = None if total <= self.index_threshold else self._candidates(db, query, int(k), excluded, total)
            keys, vectors = self._matrix(db) if ids is None else self._load(db, ids)
            keep = ~np.isin(keys, list(excluded))
            keys, scores = keys[keep], vectors[keep] @ query
            order = np.lexsort((keys, -scores))[:k]
            return [self._reference(db, int(keys[i]), float(scores[i])) for i in order]

    def get(self, ids: Sequence[int]) -> list[Reference]:
        """The clips of these ids, in this order; their score is NaN. Raises MemoryStoreError for an unknown id."""
        with self._transaction() as db:
            return [self._reference(db, int(number), math.nan) for number in ids]

    def refresh(self) -> None:
        """Make the derived index now if the memory is large enough to want one, so that no search has to."""
        if len(self) > self.index_threshold:
            with self._transaction() as db:
                self._vector_index(db)

    def _candidates(
        self, db: sqlite3.Connection, query: NDArray[np.float32], k: int, excluded: set[int], total: int
    ) -> NDArray[np.int64] | None:
        """Ids of clips that surely include good answers, from the index; None if it cannot find enough."""
        want = min(2 * (k + len(excluded)) + 16, total)  # more than k: float16 order is corrected, filters cost some
        index = self._vector_index(db)
        index.expansion_search = max(want, 64)
        found = np.asarray(index.search(query, want, threads=1).keys, np.int64)
        return found if len(np.setdiff1d(found, list(excluded))) >= k else None

    def _vector_index(self, db: sqlite3.Connection) -> Any:
        from motionrt.runtime.indexing import vector_index

        generation, content = _state(db, self.path)
        if self._index is None or self._index[0] != content:
            count = int(db.execute("SELECT COUNT(*) FROM clips").fetchone()[0])
            wanted = {"generation": generation, "content": content, "count": count}
            self._index = (content, vector_index(self.path, wanted, lambda: self._load(db), self.readonly))
        return self._index[1]

    def _matrix(self, db: sqlite3.Connection) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        content = _state(db, self.path)[1]
        if self._vectors is None or self._vectors[0] != content:
            self._vectors = (content, *self._load(db))
        return self._vectors[1:]

    def _load(
        self, db: sqlite3.Connection, ids: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids int64 [N] rising, and unit embeddings float32 [N,E]: of all clips, or of `ids`."""
        chosen = "" if ids is None else f"WHERE id IN ({','.join(map(str, ids))})"
        rows = db.execute(f"SELECT id, embedding FROM clips {chosen} ORDER BY id").fetchall()
        vectors = [self._unpack("embedding", row[1], "<f4", row[0]) for row in rows]
        return np.array([row[0] for row in rows], np.int64), _unit(np.stack(vectors))

    def _reference(self, db: sqlite3.Connection, number: int, score: float) -> Reference:
        columns = "caption, source, start, duration, motion, appearance"
        row = db.execute(f"SELECT {columns} FROM clips WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise MemoryStoreError(f"the motion memory {self.path} has no clip {number}; use an id that search gave.")
        caption, source, start, duration, motion, appearance = row
        return Reference(
            number, score, caption, source, start, duration,
            self._unpack("motion", motion, "<f2", number), self._unpack("appearance", appearance, "<f2", number),
        )  # fmt: skip

    def _unpack(self, name: str, blob: bytes, dtype: str, number: int) -> NDArray[np.float32]:
        shape = tuple(self.dims[name])
        if len(blob) != math.prod(shape) * np.dtype(dtype).itemsize:
            raise _damaged(self.path, f"clip {number} has {len(blob)} bytes of {name}")
        values = np.frombuffer(blob, dtype).reshape(shape).astype(np.float32)
        if not np.isfinite(values).all() or (name == "embedding" and not values.any()):
            raise _damaged(self.path, f"clip {number} has an impossible {name}")
        return values

    def _row(self, number: int, clip: Clip) -> tuple[Any, ...]:
        name = f"clip {number} ({clip.source!r})"
        try:
            for text in (clip.caption, clip.source, clip.source_sha256, *clip.metadata, *clip.metadata.values()):
                text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise InputError(f"{name}: caption, source, SHA-256 and metadata must be valid text ({error}).") from error
        if not clip.caption.strip():
            raise InputError(f"{name} has an empty caption; say in a few words what moves and how.")
        times = (clip.start, clip.duration, clip.fps)
        if not all(math.isfinite(value) and value >= 0 for value in times):
            raise InputError(f"{name} has (start, duration, fps) {times}; allowed are finite numbers from 0 on.")
        embedding, motion, appearance = (
            _array(f"`{part}` of {name}", getattr(clip, part), tuple(size)) for part, size in self.dims.items()
        )
        _unit(embedding)
        if max(np.abs(motion).max(), np.abs(appearance).max()) > _LARGEST:
            raise InputError(f"the tokens of {name} exceed {_LARGEST:g}, the largest float16; they cannot be kept.")
        blobs = (embedding.astype("<f4").tobytes(), *(x.astype("<f2").tobytes() for x in (motion, appearance)))
        metadata = json.dumps(dict(clip.metadata), ensure_ascii=False, sort_keys=True)
        return clip.caption, clip.source, *times, clip.source_sha256, metadata, *blobs

    @contextmanager
    def _transaction(self, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
        with self._lock, _plain_errors(self.path):
            if self._db is None:
                raise MemoryStoreError(f"the motion memory {self.path} is closed; open it again.")
            db = self._db
            db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the system into MemoryStoreError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "OSError")):
            text = f"cannot be written or read ({error}). Nothing was added. Free space on the disk and try again."
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            text = "is being written by another process; wait for it to finish and try again."
        elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "Permission")):
            text = f"cannot be opened or written ({error}); check its permissions, or copy it to a place of your own."
        else:
            raise _damaged(path, str(error)) from error
        raise MemoryStoreError(f"the motion memory {path} {text}") from error


def _damaged(path: Path, why: str) -> MemoryStoreError:
    return MemoryStoreError(
        f"the motion memory {path} is damaged: {why}. Restore a copy, or make it again: `motionrt memory create`, then"
        " `motionrt memory add`."
    )


def _state(db: sqlite3.Connection, path: Path) -> tuple[int, str]:
    """How often the memory changed, and a digest of all that was ever added, by which derived data is recognised."""
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        return int(meta["generation"]), str(meta["content"])
    except (KeyError, ValueError, TypeError) as error:
        raise _damaged(path, f"its description cannot be read: {error!r}") from error


def _check_dims(dims: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    ranks = {"embedding": 1, "motion": 2, "appearance": 2}
    sizes = {name: [size] if isinstance(size, int) else list(size) for name, size in dims.items()}
    whole = all(isinstance(n, int) and n > 0 for size in sizes.values() for n in size)
    if {name: len(size) for name, size in sizes.items()} != ranks or not whole:
        allowed = '{"embedding": E, "motion": [M,D], "appearance": [M,D]}'
        raise InputError(f"the dims of a motion memory are {dims!r}; allowed is {allowed}, all from 1 on.")
    return {name: sizes[name] for name in ranks}


def _array(name: str, value: object, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.shape != shape:
        raise InputError(f"{name} is {array.dtype} {list(array.shape)}; this memory accepts float {list(shape)}.")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{name} has NaN or infinite values; all must be finite.")
    return array


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide [..., E] by its length; InputError for zero vectors, which have no direction."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not (norm > 0).all():
        raise InputError("an embedding is all zeros; it must point somewhere.")
    return np.asarray(vectors / norm, np.float32)
