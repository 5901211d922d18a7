"""The cheapest schedule that a budget of quality allows, found with requests of one's own, and kept in the bundle by name.

    found = calibrate(pipeline, requests, steps=25, least=50)
    keep(Path("my-bundle"), found, "quick")            # from now on: solver="quick"

Quality is that of the frames against those of the same request with the network in every step: the peak signal-to-noise ratio
of a video over all of its pixels, in dB, and the structural similarity (SSIM: Wang et al. 2004), which sees blur and lost
outlines where few pixels change. The budget holds for the worst of the requests. What is kept is rows of numbers and the
figures, so that every run of it is the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle, rewrite
from motionrt.runtime.bundle.manifest import Approximation, ImageInput, TextInput
from motionrt.runtime.errors import BundleError, InputError, MediaError, shown
from motionrt.runtime.files import here, replacing, sha256_of
from motionrt.runtime.indexing.encoders import cut
from motionrt.runtime.job import to_frames
from motionrt.runtime.memory.memory import MotionMemory, Reference
from motionrt.runtime.memory.search import Search
from motionrt.runtime.pipeline import MotionPipeline, Request
from motionrt.runtime.schedules import extrapolated, pattern, patterns

_LEAST_ERROR = 0.05  # mean square of a value, of 255 levels: equal frames count as if they differed by that
EQUAL = round(10 * math.log10(255**2 / _LEAST_ERROR), 2)  # dB of frames that are equal
_TRIED = "calibrated"  # the name of a schedule while it is tried
_LISTED = 'Give a list of objects with inputs of the bundle, such as [{"image": "star.png", "prompt": "a star turns"}]'
Say = Callable[[str], object]


@dataclass(frozen=True)
class Found:
    """A schedule of `loop`: `rows` `[T, R]`, made of those of `solver`, which run the network where `runs` is true; `decibels`
    and `similarities` (SSIM) of each request that it was tried with."""

    loop: str
    solver: str
    runs: tuple[bool, ...]
    rows: NDArray[np.float32]
    decibels: tuple[float, ...]
    similarities: tuple[float, ...]

    @property
    def quality(self) -> dict[str, Any]:
        """What bundle.json keeps of it."""
        return {
            "of": self.solver, "steps": len(self.runs), "network_runs": sum(self.runs), "pattern": pattern(self.runs),
            "db_lowest": round(min(self.decibels), 2), "db_mean": round(float(np.mean(self.decibels)), 2),
            "ssim_lowest": round(min(self.similarities), 4), "ssim_mean": round(float(np.mean(self.similarities)), 4),
            "requests": len(self.decibels),
        }  # fmt: skip


def calibrate(
    pipeline: MotionPipeline, requests: Sequence[Request], *, solver: str | None = None, steps: int | None = None,
    least: float = 50.0, least_ssim: float = 0.0, say: Say = lambda text: None,
) -> Found:  # fmt: skip
    """The schedule with the fewest runs of the network whose frames come within `least` dB of the exact ones, and within
    `least_ssim` (0 to 1, of equal frames 1) of them, in every request.

    solver, steps: the schedule that steps are left out of, the bundle's default if not given. say: told what was tried. Raises
    `InputError` for a bundle that cannot leave out steps, no requests, and a budget that no schedule meets.
    """
    if not requests:
        raise InputError("there are no requests to calibrate with; give one or more.")
    if not 0 < least <= EQUAL:
        raise InputError(f"at least {shown(least)} dB is asked for; allowed are 0 to {EQUAL} (equal frames), such as 50.")
    if not 0 <= least_ssim <= 1:
        raise InputError(f"an SSIM of {shown(least_ssim)} is asked for; allowed are 0 (any) to 1 (equal frames), such as 0.98.")
    bundle = pipeline.bundle
    loop = extrapolating(bundle)
    schedule = bundle.schedule(loop, solver, steps)
    exact = list[NDArray[np.uint8]]()
    for number, request in enumerate(requests, 1):
        say(f"exact frames of request {number} of {len(requests)}")
        asked = replace(request, solver={loop: schedule.name}, steps={loop: schedule.steps})
        exact.append(pipeline.result(pipeline.start(asked)).frames)
    for runs in patterns(schedule.steps):
        rows = extrapolated(bundle.manifest.loops[loop], schedule.rows, runs)
        pipeline.bundle = with_schedule(bundle, loop, _TRIED, rows)
        got, alike = list[float](), list[float]()
        try:
            for request, frames in zip(requests, exact, strict=True):
                made = pipeline.result(pipeline.start(replace(request, solver={loop: _TRIED}, steps={loop: len(rows)})))
                got.append(decibels(made.frames, frames))
                alike.append(similarity(made.frames, frames))
                if enough := got[-1] >= least and alike[-1] >= least_ssim:
                    continue
                break
        finally:
            pipeline.bundle = bundle
        told = f"{pattern(runs)}  {sum(runs)} of {len(runs)}: {min(got):.1f} dB, SSIM {min(alike):.4f}"
        say(told if enough else f"{told}, too little")
        if enough:
            return Found(loop, schedule.name, runs, rows, tuple(got), tuple(alike))
    budget = f"{least:g} dB" + (f" and an SSIM of {least_ssim:g}" if least_ssim else "")
    raise InputError(
        f"no schedule of {schedule.steps} steps of {schedule.name} that leaves out any comes within {budget} of the exact"
        " frames. Ask for less, or for more steps."
    )


def extrapolating(bundle: Bundle) -> str:
    """The loop of a bundle that can leave out steps; `InputError` where none can."""
    for name, loop in bundle.manifest.loops.items():
        if loop.extrapolates is not None:
            return name
    raise InputError(f"no loop of bundle '{bundle.name}' can leave out steps: those of MotionRAG can. Export one of it again.")


def decibels(frames: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    """The peak signal-to-noise ratio of uint8 frames, in dB; of equal ones `EQUAL`."""
    error = float(np.mean((frames.astype(np.float64) - exact) ** 2))
    return 10 * math.log10(255**2 / max(error, _LEAST_ERROR))


def similarity(frames: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    """The mean structural similarity of uint8 frames `[F, H, W, 3]`, 1 where they are equal.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004, equation 13, in square windows of 7 pixels (less in
    smaller frames), channel by channel, with their constants 0.01 and 0.03.
    """
    window = min(7, *exact.shape[1:3])
    unbiased = window**2 / max(window**2 - 1, 1)
    first, second = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, window, axis).mean(axis=-1)
        return values

    alike = []
    for one, other in zip(frames.astype(np.float64), exact, strict=True):
        x, y = mean(one), mean(wanted := other.astype(np.float64))
        var_x, var_y = (unbiased * (mean(v * v) - m * m) for v, m in ((one, x), (wanted, y)))
        both = unbiased * (mean(one * wanted) - x * y)
        alike.append(np.mean((2 * x * y + first) * (2 * both + second) / ((x * x + y * y + first) * (var_x + var_y + second))))
    return float(np.mean(alike))


def some_clips(memory: MotionMemory, count: int, first: int = 0) -> list[int]:
    """Ids of up to `count` clips, evenly over a memory: every second of twice as many, from number `first`, 0 or 1, on: those
    from 1 on are others than those from 0 on. `InputError` for a memory of fewer than two: one's motion is another's."""
    ids = memory.ids()
    if len(ids) < 2:
        raise InputError(f"the motion memory holds {len(ids)} clips; calibrating takes 2 or more: one's motion is another's.")
    places = np.unique(np.linspace(0, len(ids) - 1, 2 * count).astype(int))
    return [int(number) for number in ids[places][first::2]]


def requests_of(bundle: Bundle, memory: MotionMemory, clips: Sequence[int]) -> list[Request]:
    """The requests that clips of a memory make: a clip's first picture and caption, and the motion of others: clips of the same
    file are left out of the search. Raises `MediaError` where a clip's file is gone."""
    spec, every = bundle.manifest.memory, bundle.manifest.inputs
    assert spec is not None
    texts = [name for name, one in every.items() if isinstance(one, TextInput) and one.default is None]
    stills = [name for name, one in every.items() if isinstance(one, ImageInput)][:1]
    made = []
    for seed, clip in enumerate(memory.get(list(clips))):
        inputs: dict[str, Any] = dict.fromkeys(texts, clip.caption)
        if stills:
            video = cut(spec, _file_of(clip, memory), clip.start, None).video
            inputs |= dict.fromkeys(stills, to_frames(video[None, :1])[0])
        made.append(Request(inputs, seed, search=Search(exclude_source=[clip.source])))
    return made


def _file_of(clip: Reference, memory: MotionMemory) -> Path:
    """The file of a clip; a relative one lies below this folder, or below that of the memory."""
    beside = memory.path.absolute().parent
    for folder in (here(), beside):
        if (folder / clip.source).is_file():
            return folder / clip.source
    raise MediaError(
        f"the video file {clip.source} of clip {clip.id} is neither below {here()} nor below {beside}. Calibrating takes the"
        " first pictures of clips: go to the folder that the memory was made in, or restore the file."
    )


def requests_in(pipeline: MotionPipeline, file: Path) -> list[Request]:
    """The requests of a JSON file: a list of objects with what `MotionPipeline.__call__` takes by name."""
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error}). {_LISTED}.") from None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise InputError(f"{file} holds {shown(listed)}. {_LISTED}.")
    return [pipeline.request(**one) for one in listed]


def with_schedule(bundle: Bundle, loop: str, name: str, rows: NDArray[np.float32]) -> Bundle:
    """`bundle`, opened, with one schedule more or another of that name."""
    spec, every = bundle.manifest.loops[loop], dict(bundle.manifest.loops)
    every[loop] = msgspec.structs.replace(spec, schedules={**spec.schedules, name: (len(rows),)})
    manifest = msgspec.structs.replace(bundle.manifest, loops=every)
    return replace(bundle, manifest=manifest, _tables={**bundle.tables, f"{loop}/{name}/{len(rows)}": rows})


def keep(path: Path, found: Found, name: str) -> None:
    """Put a schedule into the bundle directory `path` as solver `name`, with its figures.

    The bundle is the old one or the new one at every moment. Raises `InputError` for a name that is taken, `BundleError` where
    it cannot be written.
    """
    bundle = Bundle.open(path)
    if name in bundle.manifest.loops[found.loop].schedules or not name.replace("-", "").replace("_", "").isalnum():
        there = ", ".join(bundle.manifest.loops[found.loop].schedules)
        raise InputError(f"the name is {shown(name)}; allowed are letters, digits, - and _, and none of {there}.")
    made = with_schedule(bundle, found.loop, name, found.rows)
    graph = made.manifest.loops[found.loop].extrapolates
    assert graph is not None
    entry = Approximation(name, (graph,), found.quality, {found.loop: name})
    every = (*made.manifest.approximations, entry)
    _write(replace(made, manifest=msgspec.structs.replace(made.manifest, approximations=every)))


def remove(path: Path, name: str) -> None:
    """Take the schedule `name`, which `keep` put there, out of a bundle; `InputError` where there is none."""
    bundle = Bundle.open(path)
    entry = next((one for one in bundle.manifest.approximations if one.name == name and one.schedules), None)
    if entry is None:
        there = ", ".join(one.name for one in bundle.manifest.approximations if one.schedules) or "none"
        raise InputError(f"the name is {shown(name)}; calibrated schedules of this bundle: {there}.")
    loops, tables = dict(bundle.manifest.loops), dict(bundle.tables)
    for loop, schedule in entry.schedules.items():
        for steps in loops[loop].schedules[schedule]:
            tables.pop(f"{loop}/{schedule}/{steps}")
        left = {key: value for key, value in loops[loop].schedules.items() if key != schedule}
        loops[loop] = msgspec.structs.replace(loops[loop], schedules=left)
    others = tuple(one for one in bundle.manifest.approximations if one != entry)
    manifest = msgspec.structs.replace(bundle.manifest, loops=loops, approximations=others)
    _write(replace(bundle, manifest=manifest, _tables=tables))


def _write(bundle: Bundle) -> None:
    """Write loops, their rows and approximations of an opened bundle to its directory: rows in a new file first, bundle.json
    that names it then, and the old file goes last."""
    from safetensors.numpy import save_file

    rows = {key: np.ascontiguousarray(value) for key, value in sorted(bundle.tables.items())}
    with replacing(bundle.path / "rows.new", BundleError) as temporary:
        save_file(rows, temporary)
    sha256 = sha256_of(bundle.path / "rows.new")
    tables = f"rows-{sha256[:12]}.safetensors"
    os.replace(bundle.path / "rows.new", bundle.path / tables)

    def change(raw: dict[str, Any]) -> None:
        for name, loop in bundle.manifest.loops.items():
            raw["loops"][name]["schedules"] = {key: list(counts) for key, counts in loop.schedules.items()}
        raw["approximations"] = [_builtins(one) for one in bundle.manifest.approximations]
        raw["tables"] = {"file": tables, "sha256": sha256}

    rewrite(bundle.path, change)
    if (old := bundle.manifest.tables.file) != tables:
        (bundle.path / old).unlink(missing_ok=True)


def _builtins(entry: Approximation) -> dict[str, Any]:
    made: Mapping[str, Any] = msgspec.to_builtins(entry)
    return {key: value for key, value in made.items() if value or key != "schedules"}
