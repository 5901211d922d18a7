"""What does a whole request cost, stage by stage: from the call to the first frame, and to the written video?

    .venv-dev/bin/python benchmarks/questions/bench_end_to_end.py --requests 100

The demo's prompts and stills in turn, with its bundle and memory, each with another seed. `first_frame`: until frames can be
shown (the decoder gives all at once); `write`: the mp4; `request`: both. `unaccounted`: what of `first_frame` is in no
stage; above the limit nothing is published. Gate: the frames are those of the step as it was written, to one level of 255,
and every request gives its frames again, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO, answer, open_pipeline, plain_frames, read_requests
from motionrt.runtime.media.video import write_video
from motionrt.runtime.pipeline import MotionPipeline, Request, Result

LEVELS = 1  # of 255: rounding to pixels may fall on either side
ROWS = {"request": "request_state", "text_query": "search"}  # `request` is all of it here, and a search begins with its vector
UNACCOUNTED = 0.05  # of the time to the first frame, at the median


def check(pipeline: MotionPipeline, requests: Sequence[Request]) -> tuple[list[Result], dict[str, Any]]:
    """What each request gives, and the gate's figures; ParityError where the plain step gives other frames."""
    results = [answer(pipeline, request) for request in requests]
    if not any(loop.plain for loop in pipeline.bundle.manifest.loops.values()):
        return results, {"max_abs_difference": None, "to": "not run: the bundle has no step_plain", "allowed": LEVELS}
    worst = 0
    for request, result in zip(requests, results, strict=True):
        gap = np.abs(result.frames.astype(np.int16) - plain_frames(pipeline, request).astype(np.int16))
        worst = max(worst, int(gap.max()))
    if worst > LEVELS:
        raise harness.ParityError(f"frames differ from those of the plain step by {worst} of 255; allowed is {LEVELS}")
    return results, {"max_abs_difference": worst, "to": "frames of step_plain, of 255", "allowed": LEVELS}


def measure(
    pipeline: MotionPipeline, requests: Sequence[Request], results: Sequence[Result], count: int, warmups: int, video: Path
) -> dict[str, NDArray[np.float64]]:
    """Seconds of every stage over `count` requests; ParityError where one does not give its frames again."""
    stages = dict.fromkeys(ROWS.get(name, name) for name in results[0].seconds)
    times: dict[str, list[float]] = {name: [] for name in (*stages, "unaccounted", "first_frame", "write", "request")}
    for index in range(-warmups, count):
        which = index % len(requests)
        start = perf_counter()
        result = answer(pipeline, requests[which])
        shown = perf_counter()
        write_video(video, result.frames, result.fps)
        end = perf_counter()
        if not np.array_equal(result.frames, results[which].frames):
            raise harness.ParityError(f"request {which} gave other frames than before")
        if index >= 0:
            for stage in stages:
                times[stage].append(sum(taken for name, taken in result.seconds.items() if ROWS.get(name, name) == stage))
            times["first_frame"].append(shown - start)
            times["unaccounted"].append(shown - start - sum(result.seconds.values()))
            times["write"].append(end - shown)
            times["request"].append(end - start)
    return {name: np.array(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--memory", type=Path, default=DEMO / "memory")
    parser.add_argument("--prompts", type=Path, default=DEMO / "prompts.json")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--warmups", type=int, default=10)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the bundle's)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    opened = open_pipeline(options.bundle, options.memory, threads=options.threads)
    with opened as pipeline, tempfile.TemporaryDirectory(prefix="motionrt-bench-") as folder:
        requests = [replace(request, steps=options.steps) for request in read_requests(options.prompts)]
        results, error = check(pipeline, requests)
        times = measure(pipeline, requests, results, options.requests, options.warmups, Path(folder) / "video.mp4")
        share = float(np.median(times["unaccounted"] / times["first_frame"]))
        if not 0 <= share <= UNACCOUNTED:
            raise SystemExit(f"no rows: {share:.1%} of the time is in no stage; allowed is {UNACCOUNTED:.0%}")
        frames, height, width, _ = results[0].frames.shape
        middle = np.median(times["request"])
        for name, seconds in times.items():
            row = {
                "model": pipeline.bundle.name, "what": "request", "backend": name, **harness.summary(seconds),
                "warmups": options.warmups, "shape": [frames, height, width, 3], "dtype": "float32",
                "steps": len(results[0].step_seconds), "threads": options.threads, "error": error,
                "over_request": float(np.median(seconds) / middle), "unaccounted": share, "note": options.note,
            }  # fmt: skip
            harness.append_row("bench_end_to_end", row, folder=options.results)
            print(f"{name:>13}: {harness.times(row)}, {row['over_request']:6.1%} of the request")
        print(f"{options.requests} requests of {row['steps']} steps; in no stage: {share:.2%}; largest difference: {error}")


if __name__ == "__main__":
    main()
