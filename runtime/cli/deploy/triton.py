"""`motionrt deploy triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import BundlePath, with_run_options
from motionrt.runtime.cli.terminal import echo


@with_run_options
def triton(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option("--out", "-o", help="Model repository, in which the bundle's name is the model's.")],
    memory: Annotated[Path | None, typer.Option("--memory", "-m", help="Motion memory directory.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs that each have an instance: cuda:0,cuda:1; the CPU if not given.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Instances on each device: requests that are answered at once.")] = 1,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy bundle and memory into the repository, so that it can be taken elsewhere.")
    ] = False,
    *,
    run_options: RunOptions,
) -> None:
    """Write a model repository of Triton Inference Server: one decoupled Python model, which streams progress and frames.

    \b
    Examples:
      motionrt deploy triton -b demo/bundle -m demo/memory -o out/repository
      motionrt deploy triton -b demo/bundle -m demo/memory -o out/repository --copy --devices cuda:0,cuda:1 --backend tensorrt
    """
    from motionrt.runtime.deploy.triton import write_repository

    cards = devices.split(",") if devices else []
    target, why = write_repository(out, bundle, memory, run_options, devices=cards, instances=instances, copied=copy)
    if why is not None:
        echo(f"no warm-up request can be made up: {why}")
    echo(f"{target}: start Triton with --model-repository={out}")
