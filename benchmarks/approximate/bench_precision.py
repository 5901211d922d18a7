"""What do 8 and 16 bits cost the demos of MotionClone and Motion-I2V, against their exact videos and what was asked for?

    .venv-dev/bin/python benchmarks/approximate/bench_precision.py motionclone
    .venv-dev/bin/python benchmarks/approximate/bench_precision.py motion-i2v

Targets are those of the demos' own measures (demo/*/measure.py, the split that is reported), which no training saw. *dB* is of
all pixels of a video against the exact one (equal ones: 61). The path error in px is that of the demo, and its change is paired
by target; intervals are 95 % bootstraps over targets. int8 forms are built here; OpenVINO's are calibrated on the memory.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.approximate.bench_quality import build_forms
from motionrt.benchmarks.approximate.recipes import NUMERICS, Recipe
from motionrt.runtime.calibrate import decibels
from motionrt.runtime.errors import MotionRTError

Clips = list[tuple[NDArray[np.uint8], list[float]]]  # the frames of each target, and their scores


@dataclass(frozen=True)
class Demo:
    """A demo: its folder, the rows of its measure that are taken, and which scores are path error, colour and shape. clips:
    measure, folder with bundle and memory, place of a row, targets, numerics -> its clips."""

    folder: str
    rows: Sequence[int]
    scores: tuple[int, int, int]
    clips: Callable[..., Clips]


def cloned(measure: Any, place: Path, row: int, count: int, numerics: dict[str, Any]) -> Clips:
    """Clips of MotionClone."""
    wanted = measure.targets("report", count)
    frames = measure.made(place / "bundle", measure.ROWS[row], wanted, range(count), **numerics)
    return [(one, measure.measure(one, target)) for one, target in zip(frames, wanted, strict=True)]


def moved(measure: Any, place: Path, row: int, count: int, numerics: dict[str, Any]) -> Clips:
    """Clips of Motion-I2V."""
    scenes = measure.ROWS[row].scenes("report", count)
    clips = measure.made(place, row, scenes, range(count), **numerics)
    return [(one, measure.judge.measure(one, scene, field)) for (one, field, _), scene in zip(clips, scenes, strict=True)]


DEMOS = {
    "motionclone": Demo("motionclone", (2,), (1, 3, 4), cloned),
    "motion-i2v": Demo("motion_i2v", (0, 3, 5), (0, 2, 3), moved),
}


def row_of(clips: Clips, exact: Clips, scores: tuple[int, int, int]) -> dict[str, Any]:
    """What a row says of clips, beside the exact ones of the same targets."""
    interval = harness.demo_module("figures").interval
    near = np.array([decibels(one, other) for (one, _), (other, _) in zip(clips, exact, strict=True)])
    path, colour, shape = (np.array([score[at] for _, score in clips]) for at in scores)
    change = path - np.array([score[scores[0]] for _, score in exact])
    return {
        "targets": len(clips), "db_mean": round(float(near.mean()), 2), "db_lowest": round(float(near.min()), 2),
        "path_px": interval(path), "path_change_px": interval(change), "colour": interval(colour),
        "shape": interval(shape[~np.isnan(shape)]),
    }  # fmt: skip


def measure(options: argparse.Namespace, demo: Demo, place: Path) -> None:
    """Rows of every precision that runs here."""
    sys.path.insert(0, str(harness.ROOT / "demo" / demo.folder))
    script = importlib.import_module("measure")
    for row in demo.rows:
        exact: Clips = []
        for recipe in (Recipe(backend, precision) for backend, precision in NUMERICS):
            try:
                clips = demo.clips(script, place, row, options.targets, recipe.numerics)
            except MotionRTError as error:
                print(f"{recipe.name}: not run: {error}", flush=True)
                continue
            exact = exact or clips
            made: dict[str, Any] = {"model": options.demo, "what": recipe.name, "way": script.ROWS[row].name}
            made |= row_of(clips, exact, demo.scores)
            harness.append_row("bench_precision", made, folder=options.results)
            print(
                f"{options.demo}, {made['way']}, {recipe.name}: {made['db_mean']:.1f} dB (lowest {made['db_lowest']:.1f}), path"
                f" {made['path_px'][0]:.2f} px ({made['path_change_px'][0]:+.3f})", flush=True,
            )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and append one row for each precision and way to say what moves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    demo = DEMOS[options.demo]
    with tempfile.TemporaryDirectory() as folder:
        place, shipped = Path(folder), harness.ROOT / "demo" / demo.folder
        for name in ("bundle", "memory"):
            shutil.copytree(shipped / name, place / name)
        build_forms(place / "bundle", "--calibrate", str(shipped / "memory"))  # its clips are beside it
        measure(options, demo, place)


if __name__ == "__main__":
    main()
