"""Safetensors files as places on disk: every tensor's dtype, shape and byte range, read one tensor at a time.

The header is checked against the file's real size before anything else is done with it, so that a download that broke
off is found at once and not after an hour. Writing takes tensors one after the other: memory holds one of them.

Format: 8 bytes little-endian N, N bytes JSON {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}, data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrt.runtime import dtypes
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.files import replacing

DTYPES = {kind.safetensors: getattr(torch, name) for name, kind in dtypes.DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_ALIGN = 64  # bytes: ONNX external data is mapped, and vector loads like aligned weights


class CheckpointError(MotionRTError):
    """A checkpoint is missing, damaged, of another model, or holds what must not be executed."""


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: `offset` bytes from the beginning of `file`, `size` bytes, row-major, little-endian."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> Tensor:
        """The tensor itself, mapped from the file: its pages are page cache, and copied only where they are written to."""
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)
        try:
            mapped = np.memmap(self.file, np.uint8, "c", self.offset, self.size)
        except ValueError:  # the file is shorter than it was when its header was read
            raise CheckpointError(
                f"{self.file} ends inside the tensor `{self.key}`. Copy or download the file again."
            ) from None
        flat = torch.from_numpy(mapped)
        if self.offset % self.dtype.itemsize:  # other writers pad their headers as they like
            flat = flat.clone()
        return flat.view(self.dtype).view(self.shape)


def _refuse(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is no intact safetensors file: {why}. Copy or download it again.")


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of the file `path`; `CheckpointError` unless the header fits the file's size exactly."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            count = int.from_bytes(file.read(8), "little")
            if total < 8 or not 0 < count <= min(_LARGEST_HEADER, total - 8):
                raise _refuse(path, f"its header says {count} bytes, and the file has {total}")
            parsed = json.loads(file.read(count))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its header is no JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise _refuse(path, "its header is no JSON object")
    metadata = parsed.pop("__metadata__", {})
    base, tensors = 8 + count, {}
    for key, entry in parsed.items():
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            sizes = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            raise _refuse(path, f"the entry of `{key}` is {entry!r:.80}") from None
        if not sizes or end - begin != math.prod(shape) * dtype.itemsize:
            raise _refuse(path, f"`{key}` is {entry['dtype']} {list(shape)}, and its data {entry['data_offsets']}")
        if base + end > total:
            raise _refuse(path, f"it is cut off: `{key}` ends at byte {base + end}, and the file at {total}")
        tensors[key] = Stored(path, key, dtype, shape, base + begin, end - begin)
    if not isinstance(metadata, dict):
        raise _refuse(path, "its metadata is no JSON object")
    end = base
    for stored in sorted(tensors.values(), key=lambda item: (item.offset, item.size)):
        if stored.offset != end:
            raise _refuse(path, f"`{stored.key}` begins at byte {stored.offset}, where {end} is expected")
        end += stored.size
    if end != total:
        raise _refuse(path, f"its tensors end at byte {end}, and the file at {total}")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its `make` is called once, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Written:
    """A file that was written: where each tensor is, and the SHA-256 of all its bytes."""

    tensors: Mapping[str, Stored]
    sha256: str


def write_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> Written:
    """Write `entries` to `path`, whole or not at all, one tensor in memory at a time, hashed on the way.

    Data begins at a multiple of 64 bytes, and so does every tensor whose size is a multiple of 64: the others come last,
    because the format allows no holes. ValueError if a tensor is not what its entry declares.
    """
    entries = sorted(entries, key=lambda entry: math.prod(entry.shape) * entry.dtype.itemsize % _ALIGN != 0)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"tensor `{entry.name}` is to be written twice")
        size = math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + size]
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with replacing(path, CheckpointError) as partial:
        with partial.open("wb") as file:
            file.write(head)
            for entry in entries:
                value = entry.make().detach()
                if tuple(value.shape) != entry.shape or value.dtype != entry.dtype:
                    raise ValueError(
                        f"tensor `{entry.name}` is {value.dtype} {tuple(value.shape)}; declared {entry.dtype} {entry.shape}"
                    )
                if not value.numel():
                    continue
                flat = value.contiguous().view(-1).view(torch.uint8)
                digest.update(flat.numpy().data)
                if flat.any():
                    file.write(flat.numpy().data)
                else:  # a hole, where the disk has such
                    file.seek(flat.numel(), os.SEEK_CUR)
            file.truncate(len(head) + end)
    return Written(read_header(path)[0], digest.hexdigest())
