"""What a request says, as one nested dict: names taken apart, everything checked, files out of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from motionrt.runtime.serve.web.body.uploads import Spool, Upload
from motionrt.runtime.serve.web.refusal import Refused, named, quoted

_NAME = re.compile(r"[^\[\].]+(?:\.[^\[\].]+)*(?:\[[^\[\]]+\])*(?:\[\])?")
_NAME_LENGTH = 200  # characters
_ADDRESS = ("image_url", "video_url", "url")  # `input_reference[image_url]` is the file of `input_reference`
_GONE = object()  # what is left of a value that was a file


@dataclass(frozen=True)
class FormLimits:
    """Bounds on one request.

    body: bytes of the whole. json: bytes of a JSON body, without the data URLs in it. field: bytes of one text. fields: how
    many parts of a form, and data URLs. values: how many values, those of lists counted singly. depth: how many objects and
    lists in each other, the outermost counted. files: how many files. file_fields: the fields that are files; only there is a
    data URL one.
    """

    body: int = 32 << 20
    json: int = 256 << 10
    field: int = 64 << 10
    fields: int = 64
    values: int = 64
    depth: int = 4
    files: int = 1
    file_fields: frozenset[str] = frozenset({"input_reference"})


@dataclass(frozen=True)
class Fields:
    """What a request says. values: nested dicts, lists, text, numbers, booleans and None, without the files.
    uploads: the files by the name of their field (`input_reference`; in a list `clips.0`). digest: hex SHA-256 of both, of
    files by their bytes: two requests that say the same in the same form have one digest."""

    values: dict[str, Any]
    uploads: dict[str, Upload] = field(default_factory=dict)
    digest: str = ""

    def discard(self) -> None:
        """Remove the files: nothing comes of the request."""
        for upload in self.uploads.values():
            upload.path.unlink(missing_ok=True)


def path_of(name: str) -> tuple[list[str], bool]:
    """`motion[refs][]` or `motion.refs[]` as (["motion", "refs"], True); True: a list, to which a value is added."""
    if len(name) > _NAME_LENGTH or not _NAME.fullmatch(name):
        text = f"{quoted(name)} is no name of a field; allowed are names such as `seed`, `motion[scale]` and `motion[refs][]`."
        raise Refused(400, "invalid_name", text)
    head, *brackets = re.split(r"\]?\[|\]", name.removesuffix("[]"))
    return [*head.split("."), *(key for key in brackets if key)], name.endswith("[]")


def put(root: dict[str, Any], name: str, value: Any, limits: FormLimits) -> None:
    """Put a value where its name says; an object joins the one that is there. Refused if the field is there already."""
    path, listed = path_of(name)
    for key in path[:-1]:
        root = root.setdefault(key, {})
        if not isinstance(root, dict):
            _twice(name)
    if not listed:
        _join(root, path[-1], value, name, limits.depth)
    elif isinstance(items := root.setdefault(path[-1], []), list):
        items.append(value)
    else:
        _twice(name)


def _join(root: dict[str, Any], key: str, value: Any, name: str, depth: int) -> None:
    if key not in root:
        root[key] = value
    elif not (isinstance(value, dict) and isinstance(root[key], dict)):
        _twice(name)
    elif depth == 0:
        raise Refused(400, "too_deep", f"{named(name)} holds objects in objects beyond what is taken.", name)
    else:
        for inner, item in value.items():
            _join(root[key], inner, item, f"{name}.{inner}", depth - 1)


def _twice(name: str) -> NoReturn:
    raise Refused(400, "duplicate_field", f"{named(name)} is given twice; send it once, or a list as `NAME[]`.", name)


def too_many(most: int) -> Refused:
    """For a request with more values than are taken."""
    return Refused(400, "too_many_fields", f"the request has more than {most} values, which is what is taken.")


def parse_json(data: bytes, param: str | None = None) -> Any:
    """JSON in UTF-8, without NaN or Infinity and with no key twice in one object. Raises Refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                _twice(key)
            found[key] = value
        return found

    def constant(text: str) -> NoReturn:
        raise Refused(400, "invalid_number", f"{text} is no number of JSON; send a finite one, or leave the field out.", param)

    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise Refused(400, "too_deep", "the JSON holds objects or lists in each other beyond what is taken.", param) from None
    except json.JSONDecodeError as cause:
        near = quoted(cause.doc[cause.pos : cause.pos + 20])
        raise Refused(400, "invalid_json", f"this is not JSON: {cause.msg}, near {near}.", param) from None
    except ValueError as cause:  # not UTF-8; an integer of thousands of digits
        raise Refused(400, "invalid_json", f"this is not JSON: {quoted(str(cause))[1:-1]}.", param) from None


def settle(root: dict[str, Any], urls: Mapping[str, str], limits: FormLimits, spool: Spool) -> Fields:
    """Check every value, lift what is in `motionrt`, read `metadata`, take the files out. Blocks: it writes files of data URLs.

    urls: texts that stand in `root` under a sign of ours. Raises Refused.
    """
    own = root.pop("motionrt", {})
    if isinstance(own, str):
        own = parse_json(own.encode("utf-8", "surrogatepass"), "motionrt")
    if not isinstance(own, dict):
        raise Refused(400, "invalid_json", f"`motionrt` is {quoted(own)}; it takes a JSON object of fields.", "motionrt")
    for name, value in own.items():
        put(root, name, value, limits)
    if isinstance(text := root.get("metadata"), str) and text.strip():  # an object, which a form may send as JSON
        root["metadata"] = parse_json(text.encode("utf-8", "surrogatepass"), "metadata")
    walk = _Walk(urls, limits, spool)
    values = walk.of(root, (), 1)
    values = {} if values is _GONE else values
    said = [values, {name: upload.sha256 for name, upload in walk.uploads.items()}]
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return Fields(values, walk.uploads, hashlib.sha256(canonical.encode()).hexdigest())


class _Walk:
    """Every value once, from the outside in."""

    def __init__(self, urls: Mapping[str, str], limits: FormLimits, spool: Spool) -> None:
        self._urls, self._limits, self._spool = urls, limits, spool
        self._count = 0
        self.uploads: dict[str, Upload] = {}

    def of(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        """The value as it is kept, or `_GONE` if it was a file, or held nothing but files."""
        param = ".".join(path)
        self._count += not isinstance(value, (dict, list)) or not value
        if self._count > self._limits.values:
            raise too_many(self._limits.values)
        if isinstance(value, (dict, list)):
            if depth > self._limits.depth:
                text = f"{named(param)} is more than {self._limits.depth} objects or lists deep."
                raise Refused(400, "too_deep", text, param)
            if isinstance(value, dict):
                for key in value:
                    self._text(key, ".".join((*path, key)))
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            kept = [(key, new) for key, item in pairs if (new := self.of(item, (*path, str(key)), depth + 1)) is not _GONE]
            if value and not kept:
                return _GONE
            return dict(kept) if isinstance(value, dict) else [item for _, item in kept]
        if isinstance(value, str):
            value = self._urls.get(value, value)
        if path[0] in self._limits.file_fields:
            self._file(value, path, param)
            return _GONE
        if isinstance(value, str):
            self._text(value, param)
        elif isinstance(value, (int, float)) and not abs(value) < 2**63:
            text = f"{named(param)} is {quoted(value, 20)}; allowed is a finite number below 2^63."
            raise Refused(400, "invalid_number", text, param)
        return value

    def _text(self, text: str, param: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            size = -1
        if size < 0 or "\0" in text:
            what = "half of a surrogate pair" if size < 0 else "the character U+0000"
            raise Refused(400, "invalid_text", f"{named(param)} has {what} in it, which is no text; leave it out.", param)
        if size > self._limits.field:
            text = f"{named(param)} takes {size} bytes as UTF-8; allowed are {self._limits.field}. Shorten it."
            raise Refused(400, "field_too_large", text, param)

    def _file(self, value: Any, path: tuple[str, ...], param: str) -> None:
        """Take a file: one that came as a part, or a data URL. None is none."""
        if value is None:
            return
        while len(path) > 1 and path[-1] in _ADDRESS:
            path = path[:-1]
        name = ".".join(path)
        if name in self.uploads:
            _twice(name)
        if len(self.uploads) == self._limits.files:
            text = f"{named(param)} is one file too many; allowed in a request: {self._limits.files}."
            raise Refused(400, "too_many_files", text, param)
        if isinstance(value, Upload):
            self.uploads[name] = value
        elif isinstance(value, str) and value[:5].lower() == "data:":
            self.uploads[name] = self._spool.from_url(value, param)
        elif isinstance(value, str) and re.match(r"[a-z][a-z0-9+.-]*:", value, re.IGNORECASE):
            text = f"{named(param)} is the address {quoted(value)}, and this server fetches none. Send the file, or a data URL."
            raise Refused(400, "url_not_allowed", text, param)
        else:
            text = f"{named(param)} is {quoted(value)}; it takes a file, as a part with a file name or as a data URL."
            raise Refused(400, "invalid_file", text, param)
