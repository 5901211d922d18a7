"""What the server and a worker say to each other: JSON over a pipe, each message of a declared form. Files go by their paths.

The server asks and orders; a worker, which alone knows bundles and memories, answers and reports.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, Literal

import msgspec

PRIORITIES = ("low", "normal", "high")


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker opens: bundles and memories by name (absolute paths), and the fields of `RunOptions` for its device.

    batch: most jobs in one call; inexact: also where a batch rounds differently. self_test: a generation before it is ready.
    preview: seconds between two looks at a job that runs; 0: none. replicas: URL of those that make the videos in its place.
    """

    bundles: dict[str, str]
    memories: dict[str, str] = {}
    run_options: dict[str, Any] = {}
    low_memory: bool = False
    batch: int = 1
    inexact: bool = False
    self_test: bool = True
    preview: float = 0.5
    replicas: str = ""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A video that is asked for: `fields` as they came (text where a form brought them), `files` the uploads by field."""

    model: str
    fields: dict[str, Any]
    files: dict[str, str] = {}


# --- to a worker


class Run(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Make the video of an order that was found good (`Ask` "check"), and write it into `folder`. key: whose it is."""

    job: str
    order: Order
    folder: str
    key: str = ""
    priority: int = 1


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Stop a job; `Ended` says when it has."""

    job: str


class Ask(msgspec.Struct, tag=True, frozen=True):
    """A question, answered by `Answer` of the same number."""

    number: int
    what: Literal["check", "search", "preview", "stats"]
    about: dict[str, Any]


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Leave: what is running is let go of, without `Ended`."""


# --- from a worker


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Everything is open and warm, after so many seconds. `models`: what each bundle takes and gives."""

    models: dict[str, dict[str, Any]]
    seconds: float


class Alive(msgspec.Struct, tag=True, frozen=True):
    """Said every two seconds. rss: bytes."""

    rss: int


class Progress(msgspec.Struct, tag=True, kw_only=True):
    """Where a job is. done: the part of its expected time that is over; left: seconds of work to go, both by what this worker
    measured before. used: seconds that it took of this worker so far. preview: what the video will be, as an animated webp, of
    this step; None where nothing new is shown."""

    job: str
    stage: str
    step: int
    steps: int
    done: float
    left: float
    used: float
    references: list[dict[str, Any]] | None = None
    preview: bytes | None = None


class Written(msgspec.Struct, frozen=True):
    """A file in a job's folder: its name, what it is (video-0, thumbnail-0, spritesheet-0, field-0), media type, bytes,
    SHA-256."""

    name: str
    kind: str
    type: str
    size: int
    sha256: str


class Ended(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A job is over. outcome: completed, failed or cancelled; error: code and message of a failed one."""

    job: str
    outcome: Literal["completed", "failed", "cancelled"]
    result: dict[str, Any] = {}
    files: list[Written] = []
    error: dict[str, str] | None = None
    used: float = 0.0


class Answer(msgspec.Struct, tag=True, frozen=True):
    """What came of an `Ask`; `refused`: status, code, message and perhaps the field at fault."""

    number: int
    value: Any = None
    refused: dict[str, Any] | None = None


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The worker cannot open what it should, and leaves."""

    message: str


# --- to a replica, which answers with `Progress` and `Ended`, a line each (replicas/)


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A job with the bytes of its uploads by field, in MessagePack. digest: SHA-256 of the server's own `bundle.json`."""

    run: Run
    files: dict[str, bytes]
    digest: str


# --- to and from the process that adds a clip to a memory (adding.py)

ADDING = ("opening", "reading", "encoding")  # its stages


class Adding(msgspec.Struct, frozen=True, kw_only=True):
    """A clip to add: paths of the memory, of a bundle that it was made for and of the video; the rest as in `Item`.

    describe: what it is for `index_clips`; a clip that has no caption gets one by its motion.
    decoding: bytes of memory that reading the video may take. threads: of the graphs; None: all cores.
    """

    memory: str
    bundle: str
    video: str
    sha256: str
    caption: str = ""
    describe: bool = False
    start: float | None = None
    end: float | None = None
    span: str = "start"
    dataset: str = ""
    metadata: dict[str, str] = {}
    decoding: int
    threads: int | None = None


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that begins; or the id of the clip, and whether it was `added` or there before; or code and text of an error."""

    stage: str | None = None
    clip: int | None = None
    added: bool = False
    error: dict[str, str] | None = None


ToWorker = Run | Cancel | Ask | Stop
FromWorker = Ready | Alive | Progress | Ended | Answer | Broken

_to_worker: msgspec.json.Decoder[ToWorker] = msgspec.json.Decoder(ToWorker)
_from_worker: msgspec.json.Decoder[FromWorker] = msgspec.json.Decoder(FromWorker)
_opening = msgspec.json.Decoder(Opening)


class Line:
    """One end of the pipe. Any thread may send; one thread receives. EOFError or OSError once the other end is gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, Lock()

    def send(self, message: ToWorker | FromWorker | Opening) -> None:
        data = msgspec.json.encode(message)
        with self._lock:
            self._connection.send_bytes(data)

    def ordered(self) -> ToWorker:
        return _to_worker.decode(self._connection.recv_bytes())

    def reported(self) -> FromWorker:
        return _from_worker.decode(self._connection.recv_bytes())

    def opening(self) -> Opening:
        return _opening.decode(self._connection.recv_bytes())

    def close(self) -> None:
        self._connection.close()
