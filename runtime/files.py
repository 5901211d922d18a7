"""Files that appear whole or not at all, and files that are known to be the ones they were: atomic writes, digests, stamps.

A file's SHA-256 is taken once: afterwards its stamp (inode, size, times of change) says whether it is still that file.
Hashing the weights of a large model takes seconds at every load, and comparing a stamp takes microseconds. Whatever a program
does to a file changes its stamp, because no program can set the time at which an inode changed (ctime). What a stamp misses is
a disk that changes bytes by itself: `motionrt verify` reads them all.

Stamps are kept in this process and, where the folder that a file belongs to (a bundle's) can be written, in `.stamps.json`
inside it, for the next process. That file is only ever a saving: where it is missing, damaged, or of a copy of the folder,
files are read again.

Only the standard library here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motionrt.runtime.errors import MotionRTError

STAMPS = ".stamps.json"
_FORMAT = 1
_SETTLED = 2_000_000_000  # nanoseconds: a file that changed later than this ago may change again within its time stamp
_lock = threading.Lock()  # graphs are loaded from several threads, and two may take their weights from one file
_known: dict[str, list[Any]] = {}  # absolute path -> [*stamp, SHA-256 that the file had]


@contextlib.contextmanager
def replacing(path: Path, error: type[MotionRTError]) -> Iterator[Path]:
    """Give a temporary sibling of `path`; rename it to `path` when the block succeeds, remove it when it does not.

    Folders above `path` are made. An OSError of the block (full disk, no permission) becomes `error`.
    """
    temporary = path.with_name(f".{secrets.token_hex(6)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as cause:
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "Free space on the disk" if full else "Check the folder and its permissions"
        why = cause.strerror or str(cause).strip().partition("\n")[0] or type(cause).__name__
        text = f"cannot write {path}: {why}. Nothing was written. {fix}, or choose another place."
        raise error(text) from cause
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`; it takes the place of `path` when the block ends well, and vanishes otherwise."""
    partial, old = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():  # a process was killed between the two renames below
        os.replace(old, path)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def here() -> Path:
    """The folder of the process, for relative paths that are used later: it may go elsewhere meanwhile."""
    try:
        return Path.cwd()
    except OSError:  # it is gone, and with it whatever a relative path could have been
        return Path()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON with its `seal`, the SHA-256 of all else in it, however it will be laid out: damage to a file of digests
    and facts would not be seen otherwise."""
    plain = {key: value for key, value in json.loads(json.dumps(record)).items() if key != "seal"}
    return {**plain, "seal": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record, as it was parsed from JSON, has a seal, and has not changed since."""
    return "seal" in record and sealed(record)["seal"] == record["seal"]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(file: str | Path) -> tuple[int, ...]:
    """Inode, size in bytes, and when content and inode last changed, in nanoseconds. Raises OSError."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_digest(path: Path) -> tuple[str, tuple[int, ...] | None]:
    """The SHA-256 of the bytes of `path`, and the stamp by which they are known from now on. Raises OSError.

    The stamp is None where it would promise too much: the file changed while it was read, or less than two seconds before,
    so that it may change again and keep its time stamp.
    """
    stamp, started = stamp_of(path), time.time_ns()
    sha256 = sha256_of(path)
    settled = started - max(stamp[2:]) > _SETTLED and stamp == stamp_of(path)
    return sha256, stamp if settled else None


def digest_of(path: Path, expected: str, home: Path, *, read: bool = False) -> str:
    """The SHA-256 of `path`: `expected`, unread, where a stamp says that it was that and nothing changed; else from its bytes.

    home: the folder that keeps the stamps, a bundle's; `path` may lie outside (weights in a package). read: read the bytes
    whatever the stamps say, and keep or forget the stamp by what they are. Raises OSError where `path` cannot be read.
    """
    name, key = str(path.absolute()), _key(path, home)
    with _lock:
        if not read:
            entry = [*stamp_of(path), expected]
            if _known.get(name) == entry:
                return expected
            if _stored(home).get(key) == entry:
                _known[name] = entry
                return expected
        sha256, stamp = read_digest(path)
        _known.pop(name, None)
        if sha256 == expected and stamp is not None:
            _known[name] = [*stamp, sha256]
        _store(home, key, _known.get(name))
        return sha256


def _key(path: Path, home: Path) -> str:
    """What a stamp is stored under, such that `home / key` is the file: a folder that is moved keeps its stamps."""
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else str(path.absolute())


def _stored(home: Path) -> dict[str, Any]:
    """The stamps in the folder; none where they cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads((home / STAMPS).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("format") == _FORMAT and isinstance(record.get("files"), dict):
            return dict(record["files"])
    return {}


def _store(home: Path, key: str, entry: list[Any] | None) -> None:
    """Store one stamp, or remove it; stamps of files that are gone go too. A folder that takes nothing is left as it is.

    Of two processes that do this at once, one may undo what the other stored: that file is read once more.
    """
    stored = _stored(home)
    if stored.get(key) == entry:
        return
    kept = {name: value for name, value in stored.items() if name != key and os.path.exists(home / name)}
    if entry is not None:
        kept[key] = entry
    with contextlib.suppress(MotionRTError), replacing(home / STAMPS, MotionRTError) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "files": kept}, indent=1) + "\n", encoding="utf-8")
