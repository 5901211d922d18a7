"""`motionrt bench`: times of the stages of a request, and the rewritten step against the plain one in one run.

Ratios come from interleaved rounds (each round times every candidate once, in turning order), because the medians of
separate runs drift on a busy machine. No ratio is given before the candidates agree on a whole video. What a bundle, its
backend or this machine has not got is not run, and says why.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import motionrt
from motionrt.runtime.backends.machine import find_gpus, processor
from motionrt.runtime.backends.onnxruntime import Array, Graph, place
from motionrt.runtime.files import sha256_of
from motionrt.runtime.dtypes import DTYPES
from motionrt.runtime.errors import BackendError, BundleError
from motionrt.runtime.loop import sample
from motionrt.runtime.media.video import write_video
from motionrt.runtime.memory.memory import Reference
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import STAGES, MotionPipeline, Request, Result

WARMUPS = 2
TOLERANCE = 1e-4  # float32, end to end; of a lower precision, 16 of its epsilons
PROMPT = "a red star moves right"
WHOLE = ("first_frame", "unaccounted", "write", "all")  # call to frames; what of it is in no stage; the mp4; call to mp4


@dataclass
class Row:
    """Measured seconds of one thing; where there are none, `why` it was not run."""

    what: str
    seconds: list[float] = field(default_factory=list)
    why: str = ""

    def percentiles(self) -> dict[str, float]:
        """p50, p95 and, of a hundred times or more, p99, in milliseconds."""
        wanted = (50, 95, 99) if len(self.seconds) >= 100 else (50, 95)
        return {f"p{q}": 1e3 * float(np.percentile(self.seconds, q)) for q in wanted}


@dataclass(frozen=True)
class Plan:
    """What is asked for in every request; None takes the bundle's default, no `image` a synthetic still."""

    prompt: str = PROMPT
    image: Path | None = None
    steps: int | None = None
    solver: str | None = None


@dataclass
class Comparison:
    """Seconds of each way to compute a step (`step`, `step_plain`), by round, and how far they differ."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str) -> float:
        """Median over rounds of the time of `name` over the time of the rewritten step."""
        return float(np.median(np.divide(self.seconds[name], self.seconds["step"])))


def bench_request(pipeline: MotionPipeline, index: int, plan: Plan = Plan()) -> Request:
    """Request number `index`: another seed each time; random references where there is no memory."""
    model = pipeline.bundle.model
    rng = np.random.default_rng(index)
    ramp = np.linspace(0, 255, model.width, dtype=np.uint8)
    image = np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (model.height, model.width, 3)))
    references = None
    if pipeline.memory is None:
        tokens = rng.standard_normal((model.default_references, 2, *model.motion_tokens)).astype(np.float32)
        references = [Reference(i, 0.0, "random tokens", "", 0.0, 0.0, pair[0], pair[1]) for i, pair in enumerate(tokens)]
    return Request(
        image if plan.image is None else plan.image,
        plan.prompt,
        seed=index,
        references=references,
        steps=plan.steps,
        solver=plan.solver,
    )


def not_run(pipeline: MotionPipeline, result: Result) -> dict[str, str]:
    """Stages that a request of this bundle does not have, and why."""
    graphs, why = pipeline.bundle.graphs, {}
    if pipeline.memory is None:
        why["search"] = "no --memory was given; the references were random tokens"
        if "text" not in graphs:
            why["text"] = "this bundle reads no text, and without --memory nothing is searched for"
    if not result.references:
        nothing = result.fallback or "no reference was found"
        why |= {"appearance": nothing, "cama": nothing}
    if "request" not in graphs:
        why["request"] = "nothing of this bundle's step depends on the request alone"
    if "schedule" not in graphs:
        why["schedule"] = "nothing of this bundle's step depends on the schedule alone"
    return why


def bench_stages(pipeline: MotionPipeline, repeat: int, plan: Plan, on_request: Callable[[], None]) -> list[Row]:
    """Run `repeat` requests after the warm-ups. Rows: every stage (one `step`, not the loop), and those of `WHOLE`."""
    rows = {name: Row(name) for name in (*STAGES, *WHOLE)}
    pipeline.warm()
    with tempfile.TemporaryDirectory(prefix="motionrt-bench-") as folder:
        for index in range(-WARMUPS, repeat):
            request = bench_request(pipeline, index + WARMUPS, plan)
            start = time.perf_counter()
            result = pipeline.batch([request])[0]
            shown = time.perf_counter()
            write_video(Path(folder) / "video.mp4", result.frames, result.fps)
            end = time.perf_counter()
            missing = not_run(pipeline, result)
            if index >= 0:
                taken = {name: seconds for name, seconds in result.seconds.items() if name != "step" and name not in missing}
                whole = (shown - start, shown - start - sum(result.seconds.values()), end - shown, end - start)
                for name, seconds in (*taken.items(), *zip(WHOLE, whole, strict=True)):
                    rows[name].seconds.append(seconds)
                rows["step"].seconds += result.step_seconds
            for name, why in missing.items():
                rows[name].why = why
            on_request()
    return list(rows.values())


def compare_steps(
    pipeline: MotionPipeline, rounds: int, plan: Plan, on_round: Callable[[], None]
) -> tuple[Comparison, list[str]]:
    """The rewritten step against `step_plain`, where the bundle has it; with notes on what was not run."""
    bundle, comparison, notes = pipeline.bundle, Comparison(), []
    candidates: dict[str, Graph] = {"step": pipeline.graph("step")}
    if "step_plain" in bundle.graphs:
        try:
            candidates["step_plain"] = pipeline.graph("step_plain")
        except (BackendError, BundleError) as error:  # no engine or no program of it, as it is only for this comparison
            notes.append(f"plain step: not run: {error}")
    else:
        notes.append("plain step: not run: this bundle carries no graph `step_plain`")
    prepared = pipeline.prepare(bench_request(pipeline, 0, plan))
    solver = bundle.solver(plan.solver, plan.steps)
    shape = (1, *bundle.model.latents)
    states = {name: place(graph, pipeline.select(name, prepared.state)) for name, graph in candidates.items()}  # once for all
    tables: dict[str, dict[str, Array]] = {
        name: pipeline.schedule(solver) if name == "step" else {"timestep": solver.timesteps[:, None]} for name in candidates
    }

    def run(name: str, first: int, count: int) -> Array:
        latents: Array = sample(
            candidates[name],
            latents=noise(0, 0, shape),
            state=states[name],
            tables={key: value[first : first + count] for key, value in tables[name].items()},
            coefficients=solver.coefficients[first : first + count],
            guidance=bundle.guidance,
            noise=lambda index: noise(0, index + 1, shape),
        )
        return latents

    whole = {name: run(name, 0, solver.steps) for name in candidates}  # also the warm-up
    comparison.differences = {name: float(np.abs(latents - whole["step"]).max()) for name, latents in whole.items()}
    precision = pipeline.backend.precision
    allowed = tolerance(precision) * max(1.0, float(np.abs(whole["step"]).max()))
    for name in list(candidates):
        if not comparison.differences[name] <= allowed:
            notes.append(f"{name}: no ratio: it differs from the rewritten step by {comparison.differences[name]:.1e}")
            del candidates[name]
    comparison.seconds = {name: [] for name in candidates}
    order = list(candidates)
    for index in range(rounds):
        for name in order[index % len(order) :] + order[: index % len(order)]:
            start = time.perf_counter()
            run(name, index % solver.steps, 1)
            comparison.seconds[name].append(time.perf_counter() - start)
        on_round()
    difference = max((comparison.differences[name] for name in candidates), default=0.0)
    if len(candidates) > 1:
        notes.append(f"largest difference between them after {solver.steps} steps: {difference:.1e} ({precision})")
    return comparison, notes


def tolerance(precision: str) -> float:
    """How far latents of unit size may differ after all steps, where a backend computes in `precision`."""
    return max(TOLERANCE, 16 * DTYPES[precision].epsilon)


def environment(pipeline: MotionPipeline, threads: int | None) -> dict[str, Any]:
    """What a published number needs beside it: date, machine, versions, bundle; no host name, no path."""
    versions = {}
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "usearch"):
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
        "threads": threads or os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "backend": getattr(pipeline.backend, "label", type(pipeline.backend).__name__),
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
