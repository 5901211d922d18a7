"""The jobs of a server, on disk: a job is there before anyone is told of it, and stays what it was through any kill.

SQLite in WAL mode. What must not be lost (a new job, an end) is on the disk before the call returns; progress is not stored.
Every file of a job has a row, and what has none is removed when the server starts. Threads may share it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from motionrt.runtime.serve.messages import Written
from motionrt.runtime.serve.web.refusal import Refused

STATUSES = ("queued", "in_progress", "completed", "failed")
INPUT = "input-"  # begins the kind of a file that a request brought
ATTEMPTS = 2  # how often a job is begun before it is given up: what kills two workers would kill a third
_KEPT = 7 * 86400.0  # seconds that an expired job is still known as such

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, kind TEXT NOT NULL,
    model TEXT NOT NULL, status TEXT NOT NULL, priority INTEGER NOT NULL, created REAL NOT NULL, started REAL, ended REAL,
    expires REAL, attempt INTEGER NOT NULL DEFAULT 0, expected REAL NOT NULL, asked TEXT NOT NULL, digest TEXT NOT NULL,
    idempotency TEXT, remixed TEXT, metadata TEXT NOT NULL, error TEXT, result TEXT
);
CREATE INDEX IF NOT EXISTS jobs_of_key ON jobs (key, number);
CREATE UNIQUE INDEX IF NOT EXISTS jobs_again ON jobs (key, idempotency) WHERE idempotency IS NOT NULL;
CREATE TABLE IF NOT EXISTS files (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, name TEXT NOT NULL, kind TEXT NOT NULL, type TEXT NOT NULL,
    size INTEGER NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (job, name)
);
"""


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is stored. asked: `fields`, and `seeds` of a video; times in seconds since 1970."""

    number: int = 0
    id: str
    key: str
    kind: str = "video"
    model: str
    status: str = "queued"
    priority: int = 1
    created: float
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    attempt: int = 0
    expected: float = 0.0
    asked: dict[str, Any]
    digest: str = ""
    idempotency: str | None = None
    remixed: str | None = None
    metadata: dict[str, Any] = {}
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    @property
    def share(self) -> str:
        return self.key

    @property
    def over(self) -> bool:
        return self.status in ("completed", "failed", "expired")


_JSON = ("asked", "metadata", "error", "result")
_COLUMNS = JobRow.__struct_fields__


def new_id(kind: str = "video") -> str:
    return f"{kind}_{secrets.token_hex(16)}"


class Store:
    """See the module. One process at a time: a second one is refused."""

    def __init__(self, folder: Path) -> None:
        """Open or make the store in `folder`. Raises `OSError`, `sqlite3.Error`; `Refused` where another server has it open."""
        self.folder = folder
        for name in (folder, self.uploads, folder / "files"):
            name.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None, check_same_thread=False, timeout=1)
        self._db.row_factory = sqlite3.Row
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "foreign_keys=ON"):
            self._execute_pragma(pragma)
        self._db.executescript(_SCHEMA)

    def _execute_pragma(self, pragma: str) -> None:
        try:
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise Refused(
                    503, "store_in_use", f"the store {self.folder} is open in another server; give each its own."
                ) from None
            raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @property
    def uploads(self) -> Path:
        """Where files lie until their job is stored."""
        return self.folder / "uploads"

    def place(self, job: str) -> Path:
        """The folder of a job's files."""
        return self.folder / "files" / job[-2:] / job

    @contextlib.contextmanager
    def _writing(self, *, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction. synced: on the disk when it is over; else it outlives kills of this process, not a loss of power."""
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def create(self, job: JobRow, files: Sequence[tuple[Path, Written]] = ()) -> JobRow:
        """Store a new job with its `files`, which are moved into its folder. The row comes last: no row, no job."""
        place = self.place(job.id)
        place.mkdir(parents=True)
        try:
            for path, written in files:
                path.replace(place / written.name)
            with self._writing() as db:
                values = {name: _stored(name, getattr(job, name)) for name in _COLUMNS if name != "number"}
                marks = ", ".join(f":{name}" for name in values)
                number = db.execute(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({marks})", values).lastrowid
                self._add_files(db, job.id, [written for _, written in files])
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return msgspec.structs.replace(job, number=number or 0)

    def get(self, job: str, key: str | None = None) -> JobRow | None:
        """A job; only if it is of `key`, where one is given."""
        with self._lock:
            row = self._db.execute("SELECT * FROM jobs WHERE id = ? AND (? IS NULL OR key = ?)", (job, key, key)).fetchone()
        return None if row is None else _read(row)

    def again(self, key: str, idempotency: str | None, digest: str, since: float) -> JobRow | None:
        """The job that a request of `key` made before: by its idempotency key, or else the same `digest` since that time."""
        with self._lock:
            if idempotency is not None:
                row = self._db.execute("SELECT * FROM jobs WHERE key = ? AND idempotency = ?", (key, idempotency)).fetchone()
            else:
                question = "SELECT * FROM jobs WHERE key = ? AND digest = ? AND created >= ? ORDER BY number DESC LIMIT 1"
                row = self._db.execute(question, (key, digest, since)).fetchone()
        return None if row is None else _read(row)

    def forget_keys(self, before: float) -> None:
        """Let idempotency keys of jobs made before that time be used anew."""
        with self._writing() as db:
            db.execute("UPDATE jobs SET idempotency = NULL WHERE idempotency IS NOT NULL AND created < ?", (before,))

    def page(
        self, key: str | None, kind: str, after: str | None, limit: int, descending: bool, model: str | None = None
    ) -> tuple[list[JobRow], bool]:
        """Up to `limit` jobs of `key` and `model` (None: of all) that come behind job `after`, and whether more do."""
        order, than = ("DESC", "<") if descending else ("ASC", ">")
        with self._lock:
            start = None
            if after is not None:
                question = "SELECT number FROM jobs WHERE id = ? AND (? IS NULL OR key = ?)"
                found = self._db.execute(question, (after, key, key)).fetchone()
                if found is None:
                    raise Refused(400, "invalid_request", "`after` is no job that is known.", "after")
                start = found["number"]
            rows = self._db.execute(
                f"SELECT * FROM jobs WHERE kind = :kind AND status != 'expired' AND (:key IS NULL OR key = :key)"
                f" AND (:model IS NULL OR model = :model)"
                f" AND (:start IS NULL OR number {than} :start) ORDER BY number {order} LIMIT :limit",
                {"kind": kind, "key": key, "model": model, "start": start, "limit": limit + 1},
            ).fetchall()
        return [_read(row) for row in rows[:limit]], len(rows) > limit

    def waiting(self) -> list[JobRow]:
        """The jobs that are not over, in the order in which they came."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM jobs WHERE status IN ('queued', 'in_progress') ORDER BY number").fetchall()
        return [_read(row) for row in rows]

    def begin(self, job: str) -> JobRow:
        """Say that a worker has the job now. Where a loss of power undoes that, it is as if the job had waited."""
        now = time.time()
        with self._writing(synced=False) as db:
            row = db.execute(
                "UPDATE jobs SET status = 'in_progress', attempt = attempt + 1, started = ? WHERE id = ? RETURNING *",
                (now, job),
            ).fetchone()
        return _read(row)

    def requeue(self, job: str, *, counted: bool = True) -> JobRow:
        """Put a job that a worker had back into the queue; not `counted` as an attempt where it was no fault of the job's."""
        with self._writing() as db:
            row = db.execute(
                "UPDATE jobs SET status = 'queued', started = NULL, attempt = attempt - ? WHERE id = ? RETURNING *",
                (0 if counted else 1, job),
            ).fetchone()
        return _read(row)

    def end(
        self, job: str, status: str, lifetime: float | None, *, result: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None, files: Sequence[Written] = (),
    ) -> JobRow:  # fmt: skip
        """Say how a job ended; what one that failed has written goes. lifetime: seconds until it expires; None: never."""
        now = time.time()
        expires = None if lifetime is None else now + lifetime
        with self._writing() as db:
            row = db.execute(
                "UPDATE jobs SET status = ?, ended = ?, expires = ?, result = ?, error = ? WHERE id = ? RETURNING *",
                (status, now, expires, _stored("result", result), _stored("error", error), job),
            ).fetchone()
            self._add_files(db, job, files)
        if status == "failed":
            with contextlib.suppress(OSError):  # the next sweep takes it
                self._tidy(self.place(job))
        return _read(row)

    def delete(self, job: str) -> None:
        """Remove a job and its files, for good."""
        with self._writing() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (job,))
        shutil.rmtree(self.place(job), ignore_errors=True)

    def kept(self) -> list[JobRow]:
        """The finished jobs that do not expire."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM jobs WHERE status = 'completed' AND expires IS NULL").fetchall()
        return [_read(row) for row in rows]

    # --- files --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _add_files(db: sqlite3.Connection, job: str, files: Sequence[Written]) -> None:
        rows = {file.name: (job, file.name, file.kind, file.type, file.size, file.sha256) for file in files}
        # One file may be two things: a sheet is the video of the form png.
        kinds = {name: " ".join(file.kind for file in files if file.name == name) for name in rows}
        db.executemany(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
            [(*row[:2], kinds[row[1]], *row[3:]) for row in rows.values()],
        )

    def files(self, job: str) -> dict[str, Written]:
        """The files of a job, by what they are."""
        with self._lock:
            rows = self._db.execute("SELECT name, kind, type, size, sha256 FROM files WHERE job = ?", (job,)).fetchall()
        return {
            kind: Written(row["name"], kind, row["type"], row["size"], row["sha256"])
            for row in rows
            for kind in row["kind"].split()
        }

    def inputs(self, job: str) -> dict[str, Written]:
        """The files that the request of a job brought, by field."""
        return {kind.removeprefix(INPUT): one for kind, one in self.files(job).items() if kind.startswith(INPUT)}

    def size(self) -> int:
        """Bytes of all files that have a row."""
        with self._lock:
            return int(self._db.execute("SELECT COALESCE(SUM(size), 0) FROM files").fetchone()[0])

    def discard(self, job: str) -> None:
        """Remove the files of a job that stays."""
        with self._writing() as db:
            db.execute("DELETE FROM files WHERE job = ?", (job,))
        shutil.rmtree(self.place(job), ignore_errors=True)

    # --- sweeping -----------------------------------------------------------------------------------------------------

    def expire(self, most: int) -> list[str]:
        """Let jobs expire whose time is over, and the oldest finished ones while files are more than `most` bytes; their ids.

        The row says so before the files go; it is forgotten a week later. Those that are `kept` do not count.
        """
        now = time.time()
        with self._writing() as db:
            db.execute("DELETE FROM jobs WHERE status = 'expired' AND expires < ?", (now - _KEPT,))
            kept = "SELECT id FROM jobs WHERE status = 'completed' AND expires IS NULL"
            size = f"SELECT COALESCE(SUM(size), 0) FROM files WHERE job NOT IN ({kept})"
            over = db.execute(size).fetchone()[0] - most
            question = "SELECT id FROM jobs WHERE status IN ('completed', 'failed') AND expires <= ?"
            gone = [row["id"] for row in db.execute(question, (now,))]
            sizes = db.execute(
                "SELECT jobs.id, COALESCE(SUM(files.size), 0) AS size FROM jobs LEFT JOIN files ON files.job = jobs.id"
                " WHERE status IN ('completed', 'failed') AND expires IS NOT NULL GROUP BY jobs.id ORDER BY ended"
            ).fetchall()
            over -= sum(row["size"] for row in sizes if row["id"] in gone)
            for row in sizes:
                if over <= 0:
                    break
                if row["size"] and row["id"] not in gone:
                    gone.append(row["id"])
                    over -= row["size"]
            for job in gone:
                db.execute("UPDATE jobs SET status = 'expired', expires = ?, result = NULL WHERE id = ?", (now, job))
                db.execute("DELETE FROM files WHERE job = ?", (job,))
        for job in gone:
            shutil.rmtree(self.place(job), ignore_errors=True)
        return gone

    def sweep(self) -> int:
        """Remove every file that has no row: uploads that became no job, and what a kill has left. How many were removed."""
        removed = 0
        for left in self.uploads.iterdir():
            left.unlink() if left.is_file() else shutil.rmtree(left)
            removed += 1
        for place in (self.folder / "files").glob("*/*"):
            removed += self._tidy(place)
            if not any(place.iterdir()):
                place.rmdir()
        return removed

    def _tidy(self, place: Path) -> int:
        """Remove the files in a job's folder that have no row. How many were removed."""
        with self._lock:
            known = {row["name"] for row in self._db.execute("SELECT name FROM files WHERE job = ?", (place.name,))}
        left = [path for path in place.iterdir() if path.name not in known]
        for path in left:
            path.unlink(missing_ok=True)  # a worker whose server was killed may give it its name at this moment
        return len(left)


def _stored(name: str, value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if name in _JSON and value is not None else value


def _read(row: sqlite3.Row) -> JobRow:
    values = dict(row)
    return JobRow(
        **{name: json.loads(value) if name in _JSON and value is not None else value for name, value in values.items()}
    )
