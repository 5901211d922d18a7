"""A job again, from its record (`GET /v1/videos/{id}/record`): the same bundle, memory, references and seeds give the same
frames, and their SHA-256 shows it. Needs no server, and nothing of the extra `serve`."""

from __future__ import annotations

import binascii
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from motionrt.runtime.errors import InputError
from motionrt.runtime.files import sha256_of
from motionrt.runtime.job import Result
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline
from motionrt.runtime.serve.messages import Order
from motionrt.runtime.serve.work.order import Asked, read_order
from motionrt.runtime.serve.work.written import sha256_of_frames


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a server keeps of a finished job to make it again. files: uploads as data URLs; references: ids of the clips whose
    motion was used; frames_sha256: of the frames of each seed, uint8 [F, H, W, 3]; batch: how many jobs shared its calls."""

    motionrt_record: Literal[1]
    id: str
    fields: dict[str, Any]
    files: dict[str, str]
    references: list[int]
    bundle_digest: str
    memory_digest: str | None
    frames_sha256: list[str]
    backend: str
    batch: dict[str, Any] = {}


def read_record(path: Path) -> Record:
    """The record in a file. Raises `InputError` for one that is none, OSError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        text = f"{path} is no record of a job: {error}. `motionrt client record JOB` gets one from a server."
        raise InputError(text) from None


def differences(record: Record, bundle: Path, memory: MotionMemory | None) -> list[str]:
    """What is not as it was when the job ran, each as a sentence: the bundle, the memory."""
    found = []
    if (digest := sha256_of(bundle / "bundle.json")) != record.bundle_digest:
        found.append(f"the bundle is another one: its digest is {digest[:16]}…, and the record's {record.bundle_digest[:16]}…")
    if memory is None and record.memory_digest is not None:
        found.append("the job had a motion memory, and none is given")
    if memory is not None and record.memory_digest is not None and (digest := memory.digest()) != record.memory_digest:
        text = f"the memory is another one, or has changed: its digest is {digest[:16]}…, and the record's"
        found.append(f"{text} {record.memory_digest[:16]}…")
    return found


def replayed(record: Record, pipeline: MotionPipeline) -> Iterator[tuple[Result, bool]]:
    """For each seed what `pipeline` gives, and whether its frames are those of the record. Raises what a request raises.

    The clips are taken by their ids where the memory is the one that the job had; in another one they are searched for.
    """
    memory = pipeline.memory if record.memory_digest is not None else None
    fields = dict(record.fields)
    same = isinstance(memory, MotionMemory) and memory.digest() == record.memory_digest
    if same and record.references:
        fields["references"] = record.references
    with _asked(record, fields, pipeline) as asked:
        if len(asked.seeds) != len(record.frames_sha256):
            raise InputError(f"the record has {len(asked.seeds)} seeds and {len(record.frames_sha256)} videos; it is damaged.")
        for seed, digest in zip(asked.seeds, record.frames_sha256, strict=True):
            result = pipeline.result(pipeline.start(replace(asked.request, seed=seed)))
            yield result, sha256_of_frames(result.frames) == digest


@contextmanager
def _asked(record: Record, fields: dict[str, Any], pipeline: MotionPipeline) -> Iterator[Asked]:
    """The order of a record, with its files in a folder as long as it is used."""
    with tempfile.TemporaryDirectory(prefix="motionrt-replay-") as folder:
        files = {}
        for place, (name, url) in enumerate(record.files.items()):
            path = Path(folder) / str(place)
            try:
                path.write_bytes(b64decode(url.partition(";base64,")[2], validate=True))
            except binascii.Error as error:
                raise InputError(f"the record's file {name} is no data URL: {error}.") from None
            files[name] = str(path)
        memories = [str(fields["memory"])] if "memory" in fields else []
        yield read_order(pipeline.bundle, Order(model="", fields=fields, files=files), memories)
