"""The `motionrt memory` commands, and what they share with the other commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from motionrt.runtime.errors import InputError

if TYPE_CHECKING:
    from motionrt.runtime.pipeline import MotionPipeline

memory_app = typer.Typer(
    help="Make, fill and search a motion memory: the clips whose motion can be used.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
BundlePath = Annotated[Path, typer.Option("--bundle", "-b", help="Bundle directory, as written by `motionrt export`.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the backend; all cores if not given.")]
BackendName = Annotated[str, typer.Option("--backend", help="onnxruntime, or torch (the bundle needs programs).")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda needs --backend torch.")]
AllowOnnxRuntime = Annotated[
    bool, typer.Option("--allow-onnxruntime", help="Run graphs that have no torch program in ONNX Runtime.")
]


@memory_app.command("create")
def memory_create(
    memory: Annotated[Path, typer.Argument(help="Directory to make.")],
    bundle: BundlePath,
) -> None:
    """Make an empty motion memory for a bundle.

    \b
    Example:
      motionrt memory create my-memory --bundle demo/bundle
    """
    from motionrt.runtime.bundle import Bundle
    from motionrt.runtime.memory import MotionMemory

    opened = Bundle.open(bundle)
    dims: dict[str, int | Sequence[int]] = {
        "embedding": opened.port("text_query", "embedding").dims[1].max,
        "motion": list(opened.model.motion_tokens),
        "appearance": list(opened.model.motion_tokens),
    }
    MotionMemory.create(memory, digests=opened.digests, dims=dims).close()
    typer.echo(f"{memory}: an empty motion memory. Fill it with: motionrt memory add {memory} CLIP... -b {bundle}")


@memory_app.command("add")
def memory_add(
    memory: Annotated[Path, typer.Argument(help="Motion memory directory.")],
    clips: Annotated[list[Path], typer.Argument(help="Video files.")],
    bundle: BundlePath,
    caption: Annotated[str | None, typer.Option(help="One caption for all of them.")] = None,
    captions: Annotated[Path | None, typer.Option(help='JSON file: {"file name": "caption"}.')] = None,
    start: Annotated[float | None, typer.Option(help="Where to cut, in seconds; the beginning if not given.")] = None,
    threads: Threads = None,
) -> None:
    """Add video files to a motion memory. Their tokens are computed once, here.

    \b
    Examples:
      motionrt memory add my-memory wave.mp4 --bundle demo/bundle --caption "a wave rolls to the left"
      motionrt memory add my-memory clips/*.mp4 --bundle demo/bundle --captions captions.json
    """
    from motionrt.runtime import report
    from motionrt.runtime.indexing import ClipEncoders, index_clips
    from motionrt.runtime.memory import MotionMemory

    texts = _captions(clips, caption, captions)
    with open_pipeline(bundle, None, threads) as pipeline, MotionMemory.open(memory) as opened, report.progress() as bars:
        opened.check(pipeline.bundle.digests)
        task = bars.add_task("indexing", total=len(clips))
        items = [(clip, text, start) for clip, text in zip(clips, texts, strict=True)]
        encoders = ClipEncoders.from_bundle(pipeline.bundle, pipeline.backend)
        outcome = index_clips(opened, encoders, items, lambda *_: bars.advance(task))
        count = len(opened)
    typer.echo(f"{memory}: {outcome.added} added, {count} clips in all.")
    if outcome.failed:
        for path, reason in outcome.failed:
            typer.echo(f"{path}: {reason}", err=True)
        raise InputError(f"{len(outcome.failed)} of {len(clips)} clips could not be added (listed above).")


@memory_app.command("search")
def memory_search(
    memory: Annotated[Path, typer.Argument(help="Motion memory directory.")],
    prompt: Annotated[str, typer.Argument(help="What moves, and how.")],
    bundle: BundlePath,
    references: Annotated[int, typer.Option("--references", "-k", help="How many clips.")] = 4,
    threads: Threads = None,
) -> None:
    """Show the clips that a prompt would retrieve.

    \b
    Example:
      motionrt memory search demo/memory "a red star moves in a circle" --bundle demo/bundle -k 3
    """
    from motionrt.runtime import report

    with open_pipeline(bundle, memory, threads) as pipeline:
        assert pipeline.memory is not None
        found = pipeline.memory.search(pipeline.embed(prompt), references)
    report.console().print(report.references_table(found))


def open_pipeline(
    bundle: Path,
    memory: Path | None,
    threads: int | None,
    backend: str = "onnxruntime",
    device: str | None = None,
    allow_onnxruntime: bool = False,
) -> MotionPipeline:
    from motionrt.runtime.backend import open_backend
    from motionrt.runtime.pipeline import MotionPipeline

    opened = open_backend(backend, device=device, threads=threads, allow_onnxruntime=allow_onnxruntime)
    return MotionPipeline.from_bundle(bundle, memory, backend=opened)


def _captions(clips: list[Path], caption: str | None, captions: Path | None) -> list[str]:
    if (caption is None) == (captions is None):
        raise InputError("give either --caption (one for all clips) or --captions (a JSON file with one for each).")
    if captions is None:
        return [caption or ""] * len(clips)
    try:
        table = json.loads(captions.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"captions file {captions} cannot be read as JSON: {error}.") from None
    if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
        raise InputError(f'captions file {captions} must hold an object like {{"wave.mp4": "a wave rolls"}}.')
    missing = [clip.name for clip in clips if clip.name not in table]
    if missing:
        raise InputError(f"captions file {captions} has no caption for {', '.join(missing)}.")
    return [table[clip.name] for clip in clips]
