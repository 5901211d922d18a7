"""An open motion memory file: made, opened, read and written in transactions, migrated by the first change."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.files import replacing
from motionrt.runtime.memory import store
from motionrt.runtime.memory.rows import Clip, Layout
from motionrt.runtime.memory.search import Choice, Where
from motionrt.runtime.memory.store import plain_errors

INDEX_THRESHOLD = 5_000  # clips up to which exact search is as fast as an index (benchmarks/bench_memory.py)


class MemoryFile:
    """What `MotionMemory` is without searching. Safe to share between threads: one transaction at a time."""

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool, index_threshold: int) -> None:
        self.path, self.readonly, self.index_threshold = path, readonly, index_threshold
        self._db: sqlite3.Connection | None = db
        self._lock = threading.RLock()
        self._old = False  # of an older schema, read through views
        with self._transaction() as connection:
            if store.recognise(connection, path) < store.SCHEMA:
                store.look_like_new(connection, True)
                self._old = True
            self._layout, self.digests = store.read_meta(connection, path)
            store.read_state(connection, path)
        self.dims = self._layout.dims

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, digests: Mapping[str, str], dims: Mapping[str, int | Sequence[int]],
        tokens: str = "float16", index_threshold: int = INDEX_THRESHOLD,
    ) -> Self:  # fmt: skip
        """Make an empty memory in the directory `path` and open it.

        digests: of the graphs whose outputs it will hold (`check` compares them); dims: {"embedding": E,
        "motion": [M,D], "appearance": [M,D]}; tokens: "float16", or "int8", which takes half the space.
        MemoryStoreError if there is one already or no place; InputError.
        """
        directory, layout = Path(path), Layout.checked(dims, tokens)
        if not all(isinstance(text, str) for pair in digests.items() for text in pair):
            raise InputError("the digests of a motion memory map graph names to hex strings; pass `bundle.digests`.")
        with new_file(directory) as temporary:
            store.create(layout, digests, temporary)
        return cls.open(directory, index_threshold=index_threshold)

    @classmethod
    def open(cls, path: str | os.PathLike[str], readonly: bool = False, *, index_threshold: int = INDEX_THRESHOLD) -> Self:
        """Open the memory in the directory `path`, read-only if asked to or if it cannot be written.

        A file of an older schema is read as it is, and migrated by the first change. Raises MemoryStoreError if it is
        missing, damaged or of a newer schema.
        """
        directory = Path(path)
        db, readonly = store.connect(directory, readonly)
        try:
            return cls(directory, db, readonly, index_threshold)
        except BaseException:
            db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._transaction() as db:
            return store.read_state(db, self.path).clips

    def close(self) -> None:
        """Fold the write-ahead log into memory.sqlite and close; a second call does nothing."""
        with self._lock, plain_errors(self.path):
            db, self._db = self._db, None
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
                    " Use the bundle it was made with, or build it again for this one: `motionrt memory create NEW"
                    " --bundle BUNDLE`, then `motionrt memory add NEW CLIPS --bundle BUNDLE`."
                )

    def contains(self, source_sha256: str, start: float, caption: str) -> bool:
        """Whether the span at `start` of the file of this SHA-256 is there under this caption."""
        question = "SELECT 1 FROM clips WHERE source_sha256 = ? AND start = ? AND caption = ? LIMIT 1"
        with self._transaction() as db:
            return db.execute(question, (source_sha256, start, caption)).fetchone() is not None

    def add(self, entries: Iterable[Clip]) -> list[int]:
        """Add clips, all or none, and return their ids. Raises InputError (shape, NaN, …) and MemoryStoreError.

        They are found at once; an index is brought up to date by `refresh`, which index building calls at its end.
        """
        rows = [self._layout.row(number, clip) for number, clip in enumerate(entries)]
        with self._writing(bool(rows)) as db:
            return store.insert(db, self.path, rows)

    def remove(self, ids: Iterable[int]) -> int:
        """Remove the clips of these ids, all or none, and return how many were there. An id is never given again."""
        numbers = [int(number) for number in ids]
        with self._writing(bool(numbers)) as db:
            return store.delete(db, self.path, numbers)

    def ids(self, where: Where | None = None) -> NDArray[np.int64]:
        """Ids [N] of the clips that pass `where` (see `search`), rising."""
        sql, parameters = Choice(where=where).of_scan()
        with self._transaction() as db:
            rows = db.execute(f"SELECT v.id FROM clips v WHERE 1{sql} ORDER BY v.id", parameters).fetchall()
        return np.array([row[0] for row in rows], np.int64)

    @contextmanager
    def _transaction(self, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
        """One consistent state of the memory, or one change of it."""
        with self._lock, plain_errors(self.path):
            if self._db is None:
                raise MemoryStoreError(f"the motion memory {self.path} is closed; open it again.")
            db = self._db
            db.execute(begin)
            if self._old and db.execute("PRAGMA user_version").fetchone()[0] == store.SCHEMA:  # another process migrated it
                db.execute("ROLLBACK")
                store.look_like_new(db, False)
                self._old = False
                db.execute(begin)
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _writing(self, changes: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction that changes the memory, which is migrated to the newest schema first."""
        if self.readonly:
            raise MemoryStoreError(f"the motion memory {self.path} is read-only; copy it to a place of your own.")
        with self._lock:
            if self._db is not None and changes:
                with plain_errors(self.path):
                    self._db.execute("PRAGMA journal_mode=WAL")  # others can read while this writes
            with self._transaction("BEGIN IMMEDIATE" if changes else "BEGIN") as db:
                if self._old and changes:
                    store.migrate(db)
                yield db
            self._old &= not changes


@contextmanager
def new_file(directory: Path) -> Iterator[Path]:
    """A temporary file that becomes the SQLite file of a new memory in `directory` when the block succeeds."""
    file = directory / store.FILE
    if file.exists():
        raise MemoryStoreError(f"{directory} already holds a motion memory; open it, or choose another directory.")
    with plain_errors(directory), replacing(file, MemoryStoreError) as temporary:
        yield temporary
