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

from motionrt.runtime.cli.terminal import echo, visible
from motionrt.runtime.errors import BackendError, InputError, install

if TYPE_CHECKING:
    from motionrt.export.engines.build import Built
    from motionrt.export.engines.onnx_forms import Formed
    from motionrt.export.engines.process import Event
    from motionrt.export.systems.motionrag_system import Sources
    from motionrt.export.systems.system import System

# The published models, and how many frames a video has unless told otherwise; options that are for some of them alone.
DYNAMICRAFTERS = ("dynamicrafter-1024", "dynamicrafter-512", "dynamicrafter-256")
FRAMES = {"cogvideox-5b-i2v": 17, "svd": 16, **dict.fromkeys(DYNAMICRAFTERS, 16), "motionclone": 16, "motion-i2v": 16}
STEPS = ("target_range", "positions", "ending", "split_guidance")  # of MotionRAG's, not for DynamiCrafter
MOTIONRAG = ("motionrag", "videomae", "dinov2", "fusion", "sos_token", *STEPS, "decode_tiles")
DYNAMICRAFTER = ("tokenizer", "adapter_queries", "frame_tokens", "passes")
MOTIONCLONE = ("motion", "domain_adapter", "sparsectrl", "group_norm", "record", "semantic")
MOTION_I2V = ("models", "unet", "vae", "form")
# What an export cannot do without
NEEDED = {
    "motionclone": ("base", "motion"), "motion-i2v": ("models",), **dict.fromkeys(DYNAMICRAFTERS, ("base", "tokenizer")),
}  # fmt: skip
MIB = 2**20


def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"The published model: {', '.join(FRAMES)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle directory to write.")],
    base: Annotated[
        Path | None, typer.Option(help="Diffusers folder of the base model, or DynamiCrafter's model.ckpt; not for Motion-I2V.")
    ] = None,
    motionrag: Annotated[Path | None, typer.Option(help="Folder with MotionRAG's files for that model.")] = None,
    videomae: Annotated[Path | None, typer.Option(help="Folder of VideoMAE-base, finetuned on SSv2.")] = None,
    dinov2: Annotated[Path | None, typer.Option(help="Folder of DINOv2-large.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a CLIP tokenizer, for DynamiCrafter.")] = None,
    motion: Annotated[Path | None, typer.Option(help="AnimateDiff's motion modules, file or folder, for MotionClone.")] = None,
    domain_adapter: Annotated[Path | None, typer.Option(help="AnimateDiff's domain adapter (LoRA), for MotionClone.")] = None,
    sparsectrl: Annotated[
        Path | None, typer.Option(help="SparseCtrl, file or folder: MotionClone from an image (rgb) or a sketch (scribble).")
    ] = None,
    models: Annotated[Path | None, typer.Option(help="Motion-I2V's folder `models`.")] = None,
    unet: Annotated[Path | None, typer.Option(help="UNet in place of Motion-I2V's realistic_unet.ckpt.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Diffusers folder of a picture autoencoder for Motion-I2V.")] = None,
    text_query: Annotated[Path | None, typer.Option(help="Sentence-transformers folder to search with; else MiniLM.")] = None,
    frames: Annotated[int | None, typer.Option(help="17 or 49 for CogVideoX, 16 for the others.")] = None,
    height: Annotated[
        int | None,
        typer.Option(
            help="Of the picture, a multiple of 64; unless given, 576 for SVD, 512 for MotionClone, 320 for Motion-I2V, and "
            "what DynamiCrafter's model is for."
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Of the picture, as height; unless given, 1024 for SVD, and 512.")
    ] = None,
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
    fusion: Annotated[
        str,
        typer.Option(
            help="How MotionRAG's clips become one motion: cama, or without that network mean, concat, top1 or weight (by how "
            "near a clip is), which need no --dinov2 and no motion_transformer."
        ),
    ] = "cama",
    sos_token: Annotated[str | None, typer.Option(help="seed:NUMBER or a file, where the checkpoint has none.")] = None,
    adapter_queries: Annotated[
        str | None, typer.Option(help="seed:NUMBER, where MotionRAG's adapter for DynamiCrafter has no queries.")
    ] = None,
    frame_tokens: Annotated[
        str, typer.Option(help="Image tokens that a frame of DynamiCrafter sees: its share (split), or all.")
    ] = "split",
    passes: Annotated[int, typer.Option(help="DynamiCrafter's passes of guidance: 2, or 3 with one for the image.")] = 2,
    target_range: Annotated[str, typer.Option(help="What DINOv2 sees of the still: correct, or as released.")] = "correct",
    positions: Annotated[str, typer.Option(help="CogVideoX positions off 49 frames: released, or learned.")] = "released",
    ending: Annotated[
        str, typer.Option(help="CogVideoX's last step: x0, or released, which at 6, 7, 11, 13 and other counts leaves noise.")
    ] = "x0",
    split_guidance: Annotated[
        bool, typer.Option("--split-guidance", help="A call of the network for each branch of guidance: see docs/scale.md.")
    ] = False,
    decode_tiles: Annotated[int, typer.Option(help="Tiles along either side in which latents are decoded.")] = 1,
    group_norm: Annotated[
        str, typer.Option(help="Statistics of MotionClone's motion modules: per_frame as trained, or shared as in diffusers.")
    ] = "per_frame",
    form: Annotated[
        str, typer.Option(help="Motion-I2V's branches of guidance: own, or mixed as in its released code (released).")
    ] = "own",
    record: Annotated[
        str,
        typer.Option(
            help="What MotionClone's memory keeps of a clip: latents, or the representation that one noise gives, which costs "
            "a request nothing and follows the clip less closely."
        ),
    ] = "latents",
    semantic: Annotated[
        bool, typer.Option("--semantic", help="Guide what MotionClone's video shows too, as its first version did.")
    ] = False,
) -> None:
    """Export a published model as a bundle: a base with MotionRAG's files (DynamiCrafter: or without), MotionClone or
    Motion-I2V. Needs pip install motionrt[export].

    \b
    Examples:
      motionrt export cogvideox-5b-i2v --base CogVideoX-5b-I2V --motionrag CogVideoX --videomae videomae-base-ssv2
        --dinov2 dinov2-large --sos-token seed:42 -o cogvideox
      motionrt export dynamicrafter-512 --base DynamiCrafter_512 --tokenizer clip-tokenizer -o dynamicrafter
      motionrt export motionclone --base stable-diffusion-v1-5 --motion v3_sd15_mm.ckpt -o motionclone
      motionrt export motion-i2v --models Motion-I2V/models -o motion-i2v
    """
    _need("export", "torch", "diffusers", "transformers", "onnx", "onnxscript")
    if model not in FRAMES:
        raise InputError(f"model is {model!r}; it must be one of {', '.join(FRAMES)}. See docs/models.md.")
    own_options = {"motionclone": (*MOTIONCLONE, "base", "text_query"), "motion-i2v": MOTION_I2V}
    rag = [name for name in MOTIONRAG if name not in STEPS]
    own_options |= dict.fromkeys(DYNAMICRAFTERS, (*rag, *DYNAMICRAFTER, "base", "text_query"))
    taken = own_options.get(model, (*MOTIONRAG, "base", "text_query"))
    others = {*MOTIONRAG, *DYNAMICRAFTER, *MOTIONCLONE, *MOTION_I2V, "base", "text_query"} - {*taken}
    given = {name: context.get_parameter_source(name) for name in context.params if name in others}
    if foreign := [f"--{name.replace('_', '-')}" for name, at in given.items() if at and at.name == "COMMANDLINE"]:
        raise InputError(f"{', '.join(foreign)}: not for {model}. Leave out what is for another model; see docs/models.md.")
    needed = NEEDED.get(model, ("base", "motionrag", "videomae", *(("dinov2",) if fusion == "cama" else ())))
    if absent := [f"--{name}" for name in needed if context.params[name] is None]:
        raise InputError(f"export {model} needs {', '.join(absent)}. See docs/models.md.")
    from motionrt.export.exporter import export_system

    frames = frames or FRAMES[model]
    if model == "motion-i2v":
        assert models is not None
        from motionrt.export.checkpoints.motion_i2v_files import MotionI2VSources
        from motionrt.export.systems.motion_i2v.released import motion_i2v_system

        files = MotionI2VSources(models, unet, vae, form, dtype)
        system = motion_i2v_system(files, frames=frames, height=height or 320, width=width or 512, say=echo)
    elif model == "motionclone":
        assert base is not None and motion is not None
        from motionrt.export.checkpoints.animatediff_files import MotionCloneSources
        from motionrt.export.systems.motionclone.system import motionclone_system

        own = MotionCloneSources(base, motion, domain_adapter, sparsectrl, text_query, dtype, group_norm, record, semantic)
        system = motionclone_system(own, frames=frames, height=height or 512, width=width or 512, say=echo)
    elif model in DYNAMICRAFTERS:
        assert base is not None and tokenizer is not None
        from motionrt.export.checkpoints.motionrag_files import SosToken
        from motionrt.export.systems.dynamicrafter.system import DynamiCrafterSources, dynamicrafter_system

        crafter = DynamiCrafterSources(
            base=base,
            tokenizer=tokenizer,
            model=model.removeprefix("dynamicrafter-"),
            motionrag=motionrag,
            videomae=videomae,
            dinov2=dinov2,
            dtype=dtype,
            sos=SosToken.parse(sos_token) if sos_token else None,
            fusion=fusion,
            queries=_seed("--adapter-queries", adapter_queries),
            frame_tokens=frame_tokens,
            passes=passes,
            text_query=text_query,
            tiles=decode_tiles,
        )
        system = dynamicrafter_system(crafter, frames=frames, height=height, width=width, say=echo)
    else:
        assert base is not None and motionrag is not None and videomae is not None
        from motionrt.export.checkpoints.motionrag_files import SosToken
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
            ending=ending,
            text_query=text_query,
            tiles=decode_tiles,
            fusion=fusion,
            split=split_guidance,
        )
        system = _motionrag(model, sources, frames, height, width)
    lines = export_system(system, out, programs=not without_torch, say=echo)
    for line in lines:
        echo(line)
    echo(f"{out}: exported. Look at it with: motionrt inspect {out}")


def _seed(option: str, text: str | None) -> int | None:
    """The number of seed:NUMBER."""
    if text is None:
        return None
    number = text.removeprefix("seed:")
    if number == text or not number.isdecimal() or int(number) >= 2**63:
        raise InputError(f"{option} is {text!r}; allowed is seed:NUMBER.")
    return int(number)


def _motionrag(model: str, sources: Sources, frames: int, height: int | None, width: int | None) -> System:
    """The system of a base model with MotionRAG's files."""
    if model == "svd":
        from motionrt.export.systems.svd import svd_system

        return svd_system(sources, frames=frames, height=height or 576, width=width or 1024, say=echo)
    if height is not None or width is not None:
        raise InputError(f"--height and --width are not for {model}, which was trained for one size, which its files say.")
    from motionrt.export.systems.cogvideox import cogvideox_system

    return cogvideox_system(sources, frames=frames, say=echo)


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory; engines are written to its folder `engines`.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="GPU to build engines for, such as sm_89; commas, or again.")
    ] = None,
    flavor: Annotated[
        str,
        typer.Option(
            help="rtx (TensorRT-RTX; no GPU needed), tensorrt (on the target GPU); or no engines, but graphs: onnxruntime, in "
            "--dtype for any GPU or in --precision int8 for the CPU, and openvino, in --precision int8."
        ),
    ] = "rtx",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What all is computed in, or with --precision the rest of it: float16 (unless given), bfloat16 (sm_80 and "
            "newer) or float32."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="int8, or fp8 (rtx and tensorrt; sm_89 and newer): the steps of loops with their products of weights in 8 "
            "bits. An approximation; only what is run with the same --precision takes it."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="MEMORY",
            help="Motion memory whose clips make the requests that --precision is measured with: scales of activations (all "
            "but onnxruntime need them once), and quality.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many requests --calibrate makes for the scales.")] = 8,
    least_db: Annotated[
        float | None,
        typer.Option(
            "--least-db",
            help="Of --flavor onnxruntime or openvino: leave the products that cost most as they are until --calibrate "
            "measures this quality. Slow: every product is tried alone.",
        ),
    ] = None,
    graphs: Annotated[
        list[str] | None,
        typer.Option("--graphs", "-g", help="Only these graphs; commas, or again. Else all, or with --precision the steps."),
    ] = None,
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
      motionrt build demo/bundle --flavor onnxruntime --precision int8
      motionrt build demo/bundle --target sm_89 --precision fp8 --calibrate demo/memory
    """
    _need("build", "onnx", "onnx_ir", "ml_dtypes")
    from motionrt.export.engines.build import Options, build_engines
    from motionrt.export.engines.onnx_forms import Formed, build_forms
    from motionrt.export.engines.profiles import parse_profile
    from motionrt.runtime.backends.onnx_form import FORMS
    from motionrt.runtime.cli import show as report

    if precision is None and calibrate is not None:
        raise InputError("--calibrate is for what is in 8 bits: give --precision int8 or fp8 with it, or leave it away.")
    if precision is not None and flavor in FORMS and dtype not in (None, "float32"):
        raise InputError(f"--dtype is {dtype!r}; with --flavor {flavor} --precision {precision} it is float32: leave it away.")
    if least_db is not None and flavor not in FORMS:
        raise InputError(f"--least-db is for --flavor {' or '.join(FORMS)}: the quality of engines takes their GPU.")
    options = Options(
        targets=tuple(_split(target or [])),
        flavor=flavor,
        dtype=dtype or "float16",
        graphs=tuple(_split(graphs or [])),
        profiles=tuple(parse_profile(text) for text in profile or ()),
        force=force,
        kernel=kernel,
        precision=precision,
        calibrate=calibrate,
        requests=requests,
        least_db=least_db,
    )
    start = time.perf_counter()
    made: Iterator[Built] | Iterator[Formed]
    count = new = 0
    with report.progress() as bars:
        task = bars.add_task("reading the bundle", total=None)

        def listen(event: Event) -> None:
            bars.update(task, description=f"{event.graph}: {event.phase}", completed=event.done, total=event.total or None)
            if event.phase.startswith("building") and bars.disable:
                echo(f"{event.graph}: {event.phase}")

        made = build_forms(bundle, options, listen) if flavor in FORMS else build_engines(bundle, options, listen)
        for item in made:
            count, new = count + 1, new + (not item.cached)
            folder = item.form.folder if isinstance(item, Formed) else item.file.folder
            if bars.disable:
                echo(_line(item))
            else:  # above the bars
                bars.console.print(visible(_line(item)), markup=False)
    what = "graphs" if flavor in FORMS else "engines"
    built = f"{folder}: {count} {what}, {new} of them built now, {time.perf_counter() - start:.1f} s"
    echo(f"{built}. Look with: motionrt doctor {bundle}")


def _line(item: Built | Formed) -> str:
    """What was built, in one line."""
    from motionrt.export.engines.onnx_forms import Formed

    if isinstance(item, Formed):
        rest = "; up to date" if item.cached else ""
        form = item.form
        if form.products:
            left = f" ({len(form.left)} left as they are)" if form.left else ""
            rest = f", {form.products} products{left}; {form.quality or 'quality not measured (--calibrate MEMORY)'}{rest}"
        return f"{form.graph}: {item.bytes / MIB:.1f} MiB in {form.dtype}{rest}"
    file = item.file
    text = f"{file.graph}: {file.engine_bytes / MIB:.1f} MiB, {file.attentions} attentions"
    if file.products:
        text += f", {file.products} products in {file.dtype}, quality not measured (that takes the GPU)"
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
