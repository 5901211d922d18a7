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
from motionrt.runtime.bundle.manifest import (
    DRAWN,
    ChoiceInput,
    ColumnInput,
    FieldInput,
    ImageInput,
    Manifest,
    MaskInput,
    NumberInput,
    TextInput,
    TracksInput,
)  # fmt: skip
from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.media.drawn import Kept, brush, drags, field, is_array
from motionrt.runtime.media.flow import check_flow, dense_flow
from motionrt.runtime.media.limits import LIMITS, Limits
from motionrt.runtime.media.stills import read_image, still_size
from motionrt.runtime.media.video import decode_clip

_LARGEST = float(np.finfo(np.float32).max)
Values = dict[str, NDArray[Any]]


def complete(manifest: Manifest, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every declared input with what was given, or its default; left out are columns, and what may be drawn, if not given.

    `InputError` for a name that the bundle does not declare, and for an input that is missing.
    """
    if unknown := sorted(given.keys() - manifest.inputs.keys()):
        raise InputError(f"{unknown[0]!r} is no input of bundle '{manifest.name}'; it takes {', '.join(manifest.inputs)}.")
    every: dict[str, Any] = {}
    for name, spec in manifest.inputs.items():
        value = given.get(name)
        if value is None and isinstance(spec, ColumnInput | DRAWN):
            continue
        if isinstance(spec, TracksInput) and isinstance(value, Sequence) and not len(value):  # no tracks are none
            continue
        if value is None and spec.default is None and name not in given:
            raise InputError(f"{name} is missing; bundle '{manifest.name}' needs it{f': {spec.help}' if spec.help else '.'}")
        every[name] = spec.default if value is None and spec.default is not None else value
    return every


def values_of(bundle: Bundle, inputs: Mapping[str, Any], limits: Limits = LIMITS) -> tuple[Values, list[str]]:
    """The values that `inputs` (`complete`) give, by name, and what is kept in another way than it was given, in sentences.
    Raises what `convert` raises."""
    values, said = Values(), list[str]()
    declared = bundle.manifest.inputs
    drawn = {name: spec for name, spec in declared.items() if isinstance(spec, DRAWN)}
    kept = dict[str, Kept]()
    for image in {spec.image for spec in drawn.values()}:  # before it is read: Pillow may make it smaller then
        fitted = declared[image]
        assert isinstance(fitted, ImageInput)
        some = any(name in inputs for name, spec in drawn.items() if spec.image == image)
        size = still_size(check_image(image, inputs[image]), limits) if some else (fitted.width, fitted.height)
        kept[image] = Kept.of(*size, fitted.height, fitted.width)
    for name, value in inputs.items():
        if name not in drawn:
            values |= convert(bundle, name, value, limits)
    for name, spec in sorted(drawn.items(), key=lambda item: isinstance(item[1], TracksInput)):  # which may have a brush
        given, over = inputs.get(name), kept[spec.image]
        match spec:
            case MaskInput():
                values[name], told = brush(name, None if given is None else check_image(name, given), over, limits)
                said += told
            case FieldInput():
                if given is not None and not is_array(given):
                    given = _field_of(name, given, over, spec.frames, bundle.manifest.output.fps, limits)
                if given is not None:
                    values[name] = field(name, given, over, spec.frames, limits)
            case TracksInput():
                static = None if spec.mask is None else values[spec.mask]
                flow, mask, told = drags(name, [] if given is None else given, over, spec.frames, spec.unit, spec.cell, static)
                values |= {f"{name}.flow": flow, f"{name}.mask": mask}
                said += told
    return values, said


def convert(bundle: Bundle, name: str, value: Any, limits: Limits = LIMITS) -> Values:
    """The values that input `name`, which is not drawn, gives; `InputError` or `MediaError` for what it does not take."""
    match bundle.manifest.inputs[name]:
        case ImageInput() as spec:
            image = read_image(check_image(name, value), spec.height, spec.width, limits=limits)[None]  # in [-1, 1]
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
        case ColumnInput() | ChoiceInput():
            return {}  # it changes the rows of a loop: `column`; or the plan
        case _:
            pass  # what is drawn: `values_of`
    raise AssertionError("a kind of input without a converter")


def _field_of(name: str, file: Any, kept: Kept, targets: int, fps: float, limits: Limits) -> NDArray[np.float32]:
    """The field `[targets, 2, H, W]` of the clip that the video `file` begins with, cut as a picture is that is kept."""
    check_flow(f"{name}, the video {file},", "Give the field itself, an .npy file of floats")
    return dense_flow(decode_clip(file, targets + 1, kept.height, kept.width, fps, limits=limits).video)


def choice(name: str, spec: ChoiceInput, value: Any) -> str:
    """One of the options of `spec`; `InputError` for anything else."""
    if not isinstance(value, str) or value not in spec.options:
        raise InputError(f"{name} is {shown(value)}; allowed are {', '.join(spec.options)}.")
    return value


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
        fix = "download it, or pipe it into the command (curl ... | motionrt ... --image -)"
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
