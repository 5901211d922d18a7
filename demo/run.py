"""The demo: `python demo/run.py` (`make demo`). Its prompts through its bundle and memory, and how well motion was followed.

`--system motionclone` (`make demo SYSTEM=motionclone`): videos from words alone, by the second system; `--system motion-i2v`:
stills with fields, drags and brushes, by the third.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from domain import track
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli import show as report
from motionrt.runtime.cli.common import open_pipeline, run_app, with_run_options
from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.files import replacing
from motionrt.runtime.media.video import read_clip, write_video
from motionrt.runtime.memory.memory import Reference
from motionrt.runtime.pipeline import MotionPipeline, Result

HERE = Path(__file__).resolve().parent
# The folder in this one that has the bundle, memory and prompts.
SYSTEMS = {"motionrag": "", "motionclone": "motionclone", "motion-i2v": "motion_i2v"}
Frames = NDArray[np.uint8]
_SHOWN = 5  # frames of each video on the sheet
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
@with_run_options
def run(
    system: Annotated[
        str, typer.Option(help="motionrag: stills that move; motionclone: videos from words; motion-i2v: fields, drags.")
    ] = "motionrag",
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the videos and sheet.png.")] = Path("out"),
    *,
    run_options: RunOptions,
) -> None:
    """Make the demo's videos with its bundle and memory, with the motion of retrieved clips and without.

    Writes OUT/NAME.mp4 for every prompt and OUT/sheet.png; prints references, stage times and end-point errors.
    """
    if system not in SYSTEMS:
        raise InputError(f"--system is {system!r}; allowed: {', '.join(SYSTEMS)}.")
    place = HERE / SYSTEMS[system]
    console, prompts = report.console(), _prompts(place / "prompts.json")
    if system == "motion-i2v":
        _drawn(place, prompts, out, run_options)
        return
    rows: list[tuple[dict[str, Any], Frames, Result, Result]] = []
    errors, write_seconds = [], 0.0
    with open_pipeline(place / "bundle", [str(place / "memory")], run_options) as pipeline:
        start = time.perf_counter()
        pipeline.warm()
        load_seconds = time.perf_counter() - start
        with report.progress() as bars:
            task = bars.add_task("generating", total=2 * len(prompts))
            for item in prompts:
                pair = []
                for scale in (1.0, 0.0):
                    pair.append(pipeline(**item["inputs"], motion_scale=scale))
                    bars.advance(task)
                start = time.perf_counter()
                write_video(out / f"{item['name']}.mp4", pair[0].frames, pair[0].fps)
                write_seconds += time.perf_counter() - start
                clips = [_clip(pipeline, reference, place) for reference in pair[0].references]
                wanted = np.mean([displacement(track, clip) for clip in clips], axis=0)
                errors.append([end_point_error(displacement(track, result.frames), wanted) for result in pair])
                rows.append((item, clips[0], pair[0], pair[1]))
    titles = [f"{item['name']}: {item['inputs']['prompt']}" for item, *_ in rows]
    shown = [(clip, on.frames, off.frames) for _, clip, on, off in rows]
    columns = ("best retrieved clip", "generated", "generated without motion")
    write_sheet(out / "sheet.png", columns, list(zip(titles, shown, strict=True)))
    for item, _, result, _ in rows:
        console.print(f"{out / item['name']}.mp4: {item['inputs']['prompt']}", markup=False)
        console.print(report.references_table(result.references))
    console.print(report.stages_table([row[2] for row in rows], {"write": write_seconds, "load": load_seconds}))
    lines = [(item["name"], f"{on:.1f}", f"{off:.1f}") for (item, *_), (on, off) in zip(rows, errors, strict=True)]
    mean_on, mean_off = np.mean(errors, axis=0)
    lines.append(("mean", f"{mean_on:.1f}", f"{mean_off:.1f}"))
    title = "end-point error, px: tracked sprite against the references' motion"
    console.print(report.table(title, ("video", "motion on", "motion off"), lines))
    console.print(f"{out / 'sheet.png'}: retrieved clip, generated, generated without motion", markup=False)


def _drawn(place: Path, prompts: Sequence[dict[str, Any]], out: Path, run_options: RunOptions) -> None:
    """The same of the system that is told where things go."""
    sys.path.append(str(place))
    from show import COLUMNS, LINES, show

    out.mkdir(parents=True, exist_ok=True)
    shown, results, lines = [], [], []
    with open_pipeline(place / "bundle", [str(place / "memory")], run_options) as pipeline:
        start = time.perf_counter()
        pipeline.warm()
        load_seconds = time.perf_counter() - start
        with report.progress() as bars:
            task = bars.add_task("generating", total=len(prompts))
            for item in prompts:
                videos, made, cells = show(pipeline, item["inputs"], out / item["name"])
                shown.append((f"{item['name']}: {item['inputs']['prompt']}", videos))
                results += made
                lines.append((item["name"], *cells))
                bars.advance(task)
    write_sheet(out / "sheet.png", COLUMNS, shown)
    console = report.console()
    console.print(report.stages_table(results, {"load": load_seconds}))
    console.print(report.table("drags and brushes obeyed", LINES, lines))
    console.print(f"{out / 'sheet.png'}: {', '.join(COLUMNS)}", markup=False)


def _prompts(path: Path) -> list[dict[str, Any]]:
    """The demo's list of names and inputs: a prompt, and a still, as a path, where there is one."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for item in items:
            inputs: dict[str, Any] = {"prompt": str(item["prompt"])}
            if "image" in item:
                inputs["image"] = _still(path.parent, str(item["image"]))
            found.append({"name": str(item["name"]), "inputs": inputs})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}). Check out the repository again.") from None
    if not found:
        raise InputError(f"{path} lists no prompts. Check out the repository again.")
    return found


def _still(place: Path, name: str) -> Path:
    beside = place / name
    return beside if beside.is_file() else place / "inputs" / name


def _clip(pipeline: MotionPipeline, reference: Reference, place: Path) -> Frames:
    """The frames of a retrieved clip, uint8 [F, H, W, 3]: as the memory saw them."""
    memory = pipeline.bundle.manifest.memory
    assert memory is not None
    size = memory.clip
    source = Path(reference.source)
    path = source if source.is_absolute() else place / source
    video = read_clip(path, size.frames, size.height, size.width, size.fps, start=reference.start)
    pixels: Frames = np.rint((video + 1) * 127.5).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def displacement(track: Any, frames: Frames) -> NDArray[np.float64]:
    """Where the tracked sprite is in each frame relative to the first, px, [F, 2]."""
    centres: NDArray[np.float64] = np.asarray(track(np.ascontiguousarray(frames)), np.float64)
    moved: NDArray[np.float64] = centres - centres[0]
    return moved


def end_point_error(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    """Mean over frames of the distance between two displacements [F, 2], px."""
    return float(np.linalg.norm(got - wanted, axis=1).mean())


def write_sheet(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Frames]]]) -> None:
    """A PNG with a row per example: its title, then some frames of each of its videos, one video per column."""
    height, width = rows[0][1][0].shape[1:3]
    gap, label = 12, 16
    strip = _SHOWN * width
    sheet = Image.new("RGB", (len(columns) * (strip + gap) + gap, label + len(rows) * (height + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(columns):
        draw.text((gap + column * (strip + gap), 2), title, fill="black")
    for row, (title, videos) in enumerate(rows):
        top = label + row * (height + label + gap)
        draw.text((gap, top + 2), title, fill="dimgray")
        for column, frames in enumerate(videos):
            shown = frames[np.linspace(0, len(frames) - 1, _SHOWN).round().astype(int)]
            left = gap + column * (strip + gap)
            sheet.paste(Image.fromarray(np.concatenate(list(shown), axis=1)), (left, top + label))
    with replacing(path, MediaError) as temporary:
        sheet.save(temporary, format="PNG")


if __name__ == "__main__":
    run_app(app, "demo/run.py")
