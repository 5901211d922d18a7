"""Clips and references as rows of a motion memory: checked, packed into blobs and unpacked. M tokens of width D."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError

TOKENS = ("float16", "int8")
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip to add; times in seconds. embedding: float32 [E]; motion, appearance: float32 [M,D], kept as the memory says."""

    caption: str
    source: str
    start: float
    duration: float
    fps: float
    source_sha256: str
    embedding: NDArray[np.float32]
    motion: NDArray[np.float32]
    appearance: NDArray[np.float32]
    metadata: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""


@dataclass(frozen=True, eq=False)
class Reference:
    """A retrieved clip. score: cosine with the query in [-1,1]; motion and appearance: float32 [M,D].

    memory: its name in a `MemorySet`, where the score is multiplied by the memory's weight.
    """

    id: int
    score: float
    caption: str
    source: str
    start: float
    duration: float
    motion: NDArray[np.float32]
    appearance: NDArray[np.float32]
    memory: str = ""
    dataset: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryStats:
    """What `MotionMemory.stats` says.

    datasets: clips in each; bytes_db, bytes_index: on disk; generation: changes so far; tokens: how they are kept;
    index_state: "not needed", "missing", "current" or "behind by N clips" (which are searched exactly).
    """

    clips: int
    datasets: Mapping[str, int]
    bytes_db: int
    bytes_index: int
    generation: int
    tokens: str
    index_state: str


class DamagedRow(ValueError):
    """A row of the file cannot be a clip; the text says which and why."""


@dataclass(frozen=True)
class Layout:
    """The sizes of a memory's arrays, {"embedding": [E], "motion": [M,D], "appearance": [M,D]}, and how tokens are kept.

    tokens: "float16", or "int8" with a float32 scale for each row of D (largest magnitude / 127, symmetric).
    """

    dims: Mapping[str, Sequence[int]]
    tokens: str

    @classmethod
    def checked(cls, dims: Mapping[str, int | Sequence[int]], tokens: str) -> Layout:
        """Raise InputError for other names, ranks or kinds of tokens."""
        ranks = {"embedding": 1, "motion": 2, "appearance": 2}
        sizes = {name: [size] if isinstance(size, int) else list(size) for name, size in dims.items()}
        whole = all(isinstance(n, int) and n > 0 for size in sizes.values() for n in size)
        if {name: len(size) for name, size in sizes.items()} != ranks or not whole:
            allowed = '{"embedding": E, "motion": [M,D], "appearance": [M,D]}'
            raise InputError(f"the dims of a motion memory are {dims!r}; allowed is {allowed}, all from 1 on.")
        if tokens not in TOKENS:
            raise InputError(f"the tokens of a motion memory are {tokens!r}; allowed is {' or '.join(TOKENS)}.")
        return cls({name: sizes[name] for name in ranks}, tokens)

    def array(self, part: str, value: object, what: str) -> NDArray[np.float32]:
        """`value` as finite float32 of the part's shape; InputError that calls it `what`."""
        return _array(what, value, tuple(self.dims[part]))

    def row(self, number: int, clip: Clip) -> dict[str, Any]:
        """The columns of a clip; InputError, which names it by `number`, for what a memory cannot hold."""
        name = f"clip {number} ({clip.source!r})"
        texts = (clip.caption, clip.source, clip.source_sha256, clip.dataset, *clip.metadata, *clip.metadata.values())
        try:
            for text in texts:
                text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise InputError(f"{name}: caption, source, SHA-256, dataset and metadata must be valid text ({error}).") from error
        if not clip.caption.strip():
            raise InputError(f"{name} has an empty caption; say in a few words what moves and how.")
        if "dataset" in clip.metadata:
            raise InputError(f"{name} has `dataset` in its metadata; a clip has a field for it: Clip(dataset=...).")
        times = (clip.start, clip.duration, clip.fps)
        if not all(math.isfinite(value) and value >= 0 for value in times):
            raise InputError(f"{name} has (start, duration, fps) {times}; allowed are finite numbers from 0 on.")
        embedding, motion, appearance = (self.array(part, getattr(clip, part), f"`{part}` of {name}") for part in self.dims)
        unit(embedding)
        if max(np.abs(motion).max(), np.abs(appearance).max()) > _LARGEST:
            raise InputError(f"the tokens of {name} exceed {_LARGEST:g}, the largest float16; they cannot be kept.")
        blobs = {"embedding": embedding.astype("<f4").tobytes()}
        blobs |= {"motion": self._pack(motion), "appearance": self._pack(appearance)}
        return {
            "caption": clip.caption, "source": clip.source, "start": clip.start, "duration": clip.duration,
            "fps": clip.fps, "source_sha256": clip.source_sha256, "dataset": clip.dataset,
            "metadata": json.dumps(dict(clip.metadata), ensure_ascii=False, sort_keys=True),
            "crc": checksum(*blobs.values()), **blobs,
        }  # fmt: skip

    def bytes_of(self, part: str) -> int:
        """Bytes of one blob."""
        size = math.prod(self.dims[part])
        if part == "embedding":
            return 4 * size
        return 2 * size if self.tokens == "float16" else size + 4 * self.dims[part][0]

    def unpack(self, part: str, ids: Sequence[int], blobs: Sequence[bytes]) -> NDArray[np.float32]:
        """Blobs [N] of one part as float32 [N,...], embeddings as unit vectors; DamagedRow names an impossible one."""
        size, shape = self.bytes_of(part), (len(blobs), *self.dims[part])
        try:
            data = b"".join(blobs)
            fit = set(map(len, blobs)) <= {size}
        except TypeError:  # a column may hold text, a number or nothing
            fit = False
        if not fit:
            lengths = [len(blob) if isinstance(blob, bytes) else -1 for blob in blobs]
            wrong = next(n for n, length in enumerate(lengths) if length != size)
            raise DamagedRow(f"clip {ids[wrong]} has {max(lengths[wrong], 0)} bytes of {part}")
        if part == "embedding":
            values = np.frombuffer(data, "<f4").reshape(shape)
        elif self.tokens == "float16":
            values = np.frombuffer(data, "<f2").reshape(shape).astype(np.float32)
        else:
            raw = np.frombuffer(data, np.int8).reshape(len(blobs), size)
            scale = raw[:, : 4 * shape[1]].copy().view("<f4")[..., None]
            values = (raw[:, 4 * shape[1] :].reshape(shape) * scale).astype(np.float32, copy=False)
        rows = values.reshape(len(blobs), -1) if len(blobs) else values
        squares = np.vecdot(rows, rows)  # one cheap pass; only what is suspicious is looked at closely
        if not math.isfinite(squares.sum(dtype=np.float64)) or part == "embedding" and not squares.all():
            impossible = ~np.isfinite(rows).all(axis=1)
            if part == "embedding":
                impossible |= ~rows.any(axis=1)
            if impossible.any():
                raise DamagedRow(f"clip {ids[int(np.argmax(impossible))]} has an impossible {part}")
        return np.asarray(values / np.sqrt(squares)[:, None], np.float32) if part == "embedding" else values

    def _pack(self, tokens: NDArray[np.float32]) -> bytes:
        if self.tokens == "float16":
            return bytes(tokens.astype("<f2").tobytes())
        scale = (np.abs(tokens).max(axis=1, keepdims=True) / 127).astype("<f4")
        whole = np.rint(np.divide(tokens, scale, out=np.zeros_like(tokens), where=scale > 0))
        return bytes(scale.tobytes() + whole.clip(-127, 127).astype(np.int8).tobytes())


def checksum(*blobs: bytes) -> int:
    """CRC-32 of embedding, motion and appearance, in this order: SQLite itself does not notice a flipped bit in a blob."""
    crc = 0
    for blob in blobs:
        crc = zlib.crc32(blob, crc)
    return crc


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide [..., E] by its length; InputError for zero vectors, which have no direction."""
    norm = np.sqrt(np.vecdot(vectors, vectors))
    if not norm.all():
        raise InputError("an embedding is all zeros; it must point somewhere.")
    return np.asarray(vectors / norm[..., None], np.float32)


def _array(name: str, value: object, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = np.asarray(value)
    if array.dtype.kind != "f" or array.shape != shape:
        raise InputError(f"{name} is {array.dtype} {list(array.shape)}; this memory accepts float {list(shape)}.")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{name} has NaN or infinite values; all must be finite.")
    return array
