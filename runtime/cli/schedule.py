"""The `motionrt schedule` commands: schedules that leave out steps, found for a budget and kept in the bundle by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import BundleArgument, Memories, Solver, Steps, open_pipeline, with_run_options
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError

schedule_app = typer.Typer(
    help="Find schedules that run the network in fewer steps, and keep them in the bundle by name.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@schedule_app.command("calibrate")
@with_run_options
def schedule_calibrate(
    bundle: BundleArgument,
    memory: Memories = None,
    name: Annotated[str, typer.Option(help="What it is called: a solver of the bundle from then on.")] = "quick",
    at_least: Annotated[
        float, typer.Option("--at-least", metavar="DB", help="How near to the exact frames the worst request stays, in dB.")
    ] = 50.0,
    clips: Annotated[int, typer.Option(min=1, help="Requests that are made of clips of the memory.")] = 8,
    requests: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Requests of your own instead: a list of objects with inputs.")
    ] = None,
    steps: Steps = None,
    solver: Solver = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what was found, and leave the bundle as it is.")] = False,
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
    from motionrt.runtime.calibrate import calibrate, keep, requests_in, requests_of, some_clips
    from motionrt.runtime.memory.memory import MotionMemory

    with open_pipeline(bundle, memory or [], run_options) as pipeline:
        if requests is not None:
            asked = requests_in(pipeline, requests)
        elif isinstance(pipeline.memory, MotionMemory):
            asked = requests_of(pipeline.bundle, pipeline.memory, some_clips(pipeline.memory, clips))
        else:
            raise InputError("requests are made of the clips of one motion memory: give --memory, or --requests FILE.json.")
        found = calibrate(pipeline, asked, solver=solver, steps=steps, least=at_least, say=echo)
    quality = found.quality
    if not dry_run:
        keep(bundle, found, name)
    echo(
        f"{name}: {quality['network_runs']} of {quality['steps']} steps of {found.solver} run the network; of {len(asked)}"
        f" requests the worst is {quality['db_lowest']:.1f} dB from the exact frames, the mean {quality['db_mean']:.1f}"
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
