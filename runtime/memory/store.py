"""The SQLite file of a motion memory: schema, opening, writing, reading what is checked, and looking for damage.

    clips (narrow)   vectors (embedding, read by the search)
    records (wide, read for the clips found; NULL where records are made on demand)
    tags (key, value, id): metadata, dataset and words of captions, turned round, so that a filter is a range of this table;
    tallies of them
    history: one row for each change; the last says how many clips there are, and each names a state by its digest

Each row has a checksum over all of it, and is checked whenever it is read. Ids are never given twice, so whatever is derived
from a state stays right about the ids that it knows. The header of the file has a number drawn for this memory (with the
schema, in `user_version`), by which a log beside it that is another memory's is known.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from motionrt.runtime.errors import MemoryStoreError, UnknownClip
from motionrt.runtime.memory import tags
from motionrt.runtime.memory.rows import Damaged, DamagedRow, Layout, Reference, Row, checksum, reference
from motionrt.runtime.memory.search import marks
from motionrt.runtime.memory.state import SCHEMA, State, check_log, identity_of

FILE = "memory.sqlite"
_APPLICATION = 0x4D52544D  # "MRTM", marks the SQLite file as ours
_PAGE = 8192  # five 384-d vectors to a page, and a fourth of the pages of a large blob
_AT_ONCE = 4096  # values in one statement; SQLite takes 32,766
_TABLES = f"""
CREATE TABLE meta (layout TEXT NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE history (generation INTEGER PRIMARY KEY, content TEXT NOT NULL, last INTEGER NOT NULL, clips INTEGER NOT NULL,
    words INTEGER NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE clips (id INTEGER PRIMARY KEY, caption TEXT NOT NULL, source TEXT NOT NULL, start REAL NOT NULL,
    duration REAL NOT NULL, fps REAL NOT NULL, source_sha256 TEXT NOT NULL, dataset TEXT NOT NULL, metadata TEXT NOT NULL,
    checksum INTEGER NOT NULL);
CREATE TABLE vectors (id INTEGER PRIMARY KEY, embedding BLOB NOT NULL, checksum INTEGER NOT NULL);
CREATE TABLE records (id INTEGER PRIMARY KEY, record BLOB, checksum INTEGER NOT NULL);
{tags.TABLES.strip()};
CREATE INDEX clips_sha256 ON clips (source_sha256)
"""


def create(layout: Layout, file: Path) -> None:
    """Write an empty memory as `file`."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute(f"PRAGMA page_size={_PAGE}")
        db.execute("PRAGMA journal_mode=MEMORY")
        db.execute(f"PRAGMA application_id={_APPLICATION}")
        db.execute("BEGIN")
        for statement in _TABLES.split(";\n"):
            db.execute(statement)
        text = msgspec.json.encode(layout)
        db.execute("INSERT INTO meta VALUES (?, ?)", (text.decode(), zlib.crc32(text)))
        db.execute(f"PRAGMA user_version={secrets.randbelow(2**23) << 8 | SCHEMA}")
        _enter(db, State(0, hashlib.sha256(text).hexdigest(), 0, 0))
        db.execute("COMMIT")


def connect(directory: Path, readonly: bool) -> tuple[sqlite3.Connection, bool]:
    """A connection to the memory in `directory`, and whether it is read-only: as asked, or because it must be."""
    file = directory / FILE
    if not os.path.isfile(file):
        raise MemoryStoreError(
            f"there is no motion memory at {directory} (no {FILE}). Check the path, or make one with"
            f" `motionrt memory create {directory}`."
        )
    with plain_errors(directory):
        with file.open("rb") as stream:
            head = stream.read(64)
        if not head.startswith(b"SQLite format 3\0"):
            raise damaged(directory, f"{FILE} is not an SQLite file")
        effective = os.access in os.supports_effective_ids
        writable = all(os.access(place, os.W_OK, effective_ids=effective) for place in (directory, file))
        logged = check_log(file, head)
        # SQLite cannot share a WAL-mode file that it may not write beside; without a log nobody else has it open.
        alone = head[18:20] == b"\2\2" and not logged
        # Readers open it for writing where they may, so that SQLite can undo what a killed writer left half done.
        mode = "rw" if writable else "ro&immutable=1" if alone else "ro"
        uri = f"{file.absolute().as_uri()}?mode={mode}"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
        db.text_factory = lambda text: text.decode("utf-8", "replace")  # what was damaged is found by its checksum
        try:
            db.execute("PRAGMA cache_size=-8000")  # KiB: the upper levels of a million rows
        except BaseException:
            db.close()
            raise
    return db, readonly or not writable


def write_ahead(db: sqlite3.Connection) -> None:
    """Let others read while this connection writes.

    SQLite waits here for who writes, but gives up at once where two connections ask for it together, since each holds what the
    other waits for: then one of them has it a moment later.
    """
    end = time.monotonic() + db.execute("PRAGMA busy_timeout").fetchone()[0] / 1000
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() >= end:
                raise
        time.sleep(0.01)


def read_layout(db: sqlite3.Connection, path: Path) -> Layout:
    """What a memory keeps, inside a transaction; MemoryStoreError for another file or another schema."""
    if db.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise MemoryStoreError(f"{path} is not a motion memory; choose another.")
    schema = identity_of(db)[1]
    if schema != SCHEMA:
        fix = "a newer MotionRT wrote it: upgrade" if schema > SCHEMA else "an older MotionRT wrote it: index its videos again"
        raise MemoryStoreError(f"the motion memory {path} has schema {schema}; this MotionRT reads schema {SCHEMA} ({fix}).")
    try:
        ((text, checksum),) = db.execute("SELECT layout, checksum FROM meta")
        if zlib.crc32(text.encode()) != checksum:
            raise ValueError("its checksum differs")
        return msgspec.json.decode(text, type=Layout)
    except (ValueError, TypeError, AttributeError, msgspec.MsgspecError) as error:
        raise damaged(path, f"its description cannot be read: {error}") from error


def read_state(db: sqlite3.Connection, path: Path) -> State:
    """The state that this transaction sees, without counting rows."""
    row = db.execute("SELECT * FROM history ORDER BY generation DESC LIMIT 1").fetchone()
    if row is None or State(*row[:-1]).checksum(identity_of(db)[0]) != row[-1]:
        raise damaged(path, f"its history ends in {row!r}")
    return State(*row[:-1])


def insert(db: sqlite3.Connection, path: Path, rows: Iterable[Row], words: bool) -> list[int]:
    """Add rows that `Layout.row` made, and the words of their captions if the layout keeps them; return their ids."""
    generation, content, last, clips, total = read_state(db, path)
    ids: list[int] = []
    told_of: list[tags.Tag] = []
    for number, row in enumerate(rows, last + 1):
        told, embedding, record = sums = row.checksums(number)
        db.execute(f"INSERT INTO clips VALUES (?, {marks(row.told)}, ?)", (number, *row.told, told))
        db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (number, row.embedding, embedding))
        db.execute("INSERT INTO records VALUES (?, ?, ?)", (number, row.record, record))
        told_of += tags.tags_of(number, row.told, words)
        content = hashlib.sha256(f"{content} {number} {sums}".encode()).hexdigest()
        ids.append(number)
    if ids:
        total += tags.insert(db, told_of)
        _enter(db, State(generation + 1, content, ids[-1], clips + len(ids), total))
    return ids


def delete(db: sqlite3.Connection, path: Path, ids: Iterable[int], words: bool) -> int:
    """Remove clips, damaged ones too; return how many there were of these ids."""
    generation, content, last, clips, total = read_state(db, path)
    gone = 0
    for number in ids:
        row = db.execute(f"SELECT {tags.TOLD}, checksum FROM clips WHERE id = ?", (number,)).fetchone()
        sound = row is not None and checksum(number, row[:-1]) == row[-1]
        found = sum(db.execute(f"DELETE FROM {table} WHERE id = ?", (number,)).rowcount for table in _PARTS)
        if not found:
            continue
        total += tags.delete(db, tags.tags_of(number, row[:-1], words) if sound else tags.held(db, number))
        content = hashlib.sha256(f"{content} -{number}".encode()).hexdigest()
        gone += 1
    if gone:
        _enter(db, State(generation + 1, content, last, clips - gone, total))
    return gone


def read(
    db: sqlite3.Connection, path: Path, layout: Layout, ids: list[int], scores: list[float],
    more: Mapping[str, list[float]] = MappingProxyType({}), told: Mapping[int, tuple[Any, ...]] | None = None,
    embedded: bool = True,
) -> tuple[list[Reference], list[bytes]]:  # fmt: skip
    """The clips of these ids, in this order, with these scores and more fields of references, and their embeddings as stored.

    told: what `tags.told` gave, if it was asked; embedded: whether embeddings are read, else they are empty. Each row that is
    read was checked. MemoryStoreError for an id that is not there, DamagedRow for a row that is not what was written.
    """
    rows: dict[int, Row] = {}
    wrong: dict[int, str] = {}
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        for number, row, sums in _rows(db, f"WHERE id IN ({marks(some)})", some, told, embedded):
            rows[number] = row
            try:
                _check(number, layout, row, sums)
            except DamagedRow as error:
                wrong |= error.wrong
    if missing := [number for number in ids if number not in rows]:
        wrong |= dict.fromkeys(still_there(db, {*missing}), "is there in part")
        if unknown := [number for number in missing if number not in wrong]:
            raise UnknownClip(f"the motion memory {path} has no clip {unknown[0]}; use an id that search gave.")
    if wrong:
        raise DamagedRow(wrong)
    clips = list[Reference]()
    parts = {} if layout.on_demand else layout.unpack(ids, [rows[number].record for number in ids])
    for at, (number, score) in enumerate(zip(ids, scores, strict=True)):
        row, record = rows[number], {name: values[at, ...] for name, values in parts.items()}
        caption, source, start, duration, fps, sha256, dataset, metadata = row.told
        facts = {
            "id": number, "score": score, "caption": caption, "source": source, "start": start, "duration": duration,
            "record": record, "dataset": dataset, "metadata": msgspec.json.decode(metadata), "fps": fps,
            "source_sha256": sha256,
        }  # fmt: skip
        clips.append(reference(facts, **{name: values[at] for name, values in more.items()}))
    return clips, [rows[number].embedding for number in ids]


def still_there(db: sqlite3.Connection, ids: Set[int]) -> set[int]:
    """Those of some ids that have a row in any of the tables."""
    one_of = " OR ".join(f"EXISTS (SELECT 1 FROM {table} WHERE id = ?1)" for table in _PARTS)
    return {number for number in ids if db.execute(f"SELECT {one_of}", (number,)).fetchone()[0]}


def problems(db: sqlite3.Connection, path: Path) -> list[str]:
    """All that is wrong in the file, in sentences: pages, numbers of rows, tags, and every row's blobs and checksum."""
    found = [str(row[0]) for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
    if found:
        return [f"SQLite finds damaged pages: {text}" for text in found]
    layout, state = read_layout(db, path), read_state(db, path)
    for table in ("clips", "vectors", "records"):
        count, last = db.execute(f"SELECT COUNT(*), MAX(id) FROM {table}").fetchone()
        if count != state.clips:
            found.append(f"{table} has {count} rows; the history says {state.clips}")
        if count and last > state.last:
            found.append(f"{table} has a clip {last}; the history says that {state.last} was the last")
    count = 0
    for number, row, sums in _rows(db, "ORDER BY id", ()):
        try:
            layout.embeddings([number], [row.embedding])
            _check(number, layout, row, sums)
            for tag in tags.tags_of(number, row.told, layout.words):
                count += 1
                if db.execute("SELECT 1 FROM tags WHERE key = ? AND value = ? AND id = ?", tag).fetchone() is None:
                    found.append(f"clip {number} is not found by {tag[0] or tag[1]!r}: tags has not what its row says")
        except DamagedRow as error:
            found.append(str(error))
    have = db.execute("SELECT COUNT(*) FROM tags").fetchone()[0]
    if not found and have != count:
        found.append(f"tags has {have} rows; the clips have {count} in their metadata")
    return found + list(tags.problems(db, state))


def copy(source: Path, target: Path) -> None:
    """Write the state of the memory file `source` as the new file `target`; MemoryStoreError if anything is wrong in it."""
    for file in (source, target):
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)) as db:
            if file is source:
                with source.open("rb") as stream:
                    check_log(source, stream.read(64))
                read_layout(db, source)  # that it is a memory
                db.execute("VACUUM INTO ?", (str(target),))
            elif wrong := problems(db, source):
                raise damaged(source, wrong[0])


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite and of the system into MemoryStoreError."""
    try:
        yield
    except DamagedRow as error:
        ids = " ".join(map(str, [*error.wrong][:20]))
        raise MemoryStoreError(
            f"the motion memory {path} is damaged: {error}. The other clips are not. Remove it (`motionrt memory remove {path}"
            f" {ids}`) and add its file again, restore a copy, or search without it (--without-damaged)."
        ) from error
    except Damaged as error:
        raise damaged(path, str(error)) from error
    except (sqlite3.Error, OSError, UnicodeError) as error:  # sqlite3's own message may quote what is damaged
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "OSError")):
            text = (
                f"cannot be written or read ({error}). Nothing of this change was kept. Free space on the disk and try again."
            )
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


def _enter(db: sqlite3.Connection, state: State) -> None:
    db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?)", (*state, state.checksum(identity_of(db)[0])))


_PARTS = ("clips", "vectors", "records")  # tables with a row for each clip
_JOINED = "FROM clips c JOIN vectors v USING (id) JOIN records r USING (id)"


def _rows(
    db: sqlite3.Connection, condition: str, parameters: Sequence[int], known: Mapping[int, tuple[Any, ...]] | None = None,
    embedded: bool = True,
) -> Iterator[tuple[int, Row, tuple[int, ...]]]:  # fmt: skip
    """Ids, rows and their checksums as they are stored; of clips whose own row is known, the others, or the records alone."""
    if known is not None and not embedded:
        for number, record, total in db.execute(f"SELECT id, record, checksum FROM records {condition}", parameters):
            yield number, Row(known[number], b"", record), (total,)
        return
    if known is not None:
        question = f"SELECT id, embedding, record, v.checksum, r.checksum FROM vectors v JOIN records r USING (id) {condition}"
        for number, embedding, record, *sums in db.execute(question, parameters):
            yield number, Row(known[number], embedding, record), tuple(sums)
        return
    columns = f"id, {tags.TOLD}, embedding, record, c.checksum, v.checksum, r.checksum"
    for number, *told, embedding, record, one, two, three in db.execute(f"SELECT {columns} {_JOINED} {condition}", parameters):
        yield number, Row(tuple(told), embedding, record), (one, two, three)


def _check(number: int, layout: Layout, row: Row, checksums: tuple[int, ...]) -> None:
    """DamagedRow unless a row is what was written."""
    if layout.on_demand != (row.record is None):
        raise DamagedRow({number: f"has {'no' if row.record is None else 'a'} record, as no clip of this memory"})
    for part, expected in zip(row[-len(checksums) :], checksums, strict=True):  # what was read of it
        if (zlib.crc32(part, number & 0xFFFFFFFF) if type(part) is bytes else checksum(number, part)) != expected:
            raise DamagedRow({number: "is not what was written: its checksum differs"})
