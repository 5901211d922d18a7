"""The run side's commands of `motionrt`; src/motionrt/cli.py puts those of the build side beside them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.bench import bench
from motionrt.runtime.cli.common import (
    BundleArgument,
    BundlePath,
    Conditions,
    Distinct,
    Diversity,
    LowMemory,
    MinimumScore,
    Solver,
    Steps,
    open_pipeline,
    parse_where,
    with_run_options,
)  # fmt: skip
from motionrt.runtime.cli.doctor import doctor
from motionrt.runtime.cli.memory import memory_app
from motionrt.runtime.cli.verify import verify
from motionrt.runtime.errors import MediaError

if TYPE_CHECKING:
    from motionrt.runtime.pipeline import MotionPipeline

app = typer.Typer(
    name="motionrt",
    help="Make a still image move the way retrieved clips move.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(memory_app, name="memory")


def _print_version(wanted: bool) -> None:
    if wanted:
        import motionrt

        typer.echo(f"motionrt {motionrt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
@with_run_options
def generate(
    bundle: BundlePath,
    image: Annotated[Path, typer.Option("--image", "-i", help="The still: any size, mode and orientation.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What moves, and how.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Video to write: .mp4, .gif, .webp or .png (a sheet).")],
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", "-m", help="Motion memory directory; again: searched together, `directory=0.5` for a weight."),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    seed: Annotated[int, typer.Option(help="Same seed, bundle and memory: same video.")] = 0,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    motion_scale: Annotated[float, typer.Option(help="Strength of the retrieved motion; 0 is the base model.")] = 1.0,
    references: Annotated[int | None, typer.Option("--references", "-k", help="How many clips to retrieve.")] = None,
    where: Conditions = None,
    minimum_score: MinimumScore = None,
    distinct: Distinct = None,
    diversity: Diversity = None,
    solver: Solver = None,
    low_memory: LowMemory = False,
    *,
    run_options: RunOptions,
) -> None:
    """Make a video from a still image and a prompt.

    \b
    Examples:
      motionrt generate -b demo/bundle -m demo/memory -i star.png -p "a red star moves in a circle" -o star.mp4
      motionrt generate -b demo/bundle -m birds -m sea=0.5 -i star.png -p "waves" -o star.mp4
      motionrt generate -b demo/bundle -i star.png -p "a red star" --motion-scale 0 -o still.gif --steps 20
      motionrt generate -b demo/bundle -m demo/memory -i star.png -p "a red star" -o star.mp4 --backend auto
    """
    from motionrt.runtime.cli import show as report
    from motionrt.runtime.media.video import WRITABLE, write_video

    if out.suffix.lower() not in WRITABLE:  # said before the work, not after it
        raise MediaError(f"cannot write {out}: extension {out.suffix!r} is not one of {', '.join(WRITABLE)}.")
    console = report.console()
    opened = open_pipeline(bundle, memory or [], run_options, low_memory=low_memory)
    with opened as pipeline, report.progress() as bars:
        load = _warm(pipeline)
        task = bars.add_task("denoising", total=pipeline.bundle.solver(solver, steps).steps)
        result = pipeline(
            image,
            prompt,
            seed=seed,
            steps=steps,
            guidance=guidance,
            motion_scale=motion_scale,
            references=references,
            negative_prompt=negative_prompt,
            where=parse_where(where),
            minimum_score=minimum_score,
            distinct=distinct,
            diversity=diversity,
            solver=solver,
            callback=lambda step, steps: bars.update(task, completed=step + 1),
        )
    start = time.perf_counter()
    write_video(out, result.frames, result.fps)
    if result.references:
        console.print(report.references_table(result.references))
    for note in (result.fallback, result.choice):
        if note is not None:
            console.print(note, markup=False)
    console.print(report.stages_table([result], {"write": time.perf_counter() - start, "load": load}))
    frames, height, width, _ = result.frames.shape
    told = f"{out}: {frames} frames of {width}x{height} at {result.fps:g} fps, seed {seed}"
    console.print(told, markup=False, soft_wrap=True)  # a path must not be broken


@app.command()
def inspect(bundle: BundleArgument) -> None:
    """Show what a bundle holds: where the FLOPs and bytes of a step went, what was hoisted, and every graph's ports.

    \b
    Example:
      motionrt inspect demo/bundle
    """
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.cli import show as report

    console = report.console()
    for table in report.inspect_tables(Bundle.open(bundle)):
        console.print(table)


app.command()(bench)
app.command()(doctor)
app.command()(verify)


def _warm(pipeline: MotionPipeline) -> float:
    """Load the graphs; the seconds that it took, which are a command's and not a request's."""
    start = time.perf_counter()
    pipeline.warm()
    return time.perf_counter() - start
