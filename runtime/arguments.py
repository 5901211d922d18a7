"""Checks of arguments that several parts make: `InputError` for what is not allowed, before any work.

Only the standard library here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

from motionrt.runtime.errors import InputError, shown

LAST_ID = 2**63 - 1  # of a clip: SQLite's largest number


def path_of(name: str, value: object) -> Path:
    """A file or directory by its name: text without zero bytes that the system can encode, or an `os.PathLike` of one."""
    try:
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
        if isinstance(text, str) and text and b"\0" not in os.fsencode(text):
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise InputError(f"{name} is {shown(value)}; allowed is a path, as text or a pathlib.Path.")


def text_of(name: str, value: object) -> str:
    """Text that is valid Unicode: no lone surrogates."""
    if isinstance(value, str):
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            pass
    raise InputError(f"{name} is {shown(value)}; allowed is valid text.")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number, Python's or NumPy's, from `least` to `most`; True and False are none."""
    number = _index(value)
    if number is None or number < least or most is not None and number > most:
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {shown(value)}; allowed is a whole number {limits}.")
    return number


def real(value: Any) -> float | None:
    """A finite number as a float, Python's or NumPy's; None for anything else. True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}; allowed is True or False.")
    return value


def listed(name: str, values: Any, of: str) -> list[Any]:
    """What can be gone through and is no text, as a list; of: what it must hold, for the sentence."""
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray):
        try:
            return list(values)
        except TypeError:  # such as an array without dimensions
            pass
    raise InputError(f"{name} is {shown(values)}; allowed are {of}, in a list or the like.")


def ids_of(values: Any) -> list[int]:
    """Ids of clips."""
    return [whole("an id of a clip", number, 0, LAST_ID) for number in listed("ids", values, "ids of clips")]


def called(name: str, value: object, of: str) -> Callable[..., object] | None:
    """A function, or None; of: what of, for the sentence."""
    if value is not None and not callable(value):
        raise InputError(f"{name} is {shown(value)}; allowed is a function of {of}, or None.")
    return value


def instance(name: str, value: object, kind: type, how: str) -> None:
    """Raise unless `value` is one of `kind`; how: how to get one, for the sentence."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}; allowed is {how}.")


def _index(value: Any) -> int | None:
    """`value` as an int if it is a whole number."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return int(value.__index__())
    except Exception:  # an array of several numbers
        return None
