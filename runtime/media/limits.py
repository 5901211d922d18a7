"""How much is decoded of one picture or clip, in one place; what is beyond is refused before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from motionrt.runtime.errors import InputError, MediaError


@dataclass(frozen=True)
class Limits:
    """Bounds on what is decoded for one picture or one clip; all are above 0.

    pixels: of a still, or of one frame of a video, as the file stores it. frames, seconds: how many frames of a video, and
    what stretch of it, are decoded to find those of a clip. memory: bytes that a still, the frames that a decoder keeps or
    the clip that is asked for may take, by estimate. Raises InputError.
    """

    pixels: int = 300_000_000
    frames: int = 500_000
    seconds: float = 4 * 3600.0
    memory: int = 4 << 30

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise InputError(f"the limit `{field.name}` is {value!r}; allowed is a number above 0.")

    def check_picture(self, width: int, height: int, bytes_per_pixel: int, pixels: int | None = None) -> None:
        """MediaError, as the end of a sentence about the file, if a picture is too large.

        pixels: how many are decoded if the format gives the picture smaller than it is stored.
        """
        if width * height > self.pixels:
            raise MediaError(
                f"is {width} x {height}, {width * height / 1e6:.0f} million pixels; allowed are {self.pixels / 1e6:g}. Make it"
                " smaller, or pass `limits` with more pixels."
            )
        self.check_memory((width * height if pixels is None else pixels) * bytes_per_pixel, "Make it smaller, or")

    def check_memory(self, need: int, remedy: str) -> None:
        """MediaError, as the end of a sentence, if `need` bytes are too many."""
        if need > self.memory:
            raise MediaError(
                f"takes about {need / 2**20:.0f} MiB to decode; allowed are {self.memory / 2**20:.0f}. {remedy} pass `limits`"
                " with more memory."
            )


LIMITS = Limits()
