"""The states of a memory, and the log that SQLite keeps beside its file: that it is its own, and not another memory's."""

from __future__ import annotations

import os
import sqlite3
import zlib
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from motionrt.runtime.errors import MemoryStoreError

SCHEMA = 5  # those before were never released


class State(NamedTuple):
    """A state of a memory: how often it was changed, a digest of all changes, the last id given, the clips it holds.

    words: the sum of the checksums of all tallies of captions' words (`tags`).
    """

    generation: int
    content: str
    last: int
    clips: int
    words: int = 0

    def checksum(self, identity: int) -> int:
        """CRC-32, for the memory of this number."""
        return zlib.crc32(msgspec.json.encode(self), identity)


def no_leftovers(file: Path) -> None:
    """MemoryStoreError if a log or journal lies where `file` will be: SQLite would take it for the new file's own."""
    left = [name for suffix in ("-wal", "-journal", "-shm") if os.path.lexists(name := f"{file}{suffix}")]
    if left:
        raise MemoryStoreError(
            f"{left[0]} is left of another memory, whose {file.name} is gone. Put that file back if you have it; else remove"
            f" {' and '.join(left)}, or choose another place."
        )


def check_log(file: Path, head: bytes) -> bool:
    """Whether there is a log beside a file that begins with `head`; MemoryStoreError if it is of another memory, or older.

    Read-only, and before anything else: closing the last connection that may write folds the log into the file.
    """
    log = file.with_name(f"{file.name}-wal")
    if not (log.exists() and log.stat().st_size):
        return False
    without = None
    with suppress(sqlite3.Error, UnicodeError):  # a writer may be folding the log into the file
        without = _last(file, "&immutable=1")[1]
    version, state = _last(file)
    other = version != divmod(int.from_bytes(head[60:64], "big"), 256) or version[1] == SCHEMA and state is None
    if other or without is not None and state is not None and without.generation > state.generation:
        raise MemoryStoreError(
            f"the log {log} is of {'another memory' if other else 'an older state'} than {file.name} beside it. Put back the"
            " file that it belongs to; if there is none, remove the log, and the memory is what its file holds."
        )
    return True


def _last(file: Path, options: str = "") -> tuple[tuple[int, int], State | None]:
    """What `identity_of` gives, and the last state if it is one of this memory, as SQLite sees them with a log or without."""
    uri = f"{file.absolute().as_uri()}?mode=ro{options}"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10)) as db:
        db.execute("BEGIN")
        version = identity_of(db)
        row = db.execute("SELECT * FROM history ORDER BY generation DESC LIMIT 1").fetchone()
    return version, State(*row[:-1]) if row and State(*row[:-1]).checksum(version[0]) == row[-1] else None


def identity_of(db: sqlite3.Connection) -> tuple[int, int]:
    """The number drawn for this memory, and its schema."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0]) & 0xFFFFFFFF
    return version >> 8, version & 0xFF
