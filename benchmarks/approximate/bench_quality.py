"""What does each approximation cost in quality? The demo with every recipe, against its exact loop and against the target.

    .venv-dev/bin/python benchmarks/approximate/bench_quality.py
    .venv-dev/bin/python benchmarks/approximate/bench_quality.py --steps 50 --targets 12 --results /tmp/rows     # a look

Targets are those of demo/evaluate.py, which no training and no calibration saw: `--targets` of each of two splits, with four
retrieved clips. *dB* is of all pixels of a video against the exact loop of the same steps (equal ones: 61); *EPE* is the
end-point error against the target, in px, and its difference is paired by target; PSNR and SSIM are of the object. Intervals
are 95 % bootstraps over targets. Steps are left out by the schedule that `motionrt schedule calibrate` finds on the clips of
the demo's memory for a budget; int8 forms are built here, calibrated on the same clips.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.approximate.recipes import RECIPES, Recipe, told_of
from motionrt.benchmarks.pipeline import DEMO
from motionrt.runtime.calibrate import Found, calibrate, decibels, extrapolating, requests_of, some_clips, with_schedule
from motionrt.runtime.errors import InputError, MotionRTError
from motionrt.runtime.memory.memory import MotionMemory
from motionrt.runtime.pipeline import MotionPipeline

Frames = NDArray[np.uint8]
Exact = tuple[list[Frames], NDArray[np.float64]]  # what the exact loop makes of a split's targets, and their scores


def with_forms(folder: Path) -> Path:
    """A copy of the demo's bundle with the int8 forms of its steps, where they can be built."""
    bundle = Path(shutil.copytree(DEMO / "bundle", folder / "bundle"))
    build_forms(bundle, "--calibrate", str(DEMO / "memory"))
    return bundle


def build_forms(bundle: Path, *calibrated: str) -> None:
    """The int8 forms of a bundle's steps, beside it; `calibrated`: options for those whose scales are measured."""
    for flavor, more in (("onnxruntime", ()), ("openvino", calibrated)):
        command = ["build", str(bundle), "--flavor", flavor, "--precision", "int8", *more]
        done = subprocess.run([sys.executable, "-P", "-m", "motionrt", *command], capture_output=True, text=True)
        if done.returncode:
            print(f"{flavor} int8: not run: {done.stderr.strip()}")


def schedules(bundle: Path, steps: int) -> dict[float, Found]:
    """By budget, the schedule of so many steps that the demo's memory finds, each request made of one of its clips."""
    found = dict[float, Found]()
    with MotionPipeline.from_bundle(bundle, DEMO / "memory", threads=1) as pipeline:
        assert isinstance(pipeline.memory, MotionMemory)
        asked = requests_of(pipeline.bundle, pipeline.memory, some_clips(pipeline.memory, 8))
        for budget in sorted({recipe.budget for recipe in RECIPES if recipe.budget is not None}):
            try:
                found[budget] = calibrate(pipeline, asked, steps=steps, least=budget)
            except InputError as error:
                print(f"{steps} steps, {budget:g} dB: {error}")
    return found


class Judge:
    """Targets of one split, and what the exact loop makes of them."""

    def __init__(self, split: Any, count: int) -> None:
        self.evaluate, self.split = harness.demo_module("evaluate"), split
        self.specs = self.evaluate.targets(split, count)
        domain = self.evaluate.domain
        self.truths: list[Frames] = [domain.render(spec)[0] for spec in self.specs]
        self.prompts = [domain.caption(spec, paraphrase=split.paraphrase) for spec in self.specs]

    def frames(self, pipeline: MotionPipeline, solver: str, steps: int) -> list[Frames]:
        """A video for each target."""
        asked = enumerate(zip(self.truths, self.prompts, strict=True))
        return [
            pipeline(truth[0], prompt, seed=number, solver=solver, steps=steps, references=4).frames
            for number, (truth, prompt) in asked
        ]

    def scores(self, frames: list[Frames]) -> NDArray[np.float64]:
        """End-point error, PSNR and SSIM of the object, `[count, 3]`."""
        made = zip(frames, self.truths, self.specs, strict=True)
        return np.array([self.evaluate.measure(one, truth, spec)[:3] for one, truth, spec in made])


def row(judge: Judge, recipe: Recipe, frames: list[Frames], exact: Exact, label: str) -> dict[str, Any]:
    """What a row says of one recipe on one split."""
    interval = harness.demo_module("figures").interval
    near = np.array([decibels(one, other) for one, other in zip(frames, exact[0], strict=True)])
    got, want = judge.scores(frames), exact[1]
    change = got - want
    return {
        "model": "demo", "what": recipe.name, "split": judge.split.name, "targets": len(frames), "computed_by": label,
        "db_mean": round(float(near.mean()), 2), "db_lowest": round(float(near.min()), 2),
        "epe_px": interval(got[:, 0]), "epe_change_px": interval(change[:, 0]),
        "epe_change_percent": round(100 * float(change[:, 0].mean() / want[:, 0].mean()), 2),
        "psnr_db": interval(got[:, 1]), "psnr_change_db": interval(change[:, 1]),
        "ssim": interval(got[:, 2]), "ssim_change": interval(change[:, 2]),
    }  # fmt: skip


def measure(options: argparse.Namespace, bundle: Path, steps: int) -> None:
    """Rows of all recipes for one number of steps."""
    found = schedules(bundle, steps)
    splits = harness.demo_module("evaluate").SPLITS[:2]
    judges = [Judge(split, options.targets) for split in splits]
    exact: dict[str, Exact] = {}
    for recipe in RECIPES:
        if recipe.budget is not None and recipe.budget not in found:
            continue
        for judge in judges:
            try:
                with recipe.opened(bundle, DEMO / judge.split.memory, 1) as pipeline:
                    loop = extrapolating(pipeline.bundle)
                    told = told_of((True,) * steps)
                    solver = pipeline.bundle.manifest.loops[loop].default[0]
                    if recipe.budget is not None:
                        one = found[recipe.budget]
                        pipeline.bundle = with_schedule(pipeline.bundle, loop, "recipe", one.rows)
                        told, solver = told_of(one.runs), "recipe"
                    frames, label = judge.frames(pipeline, solver, steps), pipeline.backend.label
            except MotionRTError as error:
                print(f"{recipe.name}: not run: {error}")
                break
            if judge.split.name not in exact:  # the first recipe
                exact[judge.split.name] = frames, judge.scores(frames)
            made = row(judge, recipe, frames, exact[judge.split.name], label)
            path = harness.append_row("bench_quality", {**made, "steps": steps, **told}, folder=options.results)
            print(
                f"{steps} steps, {recipe.name}, {judge.split.name}: {told['network_runs']} runs, {made['db_mean']:.1f} dB"
                f" (lowest {made['db_lowest']:.1f}), EPE {made['epe_change_percent']:+.1f} %", flush=True,
            )  # fmt: skip
    print(f"rows appended: {path.name}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and append one row for each recipe, split and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 25, 50])
    parser.add_argument("--targets", type=int, default=48, help="of each split")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        bundle = with_forms(Path(folder))
        for steps in options.steps:
            measure(options, bundle, steps)


if __name__ == "__main__":
    main()
