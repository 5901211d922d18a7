"""`motionrt bench`: times of the stages of a request, and the rewritten step against the plain one in one run.

Ratios come from interleaved rounds (each round times every candidate once, in turning order), because the medians of
separate runs drift on a busy machine. No ratio is given before the candidates agree on a whole video.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import motionrt
from motionrt.runtime.backend import Array, Graph, place
from motionrt.runtime.bundle import sha256_of
from motionrt.runtime.demo import find_demo, load_by_path
from motionrt.runtime.errors import InputError
from motionrt.runtime.memory import Reference
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import STAGES, MotionPipeline, Request
from motionrt.runtime.sampler import sample
from motionrt.runtime.video import write_video

WARMUPS = 2
TOLERANCE = 1e-4  # fp32, end to end
NEEDS_EXPORT = "torch eager: not run: needs motionrt[export]"


@dataclass
class Row:
    """Measured seconds of one thing; empty where it was not run."""

    what: str
    seconds: list[float] = field(default_factory=list)

    def percentile(self, q: float) -> float:
        """The q-th percentile in seconds."""
        return float(np.percentile(self.seconds, q))


@dataclass
class Comparison:
    """Seconds of each way to compute a step (`step`, `step_plain`, `eager`), by round, and how far they differ."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Median seconds."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str) -> float:
        """Median over rounds of the time of `name` over the time of the rewritten step."""
        return float(np.median(np.divide(self.seconds[name], self.seconds["step"])))


def bench_request(pipeline: MotionPipeline, index: int) -> Request:
    """Request number `index`: a synthetic still, another seed each time; random references where there is no memory."""
    model = pipeline.bundle.model
    rng = np.random.default_rng(index)
    ramp = np.linspace(0, 255, model.width, dtype=np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (model.height, model.width, 3))
    references = None
    if pipeline.memory is None:
        tokens = rng.standard_normal((model.default_references, 2, *model.motion_tokens)).astype(np.float32)
        references = [
            Reference(i, 0.0, "random tokens", "", 0.0, 0.0, pair[0], pair[1]) for i, pair in enumerate(tokens)
        ]
    return Request(np.ascontiguousarray(image), "a red star moves right", seed=index, references=references)


def bench_stages(pipeline: MotionPipeline, repeat: int, on_request: Callable[[], None]) -> list[Row]:
    """Run `repeat` requests after the warm-ups. Rows: every stage, one `step`, `write` (mp4), and `all`."""
    rows = {name: Row(name) for name in (*STAGES, "write", "all")}
    pipeline.warm()
    with tempfile.TemporaryDirectory(prefix="motionrt-bench-") as folder:
        for index in range(-WARMUPS, repeat):
            start = time.perf_counter()
            result = pipeline.batch([bench_request(pipeline, index + WARMUPS)])[0]
            written = time.perf_counter()
            write_video(Path(folder) / "video.mp4", result.frames, result.fps)
            end = time.perf_counter()
            if index >= 0:
                for name, seconds in result.seconds.items():
                    if name != "step" and not (name == "search" and pipeline.memory is None):
                        rows[name].seconds.append(seconds)
                rows["step"].seconds += result.step_seconds
                rows["write"].seconds.append(end - written)
                rows["all"].seconds.append(end - start)
            on_request()
    return list(rows.values())


def compare_steps(
    pipeline: MotionPipeline, rounds: int, threads: int | None, on_round: Callable[[], None]
) -> tuple[Comparison, list[str]]:
    """The rewritten step against `step_plain` and torch eager, where they exist; with notes on what was not run."""
    bundle, comparison, notes = pipeline.bundle, Comparison(), []
    candidates: dict[str, Graph] = {"step": pipeline.graph("step")}
    if "step_plain" in bundle.graphs:
        candidates["step_plain"] = pipeline.graph("step_plain")
        eager = _eager(pipeline, threads)
        if isinstance(eager, str):
            notes.append(eager)
        else:
            candidates["eager"] = eager
    else:
        notes.append("plain step: not run: this bundle carries no graph `step_plain`")
    request = bench_request(pipeline, 0)
    prepared, solver = pipeline.prepare(request), bundle.solver()
    shape = (1, *bundle.model.latents)
    plain = "step_plain" if "step_plain" in bundle.graphs else "step"
    selected = {name: pipeline.select("step" if name == "step" else plain, prepared.state) for name in candidates}
    states = {name: place(candidates[name], state) for name, state in selected.items()}  # once for all rounds
    tables: dict[str, dict[str, Array]] = {
        name: pipeline.schedule(solver) if name == "step" else {"timestep": solver.timesteps[:, None]}
        for name in candidates
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
    for name in list(candidates):
        if not comparison.differences[name] <= TOLERANCE * max(1.0, float(np.abs(whole["step"]).max())):
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
        notes.append(f"largest difference between them after {solver.steps} steps: {difference:.1e} (fp32)")
    return comparison, notes


def _eager(pipeline: MotionPipeline, threads: int | None) -> Graph | str:
    """The plain step in torch eager, with the ports of `step_plain`; or why it is not run."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers", "transformers")):
        return NEEDS_EXPORT
    try:
        demo = find_demo()
    except InputError:
        return "torch eager: not run: needs the repository's demo folder"
    checkpoint = demo / "checkpoint.safetensors"
    exported_from = (pipeline.bundle.manifest.get("provenance") or {}).get("checkpoint")
    if not checkpoint.is_file() or sha256_of(checkpoint) != exported_from:
        return "torch eager: not run: the bundle was not exported from this checkout's demo/checkpoint.safetensors"
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)
    graph: Graph = load_by_path(demo / "export.py").eager_step(checkpoint)
    return graph


def environment(pipeline: MotionPipeline, threads: int | None) -> dict[str, Any]:
    """What a published number needs beside it: date, machine, versions, bundle."""
    versions = {}
    for package in ("numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "usearch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "motionrt": motionrt.__version__,
        "bundle": pipeline.bundle.name,
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}",
        "threads": threads or os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "backend": getattr(pipeline.backend, "label", type(pipeline.backend).__name__),
        "choice": pipeline.choice,
        "dtype": "float32",
        "warmups": WARMUPS,
    }
