"""The `motionrt` command: the run side's commands, and those that other parts register."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.bench import bench
from motionrt.runtime.cli.common import (
    BundleArgument,
    BundleCommand,
    BundlePath,
    Limited,
    LowMemory,
    Memories,
    Solver,
    Steps,
    open_pipeline,
    run_app,
    with_run_options,
    with_search_options,
)  # fmt: skip
from motionrt.runtime.cli.deploy import deploy_app
from motionrt.runtime.cli.doctor import doctor
from motionrt.runtime.cli.memory import memory_app
from motionrt.runtime.cli.places import check_output, video_size
from motionrt.runtime.cli.schedule import preview_app, schedule_app
from motionrt.runtime.cli.service.client import client_app
from motionrt.runtime.cli.service.replay import replay
from motionrt.runtime.cli.service.serve import keys_app, serve
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.cli.verify import verify
from motionrt.runtime.errors import InputError, MediaError
from motionrt.runtime.files import replacing
from motionrt.runtime.job import Request
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.memory.search import Search

app = typer.Typer(
    name="motionrt",
    help="Make a still image move the way retrieved clips move.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(memory_app, name="memory")
app.add_typer(schedule_app, name="schedule")
app.add_typer(preview_app, name="preview")
app.add_typer(keys_app, name="keys")
app.add_typer(client_app, name="client")
app.add_typer(deploy_app, name="deploy")


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


@app.command(cls=BundleCommand)
@with_run_options
@with_search_options
def generate(
    inputs: typer.Context,
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Video to write: .mp4, .gif, .webp or .png (a sheet).")],
    memory: Memories = None,
    seed: Annotated[int, typer.Option(help="Same seed, bundle and memory: same video.")] = 0,
    steps: Steps = None,
    solver: Solver = None,
    references: Annotated[int | None, typer.Option("--references", "-k", help="How many clips to retrieve.")] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A video to take the motion from, in place of the memory; again for more."),
    ] = None,
    show_field: Annotated[
        bool, typer.Option("--show-field", help="Also write NAME-field: arrows over the frames, and colours by direction.")
    ] = False,
    save_field: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="Also write the motion field, floats [F, 2, H, W] in pixels.")
    ] = None,
    low_memory: LowMemory = False,
    limit: Limited = None,
    *,
    search: Search,
    run_options: RunOptions,
) -> None:
    """Make a video. What it is made from are the inputs of the bundle, each an option: `motionrt generate -b BUNDLE --help`.

    \b
    Examples:
      motionrt generate -b demo/bundle -m demo/memory -i star.png -p "a red star moves in a circle" -o star.mp4
      motionrt generate -b demo/bundle -m birds -m sea=0.5 -i star.png -p "waves" -o star.mp4
      motionrt generate -b demo/bundle -i star.png -p "a red star" --reference wave.mp4 -o star.mp4
      motionrt generate -b demo/bundle -i star.png -p "a red star" --motion-scale 0 -o still.gif --steps 20
      motionrt generate -b demo/bundle -m demo/memory -i star.png -p "a red star" -o star.mp4 --backend auto
    Where a bundle takes drags and a brush:
      motionrt generate -b BUNDLE -i star.png --drag "20,32 44,32" --brush brush.png --show-field -o star.mp4
    """
    from motionrt.runtime.cli import show
    from motionrt.runtime.media.fields import field_view
    from motionrt.runtime.media.video import WRITABLE, write_video
    from motionrt.runtime.media.video import check_output as check_video

    if out.suffix.lower() not in WRITABLE:  # said before the work, not after it
        raise MediaError(f"cannot write {out}: extension {out.suffix!r} is not one of {', '.join(WRITABLE)}.")
    if out.suffix.lower() == ".mp4":
        import av  # noqa: F401  # what writes it: an installation that is broken, or too little memory for it, is said now
    if reference and references is not None:
        raise InputError("--reference gives the clips, and --references how many to find in the memory; leave one of them out.")
    console, limits = show.console(), Limits.parse(limit or ())
    with (
        open_pipeline(bundle, memory or [], run_options, low_memory=low_memory, limits=limits) as pipeline,
        show.progress() as bars,
    ):
        job = pipeline.start(Request(inputs.obj, seed, solver, steps, reference or references, search))
        shown = pipeline.bundle.manifest.output
        if (show_field or save_field) and shown.field is None:
            raise InputError(f"bundle '{pipeline.bundle.name}' shows no motion field; leave --show-field and --save-field out.")
        field_out = out.with_stem(f"{out.stem}-field")
        check_video(out, shown.height, shown.width, shown.fps)
        for path in (out, field_out) if show_field else (out,):
            check_output(path, video_size(out, shown))
        if save_field is not None:
            check_output(save_field, 8 * shown.frames * shown.height * shown.width)
        start = time.perf_counter()
        pipeline.warm()
        load = time.perf_counter() - start
        tasks: dict[str, Any] = {}
        for call in job:
            if call.loop and call.loop not in tasks:
                tasks[call.loop] = bars.add_task(f"{call.loop}: {call.graph}", total=call.steps)
            if call.loop:
                bars.update(tasks[call.loop], completed=call.step)
        result = pipeline.result(job)
    start = time.perf_counter()
    write_video(out, result.frames, result.fps)
    if result.field is not None and show_field:
        write_video(field_out, field_view(result.frames, result.field), result.fps)
    if result.field is not None and save_field is not None:
        with replacing(save_field, MediaError) as temporary, open(temporary, "wb") as file:
            np.save(file, result.field)
    if result.references:
        console.print(show.references_table(result.references))
    inexact = f"not exact: {', '.join(result.approximations)} (motionrt inspect tells what that costs)"
    for note in (*result.notes, inexact if result.approximations else None, result.fallback, result.choice):
        if note is not None:
            echo(note)
    console.print(show.stages_table([result], {"write": time.perf_counter() - start, "load": load}))
    frames, height, width, _ = result.frames.shape
    echo(f"{out}: {frames} frames of {width}x{height} at {result.fps:g} fps, seed {seed}")


@app.command()
def inspect(
    bundle: BundleArgument,
    ports: Annotated[bool, typer.Option("--ports", help="Also every graph's ports, and what was hoisted.")] = False,
) -> None:
    """Draw the system that a bundle holds: its inputs, the way from them to the video, loops, and what a memory keeps of a
    clip.

    \b
    Examples:
      motionrt inspect demo/bundle
      motionrt inspect demo/bundle --ports
    """
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.cli import show
    from motionrt.runtime.cli.picture import picture

    console, opened = show.console(), Bundle.open(bundle)
    for line in picture(opened):
        echo(line)
    for table in show.inspect_tables(opened, ports):
        console.print(table)


app.command(cls=BundleCommand)(bench)
app.command()(doctor)
app.command()(verify)
app.command()(serve)
app.command()(replay)


def register() -> None:
    """Take in the commands that need more than the run side: entry points of the group `motionrt.commands`."""
    known = {command.name for command in app.registered_commands}
    for entry in importlib.metadata.entry_points(group="motionrt.commands"):
        if entry.name not in known:
            app.command(entry.name)(entry.load())


def main(arguments: list[str] | None = None) -> None:
    """Run the command with `arguments`, those of the process if not given; ends the process as `run_app` says."""
    register()
    run_app(app, "motionrt", arguments)
