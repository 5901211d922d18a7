"""What the server itself does to a memory: small changes, and looking whether it may. Each opens it and closes it again.

All of it blocks. Whoever imports this brings in NumPy: the server does so when it first needs it.
"""

from __future__ import annotations

from pathlib import Path

from motionrt.runtime.errors import InputError, MemoryStoreError, UnknownClip
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.serve.web.refusal import Refused, told
from motionrt.runtime.serve.work.order import read_clip


def clip_fields(fields: dict[str, object]) -> dict[str, object]:
    """What `read_clip` reads; `Refused` (400) for what it refuses."""
    try:
        return read_clip(fields)
    except InputError as error:
        raise Refused(400, "invalid_request", told(error)) from None


def check_writable(path: Path) -> None:
    """`Refused` (409) where a memory cannot be added to: it is read-only, of another schema, damaged or gone."""
    try:
        with MotionMemory.open(path) as memory:
            if memory.readonly:
                raise MemoryStoreError(f"the motion memory {path} is read-only on the server; its clips stay as they are.")
    except MemoryStoreError as error:
        raise _unwritable(error) from None


def remove_clip(path: Path, clip: int) -> tuple[str, str]:
    """Remove a clip; its source and that file's SHA-256. Raises `UnknownClip`; `Refused` (409) as `check_writable` does."""
    try:
        with MotionMemory.open(path) as memory:
            (reference,) = memory.get([clip])
            memory.remove([clip])
    except UnknownClip:
        raise
    except MemoryStoreError as error:
        raise _unwritable(error) from None
    return reference.source, reference.source_sha256


def take_back(path: Path, source: Path, sha256: str) -> None:
    """Remove the clips of the file `source`, which has this SHA-256. Raises `MemoryStoreError`."""
    with MotionMemory.open(path) as memory:
        if found := memory.find(sha256):
            memory.remove(clip.id for clip in memory.get(found) if clip.source == str(source))


def ids_of(path: Path) -> set[int]:
    """The ids of all clips. Raises `MemoryStoreError`."""
    with MotionMemory.open(path, readonly=True) as memory:
        return set(memory.ids().tolist())


def _unwritable(error: MemoryStoreError) -> Refused:
    return Refused(409, "memory_not_writable", told(error), "memory", headers={"x-should-retry": "false"})
