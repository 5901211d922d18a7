"""The commands of the build side: `motionrt export` and `motionrt build`.

The command line shows them wherever motionrt is installed, so nothing of the extra `export` is imported here before it is used.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionrt.runtime.errors import BackendError, InputError, install

if TYPE_CHECKING:
    from motionrt.export.engines.build import Built
    from motionrt.export.engines.onnx_forms import Formed
    from motionrt.export.engines.process import Event

FRAMES = {"cogvideox-5b-i2v": 17, "svd": 16}  # the published models, and how many frames a video has unless told otherwise
MIB = 2**20


def export(
    model: Annotated[str, typer.Argument(help=f"The published model: {' or '.join(FRAMES)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory to write.")],
    base: Annotated[Path | None, typer.Option(help="Diffusers folder of the base model.")] = None,
    motionrag: Annotated[Path | None, typer.Option(help="Folder with MotionRAG's files for that model.")] = None,
    videomae: Annotated[Path | None, typer.Option(help="Folder of VideoMAE-base, finetuned on SSv2.")] = None,
    dinov2: Annotated[Path | None, typer.Option(help="Folder of DINOv2-large.")] = None,
    text_query: Annotated[Path | None, typer.Option(help="Sentence-transformers folder to search with; else MiniLM.")] = None,
    frames: Annotated[int | None, typer.Option(help="17 or 49 for CogVideoX, 16 for SVD.")] = None,
    height: Annotated[int | None, typer.Option(help="Of the picture, for SVD: 576 unless given, a multiple of 64.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the picture, for SVD: 1024 unless given, a multiple of 64.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="What weights are kept in: checkpoint (as they are), bfloat16, float16 or float32. What is computed in is "
            "chosen where the bundle runs."
        ),
    ] = "checkpoint",
    without_torch: Annotated[
        bool, typer.Option("--without-torch", help="Leave out the torch programs: --backend torch cannot run the bundle then.")
    ] = False,
    sos_token: Annotated[str | None, typer.Option(help="seed:NUMBER or a file, where the checkpoint has none.")] = None,
    target_range: Annotated[str, typer.Option(help="What DINOv2 sees of the still: correct, or as released.")] = "correct",
    positions: Annotated[str, typer.Option(help="CogVideoX positions off 49 frames: released, or learned.")] = "released",
    decode_tiles: Annotated[int, typer.Option(help="Tiles along either side in which latents are decoded.")] = 1,
) -> None:
    """Export a published base model with MotionRAG's files as a bundle. Needs pip install motionrt[export].

    \b
    Example:
      motionrt export cogvideox-5b-i2v --base CogVideoX-5b-I2V --motionrag CogVideoX --videomae videomae-base-ssv2
        --dinov2 dinov2-large --sos-token seed:42 -o cogvideox
    """
    _need("export", "torch", "diffusers", "transformers", "onnx", "onnxscript")
    if model not in FRAMES:
        raise InputError(f"model is {model!r}; it must be one of {', '.join(FRAMES)}. See docs/models.md.")
    folders = {"--base": base, "--motionrag": motionrag, "--videomae": videomae, "--dinov2": dinov2}
    if absent := [name for name, folder in folders.items() if folder is None]:
        raise InputError(f"export {model} needs {', '.join(absent)}. See docs/models.md.")
    assert base is not None and motionrag is not None and videomae is not None and dinov2 is not None
    from motionrt.export.checkpoints.motionrag_files import SosToken
    from motionrt.export.exporter import export_system
    from motionrt.export.systems.motionrag_system import Sources

    sources = Sources(
        base=base,
        motionrag=motionrag,
        videomae=videomae,
        dinov2=dinov2,
        dtype=dtype,
        sos=SosToken.parse(sos_token) if sos_token else None,
        target_range=target_range,
        positions=positions,
        text_query=text_query,
        tiles=decode_tiles,
    )
    frames = frames or FRAMES[model]
    if model == "svd":
        from motionrt.export.systems.svd import svd_system

        system = svd_system(sources, frames=frames, height=height or 576, width=width or 1024, say=typer.echo)
    elif height is not None or width is not None:
        raise InputError(f"--height and --width are for svd; {model} was trained for one size, which its files say.")
    else:
        from motionrt.export.systems.cogvideox import cogvideox_system

        system = cogvideox_system(sources, frames=frames, say=typer.echo)
    lines = export_system(system, out, programs=not without_torch, say=typer.echo)
    for line in lines:
        typer.echo(line)
    typer.echo(f"{out}: exported. Look at it with: motionrt inspect {out}")


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory; engines are written to its folder `engines`.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="GPU to build engines for, such as sm_89; commas, or again.")
    ] = None,
    flavor: Annotated[
        str,
        typer.Option(help="rtx (TensorRT-RTX; no GPU needed), tensorrt (on the target GPU), or onnxruntime: no engines, but "
                     "graphs in --dtype for ONNX Runtime on any GPU."),
    ] = "rtx",
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
      motionrt build demo/bundle --flavor onnxruntime --dtype float16
    """
    _need("build", "onnx", "onnx_ir", "ml_dtypes")
    from motionrt.export.engines.build import Options, build_engines
    from motionrt.export.engines.onnx_forms import Formed, build_forms
    from motionrt.export.engines.profiles import parse_profile
    from motionrt.runtime.backends.onnx_form import FLAVOR
    from motionrt.runtime.cli import show as report

    options = Options(
        targets=tuple(_split(target or [])),
        flavor=flavor,
        dtype=dtype,
        graphs=tuple(_split(graphs or [])),
        profiles=tuple(parse_profile(text) for text in profile or ()),
        force=force,
        kernel=kernel,
    )
    start, console = time.perf_counter(), report.console()
    made: Iterator[Built] | Iterator[Formed]
    count = new = 0
    with report.progress() as bars:
        task = bars.add_task("reading the bundle", total=None)

        def listen(event: Event) -> None:
            bars.update(task, description=f"{event.graph}: {event.phase}", completed=event.done, total=event.total or None)
            if event.phase.startswith("building") and bars.disable:
                console.print(f"{event.graph}: {event.phase}", markup=False)

        made = build_forms(bundle, options, listen) if flavor == FLAVOR else build_engines(bundle, options, listen)
        for item in made:
            count, new = count + 1, new + (not item.cached)
            folder = item.form.folder if isinstance(item, Formed) else item.file.folder
            (console if bars.disable else bars.console).print(_line(item), markup=False)
    what = "graphs" if flavor == FLAVOR else "engines"
    console.print(
        f"{folder}: {count} {what}, {new} of them built now, {time.perf_counter() - start:.1f} s. "
        f"Look with: motionrt doctor {bundle}",
        markup=False,
        soft_wrap=True,
    )


def _line(item: Built | Formed) -> str:
    """What was built, in one line."""
    from motionrt.export.engines.onnx_forms import Formed

    if isinstance(item, Formed):
        rest = "; up to date" if item.cached else ""
        return f"{item.form.graph}: {item.bytes / MIB:.1f} MiB in {item.form.dtype}{rest}"
    file = item.file
    text = f"{file.graph}: {file.engine_bytes / MIB:.1f} MiB, {file.attentions} attentions"
    if item.cached:
        return f"{text}; up to date"
    fused = f", {item.decomposed} of them not fused" if item.decomposed else ""
    return f"{text}{fused}; {file.build_seconds:.1f} s, {file.peak_rss_mib:.0f} MiB of memory"


def _split(texts: Iterable[str]) -> list[str]:
    """Values of an option that may come again, and hold commas."""
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _need(command: str, *packages: str) -> None:
    """Raise `BackendError` unless the packages that `command` imports are there."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise BackendError(f"{command} needs {', '.join(missing)}: {install('export')}.")
