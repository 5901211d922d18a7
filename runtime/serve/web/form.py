"""The fields of a request that makes something: multipart/form-data or JSON, to one nested dict and files on the disk.

Both give the same: `motion[scale]`, `motion.scale` and `{"motion": {"scale": …}}` are one field, `refs[]` adds to a list, and
what stands in `motionrt`, an object or JSON text, stands beside it instead. Text of a form stays text: who knows the field
converts it. A file is a part with a file name, or a data URL in a field that is a file.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anyio.to_thread import run_sync
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from motionrt.runtime.serve.web.body.fields import Fields, FormLimits, parse_json, path_of, put, settle, too_many
from motionrt.runtime.serve.web.body.uploads import Spool, Upload
from motionrt.runtime.serve.web.refusal import Refused, named, quoted

__all__ = ["Fields", "FormLimits", "Upload", "read_fields"]

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

# A JSON string, not a key, that begins with `data:` and has no escapes but those of slashes.
_URL = re.compile(rb'(?<!\\)"(data:[^"\\]*+(?:\\/[^"\\]*+)*+)"(?!\s*:)', re.IGNORECASE)


async def read_fields(request: Request, limits: FormLimits, folder: Path) -> Fields:
    """Read the body of `request`. Its files go to `folder`, under names of ours, and belong to the caller afterwards.

    Raises Refused, and Starlette's ClientDisconnect where the client has gone; `folder` is then as it was.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > limits.body:
        raise _too_large(limits)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "unsupported_media_type", "bodies are taken as they are; send it without a Content-Encoding.")
    kind, options = parse_options_header(request.headers.get("content-type"))
    spool = Spool(folder)
    try:
        if kind == b"multipart/form-data":
            form = _Multipart(options.get(b"boundary", b""), limits, spool)
            await _feed(request, limits, form.write)
            return await run_sync(lambda: settle(form.values(), {}, limits, spool))
        if kind == b"application/json":
            body = bytearray()
            await _feed(request, limits, body.extend)
            return await run_sync(lambda: settle(*_json(bytes(body), limits), limits, spool))
        text = f"the body is {quoted(kind.decode('latin-1'))}; allowed are multipart/form-data and application/json."
        raise Refused(415, "unsupported_media_type", text)
    except BaseException:
        spool.discard()
        raise


async def _feed(request: Request, limits: FormLimits, take: Callable[[bytes], object]) -> None:
    """Hand the body on as it arrives, in a thread: `take` may write to the disk."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body:
            raise _too_large(limits)
        if chunk:
            await run_sync(take, chunk)


def _too_large(limits: FormLimits) -> Refused:
    return Refused(413, "body_too_large", f"the body is larger than {limits.body} bytes, which is what is taken.")


def _json(body: bytes, limits: FormLimits) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of a JSON body, and by the signs that stand for them there its data URLs, which are not parsed: they may be
    long, while what is parsed takes many times its size in memory."""
    sign, urls, pieces, at = secrets.token_hex(16), dict[str, str](), list[bytes](), 0
    for found in _URL.finditer(body):
        if len(urls) == limits.fields:
            raise too_many(limits.fields)
        mark = f"{sign}{len(urls)}"
        # Bytes that are not UTF-8 are refused later: as base64, or as text.
        urls[mark] = found[1].decode("utf-8", "surrogateescape").replace("\\/", "/")
        pieces += [body[at : found.start(1)], mark.encode()]
        at = found.end(1)
    pieces.append(body[at:])
    rest = b"".join(pieces)
    if len(rest) > limits.json:
        text = f"the JSON takes {len(rest)} bytes without its data URLs; allowed are {limits.json}."
        raise Refused(413, "json_too_large", text)
    value = parse_json(rest)
    if not isinstance(value, dict):
        raise Refused(400, "invalid_json", f"the JSON is {quoted(value)}; it must be an object of fields.")
    root: dict[str, Any] = {}
    for name, item in value.items():
        put(root, name, item, limits)
    return root, urls


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except FormParserError as cause:
        raise Refused(400, "invalid_multipart", f"this is not multipart/form-data: {quoted(str(cause))[1:-1]}.") from None


class _Multipart:
    """A form as it arrives: texts are kept, files are spooled. Of a part's headers only its names count."""

    def __init__(self, boundary: bytes, limits: FormLimits, spool: Spool) -> None:
        if not boundary:
            raise Refused(400, "invalid_multipart", "the Content-Type names no boundary, as multipart/form-data must.")
        self._limits, self._spool = limits, spool
        self._root: dict[str, Any] = {}
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name = ""
        self._file_name: bytes | None = None  # of the part that arrives; also an empty one makes it a file
        self._text, self._spooling = bytearray(), False
        self._parts, self._files, self._complete = 0, 0, False
        calls = {
            "on_part_begin": self._begin, "on_headers_finished": self._headers_end, "on_part_data": self._data,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_end, "on_part_end": self._end, "on_end": self._all,
        }  # fmt: skip
        with _parsing():
            self._parser = MultipartParser(boundary, cast("MultipartCallbacks", calls))

    def write(self, chunk: bytes) -> None:
        """The next bytes of the body. Blocks: files go to the disk. Raises Refused."""
        with _parsing():
            self._parser.write(chunk)

    def values(self) -> dict[str, Any]:
        """All fields, nested, files among them. Refused if the form is not complete."""
        if not self._complete:
            raise Refused(400, "invalid_multipart", "the form ends before its last boundary: a part of it did not arrive.")
        return self._root

    def _begin(self) -> None:
        self._disposition, self._spooling = b"", False
        self._text.clear()

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise Refused(400, "invalid_multipart", "a part has no header `Content-Disposition: form-data; name=…`.")
        self._parts += 1
        if self._parts > self._limits.fields:
            raise too_many(self._limits.fields)
        self._name, self._file_name = _utf8(options[b"name"], None), options.get(b"filename")
        (field, *_), _ = path_of(self._name)
        self._room = self._limits.body if field in self._limits.file_fields else self._limits.field
        if self._file_name is not None and field not in self._limits.file_fields:
            files = ", ".join(sorted(self._limits.file_fields)) or "none"
            text = f"{named(self._name)} is sent as a file; fields that are files here: {files}. Send it as text."
            raise Refused(400, "unexpected_file", text, self._name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file_name is not None:
            if not self._spooling:
                self._open()
            self._spool.write(data[start:end])
        else:
            self._text += data[start:end]
            if len(self._text) > self._room:
                text = f"{named(self._name)} is longer than {self._room} bytes, which is what is taken. Shorten it."
                raise Refused(400, "field_too_large", text, self._name)

    def _open(self) -> None:
        self._files += 1
        if self._files > self._limits.files:
            text = f"{named(self._name)} is one file too many; allowed in a request: {self._limits.files}."
            raise Refused(400, "too_many_files", text, self._name)
        self._spool.begin()
        self._spooling = True

    def _end(self) -> None:
        if self._file_name is None:
            put(self._root, self._name, _utf8(self._text, self._name), self._limits)
        elif self._spooling or self._file_name:  # neither: a form in a browser in which no file was chosen
            if not self._spooling:
                self._open()
            put(self._root, self._name, self._spool.end(self._name), self._limits)

    def _all(self) -> None:
        self._complete = True


def _utf8(data: bytes | bytearray, param: str | None) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        what = "the name of a field" if param is None else named(param)
        raise Refused(400, "invalid_text", f"{what} is not in UTF-8.", param) from None
