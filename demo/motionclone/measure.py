"""How good MotionClone's shipped demo is, through its bundle: `python demo/motionclone/measure.py --targets 48 --keep`.

No PyTorch: references are written as video files and handed to the pipeline, as a user would (`--reference clip.mp4`). What is
measured, on which targets, is in evaluate.py. `--keep` writes benchmarks/results/demo_motionclone.json and
docs/demo_motionclone.png, and the README's table.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # demo/domain.py

import numpy as np  # noqa: E402
from evaluate import METRICS, Frames, Target, measure, never_moves, sheet, summary, table, targets  # noqa: E402
from figures import ROOT, keep  # noqa: E402

from motionrt.runtime.media.video import write_video  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

SHIFT = 7  # a random reference is the clip of the target so many places on


@dataclass(frozen=True)
class Row:
    """One way to make a video: with how many clips of the right path, or one of a wrong path, in how many steps."""

    name: str
    steps: int
    clips: int = 1
    wrong: bool = False


ROWS = (
    Row("unguided", 20, 0), Row("random reference", 20, wrong=True), Row("guided", 20), Row("guided, K = 2", 20, 2),
    Row("guided, K = 4", 20, 4), Row("unguided", 40, 0), Row("guided", 40),
)  # fmt: skip
SHOWN = ((ROWS[2], "guided"), (ROWS[0], "unguided"))


def made(bundle: Path, row: Row, wanted: Sequence[Target], indices: Sequence[int], **numerics: Any) -> list[Frames]:
    """The clips of `row` for the targets at `indices`; numerics: of the pipeline, such as backend and precision."""
    found = []
    with MotionPipeline.from_bundle(bundle, threads=1, **numerics) as pipeline, tempfile.TemporaryDirectory() as folder:
        for index in indices:
            target = wanted[index]
            source = wanted[(index + SHIFT) % len(wanted)] if row.wrong else target
            paths = []
            for number, clip in enumerate(source.references(row.clips) if row.clips else ()):
                paths.append(str(Path(folder) / f"{index}_{number}.mp4"))
                write_video(paths[-1], clip, pipeline.bundle.manifest.output.fps)
            how: Mapping[str, Any] = {"references": paths} if paths else {"motion_scale": 0}
            found.append(pipeline(target.prompt, seed=target.seed, steps=row.steps, **how).frames)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=48)
    parser.add_argument("--split", choices=("report", "choose"), default="report")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--bundle", type=Path, default=HERE / "bundle")
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="which of ROWS, by place")
    parser.add_argument("--keep", action="store_true", help="write the JSON, the picture and the README's table")
    options = parser.parse_args()
    if options.targets < 2 * SHIFT or options.jobs < 1:
        parser.error(f"--targets is at least {2 * SHIFT} and --jobs at least 1")
    wanted = targets(options.split, options.targets)
    parts = [part.tolist() for part in np.array_split(np.arange(len(wanted)), options.jobs)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        chosen = [ROWS[place] for place in options.rows]
        work = [[pool.submit(made, options.bundle, row, wanted, part) for part in parts] for row in chosen]
        frames = {row: [clip for job in jobs for clip in job.result()] for row, jobs in zip(chosen, work, strict=True)}
    rows = []
    for row, clips in frames.items():
        scores = np.array([measure(*pair) for pair in zip(clips, wanted, strict=True)])
        rows.append({"steps": row.steps, **summary(row.name, scores)})
    rows += [{"steps": None, **row} for row in never_moves(wanted)]
    print(table(rows))
    if options.keep:
        keep("motionclone", options.bundle, options.targets, METRICS, rows, table(rows))
        picture = {name: np.stack(frames[row]) for row, name in SHOWN}
        sheet(str(ROOT / "docs" / "demo_motionclone.png"), wanted, picture)


if __name__ == "__main__":
    main()
