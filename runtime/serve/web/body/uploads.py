"""Files that a request brings: written under names of ours while they arrive, and known by their first bytes."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from motionrt.runtime.serve.web.refusal import Refused, named, quoted

KINDS = "png, jpeg, webp, gif, mp4, mov, webm or npy"
_HEAD = 64  # bytes that tell the kind
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"crx ")


@dataclass(frozen=True)
class Upload:
    """A file of a request. path: where it is, under a name of ours. size: bytes. sha256: hex. kind: by its first bytes,
    `png`, `jpeg`, `webp`, `gif`, `mp4`, `mov`, `webm` or `npy` (NumPy's arrays); the rest of the file is not looked at here."""

    path: Path
    size: int
    sha256: str
    kind: str


def kind_of(head: bytes) -> str | None:
    """What the first 64 bytes of a file say that it is, or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[4:8] == b"ftyp" and head[8:12] not in _STILL_BRANDS:
        return "mov" if head[8:12] == b"qt  " else "mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in head:
        return "webm"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    return None


class Spool:
    """The files of one request in `folder`, written beside each other; `discard` removes what a refused request left.

    Methods block: call them in a thread. Raises Refused, where the disk takes no more with status 503.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._head, self._size = b"", 0

    def begin(self) -> None:
        """Begin a file."""
        path = self._folder / f"{secrets.token_hex(16)}.upload"
        try:
            # Exclusive: never through a link, never over a file. For this user only: it is a stranger's picture.
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)
        except OSError as cause:
            raise _disk(cause) from cause
        self._paths.append(path)
        self._hash, self._head, self._size = hashlib.sha256(), b"", 0

    def write(self, data: bytes) -> None:
        """More bytes of the file that was begun."""
        assert self._file is not None
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as cause:
            raise _disk(cause) from cause
        self._hash.update(data)
        self._head += data[: _HEAD - len(self._head)]
        self._size += len(data)

    def end(self, name: str) -> Upload:
        """End the file that was begun, of the field `name`. Refused if it is empty or of a kind that is not taken."""
        self._close()
        kind = kind_of(self._head)
        if kind is None:
            began = quoted(self._head[:8]) if self._size else "nothing"
            text = f"the file of {named(name)} begins with {began}; allowed are files of type {KINDS}."
            raise Refused(400, "unsupported_file", text, name)
        return Upload(self._paths[-1], self._size, self._hash.hexdigest(), kind)

    def from_url(self, url: str, name: str) -> Upload:
        """The file that a data URL holds, in base64; what type it claims does not count. Raises Refused."""
        head, comma, data = url.partition(",")
        if not comma or not re.fullmatch(r"data:[^\s,]{0,200};base64", head, re.IGNORECASE):
            text = f"{named(name)} is {quoted(url, 40)}; a data URL is `data:TYPE;base64,DATA`."
            raise Refused(400, "invalid_file", text, name)
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as cause:
            text = f"the data URL of {named(name)} is not base64 ({cause}); send it with the alphabet of RFC 4648 section 4."
            raise Refused(400, "invalid_file", text, name) from None
        self.begin()
        self.write(content)
        return self.end(name)

    def discard(self) -> None:
        """Remove every file of the request."""
        self._close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._paths.clear()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _disk(cause: OSError) -> Refused:
    full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    text = "the server has no room for the file." if full else "the server cannot write the file."
    code = "storage_full" if full else "storage_failed"
    headers = {"retry-after": "60", "x-should-retry": "false"}  # a blind retry would bring the file again
    return Refused(503, code, f"{text} Try again later.", headers=headers, kind="server_error")
