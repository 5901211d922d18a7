"""The `motionrt memory` commands, and what they share with the other commands."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import (
    BundlePath,
    Conditions,
    Limited,
    MemoryPath,
    open_memory,
    open_pipeline,
    parse_where,
    with_run_options,
    with_search_options,
)
from motionrt.runtime.cli.places import still
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.errors import InputError, MemoryStoreError
from motionrt.runtime.media.limits import Limits
from motionrt.runtime.memory.search import Search

DEFAULT_SHOWN = 4  # clips of a search
SHOWN = 20  # failed clips that are listed on standard error

memory_app = typer.Typer(
    help="Make, fill, search and keep a motion memory: the clips whose motion can be used.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@memory_app.command("create")
def memory_create(
    memory: Annotated[Path, typer.Argument(help="Directory to make.")],
    bundle: BundlePath,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="How float parts of records are kept: float16, or int8 in half the space; as the bundle says if not given."
        ),
    ] = None,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Keep no records: make them of the clips' files when they are used.")
    ] = False,
    words: Annotated[
        bool, typer.Option("--words/--no-words", help="Keep the words of captions, which count beside their vectors.")
    ] = True,
) -> None:
    """Make an empty motion memory for a bundle.

    \b
    Examples:
      motionrt memory create my-memory --bundle demo/bundle
      motionrt memory create my-memory --bundle demo/bundle --on-demand
    """
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.memory.memory import MotionMemory

    MotionMemory.for_bundle(memory, Bundle.open(bundle), tokens=tokens, on_demand=on_demand, words=words).close()
    echo(f"{memory}: an empty motion memory. Fill it with: motionrt memory add {memory} CLIP... -b {bundle}")


@memory_app.command("add")
@with_run_options
def memory_add(
    memory: MemoryPath,
    clips: Annotated[list[Path], typer.Argument(help="Video files, folders, .csv, .jsonl, .parquet or LanceDB tables.")],
    bundle: BundlePath,
    caption: Annotated[str | None, typer.Option(help="One caption for all of them.")] = None,
    captions: Annotated[Path | None, typer.Option(help='JSON file: {"file name": "caption"}.')] = None,
    start: Annotated[float | None, typer.Option(help="Where spans of videos begin, in seconds.")] = None,
    span: Annotated[str, typer.Option(help="Where in its span a clip is cut: start or centre.")] = "start",
    dataset: Annotated[str | None, typer.Option(help="Dataset of all of them; else a table's column.")] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Folder that a table's relative paths start from; its own if not given.")
    ] = None,
    failed: Annotated[Path | None, typer.Option(help="CSV file for what could not be added, and why.")] = None,
    reembed: Annotated[bool, typer.Option("--reembed", help="Leave vectors that a table brings; embed captions anew.")] = False,
    describe: Annotated[
        bool, typer.Option("--describe", help="Tell from their motion how clips move: metadata, and captions where none is.")
    ] = False,
    limit: Limited = None,
    *,
    run_options: RunOptions,
) -> None:
    """Add clips to a motion memory. Their records are computed once, here. Called again, it goes on where it stopped.

    A caption comes from --caption, --captions, the .txt file of the video's name, or a table's column motion_caption,
    caption or text; a table's columns start_sec and end_sec are the span, `video` the file, others are kept as metadata.

    With --describe rules tell from each clip's motion field what moves where (`motion`, `path`), what the camera does
    (`camera`) and how strong that is (`strength`), for --where to filter by. A clip without a caption gets one that says
    this (`captioned=by motion`). It needs OpenCV, the extra `flow`, or a field beside each clip.

    \b
    Examples:
      motionrt memory add my-memory wave.mp4 --bundle demo/bundle --caption "a wave rolls to the left"
      motionrt memory add my-memory folder/ --bundle demo/bundle --dataset mine --failed failed.csv
      motionrt memory add my-memory openvid.parquet --bundle demo/bundle --videos videos/ --span centre
      motionrt memory add my-memory folder/ --bundle demo/bundle --describe
    """
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.cli import show as report
    from motionrt.runtime.indexing.clips import index_clips
    from motionrt.runtime.indexing.encoders import ClipEncoders
    from motionrt.runtime.indexing.sources import open_sources, write_failed
    from motionrt.runtime.memory.file import memory_spec

    limits = Limits.parse(limit or ())
    source = open_sources(
        clips, caption=caption, captions=captions, start=start, videos=videos, dataset=dataset, describe=describe
    )
    if failed is not None:
        if failed.resolve() in [path.resolve() for path in clips]:
            raise InputError(f"{failed} is read from; write what failed to another file.")
        write_failed(failed, [])  # what cannot be written is said before the work
    spec = memory_spec(Bundle.open(bundle))
    with ExitStack() as stack:
        opened = stack.enter_context(open_memory(memory))
        opened.check(spec.fingerprint)
        graphs = [spec.query] if opened.layout.on_demand else [spec.query, *spec.graphs]
        pipeline = stack.enter_context(open_pipeline(bundle, [], run_options, graphs=graphs))
        bars = stack.enter_context(report.progress())
        task = bars.add_task("indexing", total=source.count)
        encoders = ClipEncoders.of(pipeline.bundle, pipeline.graph)
        advance = lambda *_: bars.advance(task)  # noqa: E731
        outcome = index_clips(
            opened, encoders, source.items(), advance, span=span, reembed=reembed, describe=describe, limits=limits
        )
        count = len(opened)
    before = f"{outcome.skipped} there before, " if outcome.skipped else ""
    echo(f"{memory}: {outcome.added} added, {before}{count} clips in all.")
    for why in sorted({why for _, why in source.left_out}):
        files = [str(file) for file, reason in source.left_out if reason == why]
        more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
        echo(f"left out, {why}: {', '.join(files[:SHOWN])}{more}.")
    if pipeline.choice:
        echo(pipeline.choice)
    if outcome.vectors:
        echo(f"{outcome.vectors} vectors were kept as they came: they must be of this bundle's text encoder.")
    if outcome.failed:
        for item, reason in outcome.failed[:SHOWN]:
            echo(f"{item.video}: {reason}", err=True)
        rest = f" and {len(outcome.failed) - SHOWN} more" if len(outcome.failed) > SHOWN else ""
        where = f"listed in {failed}" if failed else f"listed above{rest}; --failed failed.csv keeps them all"
        if failed is not None:
            write_failed(failed, outcome.failed)
        raise InputError(f"{len(outcome.failed)} of {source.count} clips could not be added ({where}).")


@memory_app.command("search")
@with_search_options
@with_run_options
def memory_search(
    memory: MemoryPath,
    bundle: BundlePath,
    prompt: Annotated[str | None, typer.Argument(help="What moves, and how.")] = None,
    image: Annotated[str | None, typer.Option("--image", "-i", help="Search by the looks of this still instead.")] = None,
    video: Annotated[Path | None, typer.Option("--video", help="Search by the motion of this video instead.")] = None,
    references: Annotated[
        int | None, typer.Option("--references", "-k", help="How many clips; up to 4, as many as there are, if not given.")
    ] = None,
    start: Annotated[float | None, typer.Option(help="Where the span of --video begins, in seconds.")] = None,
    limit: Limited = None,
    *,
    search: Search,
    run_options: RunOptions,
) -> None:
    """Show the clips that a prompt would retrieve, or the ones that look like a still or move like a video.

    \b
    Examples:
      motionrt memory search demo/memory "a red star moves in a circle" --bundle demo/bundle -k 3
      motionrt memory search my-memory --video wave.mp4 --bundle demo/bundle --where dataset=sea --min-score 0.5
    """
    from motionrt.runtime.bundle.bundle import Bundle
    from motionrt.runtime.cli import show as report
    from motionrt.runtime.indexing.encoders import ClipEncoders, cut
    from motionrt.runtime.inputs import check_image
    from motionrt.runtime.media.video import read_image
    from motionrt.runtime.memory.file import memory_spec

    if sum(query is not None for query in (prompt, image, video)) != 1:
        raise InputError("give one thing to search by: a prompt, --image or --video.")
    # the default bends to what there is; a number that was asked for does not
    search = search.lenient() if references is None else search
    count = DEFAULT_SHOWN if references is None else references
    spec = memory_spec(Bundle.open(bundle))
    graphs = [spec.query] if prompt is not None else spec.graphs
    limits, size = Limits.parse(limit or ()), (spec.clip.height, spec.clip.width)
    looks = None if image is None else read_image(check_image("--image", still("--image", image)), *size, limits=limits)
    moves = None if video is None else cut(spec, video, start, None, limits).video
    with open_pipeline(bundle, [str(memory)], run_options, graphs=graphs) as pipeline:
        assert pipeline.memory is not None
        if prompt is not None:
            found = pipeline.memory.search(pipeline.embed(prompt), count, search, prompt)
        else:
            encoders = ClipEncoders.of(pipeline.bundle, pipeline.graph)
            if looks is not None:
                part, array = encoders.part_of_image(looks)
            else:
                assert moves is not None
                part, array = encoders.part_of_video(moves)
            found = pipeline.memory.search_record(part, array, count, search)
    if found:
        report.console().print(report.found_table(found))
    else:
        echo("no clip passes: --min-score -1 and --min-probability 0 show those that come nearest.")
    if pipeline.choice:
        echo(pipeline.choice)


@memory_app.command("remove")
def memory_remove(
    memory: MemoryPath,
    ids: Annotated[list[int] | None, typer.Argument(help="Ids, as `memory search` shows them.")] = None,
    where: Conditions = None,
) -> None:
    """Remove clips by id, or all clips of a dataset or metadata value. The space is free for new clips, or `compact` it.

    \b
    Examples:
      motionrt memory remove my-memory 3 17
      motionrt memory remove my-memory --where dataset=mine
    """
    if bool(ids) == bool(where):
        raise InputError("say what to remove: either ids, or --where key=value.")
    with open_memory(memory) as opened:
        removed = opened.remove(ids or opened.ids(parse_where(where)))
        echo(f"{memory}: {removed} removed, {len(opened)} clips in all.")


@memory_app.command("verify")
def memory_verify(memory: MemoryPath) -> None:
    """Read everything and say what is wrong; exit status 2 if anything is.

    \b
    Example:
      motionrt memory verify my-memory
    """
    with open_memory(memory, readonly=True) as opened:
        problems, count = opened.verify(), len(opened)
    for problem in problems:
        echo(f"{memory}: {problem}", err=True)
    if problems:
        raise MemoryStoreError(f"{memory} has {len(problems)} problems (listed above).")
    echo(f"{memory}: {count} clips, all sound.")


@memory_app.command("compact")
def memory_compact(memory: MemoryPath) -> None:
    """Give the space of removed clips back, and bring the index up to date.

    \b
    Example:
      motionrt memory compact my-memory
    """
    with open_memory(memory) as opened:
        before = opened.stats()
        opened.compact()
        after = opened.stats()
    sizes = [(s.bytes_db + s.bytes_index) / 2**20 for s in (before, after)]
    echo(f"{memory}: {sizes[0]:.1f} MiB before, {sizes[1]:.1f} MiB now.")


@memory_app.command("export")
def memory_export(memory: MemoryPath, file: Annotated[Path, typer.Argument(help="File to write.")]) -> None:
    """Write a motion memory as one file, to be moved and imported elsewhere.

    \b
    Example:
      motionrt memory export my-memory my-memory.mrtm
    """
    with open_memory(memory, readonly=True) as opened:
        opened.export_file(file)
        echo(f"{file}: {len(opened)} clips, {file.stat().st_size / 2**20:.1f} MiB.")


@memory_app.command("import")
def memory_import(
    file: Annotated[Path, typer.Argument(help="File that `memory export` wrote.")],
    memory: Annotated[Path, typer.Argument(help="Directory to make.")],
) -> None:
    """Make a motion memory out of an exported file. It is checked before, and appears whole or not at all.

    \b
    Example:
      motionrt memory import my-memory.mrtm my-memory
    """
    from motionrt.runtime.memory.memory import MotionMemory

    with MotionMemory.import_file(file, memory) as opened:
        echo(f"{memory}: {len(opened)} clips.")


@memory_app.command("stats")
def memory_stats(
    memory: MemoryPath, as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False
) -> None:
    """Show how much a motion memory holds, and of what.

    \b
    Example:
      motionrt memory stats demo/memory
    """
    from motionrt.runtime.cli import show as report

    with open_memory(memory, readonly=True) as opened:
        stats = asdict(opened.stats())
    if as_json:
        print(json.dumps(stats))  # in ASCII: nothing in it to be written out
    else:
        report.console().print(report.stats_table(str(memory), stats))
