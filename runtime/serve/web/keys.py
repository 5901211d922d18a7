"""Who may do what: API keys, of which a file holds only hashes; and links that are signed for a while, for a `<video>` and an
EventSource, which send no header.

A key is 256 random bits, so that its SHA-256 needs no salt and no slowness. The file is read again whenever it changes: a key
that is revoked is refused from the next request on. Where it cannot be read any more, nobody gets in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast
from urllib.parse import unquote

import msgspec
from starlette.requests import Request

from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.files import replacing
from motionrt.runtime.serve.messages import PRIORITIES
from motionrt.runtime.serve.web.refusal import Refused, quoted

_log = logging.getLogger(__name__)
Role = Literal["read", "generate", "admin"]
ROLES: Mapping[str, frozenset[str]] = {  # what each may do
    "read": frozenset({"read"}),
    "generate": frozenset({"read", "generate"}),
    "admin": frozenset({"read", "generate", "admin"}),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_WINDOW = 900  # seconds: a signed path holds for one to two of these, and stays the same within one


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a key may use; None is no bound. waiting: jobs that are not over. seconds_a_day: of work, by the day in UTC.
    priority: the highest, `low`, `normal` or `high`. n: seeds of one request. Raises InputError."""

    waiting: int | None = None
    seconds_a_day: float | None = None
    priority: str = "normal"
    n: int | None = None

    def __post_init__(self) -> None:
        for name in ("waiting", "seconds_a_day", "n"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"the quota `{name}` is {value!r}; allowed is a number above 0.")
        if self.priority not in PRIORITIES:
            raise InputError(f"the quota `priority` is {self.priority!r}; allowed are {', '.join(PRIORITIES)}.")


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A key, without its secret. id: what jobs and logs name it by. created: seconds since 1970."""

    id: str
    name: str
    roles: frozenset[Role]
    quota: Quota = Quota()
    created: float = 0.0

    def may(self, role: str) -> bool:
        """Whether one of its roles includes this one."""
        return any(role in ROLES[own] for own in self.roles)

    def check_request(self, priority: str, n: Any) -> None:
        """`Refused` (403) for a priority or a number of seeds beyond the quota. n: as it was sent, also text or None."""
        if PRIORITIES.index(priority) > PRIORITIES.index(self.quota.priority):
            _forbid(f"priority is {priority}; this key may ask for {self.quota.priority} or lower.", "priority")
        with contextlib.suppress(TypeError, ValueError):  # what is no number is refused by whoever reads it
            if self.quota.n is not None and int(n) > self.quota.n:
                _forbid(f"n is {quoted(n)}; this key may ask for {self.quota.n} at most.", "n")

    def check_seconds(self, expected: float, used: float) -> None:
        """`Refused` (429) if a job that is expected to take so many seconds goes beyond what is left of the key's day."""
        most = self.quota.seconds_a_day
        if most is not None and used + expected > most:
            text = f"this key has used or asked for {used:.0f} of {most:g} seconds today, and this takes about {expected:.0f}."
            headers = {"retry-after": str(86400 - int(time.time()) % 86400), "x-should-retry": "false"}
            raise Refused(429, "seconds_used_up", f"{text} Ask again after midnight UTC.", None, headers, "rate_limit_error")


def _forbid(text: str, param: str | None = None) -> NoReturn:
    raise Refused(403, "not_allowed", text, param, kind="permission_error")


def _unknown(code: str, text: str) -> NoReturn:
    raise Refused(401, code, text, headers={"www-authenticate": "Bearer"}, kind="authentication_error")


ANONYMOUS = Key(id="anonymous", name="anonymous", roles=frozenset({"admin", "generate", "read"}), quota=Quota(priority="high"))


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key in the file."""

    key: Key
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[_Entry] = []
    format: Literal[1] = 1


class Keys:
    """The keys of a file, or none: then whoever asks may do everything. Use `open`."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, ...] | None = None
        self._entries: list[_Entry] = []
        self._secret = secrets.token_bytes(32)  # of this process: links end with it

    @classmethod
    def open(cls, path: Path | None, *, new: bool = False) -> Keys:
        """The keys in `path`; None: everybody is `ANONYMOUS`. new: it may be missing, and `create` makes it.

        Raises MotionRTError: the file is missing, damaged, or can be read by others than its owner.
        """
        keys = cls(path)
        if path is not None and not (new and not path.exists()):
            keys._read()
        return keys

    @property
    def anonymous(self) -> bool:
        """Whether everybody may do everything."""
        return self._path is None

    def every(self) -> list[Key]:
        """All keys, the oldest first."""
        return [entry.key for entry in self._entries]

    def find(self, token: str) -> Key | None:
        """The key whose secret this is. `Refused` (503) if the file cannot be read any more."""
        self._look()
        found, digest = None, _digest(token)
        for entry in self._entries:  # to the last: the time it takes says nothing
            if hmac.compare_digest(entry.sha256, digest):
                found = entry.key
        return found

    def get(self, name: str) -> Key | None:
        """The key with this id, as long as it is not revoked."""
        self._look()
        return next((entry.key for entry in self._entries if entry.key.id == name), None)

    # --- requests -----------------------------------------------------------------------------------------------------

    def of(self, request: Request, role: str, signed: bool = False) -> Key:
        """Whose request this is. signed: the signature of its path is enough, and gives its key without a role to make things.

        `Refused`: 401 without a valid key, 403 if that lacks the role.
        """
        if self._path is None:
            return ANONYMOUS
        header = request.headers.get("authorization")
        if header is None and signed and "signature" in request.query_params:
            mounted = request.scope.get("root_path", "").removesuffix("/v1")  # below it, links are as if there were nothing
            return self._signer(request.scope["path"].removeprefix(mounted), request.query_params)
        kind, _, token = (header or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            _unknown("missing_api_key", "send an API key of this server: `Authorization: Bearer mrt_…`.")
        key = self.find(token.strip())
        if key is None:
            _unknown("invalid_api_key", "this API key is not, or no longer, one of this server.")
        if not key.may(role):
            _forbid(f"this needs a key with the role {role}; the key {key.name} has {', '.join(sorted(key.roles))}.")
        return key

    def signed(self, path: str, key: str) -> str:
        """`path`, of a request that the key with the id `key` may make, with a signature for 15 to 30 minutes.

        The rest of a query that `path` has is not signed: whoever has the link may change it.
        """
        if self._path is None:
            return path
        expires = (int(time.time()) // _WINDOW + 2) * _WINDOW
        bare, mark, query = path.partition("?")
        return f"{bare}?{query}{'&' if mark else ''}{sign(self._secret, unquote(bare), key, expires)}"

    def _signer(self, path: str, query: Mapping[str, str]) -> Key:
        key = None if (name := check(self._secret, path, query, time.time())) is None else self.get(name)
        if key is None or not key.may("read"):
            _unknown("invalid_signature", "this link has expired, or is not one of this server; get a new one.")
        # Not to make or change anything; links that an admin was given may be of anybody's job.
        roles: frozenset[Role] = frozenset({"read", "admin"}) if key.may("admin") else frozenset({"read"})
        return Key(id=key.id, name=key.name, roles=roles, quota=key.quota, created=key.created)

    # --- the file -----------------------------------------------------------------------------------------------------

    def create(self, name: str, roles: list[str], quota: Quota | None = None) -> str:
        """Add a key to the file and return its secret, which is kept nowhere. Raises InputError, MotionRTError."""
        if not _NAME.fullmatch(name):
            raise InputError(f"the key's name is {name!r}; allowed are up to 64 letters, digits and . _ @ -")
        if not roles or not set(roles) <= set(ROLES):
            raise InputError(f"the key's roles are {', '.join(roles) or 'none'}; allowed are {', '.join(ROLES)}.")
        token = f"mrt_{secrets.token_urlsafe(32)}"
        own = cast("frozenset[Role]", frozenset(roles))
        key = Key(id=f"key_{secrets.token_hex(8)}", name=name, roles=own, quota=quota or Quota(), created=round(time.time(), 3))
        with self._changing():
            if any(entry.key.name == name for entry in self._entries):
                raise InputError(f"there is a key {name!r} already; revoke it first, or choose another name.")
            self._write([*self._entries, _Entry(key, _digest(token))])
        return token

    def revoke(self, name: str) -> None:
        """Remove a key from the file. Raises InputError where there is none of this name."""
        with self._changing():
            left = [entry for entry in self._entries if entry.key.name != name]
            if len(left) == len(self._entries):
                known = ", ".join(entry.key.name for entry in self._entries) or "none"
                raise InputError(f"there is no key {name!r}; there are: {known}.")
            self._write(left)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """The file as it is now, and nobody else changes it meanwhile."""
        assert self._path is not None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if self._path.exists():
                self._read()
            yield
        finally:
            os.close(folder)

    def _look(self) -> None:
        """Read the file again if it changed."""
        if self._path is None:
            return
        try:
            if self._stamp != _stamp(os.stat(self._path)):
                self._read()
        except (OSError, MotionRTError) as error:
            self._stamp, self._entries = None, []
            _log.error("no key is accepted: %s", error)
            text = "the server cannot read its keys."
            raise Refused(503, "keys_unreadable", text, None, {"retry-after": "5"}, "server_error") from None

    def _read(self) -> None:
        assert self._path is not None
        fix = "Make it with `motionrt keys create`."
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError as cause:
            raise MotionRTError(f"the file of keys {self._path} cannot be read: {cause.strerror}. {fix}") from cause
        if status.st_mode & 0o077 or status.st_uid not in (os.geteuid(), 0):
            what = f"has mode {status.st_mode & 0o777:o}" if status.st_mode & 0o077 else "belongs to another user"
            raise MotionRTError(
                f"the file of keys {self._path} {what}; it must be readable by its owner, who runs the server, alone."
                f" `chmod 600 {self._path}`."
            )
        try:
            self._entries = msgspec.json.decode(data, type=_File).keys
        except (msgspec.DecodeError, UnicodeDecodeError) as cause:
            raise MotionRTError(f"the file of keys {self._path} is damaged: {cause}. {fix}") from cause
        self._stamp = _stamp(status)

    def _write(self, entries: list[_Entry]) -> None:
        assert self._path is not None
        text = json.dumps(msgspec.to_builtins(_File(entries)), indent=1) + "\n"
        with replacing(self._path, MotionRTError) as temporary:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        self._read()


def sign(secret: bytes, path: str, key: str, expires: int) -> str:
    """The query that lets anybody make this request as `key` until `expires`, in whole seconds since 1970."""
    return f"key={key}&expires={expires}&signature={_signature(secret, path, key, expires)}"


def check(secret: bytes, path: str, query: Mapping[str, str], now: float) -> str | None:
    """The id of the key that `sign` signed this path for; None if it did not, or the time is over."""
    key, expires, signature = (query.get(name, "") for name in ("key", "expires", "signature"))
    if not (expires.isascii() and expires.isdecimal() and len(expires) < 16 and int(expires) > now):
        return None
    right = _signature(secret, path, key, int(expires))
    return key if hmac.compare_digest(signature.encode("utf-8", "replace"), right.encode()) else None


def _signature(secret: bytes, path: str, key: str, expires: int) -> str:
    said = "\n".join((str(expires), key, path)).encode("utf-8", "surrogatepass")  # a key's id has no line end; a path is last
    return urlsafe_b64encode(hmac.digest(secret, said, "sha256")[:18]).decode()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
