"""What a caller gives, as the values that a plan begins with: one converter, with its checks, for each kind of input.

The options of the command line and the keywords of `MotionPipeline` are made from the inputs that a bundle declares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import ColumnInput, ImageInput, Manifest, NumberInput, TextInput
from motionrt.runtime.errors import InputError
from motionrt.runtime.media.video import read_image

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
            image = read_image(value, spec.height, spec.width)[None]  # in [-1, 1]
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
                raise InputError(f"{name} is {value}; allowed is a number from {spec.min} to {spec.max}.")
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
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise InputError(f"{name} is {value!r}; it must be a finite number.")
    return float(value)


def _in_range(image: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """An image in [-1, 1] in another range."""
    return image if (low, high) == (-1, 1) else np.asarray(low + (image + 1) * ((high - low) / 2), np.float32)
