"""How good Motion-I2V's shipped demo is, through its bundle: `python demo/motion_i2v/measure.py --scenes 24 --keep`.

No PyTorch: pictures, fields, drags and brushes are handed to the pipeline as a user would. What is measured, and on which
scenes, is in judge.py. `--keep` writes benchmarks/results/demo_motion_i2v.json, docs/demo_motion_i2v.png and the README's
table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "motionclone"), str(HERE.parent)]  # in this order: both have a model.py

import domain  # noqa: E402
import judge  # noqa: E402
import numpy as np  # noqa: E402
from fields import Floats, true_field  # noqa: E402
from figures import ROOT, interval, keep  # noqa: E402
from judge import Scene  # noqa: E402
from looks import Frames  # noqa: E402
from PIL import Image  # noqa: E402
from world import FRAMES  # noqa: E402

from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

Given = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One way to say what is to move: on which scenes, and what the pipeline is given beside the picture."""

    name: str
    scenes: Callable[[str, int], list[Scene]]
    given: Callable[[Scene], Given]


def unseen(split: str, count: int) -> list[Scene]:
    """Kinds of motion that no training saw, and whose words no training text has."""
    return judge.scenes(split, count, domain.UNSEEN)


def seen(split: str, count: int) -> list[Scene]:
    """Kinds of motion that training texts name; objects are held out all the same."""
    return judge.scenes(split, count, domain.SEEN)


def exchanged(split: str, count: int) -> list[Scene]:
    return judge.exchanged(judge.scenes(split, count))


def still(split: str, count: int) -> list[Scene]:
    return judge.still(judge.scenes(split, count))


def along(scene: Scene) -> Given:
    return {"prompt": scene.plain, "field": true_field(scene.spec), "retrieval": "none"}


def words(scene: Scene) -> Given:
    return {"prompt": scene.prompt, "retrieval": "none"}


def drags(count: int) -> Callable[[Scene], Given]:
    def given(scene: Scene) -> Given:
        tracks = [[(float(x), float(y)) for x, y in track] for track in judge.drawn(scene, count)]
        return {"prompt": scene.plain, "drag": tracks, "retrieval": "none"}

    return given


def brushed(scene: Scene) -> Given:
    return {**words(scene), "brush": np.where(judge.stays(scene), 0, 255).astype(np.uint8)}


def found(mode: str) -> Callable[[Scene], Given]:
    return lambda scene: {"prompt": scene.prompt, "retrieval": mode}


ROWS = (
    Row("true field", judge.scenes, along), Row("another scene's field", exchanged, along), Row("zero field", still, along),
    Row("prompt, seen kinds of motion", seen, words), Row("prompt and brush, seen kinds", seen, brushed),
    Row("1 drag", judge.scenes, drags(1)), Row("4 drags", judge.scenes, drags(4)),
    Row("prompt, unseen kinds", unseen, words), Row("retrieved, direct", unseen, found("direct")),
    Row("retrieved, placed", unseen, found("placed")), Row("retrieved, start", unseen, found("start")),
    Row("retrieved, hints", unseen, found("hints")),
)  # fmt: skip


Clip = tuple[Frames, Floats, Frames]  # frames, the field that they were made along, the picture's round trip


def made(place: Path, row: int, scenes: Sequence[Scene], indices: Sequence[int], **numerics: Any) -> list[Clip]:
    """The clips of a row, by its place in ROWS, for the scenes at `indices`; numerics: of the pipeline."""
    found = []
    with MotionPipeline.from_bundle(place / "bundle", str(place / "memory"), threads=1, **numerics) as pipeline:
        for scene in (scenes[index] for index in indices):
            result = pipeline(scene.picture, seed=scene.seed, **ROWS[row].given(scene))
            assert result.field is not None
            found.append((result.frames, result.field, round_trip(pipeline, scene.picture)))
    return found


def round_trip(pipeline: MotionPipeline, picture: Frames) -> Frames:
    """The picture, encoded and 16 times decoded."""
    image = np.ascontiguousarray(picture.transpose(2, 0, 1)[None] / 127.5 - 1, np.float32)
    latents = pipeline.graph("encode")({"image": image})["reference"]
    video = pipeline.graph("decode")({"latents": np.repeat(latents[:, None], FRAMES, axis=1)})["video"]
    frames: Frames = np.rint((video[0].transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return frames


def figures(row: Row, scenes: Sequence[Scene], clips: Sequence[Clip]) -> Given:
    """The summary of a row, with the path error of a sprite that stays; for the brush also how far anything changed outside."""
    scores = [judge.measure(frames, scene, field) for (frames, field, _), scene in zip(clips, scenes, strict=True)]
    summary = {**judge.summary(row.name, np.array(scores)), "never moves": judge.still_error(scenes)["path"]}
    if row.given is brushed:
        outside = [judge.leak(frames, rest, judge.stays(s)) for (frames, _, rest), s in zip(clips, scenes, strict=True)]
        summary["leak"] = interval(np.array(outside))
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--split", choices=("report", "choose"), default="report")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--place", type=Path, default=HERE, help="the folder of the bundle and the memory")
    parser.add_argument("--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="which of ROWS, by place")
    parser.add_argument("--keep", action="store_true", help="write the JSON, the picture and the README's table")
    options = parser.parse_args()
    if options.scenes < 6 or options.jobs < 1:
        parser.error("--scenes is at least 6 and --jobs at least 1")
    rows: list[Mapping[str, object]] = []
    strips: list[Frames] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:

        for number in options.rows:
            row = ROWS[number]
            scenes = row.scenes(options.split, options.scenes)
            parts = [part.tolist() for part in np.array_split(np.arange(len(scenes)), options.jobs)]
            jobs = [pool.submit(made, options.place, number, scenes, part) for part in parts]
            clips = [clip for job in jobs for clip in job.result()]
            rows.append(figures(row, scenes, clips))
            strips.append(np.concatenate([frame for frames, *_ in clips[:4] for frame in frames[::3]], axis=1))
            print(judge.table(rows[-1:]), flush=True)
    if options.keep:
        keep("motion_i2v", options.place / "bundle", options.scenes, judge.METRICS, rows, judge.table(rows))
        Image.fromarray(np.concatenate(strips)).save(ROOT / "docs" / "demo_motion_i2v.png")


if __name__ == "__main__":
    main()
