"""`motionrt replay`: a server's video made again, and shown to be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import BundlePath, LowMemory, open_pipeline, with_run_options
from motionrt.runtime.cli.places import check_output
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError, MediaError


@with_run_options
def replay(
    record: Annotated[Path, typer.Argument(help="Record of a job, as `motionrt client record` prints it.")],
    bundle: BundlePath,
    memory: Annotated[Path | None, typer.Option("--memory", "-m", help="Motion memory directory, if the job had one.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the video; of several seeds NAME-0.mp4 …")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Go on with another bundle or memory than the job had.")] = False,
    low_memory: LowMemory = False,
    *,
    run_options: RunOptions,
) -> None:
    """Make the video of a record again and compare its frames with those that the server made, by their SHA-256.

    Exit status 0: every frame is the same, bit for bit. 1: they differ, and why they may.

    \b
    Examples:
      motionrt client record JOB > star.json
      motionrt replay star.json -b demo/bundle -m demo/memory -o star.mp4
    """
    from motionrt.runtime.media.video import WRITABLE, write_video
    from motionrt.runtime.memory.memory import MotionMemory
    from motionrt.runtime.serve.replay import differences, read_record, replayed

    if out is not None:
        if out.suffix.lower() not in WRITABLE:
            raise MediaError(f"cannot write {out}: extension {out.suffix!r} is not one of {', '.join(WRITABLE)}.")
        check_output(out)
    job = read_record(record)
    searched = [] if memory is None else [str(memory)]
    with open_pipeline(bundle, searched, run_options, low_memory=low_memory) as pipeline:
        opened = pipeline.memory
        why = differences(job, bundle, opened if isinstance(opened, MotionMemory) else None)
        if why and not anyway:
            raise InputError(f"{'; '.join(why)}. --anyway goes on all the same.")
        if pipeline.backend.label != job.backend:
            why.append(f"the job ran on {job.backend}, and this on {pipeline.backend.label}")
        if job.batch.get("exact") is False:
            why.append("the job ran in a batch that rounds differently (--batch-rounding)")
        other, seeds = [], []
        for index, (result, same) in enumerate(replayed(job, pipeline)):
            seeds.append(result.seed)
            other += [] if same else [result.seed]
            if out is not None:
                several = len(job.frames_sha256) > 1
                write_video(out.with_name(f"{out.stem}-{index}{out.suffix}") if several else out, result.frames, result.fps)
    if not other:
        frames, height, width, _ = result.frames.shape
        echo(f"{job.id}: the same {frames} frames of {width}x{height}, bit for bit, for {_seeds(seeds)}.")
        return
    reasons = "; ".join(why) or "bundle and memory are the same, so it is the machine, its libraries or the number of threads"
    echo(f"{job.id}: other frames for {_seeds(other)} of {len(seeds)}: {reasons}.", err=True)
    raise typer.Exit(1)


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
