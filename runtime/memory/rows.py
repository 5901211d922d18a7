"""Clips and references as rows of a motion memory: checked, packed into blobs and unpacked, as the memory's layout declares."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.arguments import flag, instance, real, text_of, whole
from motionrt.runtime.bundle.manifest import Part
from motionrt.runtime.errors import InputError, shown

TOKENS = ("float16", "int8")
WORD = ""  # the key of the tags of captions' words, which no metadata has
_COMPARED = 2**20  # numbers of a part whose agreement is looked at: two dozen of them are read for a search
_LARGEST = 1_000_000_000  # bytes of a vector or a record: what SQLite keeps in one place


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip to add; times in seconds, embedding float32 [E].

    record: an array for each part that the memory keeps, of the part's dims: any float dtype for a float part, exactly the
    part's dtype for another. None of them for a memory that makes records on demand.
    """

    caption: str
    source: str
    start: float
    duration: float
    fps: float
    source_sha256: str
    embedding: NDArray[np.float32]
    record: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""


@dataclass(frozen=True, eq=False)
class Reference:
    """A retrieved clip. score: cosine with the query in [-1,1].

    words: how much of the prompt's words its caption has, in [-1, 1]; agreement: mean cosine of its motion with that of the
    other candidates, about the memory's own mean; looks: the cosine with the still's; NaN where they were not looked at
    (`Search` says what they count). unlike: how many clips whose captions fit as well stand behind it because they move unlike
    the others. probability: that the clip moves as the prompt says, in [0, 1], by score and words; NaN
    where the bundle does not say what these are worth.
    record: the parts by name, float ones as float32, others in their dtype; empty where the memory makes records on demand
    (`indexing.encoders.make_record`). memory: its name in a `MemorySet`, where the score is multiplied by the memory's weight.
    """

    id: int
    score: float
    caption: str
    source: str
    start: float
    duration: float
    record: Mapping[str, NDArray[Any]]
    memory: str = ""
    dataset: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    fps: float = 0.0
    source_sha256: str = ""
    words: float = math.nan
    agreement: float = math.nan
    looks: float = math.nan
    probability: float = math.nan
    unlike: int = 0


def reference(fields: Mapping[str, Any], **more: Any) -> Reference:
    """`Reference(**fields, **more)` for a fifth of the time: a search makes two dozen."""
    made: Reference = object.__new__(Reference)
    vars(made).update(fields, **more)
    return made


@dataclass(frozen=True)
class MemoryStats:
    """What `MotionMemory.stats` says.

    datasets: clips in each; bytes_db, bytes_index: on disk; generation: changes so far; tokens: how the float parts of
    records are kept, or "on demand"; index_state: "not needed", "missing", "current" or "behind by N clips" (which are
    searched exactly).
    """

    clips: int
    datasets: Mapping[str, int]
    bytes_db: int
    bytes_index: int
    generation: int
    tokens: str
    index_state: str


class Damaged(ValueError):
    """The file is not what was written; the text says where."""


class DamagedRow(Damaged):
    """Some rows are not what was written, while the others are. wrong: the ids of the clips, and why, as `has ...`."""

    def __init__(self, wrong: Mapping[int, str]) -> None:
        self.wrong = dict(wrong)
        first = "; ".join(f"clip {number} {why}" for number, why in [*self.wrong.items()][:3])
        super().__init__(f"{first}{f' and {len(wrong) - 3} more clips' if len(wrong) > 3 else ''}")


class Row(NamedTuple):
    """A clip as it is stored. told: caption, source, start, duration, fps, SHA-256, dataset, metadata as JSON."""

    told: tuple[Any, ...]
    embedding: bytes
    record: bytes | None

    def checksums(self, number: int) -> tuple[int, int, int]:
        """Those of the three parts, which are read at different times, for the clip of this id."""
        return checksum(number, self.told), checksum(number, self.embedding), checksum(number, self.record)


def checksum(number: int, value: object) -> int:
    """CRC-32 of what a table has of the clip `number`, its id too: SQLite itself does not notice a flipped bit in a row."""
    return zlib.crc32(value if isinstance(value, bytes) else msgspec.json.encode(value), number & 0xFFFFFFFF)


@dataclass(frozen=True)
class Layout:
    """What a memory keeps of a clip: a vector of `embedding` numbers, and the parts of a `record`, one after the other.

    fingerprint: of what made vectors and records (a bundle's). tokens: how float parts are kept: None as they are declared,
    "float16", or "int8" with a float32 scale for each row of the last dimension (largest magnitude / 127, symmetric).
    on_demand: records are not kept. words: those of captions are kept, so that they count in a search. calibration: as of a
    bundle's `MemorySpec`. InputError for what is not allowed.
    """

    embedding: int
    record: tuple[Part, ...]
    fingerprint: str
    tokens: str | None = None
    on_demand: bool = False
    words: bool = True
    calibration: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        for part in self.record:
            instance("a part of the record of a motion memory", part, Part, "a Part, as a bundle declares them")
        object.__setattr__(self, "embedding", whole("the embedding of a motion memory", self.embedding, 1, _LARGEST // 4))
        names = [part.name for part in self.record]
        sizes = [size for part in self.record for size in part.dims]
        good = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        if not good or not names or "" in names or len({*names}) < len(names):
            raise InputError(f"a motion memory of {self}: allowed are parts of different names, and whole sizes from 1 on.")
        if sum(8 * math.prod(part.dims) for part in self.record) > _LARGEST:
            raise InputError(f"a motion memory of {self}: a record may take {_LARGEST:,} bytes. Keep less of a clip.")
        if self.tokens is not None and (not isinstance(self.tokens, str) or self.tokens not in TOKENS):
            raise InputError(f"the tokens of a motion memory are {shown(self.tokens)}; allowed is {' or '.join(TOKENS)}.")
        text_of("the fingerprint of a motion memory", self.fingerprint)
        flag("on_demand", self.on_demand)
        flag("words", self.words)

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {part.dtype} {list(part.dims)}" for part in self.record)
        return f"an embedding of {self.embedding} and {parts or 'no parts'}"

    def probability(self, scores: NDArray[np.float32], words: NDArray[np.float32]) -> NDArray[np.float64] | None:
        """That clips of these cosines and shares of words [N] move as they were asked to; None where it is not known."""
        if self.calibration is None:
            return None
        constant, by_score, by_words = self.calibration
        logits = constant + by_score * scores.astype(np.float64) + by_words * words.astype(np.float64)
        return np.asarray(1 / (1 + np.exp(-logits)))

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """One record as it is stored, little-endian."""
        return np.dtype([(part.name, self._stored(part)) for part in self.record])

    @property
    def kept(self) -> str:
        """How float parts are kept, for people."""
        kinds = {self.tokens or part.dtype for part in self.record if _is_float(part)}
        return "on demand" if self.on_demand else ", ".join(sorted(kinds)) or "none"

    @property
    def moving(self) -> str | None:
        """The part of records by which clips agree: the first float one, if that is there and not too large to be compared."""
        parts = [part for part in self.record if _is_float(part) and not self.on_demand]
        return parts[0].name if parts and math.prod(parts[0].dims) <= _COMPARED else None

    def floating(self, name: str | None = None) -> Part:
        """The float part `name`, or the first one; InputError where there is none, or records are not kept."""
        if self.on_demand:
            raise InputError("this motion memory makes records on demand: it cannot be searched by them, nor by `distinct`.")
        allowed = [part for part in self.record if _is_float(part)]
        for part in allowed:
            if name is None or isinstance(name, str) and name == part.name:
                return part
        wanted = "`distinct` compares" if name is None else f"the record is searched by {shown(name)};"
        names = " or ".join(repr(part.name) for part in allowed) or "none: this memory's records have no float part"
        raise InputError(f"{wanted} float parts of the record; allowed is {names}.")

    def query(self, name: str | None, value: object) -> NDArray[np.float32]:
        """The unit vector to search by, flattened: an embedding (name None) or a float part of the record."""
        if name is None:
            return unit(_floats("the query embedding", value, (self.embedding,)))
        return unit(_floats(f"the {name} of the query", value, self.floating(name).dims).reshape(-1))

    def row(self, number: int, clip: Clip) -> Row:
        """A clip as it is stored; InputError, which names it by `number`, for what a memory cannot hold."""
        instance(f"entry {number}", clip, Clip, "a Clip")
        name = f"clip {number} ({shown(clip.source)})"
        for what, kept in (("metadata", clip.metadata), ("record", clip.record)):
            instance(f"the {what} of {name}", kept, Mapping, "a mapping from names")
        texts = (clip.caption, clip.source, clip.source_sha256, clip.dataset, *clip.metadata, *clip.metadata.values())
        try:
            for text in texts:
                text.encode()
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise InputError(f"{name}: caption, source, SHA-256, dataset and metadata must be valid text ({error}).") from error
        if not clip.caption.strip():
            raise InputError(f"{name} has an empty caption; say in a few words what moves and how.")
        if WORD in clip.metadata:
            raise InputError(f"{name} has metadata without a name (an empty key); give it one.")
        if "dataset" in clip.metadata:
            raise InputError(f"{name} has `dataset` in its metadata; a clip has a field for it: Clip(dataset=...).")
        times = [
            seconds(f"the {what} of {name}", value)
            for what, value in (("start", clip.start), ("duration", clip.duration), ("fps", clip.fps))
        ]
        embedding = _floats(f"`embedding` of {name}", clip.embedding, (self.embedding,))
        unit(embedding)
        told = (
            clip.caption, clip.source, *times,
            clip.source_sha256, clip.dataset, json.dumps(dict(clip.metadata), ensure_ascii=False, sort_keys=True),
        )  # fmt: skip
        return Row(told, embedding.astype("<f4").tobytes(), self._pack(clip.record, name))

    def embeddings(self, ids: Sequence[int], blobs: Sequence[Any]) -> NDArray[np.float32]:
        """Stored embeddings as unit vectors [N,E]; DamagedRow names an impossible one."""
        values = _joined(ids, blobs, np.dtype(("<f4", (self.embedding,))), "embedding")
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.vecdot(values, values)
        sound = np.isfinite(squares) & (squares > 0)
        if not sound.all():
            raise DamagedRow({ids[int(np.argmin(sound))]: "has an impossible embedding"})
        return np.asarray(values / np.sqrt(squares)[:, None], np.float32)

    def unpack(self, ids: Sequence[int], blobs: Sequence[Any], *names: str) -> dict[str, NDArray[Any]]:
        """The named parts (all unless named) of stored records, each [N, *dims]; DamagedRow names one of another size."""
        rows = _joined(ids, blobs, self.dtype, "record")
        found: dict[str, NDArray[Any]] = {}
        for part, is_float in self._parts:
            if names and part.name not in names:
                continue
            values = rows[part.name]
            if is_float and self.tokens == "int8":
                values = (values["values"] * values["scale"]).reshape(len(blobs), *part.dims)
            found[part.name] = values.astype(np.float32 if is_float else part.dtype)
        return found

    def unpack_one(self, number: int, blob: object) -> dict[str, NDArray[Any]]:
        """The record of clip `number`."""
        return {name: values.reshape(values.shape[1:]) for name, values in self.unpack([number], [blob]).items()}

    def rounded(self, record: Mapping[str, NDArray[Any]], what: str) -> dict[str, NDArray[Any]]:
        """A record as it would come back from a memory; InputError, which calls its clip `what`, if none can hold it."""
        return self.unpack_one(0, self._pack(record, what))

    @cached_property
    def _parts(self) -> list[tuple[Part, bool]]:
        return [(part, _is_float(part)) for part in self.record]

    def _stored(self, part: Part) -> np.dtype[Any]:
        if _is_float(part) and self.tokens == "int8":
            width = part.dims[-1] if part.dims else 1
            rows = math.prod(part.dims) // width
            return np.dtype([("scale", "<f4", (rows, 1)), ("values", "i1", (rows, width))])
        kind = self.tokens if self.tokens is not None and _is_float(part) else part.dtype
        return np.dtype((np.dtype(kind).newbyteorder("<"), part.dims))

    @cached_property
    def _narrowest(self) -> dict[str, tuple[str, Any]]:
        """Of each float part, the narrowest dtype that it is ever in, and the largest number of that."""
        kinds = {part.name: {part.dtype, self.tokens or part.dtype} - {"int8"} for part in self.record if _is_float(part)}
        largest = {name: min((np.finfo(kind).max, kind) for kind in some) for name, some in kinds.items()}
        return {name: (kind, most) for name, (most, kind) in largest.items()}

    def _pack(self, record: Mapping[str, NDArray[Any]], clip: str) -> bytes | None:
        names = [] if self.on_demand else [part.name for part in self.record]
        if set(record) != set(names):
            kept = f"keeps {', '.join(names)}" if names else "makes records on demand, and keeps none"
            raise InputError(f"the record of {clip} has {', '.join(map(str, record)) or 'nothing'}; this memory {kept}.")
        if self.on_demand:
            return None
        row = np.zeros((), self.dtype)
        for part in self.record:
            what, value = f"`{part.name}` of {clip}", record[part.name]
            if not _is_float(part):
                row[part.name] = _array(what, value, part.dims, part.dtype)
                continue
            values = _floats(what, value, part.dims)
            kind, largest = self._narrowest[part.name]
            if np.abs(values).max() > largest:
                raise InputError(f"{what} exceeds {largest:g}, the largest {kind}; it cannot be kept.")
            if self.tokens == "int8":
                tokens = values.reshape(row[part.name]["values"].shape)
                scale = np.abs(tokens).max(axis=1, keepdims=True) / np.float32(127)
                whole = np.rint(np.divide(tokens, scale, out=np.zeros_like(tokens), where=scale > 0))
                row[part.name]["scale"], row[part.name]["values"] = scale, whole.clip(-127, 127)
            else:
                row[part.name] = values.astype(part.dtype)  # first to what is declared, whatever it is kept in
        return row.tobytes()


def seconds(name: str, value: object) -> float:
    """A finite number from 0 on; InputError."""
    number = real(value)
    if number is not None and number >= 0:
        return number + 0.0  # SQLite does not keep the sign of -0.0
    raise InputError(f"{name} is {shown(value)}; allowed is a finite number from 0 on.")


def unit(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide [E] by its length; InputError for a vector without a direction."""
    with np.errstate(over="ignore"):
        square = np.vecdot(vector, vector)
    if not 0 < square < np.inf:
        raise InputError("an embedding is all zeros, or too large for float32; it must point somewhere.")
    return np.asarray(vector / np.sqrt(square), np.float32)


def _is_float(part: Part) -> bool:
    return np.dtype(part.dtype).kind == "f"


def _array(what: str, value: object, dims: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """`value` as it is if it has the shape and the dtype ("float": any float); InputError, which calls it `what`."""
    try:
        array = np.asarray(value)
    except Exception as error:  # lists of different lengths, and whatever an object may raise
        raise InputError(f"{what} is {shown(value)}, which is no array; this memory accepts {dtype} {list(dims)}.") from error
    if array.shape != dims or not (array.dtype.kind == "f" if dtype == "float" else array.dtype == np.dtype(dtype)):
        raise InputError(f"{what} is {array.dtype} {list(array.shape)}; this memory accepts {dtype} {list(dims)}.")
    return array


def _floats(what: str, value: object, dims: tuple[int, ...]) -> NDArray[np.float32]:
    """`value` as finite float32 of the shape; InputError, which calls it `what`."""
    array = _array(what, value, dims, "float")
    if not np.isfinite(array).all():
        raise InputError(f"{what} has NaN or infinite values; all must be finite.")
    if array.dtype.itemsize <= 4:
        return array.astype(np.float32)
    with np.errstate(over="ignore"):  # said below
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{what} exceeds the largest float32; it cannot be kept.")
    return array


def _joined(ids: Sequence[int], blobs: Sequence[Any], kind: np.dtype[Any], part: str) -> NDArray[Any]:
    """Blobs as rows of `kind`; DamagedRow names one of another size, or of no bytes at all (a column may hold anything)."""
    for number, blob in zip(ids, blobs, strict=True):
        if not isinstance(blob, bytes) or len(blob) != kind.itemsize:
            raise DamagedRow({number: f"has {len(blob) if isinstance(blob, bytes) else 0} bytes of {part}"})
    return np.frombuffer(b"".join(blobs), kind).reshape(len(blobs), *kind.shape) if blobs else np.empty(0, kind)
