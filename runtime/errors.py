"""Errors that a user can act on: each says what, got, allowed and how to fix."""

from __future__ import annotations

from typing import Any


def install(*extras: str) -> str:
    """How to get what an extra of motionrt brings, for a sentence; of several extras, any one will do."""
    first, *others = (f"motionrt[{extra}]" for extra in extras)
    return f"`pip install {first}`" + (f" (or {', '.join(others)})" if others else "")


def shown(value: object) -> str:
    """`repr(value)`, shortened, for a sentence; of what has none (a number of 5000 digits), what it is."""
    try:
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"


class MotionRTError(Exception):
    """Base of every error that MotionRT raises for bad input; the CLI prints it and exits with 2."""


class BundleError(MotionRTError):
    """A bundle is missing, damaged, from a newer version, or does not fit what was asked of it."""


class MemoryStoreError(MotionRTError):
    """A motion memory is missing, damaged, empty, or was made for another bundle."""


class UnknownClip(MemoryStoreError):
    """A motion memory has no clip of the id that was asked for."""


class MediaError(MotionRTError):
    """An image or video cannot be read or written."""


class InputError(MotionRTError, ValueError):
    """An argument of a call is out of range, of the wrong shape or dtype, or not finite."""


class BackendError(MotionRTError):
    """A backend is not installed, or failed while it ran a graph."""


class EngineError(BackendError):
    """An engine cannot be built, is missing or damaged, or does not fit the bundle or the machine."""


class BackendWarning(UserWarning):
    """A backend runs, but not in the way that was asked for: the message says why."""


class BatchError(MotionRTError):
    """Some requests of a batch are refused or failed. `errors`: why, by the place of the request in the batch; `results`: one
    for each request, None where there is an error or (if any was refused before the first ran) nothing was run."""

    def __init__(self, message: str, results: list[Any], errors: dict[int, Exception]) -> None:
        super().__init__(message)
        self.results, self.errors = results, errors


class Cancelled(MotionRTError):
    """The progress callback asked to stop; raised within one step."""
