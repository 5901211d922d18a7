"""A bundle's ONNX graph as OpenVINO can read it: our functions written out, and its weights found wherever they lie.

OpenVINO reads the operations of opset 23, but no functions of a model (our domain `motionrt`): package `onnx` puts their bodies
in place of their nodes. The graph then exists in memory only, and for such a graph OpenVINO opens no file outside of the folder
of the process. So the files of its weights are mapped into memory here, and the graph says where each weight lies there: in
place of a file's name stands a mark that OpenVINO shares with ONNX Runtime, and in place of an offset an address. Nothing is
copied, and a folder that cannot be written will do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motionrt.runtime.backends.seam import Array
from motionrt.runtime.dtypes import DTYPES
from motionrt.runtime.errors import BundleError

_IN_MEMORY = "*/_ORT_MEM_ADDR_/*"


@dataclass(frozen=True)
class Source:
    """A graph for OpenVINO: `model`, the bytes of an ONNX file, and the names of its inputs and outputs in their order.

    `maps`: the files that `model` points into. They must be held as long as anything that was compiled from it.
    """

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    maps: tuple[Array, ...]


def read_source(path: Path, name: str, inside: Path | None = None) -> Source:
    """The ONNX file `path` of the graph `name`. inside: the safetensors file that holds the weights which it leaves outside, by
    their names; None: they are where the graph says, beside it.

    Raises ImportError without package `onnx`, `BundleError` where a file has not what the graph needs.
    """
    import onnx
    from onnx.inliner import inline_local_functions

    model: Any = onnx.load(path, load_external_data=False)
    if model.functions:
        model = inline_local_functions(model)
    places = _beside(model, path.parent) if inside is None else _within(model, inside, name)
    maps: dict[Path, Array] = {}
    for tensor, (file, offset, length) in zip(_external(model), places, strict=True):
        if file not in maps:
            maps[file] = np.memmap(file, np.uint8, "r")
        if offset + length > maps[file].size:
            raise BundleError(f"graph '{name}' needs '{tensor.name}', and {file} ends before it. Export the bundle again.")
        del tensor.external_data[:]
        address = maps[file].ctypes.data + offset
        for key, value in (("location", _IN_MEMORY), ("offset", address), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    own = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(entry.name for entry in model.graph.input if entry.name not in own)
    return Source(model.SerializeToString(), inputs, tuple(entry.name for entry in model.graph.output), tuple(maps.values()))


def _external(model: Any) -> list[Any]:
    return [tensor for tensor in model.graph.initializer if tensor.data_location == 1]


def _beside(model: Any, folder: Path) -> list[tuple[Path, int, int]]:
    """File, offset and length in bytes of each external weight, as the graph says."""
    places = []
    for tensor in _external(model):
        said = {entry.key: entry.value for entry in tensor.external_data}
        width = next((dtype.bytes for dtype in DTYPES.values() if dtype.onnx == tensor.data_type), 0)
        length = int(said.get("length", math.prod(tensor.dims) * width))
        places.append((folder / said["location"], int(said.get("offset", 0)), length))
    return places


def _within(model: Any, file: Path, graph: str) -> list[tuple[Path, int, int]]:
    """The same where `file`, a safetensors file, has the weights by their names."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        table = json.loads(opened.read(size))
    places = []
    for tensor in _external(model):
        entry = table.get(tensor.name)
        if entry is None:
            raise BundleError(f"graph '{graph}' needs '{tensor.name}', which {file} does not hold. Export the bundle again.")
        kind = next((dtype.safetensors for dtype in DTYPES.values() if dtype.onnx == tensor.data_type), "")
        wanted, got = (kind, list(tensor.dims)), (entry["dtype"], entry["shape"])
        if wanted != got:
            raise BundleError(f"graph '{graph}' needs '{tensor.name}' as {wanted}; {file} has {got}. Export the bundle again.")
        start, end = entry["data_offsets"]
        places.append((file, 8 + size + start, end - start))
    return places
