"""How much is decoded of one picture or clip, in one place; what is beyond is refused before it is decoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from motionrt.runtime.errors import InputError, MediaError, shown


def _limit(default: Any, words: str) -> Any:
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Limits:
    """Bounds on what is decoded for one picture or one clip: whole numbers above 0, `seconds` any number above 0.

    The field says what it bounds; so does the option `--limit` of commands, which is made of these. Raises InputError.
    """

    pixels: int = _limit(300_000_000, "of a still or a frame, as the file stores it")
    frames: int = _limit(500_000, "of a video that are decoded for a clip")
    seconds: float = _limit(4 * 3600.0, "of a video that are decoded for a clip")
    memory: int = _limit(4 << 30, "in bytes, by estimate, of a still, a decoder's frames or a clip")

    def __post_init__(self) -> None:
        for bound in fields(self):
            value: Any = getattr(self, bound.name)
            kind, kept = int if isinstance(bound.default, int) else float, None
            number = isinstance(value, Real)
            with contextlib.suppress(ValueError, OverflowError):  # NaN, infinity, 10**400
                kept = kind(value) if number and not isinstance(value, bool) else None
            if kept is None or not 0 < kept < 2**63 or (kind is int and kept != value):
                allowed = "a whole number" if kind is int else "a number"
                raise InputError(f"the limit `{bound.name}` is {shown(value)}; allowed is {allowed} above 0 and below 2**63.")
            object.__setattr__(self, bound.name, kept)  # 3e8 pixels are whole

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Limits:
        """Those of `name=value` texts, the others as they are by default. Raises InputError."""
        given: dict[str, Any] = {}
        names = [bound.name for bound in fields(cls)]
        for text in texts:
            name, _, value = text.partition("=")
            if name not in names or name in given:
                once = ", each once" if name in given else ""
                raise InputError(f"--limit is {shown(text)}; allowed is NAME=VALUE with one of {', '.join(names)}{once}.")
            try:
                given[name] = int(value) if value.isdecimal() else float(value)
            except ValueError:
                raise InputError(f"--limit is {shown(text)}; allowed is a number above 0, such as {name}=1e6.") from None
        return cls(**given)

    def check_picture(self, width: int, height: int, bytes_per_pixel: int, pixels: int | None = None) -> None:
        """MediaError, as the end of a sentence about the file, if a picture is too large.

        pixels: how many are decoded if the format gives the picture smaller than it is stored.
        """
        if width * height > self.pixels:
            raise MediaError(
                f"is {width} x {height}, {width * height / 1e6:.0f} million pixels; allowed are {self.pixels / 1e6:g}. Make it"
                f" smaller, or {more('pixels', width * height)}."
            )
        self.check_memory((width * height if pixels is None else pixels) * bytes_per_pixel, "Make it smaller")

    def check_memory(self, need: int, remedy: str) -> None:
        """MediaError, as the end of a sentence, if `need` bytes are too many."""
        if need > self.memory:
            raise MediaError(
                f"takes about {need / 2**20:.0f} MiB to decode; allowed are {self.memory / 2**20:.0f}. {remedy}, or"
                f" {more('memory', need)}."
            )


def more(name: str, value: object = "...") -> str:
    """How a limit is raised, as the end of a sentence."""
    return f"raise the limit (--limit {name}={value}; in Python limits=Limits({name}={value}))"


def check_limits(limits: object) -> None:
    """InputError for what are no limits."""
    if not isinstance(limits, Limits):
        raise InputError(f"limits is {shown(limits)}; allowed is Limits(...) of motionrt.runtime.media.limits.")


LIMITS = Limits()
