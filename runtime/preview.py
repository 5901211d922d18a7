"""A cheap look at a video while its loop runs: a linear map from the channels of its latents to colours, found by least squares
with requests of one's own, and kept in the bundle.

    found = fit(pipeline, requests)
    keep(Path("my-bundle"), found)                      # from now on: job.preview() after any step

What is fitted is the last step of each request against its frames, made as small as the latents and as few. A decoder that is
smaller than the bundle's, but a network too, would show more; this takes no weights, no graph and next to no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle, rewrite
from motionrt.runtime.bundle.manifest import Loop, Preview
from motionrt.runtime.calibrate import decibels
from motionrt.runtime.errors import InputError
from motionrt.runtime.job import to_preview
from motionrt.runtime.pipeline import MotionPipeline, Request

X0 = "x0"  # the output of a step that says what the video will be; where there is none, what is carried to the next step
_DIGITS = 7  # of a factor, in bundle.json
Say = Callable[[str], object]


@dataclass(frozen=True)
class Fitted:
    """A preview of `loop`; `decibels` of each request, by a map that was fitted to the others alone."""

    loop: str
    preview: Preview
    decibels: tuple[float, ...]


def fit(pipeline: MotionPipeline, requests: Sequence[Request], *, say: Say = lambda text: None) -> Fitted:
    """The linear map that makes the last step of `requests` most like their frames, in the least squares of all pixels.

    say: told what is run. Raises `InputError` for fewer than two requests, as each is judged by what the others say, and for a
    bundle whose steps give nothing of the form `[1, F, C, h, w]`.
    """
    if len(requests) < 2:
        there = f"{len(requests)} {'request is' if len(requests) == 1 else 'requests are'}"
        raise InputError(f"{there} given to fit a preview to; give 2 or more: each is judged by a fit to the others.")
    loop, value = previewed(pipeline.bundle)
    pairs = list[tuple[NDArray[np.float32], NDArray[np.float64]]]()
    for number, request in enumerate(requests, 1):
        say(f"request {number} of {len(requests)}")
        latents, frames = _last(pipeline, request, loop, value)
        pairs.append((latents, averaged(frames, len(latents), *latents.shape[2:])))
    judged = [
        decibels(to_preview(linear_map(value, pairs[:place] + pairs[place + 1 :]), one[None]), np.rint(small).astype(np.uint8))
        for place, (one, small) in enumerate(pairs)
    ]
    quality = {
        "db_lowest": round(min(judged), 2), "db_mean": round(float(np.mean(judged)), 2), "requests": len(judged),
        "of": "each request, by a fit to the others",
    }  # fmt: skip
    return Fitted(loop, msgspec.structs.replace(linear_map(value, pairs), quality=quality), tuple(judged))


def previewed(bundle: Bundle) -> tuple[str, str]:
    """The loop of a bundle that is looked at, its last one that denoises, and the output of its steps that says most of the
    video; `InputError` where there is none."""
    manifest = bundle.manifest
    for name in [node.graph for node in manifest.nodes if node.graph in manifest.loops][::-1]:
        if not (loop := manifest.loops[name]).feeds:
            continue
        last = [output for output, port in loop.carry.items() if port in loop.gives]
        for value in (X0, *last):
            if value not in loop.collect and _everywhere(bundle, loop, value):
                return name, value
    raise InputError(f"no step of bundle '{bundle.name}' gives latents as [1, F, C, h, w], and so there is nothing to look at.")


def _everywhere(bundle: Bundle, loop: Loop, value: str) -> bool:
    """Whether every step graph of a loop gives `value`, in five dimensions."""
    graphs = [bundle.graph(graph).outputs for graph in loop.graphs]
    return all(any(port.name == value and len(port.dims) == 5 for port in outputs) for outputs in graphs)


def _last(
    pipeline: MotionPipeline, request: Request, loop: str, value: str
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """What the last step of `loop` gives as `value`, float32 [F, C, h, w], and the frames of the whole request."""
    job, found = pipeline.start(request), None
    while (call := job.call) is not None:
        outputs = pipeline.run(call, job.placed)
        if call.loop == loop:
            found = np.array(np.asarray(outputs[value])[0], np.float32)
        job.send(outputs, 0.0)
    assert found is not None and job.frames is not None
    return found, job.frames


def averaged(frames: NDArray[np.uint8], count: int, height: int, width: int) -> NDArray[np.float64]:
    """uint8 [F, H, W, 3] to `count` pictures at evenly spaced times, float64 [count, height, width, 3], each pixel the mean of
    the area that it covers."""
    chosen = frames[np.rint(np.linspace(0, len(frames) - 1, count)).astype(int)].astype(np.float64)
    down, across = _areas(chosen.shape[1], height), _areas(chosen.shape[2], width)
    made: NDArray[np.float64] = np.einsum("yh,fhwc,xw->fyxc", down, chosen, across, optimize=True)
    return made


def _areas(size: int, count: int) -> NDArray[np.float64]:
    """[count, size]: what each of `count` equal parts of a line takes of its `size` pixels; a row adds to 1."""
    edges = np.linspace(0, size, count + 1)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    shares: NDArray[np.float64] = np.maximum(covered, 0) * count / size
    return shares


def linear_map(value: str, pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> Preview:
    """The preview of `value` by least squares; pairs: latents [F, C, h, w] and colours [F, h, w, 3], 0 to 255."""
    rows = np.concatenate([latents.transpose(0, 2, 3, 1).reshape(-1, latents.shape[1]) for latents, _ in pairs])
    known = np.concatenate([rows, np.ones((len(rows), 1))], 1, dtype=np.float64)
    wanted = np.concatenate([colours.reshape(-1, 3) for _, colours in pairs])
    found, *_ = np.linalg.lstsq(known, wanted, rcond=None)
    *factors, bias = [tuple(float(f"{number:.{_DIGITS}g}") for number in row) for row in found]
    return msgspec.convert({"value": value, "factors": factors, "bias": bias}, Preview)


def keep(path: Path, found: Fitted) -> None:
    """Put a preview into the bundle directory `path`, in the place of one before it.

    The bundle is the old one or the new one at every moment. Raises `BundleError` where it cannot be written.
    """
    Bundle.open(path)

    def change(raw: dict[str, Any]) -> None:
        raw["loops"][found.loop]["preview"] = msgspec.to_builtins(found.preview)

    rewrite(path, change)
