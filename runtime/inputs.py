"""What a caller gives, as the values that a plan begins with: one converter, with its checks, for each kind of input.

The options of the command line and the keywords of `MotionPipeline` are made from the inputs that a bundle declares.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import ColumnInput, ImageInput, Manifest, NumberInput, TextInput
from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.media.video import read_image

_LARGEST = float(np.finfo(np.float32).max)
Values = dict[str, NDArray[Any]]


def complete(manifest: Manifest, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every declared input with what was given, or its default; a column that was not given is left out.

    `InputError` for a name that the bundle does not declare, and for an input that is missing.
    """
    if unknown := sorted(given.keys() - manifest.inputs.keys()):
        raise InputError(f"{unknown[0]!r} is no input of bundle '{manifest.name}'; it takes {', '.join(manifest.inputs)}.")
    every: dict[str, Any] = {}
    for name, spec in manifest.inputs.items():
        value = given.get(name)
        if value is None and isinstance(spec, ColumnInput):
            continue
        if value is None and spec.default is None and name not in given:
            raise InputError(f"{name} is missing; bundle '{manifest.name}' needs it{f': {spec.help}' if spec.help else '.'}")
        every[name] = spec.default if value is None and spec.default is not None else value
    return every


def convert(bundle: Bundle, name: str, value: Any) -> Values:
    """The values that input `name` gives, by name; `InputError` or `MediaError` for what it does not take."""
    match bundle.manifest.inputs[name]:
        case ImageInput() as spec:
            image = read_image(check_image(name, value), spec.height, spec.width)[None]  # in [-1, 1]
            return {key: _in_range(image, *span) for key, span in spec.gives.items()}
        case TextInput() as spec:
            what = f"the {name.replace('_', ' ')}"
            if spec.tokenizer is None:
                if not isinstance(value, str):
                    raise InputError(f"{what} is of type {type(value).__name__}; it must be a string.")
                return {}
            port = bundle.manifest.port(f"{name}.input_ids")
            length = port.dims[1].min if port is not None else 0
            return {f"{name}.{key}": ids for key, ids in bundle.tokenize(spec.tokenizer, value, length, what).items()}
        case NumberInput() as spec:
            number = check_number(name, value)
            if not (spec.min is None or number >= spec.min) or not (spec.max is None or number <= spec.max):
                raise InputError(f"{name} is {shown(value)}; allowed is a number from {spec.min} to {spec.max}.")
            port = bundle.manifest.port(name)
            return {name: np.full(port.shape if port is not None else (1,), number, np.float32)}
        case ColumnInput():
            return {}  # it changes the rows of a loop: `column`
    raise AssertionError("a kind of input without a converter")


def column(name: str, value: Any, steps: int) -> NDArray[np.float32] | float:
    """A number for all steps, or one for each of `steps`; `InputError` for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        return check_number(name, value)
    if len(value) != steps:
        raise InputError(f"{name} has {len(value)} numbers for {steps} steps; give one number, or one for each step.")
    return np.array([check_number(f"{name} of step {step}", number) for step, number in enumerate(value, 1)], np.float32)


def check_number(name: str, value: Any) -> float:
    """`value` as a float; `InputError` unless it is a finite number."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    number = value if isinstance(value, int) or not real else float(value)
    if not real or not -_LARGEST <= number <= _LARGEST:  # not NaN either
        raise InputError(f"{name} is {shown(value)}; it must be a finite number, within float32.")
    return float(number)


def check_image(name: str, value: Any) -> Any:
    """`value` if it may be a picture: a file's path, a Pillow image or an array; `InputError` otherwise."""
    if isinstance(value, str) and re.match(r"\w[\w+.-]+://", value):
        fix = "download it, or pipe it into the command (curl ... | motionrt generate --image - ...)"
        raise InputError(f"{name} is {shown(value)}; nothing is fetched from elsewhere: {fix}.")
    if not isinstance(value, str | os.PathLike | np.ndarray | Image.Image):
        allowed = "the path of a file, a Pillow image, or a uint8 array [h,w], [h,w,3] or [h,w,4]"
        raise InputError(f"{name} is a {type(value).__name__}; allowed is {allowed}.")
    if isinstance(value, Image.Image) and 0 in value.size:
        raise InputError(f"{name} is {value.width}x{value.height} pixels; allowed is 1x1 or more.")
    return value


def _in_range(image: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """An image in [-1, 1] in another range."""
    return image if (low, high) == (-1, 1) else np.asarray(low + (image + 1) * ((high - low) / 2), np.float32)
