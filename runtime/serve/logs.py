"""The log: one JSON object in each line of standard error, of the server and of its workers alike.

What happens to jobs is an event: the message is its name, and `extra={"fields": {...}}` what is known of it. Any other message,
of a library too, stands in `message` of the event "message". Nothing that a client sends can begin a line or move a cursor: all
but printable ASCII is escaped. Prompts are not written unless the one who runs the server asks for them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from typing import Any

_LIBRARIES = ("uvicorn", "asyncio")  # what they say at INFO is said by ours, or is of no use
_LONGEST = 8192  # characters of a text in a line


class JsonLines(logging.Formatter):
    """A record as a line: `ts` (UTC, milliseconds), `level`, `event`, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"ts": f"{when}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= {"event": record.getMessage()} | {key: value for key, value in fields.items() if value is not None}
        else:
            line |= {"event": "message", "logger": record.name, "message": record.getMessage()[:_LONGEST]}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-_LONGEST:]  # the end says what it was
        return json.dumps(line, ensure_ascii=True, default=str)


def to_standard_error() -> None:
    """Send everything from INFO on to standard error, as lines of JSON, and nothing anywhere else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)


def prompts(fields: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The texts of a request, for its event: as they are, or else their lengths and SHA-256, which find them again."""
    told: dict[str, Any] = {}
    for name in ("prompt", "negative_prompt"):
        if isinstance(text := fields.get(name), str):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            told |= {name: text} if whole else {f"{name}_length": len(text), f"{name}_sha256": digest}
    return told
