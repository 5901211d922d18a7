"""An order as it came over HTTP to a `Request`, by what the bundle declares: text to numbers, uploads to pictures."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import (
    ChoiceInput,
    ColumnInput,
    FieldInput,
    ImageInput,
    MaskInput,
    NumberInput,
    TextInput,
    TracksInput,
)
from motionrt.runtime.errors import InputError, shown
from motionrt.runtime.job import Request
from motionrt.runtime.media.drawn import is_array
from motionrt.runtime.media.flow import check_flow
from motionrt.runtime.media.pictures import open_picture
from motionrt.runtime.media.video import SPANS
from motionrt.runtime.memory.search import Search
from motionrt.runtime.noise import check_seed
from motionrt.runtime.serve.messages import Order

PIXELS = 50_000_000  # of a picture as its file stores it: decoded they take 400 MB
OUTPUTS = {"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif", "png": "image/png"}
MOST_SEEDS = 8
MOST_FOUND = 64  # clips of one search
REFERENCE = "input_reference"  # what the protocol calls the first picture that a bundle takes


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """An order that was read: its request but for the seed, the seeds, the memory to search, the form of the video."""

    request: Request
    seeds: list[int]
    memory: str | None
    output: str
    fields: dict[str, Any]


def read_order(bundle: Bundle, order: Order, memories: list[str]) -> Asked:
    """`order` for `bundle`, which may search `memories` (the first unless it names one); `InputError` names the field at fault.

    `Asked.fields` is what was taken, with every default that the answer depends on: the same order again.
    """
    manifest, given = bundle.manifest, dict(order.fields)
    files, pictures = dict(order.files), [name for name, spec in manifest.inputs.items() if isinstance(spec, ImageInput)]
    if REFERENCE in files and REFERENCE not in manifest.inputs:
        if not pictures or pictures[0] in files:
            takes = ", ".join(pictures) or "no picture; leave it out"
            raise InputError(f"{REFERENCE}: bundle '{manifest.name}' takes {takes}.")
        files[pictures[0]] = files.pop(REFERENCE)
    inputs: dict[str, Any] = {}
    for name, spec in manifest.inputs.items():
        match spec:
            case ImageInput():
                if name in given:
                    raise InputError(f"{name} is no file; upload a png, jpeg or webp, or give a data URL of one.")
                if name in files:
                    inputs[name] = _picture(name, files.pop(name))
                elif spec.default is None:
                    raise InputError(f"{name} is missing: upload a png, jpeg or webp as `{REFERENCE}`.")
            case MaskInput() | FieldInput():
                if (value := given.pop(name, None)) not in (None, ""):
                    raise InputError(f"{name} is {shown(value)}; upload a file, or give a data URL of one.")
                if name in files:
                    path = files.pop(name)
                    if isinstance(spec, FieldInput) and not is_array(path):  # a stranger's video is not read in this process
                        raise InputError(f"{name} cannot be read as an array; upload an .npy file, as numpy.save writes it.")
                    inputs[name] = _picture(name, path) if isinstance(spec, MaskInput) else path
            case TracksInput():
                if given.get(name) not in (None, ""):
                    inputs[name] = _tracks(name, given[name])
                given.pop(name, None)
            case TextInput():
                if name in given:
                    inputs[name] = given.pop(name)
            case ChoiceInput():
                if (option := _take(given, name, _text)) is not None:
                    inputs[name] = option
            case NumberInput() | ColumnInput():
                if given.get(name) is not None:
                    inputs[name] = _number(name, given[name], isinstance(spec, ColumnInput))
                given.pop(name, None)
    if files:
        raise InputError(f"{next(iter(files))} is a file; this bundle takes {', '.join(pictures) or 'none; leave it out'}.")
    shown_ = manifest.output
    size, seconds = f"{shown_.width}x{shown_.height}", shown_.frames / shown_.fps
    if (asked := given.pop("size", None)) not in (None, "", size):
        raise InputError(f"size is {shown(asked)}; the videos of '{manifest.name}' are {size}.")
    asked = given.pop("seconds", None)
    if asked not in (None, "") and not abs(_number("seconds", asked) - seconds) <= 0.01:
        raise InputError(f"seconds is {shown(asked)}; the videos of '{manifest.name}' last {seconds:g} s.")
    output = _take(given, "output", _text) or "mp4"
    if output not in OUTPUTS:
        raise InputError(f"output is {shown(output)}; allowed are {', '.join(OUTPUTS)}.")
    memory = given.pop("memory", None) or (memories[0] if memories else None)
    if memory is not None and memory not in memories:
        raise InputError(f"memory is {shown(memory)}; '{manifest.name}' may search {', '.join(memories) or 'none'}.")
    options = {name: _take(given, name, read) for name, read in _OPTIONS.items()}
    search = _search(given)
    seed, count = _take(given, "seed", _whole), _take(given, "n", _whole)
    if given:
        raise InputError(
            f"{next(iter(given))} is no field of '{manifest.name}'; it takes {', '.join([*manifest.inputs, *_OTHERS])}."
        )
    seed = secrets.randbits(31) if seed is None else check_seed(seed)
    if count is not None and not 1 <= count <= MOST_SEEDS:
        raise InputError(f"n is {count}; allowed is 1 to {MOST_SEEDS}.")
    seeds = [check_seed(seed + i) for i in range(1 if count is None else count)]
    request = Request(inputs, seeds[0], search=Search(**search), **options)
    came = ImageInput | MaskInput | FieldInput  # as files
    kept = {name: value for name, value in inputs.items() if not isinstance(manifest.inputs[name], came)}
    kept |= {name: value for name, value in (options | search).items() if value is not None}
    kept |= {"seed": seeds[0], "n": len(seeds), "output": output} | ({} if memory is None else {"memory": memory})
    return Asked(request=request, seeds=seeds, memory=memory, output=output, fields=kept)


def read_search(fields: Mapping[str, Any]) -> tuple[str, int, Search]:
    """The text, the number of clips and the options of a search over HTTP; `InputError` names the field at fault.

    With fewer clips than that, those that there are will do.
    """
    given = dict(fields)
    text, count, search = _take(given, "text", _text), _take(given, "k", _whole), _search(given)
    if given:
        raise InputError(f"{next(iter(given))} is no field of a search; it takes text, k, {', '.join(_SEARCH)}.")
    if text is None or not text.strip():
        raise InputError(f"text is {shown(text)}; say what moves, and how.")
    count = 4 if count is None else count
    if not 1 <= count <= MOST_FOUND:
        raise InputError(f"k is {count}; allowed is 1 to {MOST_FOUND}.")
    return text, count, Search(**search).lenient()


def read_clip(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What comes with a video that a memory is given over HTTP, as `Adding` has it; `InputError` names the field at fault."""
    given = dict(fields)
    taken = {name: value for name, read in _CLIP.items() if (value := _take(given, name, read)) is not None}
    if given:
        raise InputError(f"{next(iter(given))} is no field of a clip; it takes video, {', '.join(_CLIP)}.")
    if taken.get("describe"):
        check_flow("A clip that comes over HTTP", "Say what moves and how, as `caption`, and leave out `describe`")
    elif not taken.get("caption", "").strip():
        raise InputError("caption is missing: say in a few words what moves and how, or ask for `describe`.")
    if taken.get("span", "start") not in SPANS:
        raise InputError(f"span is {shown(taken['span'])}; allowed are {', '.join(SPANS)}.")
    start, end = taken.get("start", 0.0), taken.get("end", 1e6)
    if not 0 <= start < end <= 1e6:
        raise InputError(f"start is {start:g} and end {end:g}; allowed are seconds, the end after the start.")
    return taken


def _picture(name: str, path: str) -> str:
    """`path`, of a picture that is not too large to be decoded; `InputError` by what its head says."""
    try:
        with open(path, "rb") as file, open_picture(file, path) as picture:
            width, height = picture.size
    except Exception:  # Pillow raises nearly anything; reading it says what is wrong with it
        return path
    if width * height > PIXELS:
        most = f"{PIXELS / 1e6:g} million"
        raise InputError(f"{name} is {width} x {height}, {width * height / 1e6:.0f} million pixels; at most {most} are taken.")
    return path


def _search(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a search, taken out of `given`."""
    return {name: value for name in _SEARCH if (value := _take(given, name, _SEARCH[name])) is not None}


def _take(given: dict[str, Any], name: str, read: Callable[[str, Any], Any]) -> Any:
    value = given.pop(name, None)
    return None if value is None or value == "" else read(name, value)


def _number(name: str, value: Any, several: bool = False) -> Any:
    """A number; with `several` a list of them too. Forms bring text."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if several and text.startswith("[") else float(text)
        except (ValueError, RecursionError):
            raise InputError(f"{name} is {shown(value)}; it must be a number.") from None
    if several and isinstance(value, list):
        return [_number(name, item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is {shown(value)}; it must be a number{', or a list of them' if several else ''}.")
    return value


def _tracks(name: str, value: Any) -> list[Any]:
    """Tracks: a list, as JSON too, or the points of one as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else [value]
        except (ValueError, RecursionError):
            raise InputError(f"{name} is {shown(value)}; it must be tracks, such as [[[10, 20], [30, 25]]].") from None
    return value if isinstance(value, list) else [value]


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int):
        raise InputError(f"{name} is {shown(value)}; it must be a whole number.")
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}; it must be text.")
    return value


def _flag(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool) or str(value).lower() in known:
        return value if isinstance(value, bool) else known[str(value).lower()]
    raise InputError(f"{name} is {shown(value)}; it must be true or false.")


def _references(name: str, value: Any) -> int | list[int]:
    """How many clips, or which: ids."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"{name} is {shown(value)}; it must be a number of clips, or a list of ids.") from None
    return [_whole(name, item) for item in value] if isinstance(value, list) else _whole(name, value)


def _sources(name: str, value: Any) -> str | list[str]:
    """A source, or a list of such."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            pass  # a file may have such a name
    return [_text(name, item) for item in value] if isinstance(value, list) else _text(name, value)


def _where(name: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict) or len(value) > 16:
        raise InputError(f'{name} is {shown(value)}; it must be like {{"dataset": "mine"}}, of at most 16 keys.')
    return value


def _texts(name: str, value: Any) -> Mapping[str, str]:
    texts = dict(_where(name, value))
    if not all(isinstance(text, str) for text in texts.values()):
        raise InputError(f"{name} is {shown(value)}; it must be up to 16 names, each with a text.")
    return texts


_OPTIONS: dict[str, Callable[[str, Any], Any]] = {"solver": _text, "steps": _whole, "references": _references}
_SEARCH: dict[str, Callable[[str, Any], Any]] = {
    "where": _where, "exclude_source": _sources, "least_seconds": _number, "most_seconds": _number, "minimum_score": _number,
    "minimum_probability": _number, "distinct": _number, "diversity": _number, "words": _number, "agreement": _number,
    "looks": _flag, "without_damaged": _flag,
}  # fmt: skip
_CLIP: dict[str, Callable[[str, Any], Any]] = {
    "caption": _text, "start": _number, "end": _number, "span": _text, "dataset": _text, "metadata": _texts, "describe": _flag,
}  # fmt: skip
_OTHERS = ("seed", "n", *_OPTIONS, *_SEARCH, "memory", "output", "size", "seconds")
