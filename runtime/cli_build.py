"""The `motionrt build` command: a bundle's graphs as TensorRT engines for the GPUs that will run them."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionrt.runtime.errors import BackendError

if TYPE_CHECKING:
    from motionrt.export.engine_build import Built
    from motionrt.export.engine_process import Event

NEEDED = ("onnx", "onnx_ir", "ml_dtypes")
MIB = 2**20


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory; engines are written to its folder `engines`.")],
    target: Annotated[list[str], typer.Option("--target", "-t", help="GPU to build for, such as sm_89; commas, or again.")],
    flavor: Annotated[str, typer.Option(help="rtx (TensorRT-RTX; no GPU needed) or tensorrt (on the target GPU).")] = "rtx",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 (sm_80 and newer) or float32.")] = "float16",
    graphs: Annotated[list[str] | None, typer.Option("--graphs", "-g", help="Only these graphs; commas, or again.")] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option("--profile", metavar="SIZE=MIN..MAX", help="Sizes that engines take besides the usual ones; again: more."),
    ] = None,
    kernel: Annotated[
        str,
        typer.Option(help="The motion kernel: plugin (full TensorRT only), body (standard layers), auto: plugin if it can."),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Build although the memory estimate says no.")] = False,
) -> None:
    """Build engines of a bundle. Each is in place as soon as it is done; one that is up to date is left alone.

    Sizes are fixed at what the bundle is tuned for, and for graphs outside of the loop also go over the declared range
    (tokens, references, clips); a larger batch is a profile. Needs pip install motionrt[export,rtx].

    \b
    Examples:
      motionrt build demo/bundle --target sm_89,sm_120
      motionrt build demo/bundle --target sm_89 --dtype bfloat16 --graphs step --profile batch=1..4
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"build needs {', '.join(missing)}: `pip install motionrt[export]`.")
    from motionrt.export.engine_build import Options, build_engines
    from motionrt.export.engine_profiles import parse_profile
    from motionrt.runtime import report

    options = Options(
        targets=tuple(_split(target)),
        flavor=flavor,
        dtype=dtype,
        graphs=tuple(_split(graphs or [])),
        profiles=tuple(parse_profile(text) for text in profile or ()),
        force=force,
        kernel=kernel,
    )
    start, console = time.perf_counter(), report.console()
    built: list[Built] = []
    with report.progress() as bars:
        task = bars.add_task("reading the bundle", total=None)

        def listen(event: Event) -> None:
            bars.update(task, description=f"{event.graph}: {event.phase}", completed=event.done, total=event.total or None)
            if event.phase.startswith("building") and bars.disable:
                console.print(f"{event.graph}: {event.phase}", markup=False)

        for item in build_engines(bundle, options, listen):
            built.append(item)
            (console if bars.disable else bars.console).print(_line(item), markup=False)
    seconds, new = time.perf_counter() - start, sum(not item.cached for item in built)
    folder = built[0].file.folder if built else bundle / "engines"
    console.print(
        f"{folder}: {len(built)} engines, {new} of them built now, {seconds:.1f} s. Look with: motionrt doctor {bundle}",
        markup=False,
        soft_wrap=True,
    )


def _line(item: Built) -> str:
    """What was built, in one line."""
    file = item.file
    text = f"{file.graph}: {file.engine_bytes / MIB:.1f} MiB, {file.attentions} attentions"
    if item.cached:
        return f"{text}; up to date"
    fused = f", {item.decomposed} of them not fused" if item.decomposed else ""
    return f"{text}{fused}; {file.build_seconds:.1f} s, {file.peak_rss_mib:.0f} MiB of memory"


def _split(texts: Iterable[str]) -> list[str]:
    """Values of an option that may come again, and hold commas."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]
