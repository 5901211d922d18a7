"""`motionrt export`: a checkpoint, or a published base model with MotionRAG's files, as a bundle. Needs the build side."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.errors import BackendError, InputError

MODELS = ("cogvideox-5b-i2v", "svd")
_FRAMES = {"cogvideox-5b-i2v": 17, "svd": 16}


def export(
    what: Annotated[str, typer.Argument(help="The demo's checkpoint (.safetensors), or cogvideox-5b-i2v, or svd.")],
    bundle: Annotated[Path | None, typer.Argument(help="Bundle directory to write.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Bundle directory to write.")] = None,
    base: Annotated[Path | None, typer.Option(help="Diffusers folder of the base model.")] = None,
    motionrag: Annotated[Path | None, typer.Option(help="Folder with MotionRAG's files for that model.")] = None,
    videomae: Annotated[Path | None, typer.Option(help="Folder of VideoMAE-base, finetuned on SSv2.")] = None,
    dinov2: Annotated[Path | None, typer.Option(help="Folder of DINOv2-large.")] = None,
    text_query: Annotated[Path | None, typer.Option(help="Sentence-transformers folder to search with; else MiniLM.")] = None,
    converted: Annotated[Path | None, typer.Option(help="Where .ckpt files become safetensors, once.")] = None,
    frames: Annotated[int | None, typer.Option(help="17 or 49 for CogVideoX, 16 for SVD.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    sos_token: Annotated[str | None, typer.Option(help="seed:NUMBER or a file, where the checkpoint has none.")] = None,
    target_range: Annotated[str, typer.Option(help="What DINOv2 sees of the still: correct, or as released.")] = "correct",
    positions: Annotated[str, typer.Option(help="CogVideoX positions off 49 frames: released, or learned.")] = "released",
    decode_tiles: Annotated[int, typer.Option(help="Tiles along either side in which latents are decoded.")] = 1,
) -> None:
    """Export a checkpoint as a bundle. Needs the build side: pip install motionrt[export].

    \b
    Examples:
      motionrt export demo/checkpoint.safetensors out/bundle
      motionrt export cogvideox-5b-i2v --base CogVideoX-5b-I2V --motionrag CogVideoX --videomae videomae-base-ssv2
        --dinov2 dinov2-large --sos-token seed:42 -o cogvideox
    """
    needed = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"export needs {', '.join(missing)}: `pip install motionrt[export]`.")
    target = out or bundle
    if target is None or (out is not None and bundle is not None):
        raise InputError("export needs one bundle directory to write: give it with --out.")
    folders = {"--base": base, "--motionrag": motionrag, "--videomae": videomae, "--dinov2": dinov2}
    if what in MODELS:
        absent = [name for name, folder in folders.items() if folder is None]
        if absent:
            raise InputError(f"export {what} needs {', '.join(absent)}. See docs/models.md.")
        assert base is not None and motionrag is not None and videomae is not None and dinov2 is not None
        from motionrt.export.motionrag_files import SosToken
        from motionrt.export.real import Sources

        sources = Sources(
            base=base,
            motionrag=motionrag,
            videomae=videomae,
            dinov2=dinov2,
            converted=converted or target.with_name(f"{target.name}.converted"),
            dtype=dtype,
            sos=SosToken.parse(sos_token) if sos_token else None,
            target_range=target_range,
            positions=positions,
            text_query=text_query,
            tiles=decode_tiles,
        )
        frames = frames or _FRAMES[what]
        if what == "svd":
            from motionrt.export.svd_bundle import export_svd

            lines = export_svd(sources, target, frames=frames, say=typer.echo)
        else:
            from motionrt.export.cogvideox_bundle import export_cogvideox

            lines = export_cogvideox(sources, target, frames=frames, say=typer.echo)
        for line in lines:
            typer.echo(line)
    else:
        given = [name for name, folder in folders.items() if folder is not None]
        if given:
            raise InputError(f"{', '.join(given)} is for the published models ({', '.join(MODELS)}); got {what!r}.")
        checkpoint = Path(what)
        if not checkpoint.is_file():
            raise InputError(
                f"there is no checkpoint {checkpoint}. Give the .safetensors file that demo/train.py wrote, or one of "
                f"{', '.join(MODELS)}."
            )
        from motionrt.runtime.by_path import load_by_path
        from motionrt.runtime.demo import find_demo

        load_by_path(find_demo() / "export.py").export_demo(checkpoint, target)
    typer.echo(f"{target}: exported. Look at it with: motionrt inspect {target}")
