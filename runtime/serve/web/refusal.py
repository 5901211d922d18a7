"""A request that is refused: the status, and the JSON that says why, in the shape that clients of `/v1/videos` read.

What a client sent comes back in a sentence only through `quoted`, and what a library of ours said only through `told`: no
control character, no endless text and no path of this machine leaves the server.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from motionrt.runtime.errors import MotionRTError

REPEATED = 200  # characters of what a client sent, at most, in a message
_TOLD = 1000  # characters of one message, at most
# An absolute path of two parts or more; not the `/b` of "a/b", nor what follows the host of an address.
_PATH = re.compile(r"(?<![\w/:.])(?:/[^\s/'\"`,;:()]+)*/([^\s/'\"`,;:()]+)/?")


def escaped(text: str) -> str:
    """`text` with control characters, separators of lines and what UTF-8 cannot hold written out as Python writes them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def quoted(value: object, limit: int = REPEATED) -> str:
    """What a client sent, for a sentence: escaped, in quotation marks if it is text, and at most `limit` characters of it."""
    text = value if isinstance(value, str) else repr(value)
    shown = escaped(text[:limit])
    short = shown if len(text) <= limit and len(shown) <= limit else f"{shown[: limit - 1]}…"
    return f"'{short}'" if isinstance(value, str) else short


def named(field: str) -> str:
    """The name of a field, as a client may have made it up, for a sentence."""
    return f"`{quoted(field)[1:-1]}`"


def told(error: BaseException | str) -> str:
    """The text of an error of ours, for a client: escaped, at most 1000 characters, absolute paths without their folders."""
    text = escaped(_PATH.sub(r"\1", str(error).replace("\n", " ")))
    return text if len(text) <= _TOLD else f"{text[: _TOLD - 1]}…"


class Refused(MotionRTError):
    """A request that is not carried out.

    status: HTTP, 400 to 599. code: a word for programs. message: a sentence for people, escaped and shortened here.
    param: the field that it is about. headers: more headers of the answer. kind: `invalid_request_error`,
    `authentication_error`, `permission_error`, `rate_limit_error` or `server_error`.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        assert 400 <= status < 600
        self.status, self.code, self.kind = status, code, kind
        self.message = escaped(message) if len(message) <= _TOLD else f"{escaped(message[:_TOLD])}…"
        self.param = None if param is None else escaped(param[:REPEATED])
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def json(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer. It is not to be stored: the same request may be welcome later."""
        return JSONResponse(self.json(), self.status, {"cache-control": "no-store", **self.headers})
