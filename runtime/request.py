"""What a request is, what is prepared of it for the loop, and what it gives: plain records of the pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from motionrt.runtime.memory.memory import Reference
    from motionrt.runtime.memory.search import Where

STAGES = ("text", "search", "appearance", "cama", "encode", "request", "schedule", "step", "decode")


@dataclass(frozen=True)
class Request:
    """What `MotionPipeline.__call__` takes, as a value: for `batch`."""

    image: str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | Sequence[float] | None = None
    motion_scale: float = 1.0
    references: int | Sequence[Reference | int] | None = None
    negative_prompt: str = ""
    solver: str | None = None
    minimum_score: float | None = None
    where: Where | None = None
    diversity: float | None = None
    distinct: float | None = None


@dataclass(frozen=True)
class Result:
    """A generated video.

    `frames` uint8 [F, H, W, 3]; `references` the clips whose motion was used, most similar first; `seconds` per stage
    (`step` is the whole loop); `step_seconds` one per step; `fps` frames per second; `fallback` says why there is no
    motion although some was asked for. `backend`: what computed it; `choice`: why, where that was left to "auto".
    """

    frames: NDArray[np.uint8]
    references: list[Reference]
    seconds: dict[str, float]
    step_seconds: list[float]
    seed: int
    fps: float
    fallback: str | None = None
    backend: str = ""
    choice: str | None = None


@dataclass
class Prepared:
    """What the loop of a request reads: the request's `inputs`, and `state`: those and what was computed from them.

    Host arrays, or values on the backend's device (`np.asarray` copies one to the host): no other request's, and unchanged
    for as long as this is kept, whatever else is computed meanwhile.
    """

    inputs: dict[str, Any]
    state: dict[str, Any]
    references: list[Reference]
    fallback: str | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def check_guidance(value: Any, steps: int) -> None:
    """Raise `InputError` unless `value` is a finite number, or a sequence or array of `steps` such numbers."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str) or not isinstance(value, Sequence):
        check_number("guidance", value)
        return
    if len(value) != steps:
        raise InputError(f"guidance has {len(value)} numbers for {steps} steps; give one number, or one for each step.")
    for step, number in enumerate(value, 1):
        check_number(f"guidance of step {step}", number)


def check_number(name: str, value: Any) -> None:
    """Raise `InputError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise InputError(f"{name} is {value!r}; it must be a finite number.")
