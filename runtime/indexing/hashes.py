"""SHA-256 of video files, each read once: what a run that was cut short knew about them, the next one need not read again."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from motionrt.runtime.errors import MediaError
from motionrt.runtime.files import is_sealed, read_digest, sealed, stamp_of


class FileHashes:
    """SHA-256 of files, kept in this process and line by line in `journal`, if there is one, until `finish`.

    A hash is known only as long as the file has the path and the stamp that it had when it was read (files.py); so a changed
    file is read again.
    """

    def __init__(self, journal: Path | None = None) -> None:
        self.journal = journal
        self._known: dict[str, tuple[list[int], str]] = {}
        self._new: list[str] = []
        with contextlib.suppress(OSError):
            for line in [] if journal is None else journal.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):  # cut, or damaged
                    if is_sealed(record := json.loads(line)):
                        self._known[record["path"]] = record["stamp"], record["sha256"]

    def sha256(self, path: Path) -> str:
        """The SHA-256 of the bytes of `path`. Raises MediaError if it cannot be read."""
        try:
            name = str(path.absolute())
            known = self._known.get(name)
            if known is not None and known[0] == [*stamp_of(path)]:
                return known[1]
            sha256, stamp = read_digest(path)
            if stamp is not None:
                self._known[name] = [*stamp], sha256
                if self.journal is not None:
                    self._new.append(json.dumps(sealed({"path": name, "stamp": stamp, "sha256": sha256})))
            return sha256
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise MediaError(f"the video file {path} cannot be read: {why}. Check the path.") from error

    def save(self) -> None:
        """Append what is new. A disk that takes nothing costs time in the next run, and nothing else."""
        lines = "".join(f"\n{line}" for line in self._new)  # the line break first: the last line may have been cut
        if self.journal is not None:
            with contextlib.suppress(OSError), self.journal.open("a", encoding="utf-8") as file:
                file.write(lines)
                self._new.clear()

    def finish(self) -> None:
        """Forget the journal: the run came to its end."""
        if self.journal is not None:
            with contextlib.suppress(OSError):
                self.journal.unlink(missing_ok=True)
