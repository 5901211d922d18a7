"""The page: the static files of this folder. The policy that lets nothing run or load but them comes from limits.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from motionrt.runtime.errors import InputError

_SCRIPTS = ("app.js", "dom.js", "api.js", "fields.js", "draw.js", "motion.js", "player.js", "jobs.js")
FILES = ("index.html", "style.css", "icon.svg", *_SCRIPTS)
_TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".json": "application/json",
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp",
}  # fmt: skip
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class _File:
    """What is sent for one path; a browser asks each time whether it is still what it has."""

    def __init__(self, body: bytes, suffix: str) -> None:
        self._body, self._type, self._tag = body, _TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"'

    async def answer(self, request: Request) -> Response:
        headers = {"cache-control": "no-cache", "etag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._body, media_type=self._type, headers=headers)


def page_routes(examples: Mapping[str, Path] = {}) -> list[BaseRoute]:
    """`/` is the page, `/page/NAME` what it loads; no other name is looked up.

    examples: pictures to begin with, by prompt. Whoever reaches the page sees them, with or without a key. Raises InputError
    for one that cannot be read, or is no png, jpeg or webp by its name.
    """
    made = {name: _File((files(__name__) / name).read_bytes(), Path(name).suffix) for name in FILES}
    told = []
    for number, (prompt, path) in enumerate(examples.items()):
        if (suffix := path.suffix.lower()) not in _PICTURES:
            raise InputError(f"the example {str(path)!r} is no picture by its name; allowed are {', '.join(_PICTURES)}.")
        try:
            made[f"example-{number}"] = _File(path.read_bytes(), suffix)
        except OSError as error:
            raise InputError(f"the example {str(path)!r} cannot be read: {error.strerror}.") from None
        told.append({"prompt": prompt, "picture": f"/page/example-{number}"})
    made["examples"] = _File(json.dumps(told).encode(), ".json")
    return [
        Route("/", made["index.html"].answer), Route("/favicon.ico", made["icon.svg"].answer),
        *(Route(f"/page/{name}", file.answer) for name, file in made.items() if name != "index.html"),
    ]  # fmt: skip
