"""What it costs to keep a clip's motion instead of its latents, on the demo: the representation of a fixed noise.

    .venv-dev/bin/python benchmarks/guided/fixed_noise.py --targets 24        # 10 minutes of one core; one row for each way

MotionClone reads a clip's motion with the noise that the video begins with (`own`). A memory that keeps the motion itself
(`motionrt export motionclone --record representation`) read it with another, the same for every clip (`fixed`). Targets and
figures are those of demo/motionclone/evaluate.py: the distance in px between the path of what was made and the clip's.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.runtime.job import Job
from motionrt.runtime.media.video import write_video
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import MotionPipeline

DEMO = harness.ROOT / "demo" / "motionclone"
WAYS = ("own", "fixed")
FIGURES = ("abs", "align", "align_median", "near", "colour", "shape")


def answered(pipeline: MotionPipeline, job: Job, fixed: bool) -> NDArray[np.uint8]:
    """The frames of `job`, whose clips are read with the fixed noise if asked for, and their motion rounded as a record is."""
    while (call := job.call) is not None:
        reads = fixed and call.graph == "extract"
        if reads:
            start = call.inputs["start"]
            call = replace(call, inputs={**call.inputs, "start": noise(0, 0, 0, start.shape)})
        outputs = dict(pipeline.run(call, job.placed))
        if reads:
            outputs["motion_targets"] = outputs["motion_targets"].astype(np.float16).astype(np.float32)
        job.send(outputs, 0.0)
    return pipeline.result(job).frames


def made(bundle: Path, wanted: Sequence[Any], way: str, steps: int | None) -> list[NDArray[np.uint8]]:
    """The clips of one of `WAYS` for the targets."""
    found = []
    with MotionPipeline.from_bundle(bundle, threads=1) as pipeline, tempfile.TemporaryDirectory() as folder:
        for index, target in enumerate(wanted):
            write_video(clip := Path(folder) / f"{index}.mp4", target.references(1)[0], pipeline.bundle.manifest.output.fps)
            request = pipeline.request(target.prompt, seed=target.seed, steps=steps, references=[clip])
            found.append(answered(pipeline, pipeline.start(request), way == "fixed"))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Make the clips both ways, print the figures and append a row for each."""
    parser = argparse.ArgumentParser(description="Path error of MotionClone's demo: the video's own noise, and a fixed one.")
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--steps", type=int, help="of a video; the bundle's own if not given")
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(DEMO), str(DEMO.parent)]  # demo/ has another evaluate.py
    evaluate = importlib.import_module("evaluate")

    wanted = evaluate.targets("report", options.targets)
    for way in WAYS:
        clips = made(options.bundle, wanted, way, options.steps)
        scores = np.array([evaluate.measure(*pair) for pair in zip(clips, wanted, strict=True)])
        found = evaluate.summary(way, scores)
        figures = {name: found[name] for name in FIGURES}
        row = {"what": "MotionClone's demo, path error", "noise": way, "targets": len(wanted), "steps": options.steps}
        path = harness.append_row("fixed_noise", {**row, **figures}, folder=options.results)
        print(f"{way:>6}: " + ", ".join(f"{name} {value}" for name, value in figures.items()), flush=True)
    print(f"rows appended: {path.name}")


if __name__ == "__main__":
    main()
