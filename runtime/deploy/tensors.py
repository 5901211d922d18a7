"""What a bundle takes and gives as tensors of Triton Inference Server, and tensors as a request."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from numpy.typing import NDArray

from motionrt.runtime.bundle.manifest import (
    ChoiceInput,
    ColumnInput,
    FieldInput,
    ImageInput,
    Manifest,
    MaskInput,
    NumberInput,
    TextInput,
    TracksInput,
)
from motionrt.runtime.errors import BundleError, InputError, MediaError, shown
from motionrt.runtime.media.pictures import open_picture
from motionrt.runtime.memory.search import Search
from motionrt.runtime.pipeline import MotionPipeline, Request

FILE = "_file"  # behind the name of a picture: the same input as the file of one
OUTPUTS = ("frames", "mp4", "base64")  # forms of the video; base64: the mp4 as text, for JSON
_SEARCH = tuple(option.name for option in fields(Search))


@dataclass(frozen=True)
class Tensor:
    """An input or output of the model: `kind` is Triton's name of its type without `TYPE_`; -1 in `dims` is any size."""

    name: str
    kind: str
    dims: tuple[int, ...]
    optional: bool = False


def inputs_of(manifest: Manifest) -> list[Tensor]:
    """The inputs that the bundle declares, and those that every request has. `BundleError` where two share a name.

    A picture may come as pixels or as a file (`NAME_file`), so both are optional, and it is for `request_of` to say that one
    is missing.
    """
    tensors = list[Tensor]()
    for name, spec in manifest.inputs.items():
        match spec:
            case ImageInput():
                tensors += [Tensor(name, "UINT8", (-1, -1, 3), True), Tensor(name + FILE, "STRING", (1,), True)]
            case MaskInput():
                tensors += [Tensor(name, "UINT8", (-1, -1), True), Tensor(name + FILE, "STRING", (1,), True)]
            case FieldInput():
                tensors.append(Tensor(name, "FP32", (-1, 2, -1, -1), True))
            case TracksInput():
                tensors.append(Tensor(name, "STRING", (-1,), True))
            case ColumnInput():
                tensors.append(Tensor(name, "FP32", (-1,), True))
            case NumberInput():
                tensors.append(Tensor(name, "FP32", (1,), spec.default is not None))
            case TextInput() | ChoiceInput():
                tensors.append(Tensor(name, "STRING", (1,), spec.default is not None))
    every = {"seed": "INT64", "steps": "INT32", "solver": "STRING", "output": "STRING"}
    every |= {} if manifest.memory is None else {"references": "INT32", "search": "STRING"}
    tensors += [Tensor(name, kind, (1,), True) for name, kind in every.items()]
    names = [tensor.name for tensor in tensors]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BundleError(f"bundle '{manifest.name}' has an input {min(twice)!r}, a name that each of our Triton models has.")
    return tensors


def outputs_of(manifest: Manifest) -> list[Tensor]:
    """What the model answers: `stage` and `progress` after each call of a graph; the others once, at the end."""
    field = [] if manifest.output.field is None else [Tensor("field", "FP32", (-1, 2, -1, -1))]
    return [
        Tensor("stage", "STRING", (1,)), Tensor("progress", "FP32", (1,)), Tensor("frames", "UINT8", (-1, -1, -1, 3)),
        Tensor("video", "STRING", (1,)), *field, Tensor("fps", "FP32", (1,)), Tensor("about", "STRING", (1,)),
    ]  # fmt: skip


def request_of(pipeline: MotionPipeline, given: Mapping[str, NDArray[Any]]) -> tuple[Request, str]:
    """The request that tensors by name are, and the form of the video (one of `OUTPUTS`).

    Texts are arrays of bytes objects, in UTF-8; a dimension of 1 in front, as warm-up samples have it, is dropped. Nothing that
    is given names a file of this machine. Raises `InputError` and `MediaError` for what cannot be read; whether the bundle
    takes it is for `pipeline.start` to say.
    """
    manifest = pipeline.bundle.manifest
    rest = {tensor.name: _plain(tensor, given[tensor.name]) for tensor in inputs_of(manifest) if tensor.name in given}
    taken: dict[str, Any] = {}
    for name, spec in manifest.inputs.items():
        if isinstance(spec, ImageInput | MaskInput) and name + FILE in rest:
            if name in rest:
                raise InputError(f"{name} is given twice: as pixels and as a file; leave one of them out.")
            taken[name] = _picture(name, rest.pop(name + FILE)[0])
        if name not in rest:
            continue
        value = rest.pop(name)
        match spec:
            case TextInput() | ChoiceInput():
                taken[name] = _text(name, value[0])
            case TracksInput():
                taken[name] = [_text(name, text) for text in value]
            case NumberInput():
                taken[name] = float(value[0])
            case ColumnInput():
                taken[name] = float(value[0]) if value.size == 1 else value
            case _:
                taken[name] = value
    taken |= {name: int(rest[name][0]) for name in ("seed", "steps", "references") if name in rest}
    if "solver" in rest:
        taken["solver"] = _text("solver", rest["solver"][0])
    if "search" in rest:
        taken |= _search(_text("search", rest["search"][0]))
    output = _text("output", rest["output"][0]) if "output" in rest else OUTPUTS[0]
    if output not in OUTPUTS:
        raise InputError(f"output is {shown(output)}; allowed are {', '.join(OUTPUTS)}.")
    return pipeline.request(**taken), output


def _plain(tensor: Tensor, value: NDArray[Any]) -> NDArray[Any]:
    value = value[0] if value.ndim == len(tensor.dims) + 1 and len(value) == 1 else value
    if not value.size:
        raise InputError(f"{tensor.name} is empty; leave it out, or give one value at least.")
    return value


def _text(name: str, data: bytes | str) -> str:
    try:
        return data if isinstance(data, str) else data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{name} is not in UTF-8.") from None


def _picture(name: str, data: bytes) -> Any:
    """A png, jpeg or webp, its bytes or those in base64, as an open picture."""
    try:
        data = base64.b64decode(data, validate=True)
    except ValueError:
        pass  # no picture is base64 by chance: all begin with what is none
    try:
        return open_picture(io.BytesIO(data), f"the {name}")
    except Exception as error:  # Pillow raises nearly anything on damaged files
        fix = "give the bytes of an intact png, jpeg or webp, or these in base64"
        raise MediaError(f"{name}{FILE} cannot be read as a picture; {fix}.") from error


def _search(text: str) -> dict[str, Any]:
    """Fields of `Search` from JSON."""
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict) or not options.keys() <= {*_SEARCH}:
        raise InputError(f"search is {shown(text)}; allowed is a JSON object with any of {', '.join(_SEARCH)}.")
    return options
