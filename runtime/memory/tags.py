"""What filters and words read: in `tags` a row for each key and value of a clip, in `tallies` what all rows of a tag come to.

A row of `tags` that was damaged is not found by its value, so it cannot be checked by itself. Hence the tally of each
(key, value): how many clips have it, and the sum of the checksums of their rows. A filter is right if its rows come to that.

The words of a caption are tags of the key WORD. Their tallies are the memory's vocabulary; a state has the sum of the checksums
of all of them. (FTS5 would hold words too, but nothing in it could be checked without reading all of it.)
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from itertools import groupby, repeat
from math import inf
from typing import Any, NamedTuple

import msgspec

from motionrt.runtime.memory.rows import WORD, Damaged, DamagedRow, checksum
from motionrt.runtime.memory.search import Search, marks
from motionrt.runtime.memory.state import State
from motionrt.runtime.memory.words import Vocabulary, words_of

TABLES = """
CREATE TABLE tags (key TEXT, value TEXT, id INTEGER, PRIMARY KEY (key, value, id)) WITHOUT ROWID;
CREATE TABLE tallies (key TEXT, value TEXT, count INTEGER NOT NULL, sum INTEGER NOT NULL,
    PRIMARY KEY (key, value)) WITHOUT ROWID
"""
TOLD = "caption, source, start, duration, fps, source_sha256, dataset, metadata"  # as of `Row.told`
_SOURCE, _DURATION, _DATASET, _METADATA = 1, 3, 6, 7  # columns of `TOLD`
_AT_ONCE = 4096  # values in one statement; SQLite takes 32,766


class Tag(NamedTuple):
    """A row of `tags`."""

    key: str
    value: str
    id: int

    @property
    def checksum(self) -> int:
        """CRC-32 of the row."""
        return zlib.crc32(msgspec.json.encode(self))


def tags_of(number: int, told: tuple[Any, ...], words: bool) -> list[Tag]:
    """The tags of a clip, with the words of its caption or without. By Python: SQLite's own JSON ends a text at a zero byte.

    DamagedRow.
    """
    said = [Tag(WORD, word, number) for word in sorted({*words_of(told[0])})] if words else []
    try:
        return said + [Tag(*tag, number) for tag in {"dataset": told[_DATASET], **json.loads(told[_METADATA])}.items()]
    except (TypeError, ValueError) as error:
        raise DamagedRow({number: f"has metadata that cannot be read ({error})"}) from error


def insert(db: sqlite3.Connection, tags: Iterable[Tag]) -> int:
    """Add tags, and count them; return by how much the sum of the checksums of words' tallies grows."""
    rows = sorted(tags)  # as they lie in the table: each of its pages is written once
    db.executemany("INSERT INTO tags VALUES (?, ?, ?)", rows)
    return _count(db, rows, 1)


def delete(db: sqlite3.Connection, tags: Iterable[Tag]) -> int:
    """Remove tags, as far as they are there, and what was counted of them; return as `insert` does."""
    question = "DELETE FROM tags WHERE key = ? AND value = ? AND id = ?"
    return _count(db, [tag for tag in tags if db.execute(question, tag).rowcount], -1)


def _count(db: sqlite3.Connection, tags: Iterable[Tag], sign: int) -> int:
    changes = defaultdict[tuple[str, str], list[int]](lambda: [0, 0])
    for tag in tags:
        change = changes[tag[:2]]
        change[0], change[1] = change[0] + sign, change[1] + sign * tag.checksum
    grown = 0
    for name, (more, sums) in changes.items():
        old = _tally(db, *name)
        new = old[0] + more, old[1] + sums
        if new == (0, 0):
            db.execute("DELETE FROM tallies WHERE key = ? AND value = ?", name)
        else:
            db.execute("INSERT OR REPLACE INTO tallies VALUES (?, ?, ?, ?)", (*name, *new))
        if name[0] == WORD:
            grown += _checksum(name[1], *new) - _checksum(name[1], *old)
    return grown


def _tally(db: sqlite3.Connection, key: str, value: str) -> tuple[int, int]:
    row = db.execute("SELECT count, sum FROM tallies WHERE key = ? AND value = ?", (key, value)).fetchone()
    return (0, 0) if row is None else (row[0], row[1])


def _checksum(word: str, count: int, total: int) -> int:
    """CRC-32 of a tally of a word; 0 for one that is not there."""
    return zlib.crc32(msgspec.json.encode((word, count, total))) if (count, total) != (0, 0) else 0


def held(db: sqlite3.Connection, number: int) -> list[Tag]:
    """The tags of a clip as the table has them, for one whose own row cannot say it: reads the whole table."""
    return [Tag(*row) for row in db.execute("SELECT key, value, id FROM tags WHERE id = ?", (number,))]


def tagged(db: sqlite3.Connection, search: Search) -> list[int]:
    """Ids, rising, of the clips that pass `search.where`. Damaged if the table is not what was written."""
    left: set[int] | None = None
    for key, values in search.tags():
        some = set[int]()
        for value in dict.fromkeys(values):
            some.update(having(db, key, value))
        left = some if left is None else left & some
    return sorted(left or ())


def having(db: sqlite3.Connection, key: str, value: str) -> list[int]:
    """Ids, rising, of the clips with a tag. Damaged if the table is not what was written."""
    ids = [row[0] for row in db.execute("SELECT id FROM tags WHERE key = ? AND value = ?", (key, value))]
    start = zlib.crc32(msgspec.json.encode((key, value))[:-1] + b",")  # what `Tag.checksum` of all of them begins with
    ends = msgspec.json.encode(ids)[1:-1].replace(b",", b"],").split(b",") if ids else []
    if ids:
        ends[-1] += b"]"
    if (len(ends), sum(map(zlib.crc32, ends, repeat(start)))) != _tally(db, key, value):
        raise Damaged(f"what it has for {_name(key, value)} is not what was written")
    return ids


def told(db: sqlite3.Connection, ids: list[int]) -> dict[int, tuple[Any, ...]]:
    """What clips say of themselves (`TOLD`), by id; DamagedRow."""
    found: dict[int, tuple[Any, ...]] = {}
    wrong: dict[int, str] = {}
    encode, crc32 = msgspec.json.encode, zlib.crc32  # `rows.checksum`, without the call
    for at in range(0, len(ids), _AT_ONCE):
        some = ids[at : at + _AT_ONCE]
        for row in _quickly(db, f"SELECT id, {TOLD}, checksum FROM clips WHERE id IN ({marks(some)})", some):
            number, found[row[0]] = row[0], row[1:-1]
            if crc32(encode(row[1:-1]), number & 0xFFFFFFFF) != row[-1]:
                wrong[number] = "is not what was written: its checksum differs"
    if wrong := wrong | dict.fromkeys({*ids} - found.keys(), "has no caption"):
        raise DamagedRow(wrong)
    return found


def _quickly(db: sqlite3.Connection, question: str, parameters: list[int]) -> list[tuple[Any, ...]]:
    """Rows, whose texts Python's module makes: faster than `store.connect`'s own way, which is taken where one is damaged."""
    patient, db.text_factory = db.text_factory, str
    try:
        return db.execute(question, parameters).fetchall()
    except sqlite3.OperationalError:
        db.text_factory = patient
        return db.execute(question, parameters).fetchall()
    finally:
        db.text_factory = patient


def vocabulary(db: sqlite3.Connection, state: State) -> Vocabulary:
    """The words of all captions; Damaged if they are not what was written."""
    rows = db.execute("SELECT value, count, sum FROM tallies WHERE key = ? ORDER BY value", (WORD,)).fetchall()
    if sum(_checksum(*row) for row in rows) != state.words:
        raise Damaged("what it has for the words of its captions is not what was written")
    return Vocabulary({word: count for word, count, _ in rows}, state.clips)


def excluded(db: sqlite3.Connection, search: Search, without: Set[int]) -> set[int]:
    """Ids of the clips of excluded sources, and of those too short or too long, but for those `without`; DamagedRow."""
    least, most = search.least_seconds or 0.0, search.most_seconds
    conditions = [f"source IN ({marks(search.sources)})"] if search.sources else []
    conditions += ["duration < ?"] * (least > 0) + ["duration > ?"] * (most is not None)
    if not conditions:
        return set()
    parameters = [*search.sources, *([least] if least > 0 else []), *([] if most is None else [most])]
    return {*_told(db, " OR ".join(conditions), parameters, lambda told: True, without)}


def passing(db: sqlite3.Connection, search: Search, ids: list[int], without: Set[int]) -> set[int]:
    """Those of some clips, but for those `without`, that pass the filters, by what their own rows say; DamagedRow."""
    wanted = [(key, {*values}) for key, values in search.tags()]
    least, most = search.least_seconds or 0.0, inf if search.most_seconds is None else search.most_seconds

    def passes(told: tuple[Any, ...]) -> bool:
        own = {"dataset": told[_DATASET], **json.loads(told[_METADATA])} if wanted else {}
        good = told[_SOURCE] not in search.sources and least <= told[_DURATION] <= most
        return good and all(own.get(key) in values for key, values in wanted)

    found: dict[int, bool] = {}
    for at in range(0, len(ids), _AT_ONCE):
        some = ids[at : at + _AT_ONCE]
        found |= _told(db, f"id IN ({marks(some)})", some, passes, without)
    if lost := {*ids} - found.keys() - without:
        raise DamagedRow(dict.fromkeys(lost, "has no caption"))
    return {number for number, passed in found.items() if passed}


def problems(db: sqlite3.Connection, state: State) -> Iterator[str]:
    """What is wrong with the tallies, in sentences."""
    try:
        vocabulary(db, state)
    except Damaged as error:
        yield str(error)
    rows = (Tag(*row) for row in db.execute("SELECT key, value, id FROM tags ORDER BY key, value, id"))
    have = {tag: _come_to(some) for tag, some in groupby(rows, lambda row: row[:2])}
    said = {(key, value): (count, total) for key, value, count, total in db.execute("SELECT * FROM tallies")}
    for tag in have.keys() | said.keys():
        if have.get(tag) != said.get(tag):
            yield f"{_name(*tag)} comes to {have.get(tag)}; written was {said.get(tag)}"


def _told(
    db: sqlite3.Connection, condition: str, parameters: list[Any], passes: Callable[[tuple[Any, ...]], bool], without: Set[int]
) -> dict[int, bool]:
    """The rows of `clips` that meet a condition of SQL: whether each meets one of Python, by id. DamagedRow."""
    found, wrong = dict[int, bool](), dict[int, str]()
    for number, *told, expected in db.execute(f"SELECT id, {TOLD}, checksum FROM clips WHERE {condition}", parameters):
        if number in without:
            continue
        if checksum(number, tuple(told)) != expected:
            wrong[number] = "is not what was written: its checksum differs"
        else:
            found[number] = passes(tuple(told))
    if wrong:
        raise DamagedRow(wrong)
    return found


def _name(key: str, value: str) -> str:
    return f"the word {value!r}" if key == WORD else f"the filter {key}={value}"


def _come_to(rows: Iterable[Tag]) -> tuple[int, int]:
    checksums = [row.checksum for row in rows]
    return len(checksums), sum(checksums)
