"""The SQLite file of a motion memory: schema, opening, migration, writing, and looking for damage.

    clips (narrow)   vectors (embedding, read by the search)   tokens (wide, read for the clips found)
    tags (key, value, id): metadata and dataset, turned round, so that a filter is a range of this table
    history: one row for each change; the last says how many clips there are, and each names a state by its digest

Ids are never given twice, so whatever is derived from a state stays right about the ids that it knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from motionrt.runtime.errors import MemoryStoreError
from motionrt.runtime.memory.rows import DamagedRow, Layout, Reference, checksum

SCHEMA = 2
FILE = "memory.sqlite"
_APPLICATION = 0x4D52544D  # "MRTM", marks the SQLite file as ours
_PAGE = 8192  # five 384-d vectors to a page, and a fourth of the pages of a large blob
_AT_ONCE = 4096  # values in one statement; SQLite takes 32,766
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE history (generation INTEGER PRIMARY KEY, content TEXT NOT NULL, last INTEGER NOT NULL, clips INTEGER NOT NULL);
CREATE TABLE clips (id INTEGER PRIMARY KEY AUTOINCREMENT, caption TEXT NOT NULL, source TEXT NOT NULL, start REAL NOT NULL,
    duration REAL NOT NULL, fps REAL NOT NULL, source_sha256 TEXT NOT NULL, dataset TEXT NOT NULL, metadata TEXT NOT NULL);
CREATE TABLE vectors (id INTEGER PRIMARY KEY, embedding BLOB NOT NULL);
CREATE TABLE tokens (id INTEGER PRIMARY KEY, crc INTEGER NOT NULL, motion BLOB NOT NULL, appearance BLOB NOT NULL);
CREATE TABLE tags (key TEXT, value TEXT, id INTEGER, PRIMARY KEY (key, value, id)) WITHOUT ROWID;
CREATE INDEX clips_sha256 ON clips (source_sha256)
"""
_INSERTS = (
    "INSERT INTO clips VALUES (:id, :caption, :source, :start, :duration, :fps, :source_sha256, :dataset, :metadata)",
    "INSERT INTO vectors VALUES (:id, :embedding)",
    "INSERT INTO tokens VALUES (:id, :crc, :motion, :appearance)",
)
# Schema 1 had one wide table. Temporary views give it the names of schema 2: it is read as it is, without a write.
_OLD = {
    "meta": "SELECT key, value FROM main.meta UNION ALL SELECT 'tokens', 'float16'",
    "history": "SELECT (SELECT CAST(value AS INTEGER) FROM main.meta WHERE key = 'generation') AS generation,"
    " (SELECT value FROM main.meta WHERE key = 'content') AS content,"
    " (SELECT COALESCE(MAX(id), 0) FROM main.clips) AS last, (SELECT COUNT(*) FROM main.clips) AS clips",
    "vectors": "SELECT id, embedding FROM main.clips",
    "tokens": "SELECT id, NULL AS crc, motion, appearance FROM main.clips",
    "tags": "SELECT j.key, j.value, c.id FROM main.clips c, json_each(c.metadata) j WHERE j.key <> 'dataset'"
    " UNION ALL SELECT 'dataset', COALESCE(json_extract(metadata, '$.dataset'), ''), id FROM main.clips",
    "clips": "SELECT id, caption, source, start, duration, fps, source_sha256,"
    " COALESCE(json_extract(metadata, '$.dataset'), '') AS dataset, json_remove(metadata, '$.dataset') AS metadata"
    " FROM main.clips",
}


class State(NamedTuple):
    """A state of a memory: how often it was changed, a digest of all changes, the last id given, the clips it holds."""

    generation: int
    content: str
    last: int
    clips: int


def create(layout: Layout, digests: Mapping[str, str], file: Path) -> None:
    """Write an empty memory as `file`."""
    db = sqlite3.connect(file, isolation_level=None)
    try:
        db.execute(f"PRAGMA page_size={_PAGE}")
        db.execute("PRAGMA journal_mode=MEMORY")
        db.execute(f"PRAGMA application_id={_APPLICATION}")
        db.execute("BEGIN")
        for statement in _TABLES.split(";\n"):
            db.execute(statement)
        meta = {"dims": json.dumps(layout.dims), "digests": json.dumps(dict(digests)), "tokens": layout.tokens}
        db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        content = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", State(0, content, 0, 0))
        db.execute(f"PRAGMA user_version={SCHEMA}")
        db.execute("COMMIT")
    finally:
        db.close()


def connect(directory: Path, readonly: bool) -> tuple[sqlite3.Connection, bool]:
    """A connection to the memory in `directory`, and whether it is read-only: as asked, or because it must be."""
    file = directory / FILE
    if not file.is_file():
        raise MemoryStoreError(
            f"there is no motion memory at {directory} (no {FILE}). Check the path, or make one with"
            f" `motionrt memory create {directory}`."
        )
    with plain_errors(directory):
        with file.open("rb") as stream:
            head = stream.read(20)
        if not head.startswith(b"SQLite format 3\0"):
            raise damaged(directory, f"{FILE} is not an SQLite file")
        effective = os.access in os.supports_effective_ids
        writable = all(os.access(place, os.W_OK, effective_ids=effective) for place in (directory, file))
        log = file.with_name(f"{FILE}-wal")
        # SQLite cannot share a WAL-mode file that it may not write beside; without a log nobody else has it open.
        alone = head[18:20] == b"\2\2" and not (log.exists() and log.stat().st_size)
        # Readers open it for writing where they may, so that SQLite can undo what a killed writer left half done.
        mode = "rw" if writable else "ro&immutable=1" if alone else "ro"
        uri = f"{file.absolute().as_uri()}?mode={mode}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
        db.execute("PRAGMA temp_store=MEMORY")  # for the views; nothing else is temporary
        db.execute("PRAGMA cache_size=-8000")  # KiB: the upper levels of a million rows
    return db, readonly or not writable


def recognise(db: sqlite3.Connection, path: Path) -> int:
    """The schema of a memory, inside a transaction; MemoryStoreError for another file or a newer schema."""
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise MemoryStoreError(f"{path} is not a motion memory; choose another.")
    schema = int(db.execute("PRAGMA user_version").fetchone()[0])
    if schema > SCHEMA:
        raise MemoryStoreError(f"the motion memory {path} has schema {schema}; this MotionRT reads up to {SCHEMA}. Upgrade it.")
    return schema


def look_like_new(db: sqlite3.Connection, old: bool) -> None:
    """Lay the views over a file of schema 1, or take them away."""
    for name, query in _OLD.items():
        db.execute(f"CREATE TEMP VIEW {name} AS {query}" if old else f"DROP VIEW IF EXISTS temp.{name}")


def migrate(db: sqlite3.Connection) -> None:
    """Turn schema 1 into schema 2, inside a transaction."""
    db.create_function("crc", -1, checksum, deterministic=True)
    look_like_new(db, False)
    for table in ("meta", "clips"):
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    for index in ("clips_source", "clips_sha256"):
        db.execute(f"DROP INDEX {index}")
    for statement in _TABLES.split(";\n"):
        db.execute(statement)
    for name in ("meta", "history", "clips", "vectors", "tags"):
        query = _OLD[name].replace("main.meta", "old_meta").replace("main.clips", "old_clips")
        db.execute(f"INSERT INTO {name} {query}")
    db.execute("DELETE FROM meta WHERE key IN ('generation', 'content')")
    db.execute("INSERT INTO tokens SELECT id, crc(embedding, motion, appearance), motion, appearance FROM old_clips")
    for table in ("meta", "clips"):
        db.execute(f"DROP TABLE old_{table}")
    db.execute(f"PRAGMA user_version={SCHEMA}")


def read_meta(db: sqlite3.Connection, path: Path) -> tuple[Layout, dict[str, str]]:
    """The layout and the digests of a memory."""
    try:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        return Layout.checked(json.loads(meta["dims"]), meta["tokens"]), dict(json.loads(meta["digests"]))
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(path, f"its description cannot be read: {error!r}") from error


def read_state(db: sqlite3.Connection, path: Path) -> State:
    """The state that this transaction sees, without counting rows."""
    row = db.execute("SELECT generation, content, last, clips FROM history ORDER BY generation DESC LIMIT 1").fetchone()
    if row is None or tuple(map(type, row)) != (int, str, int, int):
        raise damaged(path, f"its history ends in {row!r}")
    return State(*row)


def insert(db: sqlite3.Connection, path: Path, rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Add rows that `Layout.row` made; return their ids."""
    generation, content, last, clips = read_state(db, path)
    ids: list[int] = []
    for number, row in enumerate(rows, last + 1):
        for statement in _INSERTS:
            db.execute(statement, {"id": number, **row})
        tags = {"dataset": row["dataset"], **json.loads(row["metadata"])}  # SQLite's own JSON ends a text at a zero byte
        db.executemany("INSERT INTO tags VALUES (?, ?, ?)", [(*tag, number) for tag in tags.items()])
        content = hashlib.sha256(f"{content} {number} ".encode() + row["embedding"]).hexdigest()
        ids.append(number)
    if ids:
        db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (generation + 1, content, ids[-1], clips + len(ids)))
    return ids


def delete(db: sqlite3.Connection, path: Path, ids: Iterable[int]) -> int:
    """Remove clips; return how many there were of these ids."""
    generation, content, last, clips = read_state(db, path)
    gone = 0
    for number in ids:
        row = db.execute("SELECT dataset, metadata FROM clips WHERE id = ?", (number,)).fetchone()
        if row is None:
            continue
        tags = {"dataset": row[0], **json.loads(row[1])}
        db.executemany("DELETE FROM tags WHERE key = ? AND value = ? AND id = ?", [(*tag, number) for tag in tags.items()])
        for table in ("clips", "vectors", "tokens"):
            db.execute(f"DELETE FROM {table} WHERE id = ?", (number,))
        content = hashlib.sha256(f"{content} -{number}".encode()).hexdigest()
        gone += 1
    if gone:
        db.execute("INSERT INTO history VALUES (?, ?, ?, ?)", (generation + 1, content, last, clips - gone))
    return gone


def references(db: sqlite3.Connection, path: Path, layout: Layout, ids: list[int], scores: list[float]) -> list[Reference]:
    """The clips of these ids, in this order, with these scores; MemoryStoreError for an id that is not there."""
    if not ids:
        return []
    columns = "id, caption, source, start, duration, motion, appearance, dataset, metadata"
    rows: dict[int, Any] = {}
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        question = f"SELECT {columns} FROM clips JOIN tokens USING (id) WHERE id IN ({marks(some)})"
        rows |= {row[0]: row for row in db.execute(question, some)}
    if missing := [number for number in ids if number not in rows]:
        raise MemoryStoreError(f"the motion memory {path} has no clip {missing[0]}; use an id that search gave.")
    # By columns, and the metadata at once: a call costs more than a row.
    _, *told, motion, appearance, dataset, metadata = zip(*[rows[number] for number in ids], strict=True)
    tokens = (layout.unpack("motion", ids, motion), layout.unpack("appearance", ids, appearance))
    return list(map(Reference, ids, scores, *told, *tokens, repeat(""), dataset, json.loads(f"[{','.join(metadata)}]")))


def problems(db: sqlite3.Connection, path: Path, layout: Layout) -> list[str]:
    """All that is wrong in the file, in sentences: pages, numbers of rows, blobs and their checksums."""
    found = [str(row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
    if found:
        return [f"SQLite finds damaged pages: {text}" for text in found]
    state = read_state(db, path)
    for table in ("clips", "vectors", "tokens"):
        count = db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
        if count != state.clips:
            found.append(f"{table} has {count} rows; the history says {state.clips}")
    tags = (
        "SELECT (SELECT COUNT(*) FROM tags), (SELECT COUNT(*) FROM clips, json_each(metadata)) + (SELECT COUNT(*) FROM clips)"
    )
    have, want = db.execute(tags).fetchone()
    if have != want:
        found.append(f"tags has {have} rows; the clips have {want} in their metadata")
    question = "SELECT id, crc, embedding, motion, appearance FROM tokens LEFT JOIN vectors USING (id)"
    for number, crc, *blobs in db.execute(question):
        try:
            for part, blob in zip(layout.dims, blobs, strict=True):
                layout.unpack(part, [number], [blob or b""])
        except DamagedRow as error:
            found.append(str(error))
            continue
        if crc is not None and crc != checksum(*blobs):
            found.append(f"clip {number} is not what was written: its checksum differs")
    return found


def copy(source: Path, target: Path) -> None:
    """Write the state of the memory file `source` as the new file `target`; MemoryStoreError if anything is wrong in it."""
    for file in (source, target):
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
            old = recognise(db, source) < SCHEMA
            if file is source:
                db.execute("VACUUM INTO ?", (str(target),))
                continue
            if old:
                look_like_new(db, True)
            if wrong := problems(db, source, read_meta(db, source)[0]):
                raise damaged(source, wrong[0])


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the system into MemoryStoreError."""
    try:
        yield
    except DamagedRow as error:
        raise damaged(path, str(error)) from error
    except (sqlite3.Error, OSError) as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "OSError")):
            text = f"cannot be written or read ({error}). Nothing was changed. Free space on the disk and try again."
        elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            text = "is being written by another process; wait for it to finish and try again."
        elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "Permission")):
            text = f"cannot be opened or written ({error}); check its permissions, or copy it to a place of your own."
        else:
            raise damaged(path, str(error)) from error
        raise MemoryStoreError(f"the motion memory {path} {text}") from error


def damaged(path: Path, why: str) -> MemoryStoreError:
    """The error for a file that cannot be trusted."""
    return MemoryStoreError(
        f"the motion memory {path} is damaged: {why}. Restore a copy, or make it again: `motionrt memory create`, then"
        " `motionrt memory add`."
    )


def marks(values: Sized) -> str:
    """A question mark for each value, for SQL."""
    return ",".join("?" * len(values))
