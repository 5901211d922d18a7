"""An open motion memory file: made, opened, read and written in transactions, moved as one file."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import flag, ids_of, listed, path_of, text_of, whole
from motionrt.runtime.bundle.manifest import MemorySpec, Part
from motionrt.runtime.errors import BundleError, InputError, MemoryStoreError, shown
from motionrt.runtime.files import replacing
from motionrt.runtime.memory import store, tags
from motionrt.runtime.memory.rows import Clip, Damaged, Layout, seconds
from motionrt.runtime.memory.search import Search, Where
from motionrt.runtime.memory.state import no_leftovers
from motionrt.runtime.memory.store import plain_errors

if TYPE_CHECKING:
    from motionrt.runtime.bundle.bundle import Bundle

_log = logging.getLogger(__name__)
INDEX_THRESHOLD = 5_000  # clips up to which exact search is as fast as an index (benchmarks/questions)
Folder = str | os.PathLike[str]


class MemoryFile:
    """What `MotionMemory` is without searching. Safe to share between threads: one transaction at a time.

    layout: what it keeps of a clip, and the fingerprint of what made it.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool, index_threshold: int) -> None:
        self.path, self.readonly, self.index_threshold = path, readonly, index_threshold
        self._db: sqlite3.Connection | None = db
        self._lock = threading.RLock()
        with self._transaction() as connection:
            self.layout = store.read_layout(connection, path)
            store.read_state(connection, path)

    @classmethod
    def create(
        cls, path: Folder, *, embedding: int, record: Sequence[Part], fingerprint: str,
        tokens: str | None = None, on_demand: bool = False, words: bool = True,
        calibration: tuple[float, float, float] | None = None, index_threshold: int = INDEX_THRESHOLD,
    ) -> Self:  # fmt: skip
        """Make an empty memory in the directory `path` and open it.

        embedding: numbers in a vector; record: what is kept of a clip; fingerprint: of what makes both (`check` compares it).
        tokens: how float parts are kept: as they are declared, or "float16", or "int8", which takes half the space of float16.
        on_demand: records are not kept, but made of the clips' files when they are used (`indexing.encoders.make_record`).
        words: those of captions are kept and count in a search by text, beside the vectors. calibration: as of `MemorySpec`.
        MemoryStoreError if there is one already or no place; InputError.
        """
        directory = path_of("the directory of a motion memory", path).absolute()
        whole("index_threshold", index_threshold, 0)
        parts = tuple(listed("the record of a motion memory", record, "the parts that a bundle declares"))
        layout = Layout(embedding, parts, fingerprint, tokens, on_demand, words, calibration)
        with _new_file(directory) as temporary:
            store.create(layout, temporary)
        return cls.open(directory, index_threshold=index_threshold)

    @classmethod
    def for_bundle(
        cls, path: Folder, bundle: Bundle, *, tokens: str | None = None, on_demand: bool = False, words: bool = True,
        index_threshold: int = INDEX_THRESHOLD,
    ) -> Self:  # fmt: skip
        """`create` what `bundle` declares. BundleError if its requests take no clips."""
        spec = memory_spec(bundle)
        (vector,) = bundle.graph(spec.query).outputs
        return cls.create(
            path, embedding=vector.dims[1].max, record=spec.record, fingerprint=spec.fingerprint,
            tokens=tokens, on_demand=on_demand, words=words, calibration=spec.calibration, index_threshold=index_threshold,
        )  # fmt: skip

    @classmethod
    def open(cls, path: Folder, readonly: bool = False, *, index_threshold: int = INDEX_THRESHOLD) -> Self:
        """Open the memory in the directory `path`, read-only if asked to or if it cannot be written.

        It stays that directory whatever the working directory becomes. Raises MemoryStoreError if it is missing, damaged or
        of another schema, or if the log beside it is of another memory.
        """
        directory = path_of("the directory of a motion memory", path)
        whole("index_threshold", index_threshold, 0)
        db, readonly = store.connect(directory, flag("readonly", readonly))
        try:
            return cls(directory.absolute(), db, readonly, index_threshold)
        except BaseException:
            db.close()
            raise

    @classmethod
    def import_file(cls, file: Folder, path: Folder) -> Self:
        """Make a memory in the directory `path` of a file that `export_file` wrote, and open it.

        Every page, row and checksum is verified first; MemoryStoreError, and no memory, if one is wrong.
        """
        source = path_of("the file to import", file).absolute()
        directory = path_of("the directory of a motion memory", path).absolute()
        if not os.path.isfile(source):
            raise MemoryStoreError(f"there is no file {source} to import; make one with `motionrt memory export`.")
        with _new_file(directory) as temporary, plain_errors(source):
            store.copy(source, temporary)
        return cls.open(directory)

    def export_file(self, path: Folder) -> None:
        """Write all clips as one file, verified and whole or not at all, for `import_file`; others may write meanwhile.

        MemoryStoreError if the file exists, there is no place for it, or this memory is damaged.
        """
        target = path_of("the file to write", path).absolute()
        if os.path.exists(target):
            raise MemoryStoreError(f"{target} exists; remove it, or choose another file.")
        no_leftovers(target)
        with plain_errors(self.path), replacing(target, MemoryStoreError) as temporary:
            store.copy(self.path / store.FILE, temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._transaction() as db:
            return store.read_state(db, self.path).clips

    def close(self) -> None:
        """Fold the write-ahead log into memory.sqlite and close; a second call does nothing.

        Where the disk has no room for that, the log stays beside it, with all that was added, for the next writer to fold.
        """
        with self._lock, plain_errors(self.path):
            db, self._db = self._db, None
            if db is None:
                return
            try:
                if not self.readonly and db.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
                    db.execute("PRAGMA busy_timeout=0")
                    db.execute("PRAGMA journal_mode=DELETE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname.startswith(("SQLITE_FULL", "SQLITE_IOERR_WRITE")):
                    _log.warning("the log of %s stays beside it: %s; free space on the disk", self.path, error)
                elif not error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                    raise  # busy: another process has it open, and the last one to close tidies up
            finally:
                db.close()

    def check(self, fingerprint: str) -> None:
        """Raise MemoryStoreError unless this memory was made by what has this fingerprint (a bundle's)."""
        mine, fingerprint = self.layout.fingerprint, text_of("the fingerprint", fingerprint)
        if fingerprint != mine:
            raise MemoryStoreError(
                f"the motion memory {self.path} was made by other encoders: its fingerprint is {mine[:12] or 'none'}, this"
                f" bundle's is {fingerprint[:12] or 'none'}. Use the bundle it was made with, or build it again for this one:"
                " `motionrt memory create NEW --bundle BUNDLE`, then `motionrt memory add NEW CLIPS --bundle BUNDLE`."
            )

    def contains(self, source_sha256: str, start: float, caption: str) -> bool:
        """Whether the span at `start` of the file of this SHA-256 is there under this caption. Raises InputError."""
        text_of("the SHA-256", source_sha256)
        text_of("the caption", caption)
        seconds("the start", start)
        question = "SELECT 1 FROM clips WHERE source_sha256 = ? AND start = ? AND caption = ? LIMIT 1"
        with self._transaction() as db:
            return db.execute(question, (source_sha256, start, caption)).fetchone() is not None

    def find(self, source_sha256: str, caption: str | None = None, start: float | None = None) -> list[int]:
        """Ids, rising, of the clips of the file of this SHA-256, under this caption and from this start on if one is given."""
        question = "SELECT id FROM clips WHERE source_sha256 = ? AND caption = IFNULL(?, caption) AND start = IFNULL(?, start)"
        with self._transaction() as db:
            return sorted(row[0] for row in db.execute(question, (source_sha256, caption, start)))

    def add(self, entries: Iterable[Clip]) -> list[int]:
        """Add clips, all or none, and return their ids. Raises InputError (shape, NaN, …) and MemoryStoreError.

        They are found at once; an index is brought up to date by `refresh`, which index building calls at its end.
        """
        rows = [self.layout.row(number, clip) for number, clip in enumerate(listed("entries", entries, "Clips"))]
        with self._writing(bool(rows)) as db:
            return store.insert(db, self.path, rows, self.layout.words)

    def remove(self, ids: Iterable[int]) -> int:
        """Remove the clips of these ids, all or none, and return how many were there. An id is never given again.

        Raises InputError (no ids) and MemoryStoreError.
        """
        numbers = ids_of(ids)
        with self._writing(bool(numbers)) as db:
            return store.delete(db, self.path, numbers, self.layout.words)

    def ids(self, where: Where | None = None) -> NDArray[np.int64]:
        """Ids [N] of the clips that pass `where` (see `Search`), rising."""
        search = Search(where)
        with self._transaction() as db:
            if search.where:
                return np.array(tags.tagged(db, search), np.int64)
            found = [row[0] for row in db.execute("SELECT id FROM clips NOT INDEXED ORDER BY id")]
            again = sorted(row[0] for row in db.execute("SELECT id FROM clips INDEXED BY clips_sha256"))
            if found != again or len(found) != store.read_state(db, self.path).clips:
                raise Damaged(f"its {len(found)} clips are not those that were written")
        return np.array(found, np.int64)

    @contextmanager
    def _transaction(self, begin: str = "BEGIN") -> Iterator[sqlite3.Connection]:
        """One consistent state of the memory, or one change of it."""
        with self._lock, plain_errors(self.path):
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
    def _writing(self, changes: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction that changes the memory."""
        if self.readonly:
            raise MemoryStoreError(f"the motion memory {self.path} is read-only; copy it to a place of your own.")
        with self._lock:
            if self._db is not None and changes:
                with plain_errors(self.path):
                    store.write_ahead(self._db)
            with self._transaction("BEGIN IMMEDIATE" if changes else "BEGIN") as db:
                yield db


def memory_spec(bundle: Bundle) -> MemorySpec:
    """What `bundle` declares for a memory; BundleError if its requests take no clips."""
    if not hasattr(getattr(bundle, "manifest", None), "memory"):
        raise InputError(f"the bundle is {shown(bundle)}; allowed is what Bundle.open gives.")
    if bundle.manifest.memory is None:
        raise BundleError(f"the bundle {bundle.path} takes no clips of a motion memory; use another bundle.")
    return bundle.manifest.memory


@contextmanager
def _new_file(directory: Path) -> Iterator[Path]:
    """A temporary file that becomes the SQLite file of a new memory in `directory` when the block succeeds."""
    file = directory / store.FILE
    if os.path.exists(file):
        raise MemoryStoreError(f"{directory} already holds a motion memory; open it, or choose another directory.")
    no_leftovers(file)
    with plain_errors(directory), replacing(file, MemoryStoreError) as temporary:
        yield temporary
