"""`motionrt bench`: what a bundle costs here: a request call by call, and a rewritten step against the plain one in one run.

Times are read off jobs, as everything is. Ratios come from interleaved rounds (each round times every candidate once, in
turning order), because the medians of separate runs drift on a busy machine; none is given before the candidates agree on a
whole loop. Benchmarks that need more than an installed package, and the rows that are published, are in benchmarks/ of the
repository.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from motionrt.runtime.backends.open import RunOptions
from motionrt.runtime.cli.common import BundleArgument, Limited, Memories, Solver, Steps, open_pipeline, with_run_options
from motionrt.runtime.cli.places import check_output
from motionrt.runtime.cli.terminal import echo
from motionrt.runtime.dtypes import DTYPES
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.media.limits import Limits

if TYPE_CHECKING:
    from motionrt.runtime.pipeline import MotionPipeline, Request

WARMUPS = 2
TOLERANCE = 1e-4  # float32, end to end; of a lower precision, 16 of its epsilons
TEXT = "a red star moves right"
WHOLE = ("first_frame", "unaccounted", "write", "all")  # call to frames; what of it is in no stage; the mp4; call to mp4


@dataclass
class Row:
    """Measured seconds of one thing."""

    what: str
    seconds: list[float] = field(default_factory=list)

    def percentiles(self) -> dict[str, float]:
        """p50, p95 and, of a hundred times or more, p99, in milliseconds."""
        wanted = (50, 95, 99) if len(self.seconds) >= 100 else (50, 95)
        return {f"p{q}": 1e3 * float(np.percentile(self.seconds, q)) for q in wanted}


@dataclass
class Comparison:
    """Seconds of a step by each way to compute it, by round, the rewritten one first; how far they differ; what was not run."""

    loop: str
    schedule: str
    steps: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, name: str) -> float:
        """Median over rounds of the time of `name` over the time of the rewritten step."""
        return float(np.median(np.divide(self.seconds[name], next(iter(self.seconds.values())))))


@with_run_options
def bench(
    inputs: typer.Context,
    bundle: BundleArgument,
    memory: Memories = None,
    repeat: Annotated[int, typer.Option("--repeat", "-n", min=1, help="Requests, and rounds of the comparison.")] = 20,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every measured second here.")] = None,
    steps: Steps = None,
    solver: Solver = None,
    limit: Limited = None,
    *,
    run_options: RunOptions,
) -> None:
    """Time every graph of a request, and the rewritten step against the plain one.

    The bundle's inputs are options as of `motionrt generate`; a still and a text are made up where none is given.

    \b
    Examples:
      motionrt bench demo/bundle --memory demo/memory --repeat 50
      motionrt bench demo/bundle --threads 1 --json bench.json
      motionrt bench my-bundle -m my-memory --prompt "waves roll in" --image sea.jpg
    """
    from motionrt.runtime.cli import show
    from motionrt.runtime.files import replacing

    if json_path is not None:
        check_output(json_path, error=MotionRTError)
    limits = Limits.parse(limit or ())
    with open_pipeline(bundle, memory or [], run_options, limits=limits) as pipeline, show.progress() as bars:
        request = made_up(pipeline, inputs.obj, steps=steps, solver=solver)
        task = bars.add_task("requests", total=repeat + WARMUPS)
        rows = bench_requests(pipeline, request, repeat, lambda: bars.advance(task))
        loops = [name for name, loop in pipeline.bundle.manifest.loops.items() if loop.feeds]
        compared = [compare_steps(pipeline, name, request(0), repeat) for name in loops]
        facts = environment(pipeline, run_options.threads)
        counted = show.counted(pipeline.bundle.manifest.partition)
    console = show.console()
    random = "search: not run: no --memory was given; references were random records"
    notes = [random] if request(0).references is not None else []
    notes += [note for comparison in compared for note in comparison.notes] + ([counted] if counted else [])
    echo(f"{facts['bundle']}: {facts['backend']}, {facts['processor']}")
    for item in show.bench_tables(rows, compared, notes):
        echo(item) if isinstance(item, str) else console.print(item)
    if json_path is not None:
        document = {
            **facts, "repeat": repeat, "notes": notes, "schedules": {one.loop: [one.schedule, one.steps] for one in compared},
            "seconds": {row.what: row.seconds for row in rows},
            "percentiles_ms": {row.what: row.percentiles() for row in rows},
            "step_seconds": {name: seconds for one in compared for name, seconds in one.seconds.items()},
            "step_ratios": {name: one.ratio(name) for one in compared for name in list(one.seconds)[1:]},
            "step_differences": {name: value for one in compared for name, value in one.differences.items()},
        }  # fmt: skip
        with replacing(json_path, MotionRTError) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def made_up(pipeline: MotionPipeline, given: Mapping[str, Any], **options: Any) -> Callable[[int], Request]:
    """Makes request number i: seed i, a ramp for a still and a text where none is `given`, random records without a memory."""
    from motionrt.runtime.bundle.manifest import ImageInput, TextInput
    from motionrt.runtime.memory.memory import Reference

    manifest, inputs = pipeline.bundle.manifest, dict(given)
    for name, spec in manifest.inputs.items():
        if isinstance(spec, ImageInput):
            grey = np.broadcast_to(np.linspace(0, 255, spec.width, dtype=np.uint8)[:, None], (spec.height, spec.width, 3))
            inputs.setdefault(name, np.ascontiguousarray(grey))
        elif isinstance(spec, TextInput) and spec.default is None:
            inputs.setdefault(name, TEXT)

    def request(seed: int) -> Request:
        references = None
        if pipeline.memory is None and manifest.memory is not None:
            draw = np.random.default_rng(seed)
            references = [
                Reference(i, 1.0, "random", "", 0.0, 0.0, {p.name: random_array(draw, p) for p in manifest.memory.record})
                for i in range(manifest.memory.default)
            ]
        return pipeline.request(**inputs, seed=seed, references=references, **options)

    return request


def random_array(draw: np.random.Generator, part: Any) -> Any:
    """A part of a record with normal floats, or whole numbers of its whole range."""
    if np.dtype(part.dtype).kind == "f":
        return draw.standard_normal(part.dims).astype(np.float32)
    span = np.iinfo(part.dtype)
    return draw.integers(span.min, span.max, part.dims, part.dtype, endpoint=True)


def bench_requests(
    pipeline: MotionPipeline, request: Callable[[int], Request], repeat: int, on_request: Callable[[], None]
) -> list[Row]:
    """Run `repeat` requests after the warm-ups. Rows: every graph (of the steps of a loop each step), and those of `WHOLE`."""
    from motionrt.runtime.media.video import write_video

    rows: dict[str, Row] = {}
    pipeline.warm()
    steps = set(pipeline.bundle.steps)
    with tempfile.TemporaryDirectory(prefix="motionrt-bench-") as folder:
        for index in range(-WARMUPS, repeat):
            asked = request(index + WARMUPS)
            start = time.perf_counter()
            job, taken = pipeline.start(asked), dict[str, list[float]]()
            for call in job:
                if call.graph in steps:
                    taken.setdefault(call.graph, []).append(job.step_seconds[-1])
            result = pipeline.result(job)
            shown = time.perf_counter()
            write_video(Path(folder) / "video.mp4", result.frames, result.fps)
            end = time.perf_counter()
            if index >= 0:
                taken = {name: taken.get(name, [seconds]) for name, seconds in result.seconds.items()}
                whole = (shown - start, shown - start - sum(result.seconds.values()), end - shown, end - start)
                for name, seconds in (*taken.items(), *((name, [value]) for name, value in zip(WHOLE, whole, strict=True))):
                    rows.setdefault(name, Row(name)).seconds += seconds
            on_request()
    return list(rows.values())


def compare_steps(pipeline: MotionPipeline, name: str, request: Request, rounds: int) -> Comparison:
    """The rewritten step of loop `name` against the graph of it before it was rewritten, where the bundle has that.

    Nothing is timed where the loop has steps of several kinds: there is no one step to compare.
    """
    from motionrt.runtime.job import Placed
    from motionrt.runtime.loop import Call, run_loop
    from motionrt.runtime.noise import noise

    bundle = pipeline.bundle
    loop = bundle.manifest.loops[name]
    job = pipeline.start(request)
    schedule = job.schedules[name]
    comparison = Comparison(name, schedule.name, schedule.steps)
    kinds = ", ".join(graph for graph in loop.graphs if graph != loop.extrapolates or graph in job.steps_of(name))
    if "," in kinds:
        comparison.notes.append(f"plain step: not run: loop '{name}' has {kinds}; the stages say what each takes")
        job.close()
        return comparison
    job.keep = True  # the plain step reads what the rewritten one no longer does
    while job.call is not None and job.call.loop != name:
        next(job)
    values, rows = dict(job.values), schedule.rows
    job.close()
    ways = {"rewritten": loop}
    if loop.plain is not None:
        try:
            pipeline.graph(loop.plain)
            ways["plain"] = loop.as_written
        except MotionRTError as error:  # no engine or no program of it, as it is only for this comparison
            comparison.notes.append(f"plain step: not run: {error}")
    else:
        comparison.notes.append(f"plain step: not run: loop '{name}' of this bundle carries none")
    placed: dict[str, Placed] = {way: {} for way in ways}
    running: dict[str, Any] = {}
    waiting: dict[str, Call] = {}

    def advance(way: str) -> dict[str, Any] | None:
        """Run the next call of one way; what its loop gives at the end."""
        if way not in running:
            draw = lambda step, shape: noise(0, 0, step, shape)  # noqa: E731
            running[way] = run_loop(name, ways[way], bundle.graphs, rows, values, draw)
            waiting[way] = next(running[way])
        try:
            waiting[way] = running[way].send(pipeline.run(waiting[way], placed[way]))
        except StopIteration as end:
            del running[way]
            return {key: np.asarray(value) for key, value in end.value.items()}
        return None

    whole = {}
    for way in ways:  # to the end, once: this is the proof, and the warm-up
        while (gives := advance(way)) is None:
            pass
        whole[way] = gives
    base = whole["rewritten"]
    largest = max(1.0, *(float(np.abs(value).max()) for value in base.values()))
    allowed = max(TOLERANCE, 16 * DTYPES[pipeline.backend.precision].epsilon) * largest
    for way in list(ways):
        far = max(float(np.abs(whole[way][key] - value).max()) for key, value in base.items())
        comparison.differences[way] = far
        if not far <= allowed:
            comparison.notes.append(f"{way} step: no ratio: it differs from the rewritten step by {far:.1e}")
            del ways[way]
    comparison.seconds = {way: [] for way in ways}
    order = list(ways)
    for index in range(rounds):
        for way in order[index % len(order) :] + order[: index % len(order)]:
            while way not in waiting or way not in running or waiting[way].loop != name:
                advance(way)  # to a step: tables are made before the first, and kept
            start = time.perf_counter()
            advance(way)
            comparison.seconds[way].append(time.perf_counter() - start)
    if len(ways) > 1:
        far = max(comparison.differences[way] for way in ways)
        precision = pipeline.backend.precision
        comparison.notes.append(f"largest difference between them after {len(rows)} steps: {far:.1e} ({precision})")
    return comparison


def environment(pipeline: MotionPipeline, threads: int | None) -> dict[str, Any]:
    """What a published number needs beside it: date, machine, versions, bundle; no host name, no path."""
    import motionrt
    from motionrt.runtime.backends.machine import find_gpus, processor, usable_cores
    from motionrt.runtime.files import sha256_of

    versions = {}
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch", "usearch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = find_gpus()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "motionrt": motionrt.__version__,
        "bundle": pipeline.bundle.name,
        "bundle_sha256": sha256_of(pipeline.bundle.path / "bundle.json"),
        "memory_clips": None if pipeline.memory is None else len(pipeline.memory),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": gpus if isinstance(gpus, str) else [dataclasses.asdict(gpu) for gpu in gpus],
        "peak_rss_mib": peak_rss_mib(),
        "threads": min(threads or usable_cores(), usable_cores()),
        "python": platform.python_version(),
        "versions": versions,
        "backend": pipeline.backend.label,
        "choice": pipeline.choice,
        "dtype": pipeline.backend.precision,
        "warmups": WARMUPS,
    }


def peak_rss_mib() -> float | None:
    """The most memory that this process has held, MiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024), 1)
