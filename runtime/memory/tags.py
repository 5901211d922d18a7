"""What filters read: a row of `tags` for each key and value of a clip, and in `tallies` what all rows of a tag come to.

A row of `tags` that was damaged is not found by its value, so it cannot be checked by itself. Hence the tally of each
(key, value): how many clips have it, and the sum of the checksums of their rows. A filter is right if its rows come to that.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from itertools import groupby
from typing import Any, NamedTuple

import msgspec

from motionrt.runtime.memory.rows import Damaged, DamagedRow, checksum
from motionrt.runtime.memory.search import Search, marks

TABLES = """
CREATE TABLE tags (key TEXT, value TEXT, id INTEGER, PRIMARY KEY (key, value, id)) WITHOUT ROWID;
CREATE TABLE tallies (key TEXT, value TEXT, count INTEGER NOT NULL, sum INTEGER NOT NULL,
    PRIMARY KEY (key, value)) WITHOUT ROWID
"""
TOLD = "caption, source, start, duration, fps, source_sha256, dataset, metadata"  # as of `Row.told`
_SOURCE, _DATASET, _METADATA = 1, 6, 7  # columns of `TOLD`
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


def tags_of(number: int, dataset: str, metadata: str) -> list[Tag]:
    """The tags of a clip. By Python: SQLite's own JSON ends a text at a zero byte. DamagedRow."""
    try:
        return [Tag(*tag, number) for tag in {"dataset": dataset, **json.loads(metadata)}.items()]
    except (TypeError, ValueError) as error:
        raise DamagedRow({number: f"has metadata that cannot be read ({error})"}) from error


def insert(db: sqlite3.Connection, tags: Iterable[Tag]) -> None:
    """Add tags, and count them."""
    for tag in tags:
        db.execute("INSERT INTO tags VALUES (?, ?, ?)", tag)
        more = "ON CONFLICT DO UPDATE SET count = count + 1, sum = sum + excluded.sum"
        db.execute(f"INSERT INTO tallies VALUES (?, ?, 1, ?) {more}", (tag.key, tag.value, tag.checksum))


def delete(db: sqlite3.Connection, tags: Iterable[Tag]) -> None:
    """Remove tags, as far as they are there, and what was counted of them."""
    for tag in tags:
        if db.execute("DELETE FROM tags WHERE key = ? AND value = ? AND id = ?", tag).rowcount:
            question = "UPDATE tallies SET count = count - 1, sum = sum - ? WHERE key = ? AND value = ?"
            db.execute(question, (tag.checksum, tag.key, tag.value))
            db.execute("DELETE FROM tallies WHERE key = ? AND value = ? AND count = 0 AND sum = 0", tag[:2])


def held(db: sqlite3.Connection, number: int) -> list[Tag]:
    """The tags of a clip as the table has them, for one whose own row cannot say it: reads the whole table."""
    return [Tag(*row) for row in db.execute("SELECT key, value, id FROM tags WHERE id = ?", (number,))]


def tagged(db: sqlite3.Connection, search: Search) -> list[int]:
    """Ids, rising, of the clips that pass `search.where`. Damaged if the table is not what was written."""
    left: set[int] | None = None
    for key, values in search.tags():
        some = set[int]()
        for value in dict.fromkeys(values):
            rows = [Tag(key, value, row[0]) for row in db.execute(f"SELECT id {_OF}", (key, value))]
            tally = db.execute(f"SELECT count, sum {_OF.replace('tags', 'tallies')}", (key, value)).fetchone()
            if _come_to(rows) != (tally or (0, 0)):
                raise Damaged(f"what it has for the filter {key}={value} is not what was written")
            some |= {row.id for row in rows}
        left = some if left is None else left & some
    return sorted(left or ())


_OF = "FROM tags WHERE key = ? AND value = ?"


def excluded(db: sqlite3.Connection, search: Search, without: Set[int]) -> set[int]:
    """Ids of the clips of `search.exclude_source`, but for those `without`; DamagedRow."""
    if search.exclude_source is None:
        return set()
    return {*_told(db, "source = ?", [search.exclude_source], lambda told: True, without)}


def passing(db: sqlite3.Connection, search: Search, ids: list[int], without: Set[int]) -> set[int]:
    """Those of some clips, but for those `without`, that pass the filters, by what their own rows say; DamagedRow."""
    wanted = [(key, {*values}) for key, values in search.tags()]

    def passes(told: tuple[Any, ...]) -> bool:
        own = {"dataset": told[_DATASET], **json.loads(told[_METADATA])} if wanted else {}
        return told[_SOURCE] != search.exclude_source and all(own.get(key) in values for key, values in wanted)

    found: dict[int, bool] = {}
    for at in range(0, len(ids), _AT_ONCE):
        some = ids[at : at + _AT_ONCE]
        found |= _told(db, f"id IN ({marks(some)})", some, passes, without)
    if lost := {*ids} - found.keys() - without:
        raise DamagedRow(dict.fromkeys(lost, "has no caption"))
    return {number for number, passed in found.items() if passed}


def problems(db: sqlite3.Connection) -> Iterator[str]:
    """What is wrong with the tallies, in sentences."""
    rows = (Tag(*row) for row in db.execute("SELECT key, value, id FROM tags ORDER BY key, value, id"))
    have = {tag: _come_to(some) for tag, some in groupby(rows, lambda row: row[:2])}
    said = {(key, value): (count, total) for key, value, count, total in db.execute("SELECT * FROM tallies")}
    for tag in have.keys() | said.keys():
        if have.get(tag) != said.get(tag):
            yield f"the filter {tag[0]}={tag[1]} comes to {have.get(tag)}; written was {said.get(tag)}"


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


def _come_to(rows: Iterable[Tag]) -> tuple[int, int]:
    checksums = [row.checksum for row in rows]
    return len(checksums), sum(checksums)
