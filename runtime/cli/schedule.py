"""What is found with requests of one's own and kept in the bundle: `motionrt schedule`, schedules that leave out steps, and
`motionrt preview`, a cheap look at a video while it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import BundleArgument, Memories, Solver, Steps, open_pipeline, with_run_options
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError

if TYPE_CHECKING:
    from motionrt.runtime.pipeline import MotionPipeline, Request

schedule_app = typer.Typer(
    help="Find schedules that run the network in fewer steps, and keep them in the bundle by name.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
preview_app = typer.Typer(
    help="Make a cheap look at videos while they are made, and keep it in the bundle.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Requests = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Requests of your own instead: a list of objects with inputs.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what was found, and leave the bundle as it is.")]


@schedule_app.command("calibrate")
@with_run_options
def schedule_calibrate(
    bundle: BundleArgument,
    memory: Memories = None,
    name: Annotated[str, typer.Option(help="What it is called: a solver of the bundle from then on.")] = "quick",
    at_least: Annotated[
        float, typer.Option("--at-least", metavar="DB", help="How near to the exact frames the worst request stays, in dB.")
    ] = 50.0,
    ssim: Annotated[
        float, typer.Option("--at-least-ssim", metavar="SSIM", help="The same as structural similarity: 1 equal, 0 any.")
    ] = 0.0,
    clips: Annotated[int, typer.Option(min=1, help="Requests that are made of clips of the memory.")] = 8,
    requests: Requests = None,
    steps: Steps = None,
    solver: Solver = None,
    dry_run: DryRun = False,
    *,
    run_options: RunOptions,
) -> None:
    """Find the schedule with the fewest runs of the network that stays within a budget of quality, and keep it by name.

    Steps that are left out are extrapolated from the two before them that ran the network. The frames are compared with those
    of the same requests without that: first pictures and captions of the memory's clips, with the motion of the other clips.

    \b
    Examples:
      motionrt schedule calibrate demo/bundle -m demo/memory --steps 25 --at-least 50
      motionrt generate -b demo/bundle -m demo/memory -i star.png -p "a star turns" --solver quick -o star.mp4
    """
    from motionrt.runtime.calibrate import calibrate, keep

    with open_pipeline(bundle, memory or [], run_options) as pipeline:
        asked = _asked(pipeline, requests, clips)
        found = calibrate(pipeline, asked, solver=solver, steps=steps, least=at_least, least_ssim=ssim, say=echo)
    quality = found.quality
    if not dry_run:
        keep(bundle, found, name)
    echo(
        f"{name}: {quality['network_runs']} of {quality['steps']} steps of {found.solver} run the network; of {len(asked)}"
        f" requests the worst is {quality['db_lowest']:.1f} dB from the exact frames, the mean {quality['db_mean']:.1f},"
        f" and their SSIM is {quality['ssim_lowest']:.4f} and {quality['ssim_mean']:.4f}"
    )
    echo("the bundle was left as it is" if dry_run else f"kept in {bundle}: use it with --solver {name}")


@schedule_app.command("remove")
def schedule_remove(bundle: BundleArgument, name: Annotated[str, typer.Argument(help="Name of the schedule.")]) -> None:
    """Take a schedule that was calibrated out of the bundle.

    \b
    Examples:
      motionrt schedule remove demo/bundle quick
    """
    from motionrt.runtime.calibrate import remove

    remove(bundle, name)
    echo(f"{bundle}: {name} is gone")


@preview_app.command("calibrate")
@with_run_options
def preview_calibrate(
    bundle: BundleArgument,
    memory: Memories = None,
    clips: Annotated[int, typer.Option(min=2, help="Requests that are made of clips of the memory.")] = 4,
    requests: Requests = None,
    dry_run: DryRun = False,
    *,
    run_options: RunOptions,
) -> None:
    """Find the linear map from latents to colours that is most like the frames of a few requests, and keep it.

    From then on `Job.preview()` shows small pictures of the video after any step, and a server shows them while a job runs. No
    frame changes. How near they come is measured with requests that were not fitted.

    \b
    Examples:
      motionrt preview calibrate demo/bundle -m demo/memory
    """
    from motionrt.runtime.preview import fit, keep

    with open_pipeline(bundle, memory or [], run_options) as pipeline:
        found = fit(pipeline, _asked(pipeline, requests, clips), say=echo)
    if not dry_run:
        keep(bundle, found)
    quality = found.preview.quality
    echo(
        f"`{found.preview.value}` of loop '{found.loop}', {len(found.preview.factors)} channels: of {quality['requests']}"
        f" requests, each by a fit to the others, the worst is {quality['db_lowest']:.1f} dB from the frames made as small,"
        f" the mean {quality['db_mean']:.1f}"
    )
    echo("the bundle was left as it is" if dry_run else f"kept in {bundle}")


def _asked(pipeline: MotionPipeline, file: Path | None, clips: int) -> list[Request]:
    """The requests of a file, else as many as `clips` of the clips of the memory."""
    from motionrt.runtime.calibrate import requests_in, requests_of, some_clips
    from motionrt.runtime.memory.memory import MotionMemory

    if file is not None:
        return requests_in(pipeline, file)
    if isinstance(pipeline.memory, MotionMemory):
        return requests_of(pipeline.bundle, pipeline.memory, some_clips(pipeline.memory, clips))
    raise InputError("requests are made of the clips of one motion memory: give --memory, or --requests FILE.json.")
