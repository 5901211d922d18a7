"""What benchmarks ask of the runtime: requests, a pipeline's answers, its denoising loop around a step.

    with open_pipeline(DEMO / "bundle", DEMO / "memory") as pipeline:
        result = answer(pipeline, read_requests(DEMO / "prompts.json")[0])

No other benchmark makes these calls, but for cold_start_child.py, which may import nothing of ours: where the runtime's
calls change, this changes.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.runtime.backends.seam import Backend, Graph
from motionrt.runtime.bundle.manifest import Loop
from motionrt.runtime.cli.bench import made_up
from motionrt.runtime.loop import Call, Outputs, run_loop
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import MotionPipeline, Request, Result

DEMO = harness.ROOT / "demo"

Arrays = dict[str, NDArray[Any]]
Frames = NDArray[np.uint8]  # [F, H, W, 3]


def open_pipeline(
    bundle: Path, memory: Path | None = None, *, threads: int | None = None, backend: Backend | None = None
) -> MotionPipeline:
    """A pipeline on `threads` of the processor, or on `backend`; a context manager."""
    return MotionPipeline.from_bundle(bundle, memory, backend=backend, threads=threads)


def read_requests(file: Path) -> list[Request]:
    """Requests of a list of {"prompt", "image"}; images are beside the file, or in inputs/."""
    items = json.loads(file.read_text(encoding="utf-8"))
    places = [(file.parent / item["image"], file.parent / "inputs" / item["image"]) for item in items]
    return [
        Request({"image": beside if beside.is_file() else inside, "prompt": item["prompt"]}, seed)
        for seed, (item, (beside, inside)) in enumerate(zip(items, places, strict=True))
    ]


def any_request(pipeline: MotionPipeline) -> Request:
    """A request that the bundle can serve, whatever it is: a synthetic still, a prompt, drawn references."""
    return made_up(pipeline, {})(0)


def answer(pipeline: MotionPipeline, request: Request) -> Result:
    """What the pipeline makes of one request."""
    return pipeline.batch([request])[0]


def recorded(pipeline: MotionPipeline, request: Request) -> tuple[dict[str, Arrays], Result]:
    """The inputs of each graph's first call while `request` is answered, and the answer."""
    job, seen = pipeline.start(request), dict[str, Arrays]()
    while job.call is not None:
        if job.call.graph not in seen:
            seen[job.call.graph] = inputs_of(job.call)
        next(job)
    return seen, pipeline.result(job)


def plain_frames(pipeline: MotionPipeline, request: Request) -> Frames:
    """The frames of `request` by the step as it was written, which computes everything in every step."""
    step = step_request(pipeline, request)
    latents = step.denoise(pipeline.graph(step.loop(plain=True).graphs[0]), plain=True)
    return answer(pipeline, replace(request, given=latents)).frames


@dataclass(frozen=True)
class StepRequest:
    """A request where its denoising loop begins: `values` of the plan so far, all of them, and `rows` of the loop `name`.

    Its steps are run in either of two forms: rewritten, or plain, as the step was written before the compiler pass.
    """

    pipeline: MotionPipeline
    name: str
    values: Mapping[str, Any]
    rows: NDArray[np.float32]
    seed: int

    def loop(self, *, plain: bool) -> Loop:
        """The loop around the step in one of its forms; the plain one reads no tables."""
        loop = self.pipeline.bundle.manifest.loops[self.name]
        if not plain:
            return loop
        if loop.plain is None:
            raise ValueError(f"loop '{self.name}' of bundle '{self.pipeline.bundle.name}' carries no plain step")
        return loop.as_written

    @property
    def shape(self) -> list[int]:
        """Sizes of what is denoised."""
        loop = self.loop(plain=False)
        return list(self.pipeline.bundle.port(loop.graphs[0], next(iter(loop.gives))).shape)

    def calls(self, *, plain: bool) -> Generator[Call, Outputs, dict[str, Any]]:
        """The loop of the runtime: graphs that make its tables, where it has such, then every step."""
        manifest = self.pipeline.bundle.manifest
        stream = list(manifest.loops).index(self.name)

        def draw(step: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
            return noise(self.seed, stream, step, shape)

        return run_loop(self.name, self.loop(plain=plain), manifest.graphs, self.rows, self.values, draw)

    def denoise(self, step: Graph, *, plain: bool) -> Arrays:
        """What the loop gives at its end, all steps run by `step`."""
        calls = self.calls(plain=plain)
        call = next(calls)
        while True:
            graph = step if call.loop else self.pipeline.graph(call.graph)
            try:
                call = calls.send(graph(inputs_of(call)))
            except StopIteration as end:
                return {name: np.asarray(value) for name, value in end.value.items()}

    def one_step(self, *, plain: bool) -> Arrays:
        """The inputs of a step in the middle of the schedule; what the step before it hands on is random."""
        loop = self.loop(plain=plain)
        handed: Arrays = {}
        for index, (output, port) in enumerate(loop.carry.items()):
            handed[output] = noise(1, 0, index, self.pipeline.bundle.port(loop.graphs[0], port).shape)
        calls = self.calls(plain=plain)
        call = next(calls)
        while call.step <= call.steps // 2:  # graphs that make tables are step 0 of 0
            call = calls.send(handed if call.loop else self.pipeline.graph(call.graph)(inputs_of(call)))
        return inputs_of(call)


def inputs_of(call: Call) -> Arrays:
    """The inputs of a call as host arrays."""
    return {name: np.asarray(value) for name, value in call.inputs.items()}


def step_request(pipeline: MotionPipeline, request: Request | None = None) -> StepRequest:
    """`request`, or any, after everything that is run before its denoising loop."""
    request = any_request(pipeline) if request is None else request
    name = next(name for name, loop in pipeline.bundle.manifest.loops.items() if loop.feeds)
    job = pipeline.start(request)
    job.keep = True  # the plain step reads what the rewritten one no longer does
    while job.call is not None and job.call.loop != name:
        next(job)
    values = dict(job.values)
    job.close()
    return StepRequest(pipeline, name, values, job.schedules[name].rows, job.seed)
