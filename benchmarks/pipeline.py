"""What benchmarks ask of the runtime: requests, a pipeline's answers, its loop around a step.

    with open_pipeline(DEMO / "bundle", DEMO / "memory") as pipeline:
        result = answer(pipeline, read_requests(DEMO / "prompts.json")[0])

No other benchmark makes these calls, but for cold_start_child.py, which may import nothing of ours: where the runtime's
calls change, this changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.runtime.backends.onnxruntime import Backend, Graph
from motionrt.runtime.bundle.bundle import Bundle, Port
from motionrt.runtime.cli.measure import bench_request
from motionrt.runtime.decode import to_frames
from motionrt.runtime.loop import sample
from motionrt.runtime.noise import noise
from motionrt.runtime.pipeline import MotionPipeline, Request, Result

DEMO = harness.ROOT / "demo"
OWN = ("latents", "previous_x0", "noise", "coefficients", "guidance")  # what the loop itself gives a step

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
        Request(beside if beside.is_file() else inside, item["prompt"], seed=seed)
        for seed, (item, (beside, inside)) in enumerate(zip(items, places, strict=True))
    ]


def any_request(pipeline: MotionPipeline) -> Request:
    """A request that the bundle can serve, whatever it is: a synthetic still, a prompt, drawn references."""
    return bench_request(pipeline, 0)


def answer(pipeline: MotionPipeline, request: Request) -> Result:
    """What the pipeline makes of one request."""
    return pipeline.batch([request])[0]


def plain_frames(pipeline: MotionPipeline, request: Request) -> Frames:
    """The frames of `request` by `step_plain`: the step as it was written, which computes everything in every step."""
    prepared, solver = pipeline.prepare(request), pipeline.bundle.solver(request.solver, request.steps)
    latents = denoise(
        pipeline.graph("step_plain"),
        noise(request.seed, 0, (1, *pipeline.bundle.model.latents)),
        pipeline.select("step_plain", prepared.inputs),
        {"timestep": np.array(solver.timesteps)},
        solver.coefficients,
        pipeline.bundle.guidance,
        request.seed,
    )
    return to_frames(pipeline.graph("decode")({"latents": latents})["video"])


def denoise(
    step: Graph,
    latents: NDArray[np.float32],
    state: Arrays,
    tables: Arrays,
    coefficients: NDArray[np.float32],
    guidance: float,
    seed: int,
) -> NDArray[np.float32]:
    """All steps from `latents` [1, F, C, H, W]; `state` is the same in all, `tables` [T, ..] have a row for each of T."""
    result: NDArray[np.float32] = sample(
        step,
        latents=latents,
        state=state,
        tables=tables,
        coefficients=coefficients,
        guidance=guidance,
        noise=lambda index: noise(seed, index + 1, latents.shape),
    )
    return result


@dataclass(frozen=True)
class StepRequest:
    """Random inputs of one request; `rewritten` and `plain`: what each form of the step reads, (state, tables [T, ...])."""

    latents: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    guidance: float
    rewritten: tuple[Arrays, Arrays]
    plain: tuple[Arrays, Arrays]

    def denoise(self, step: Graph, inputs: tuple[Arrays, Arrays]) -> Arrays:
        """All steps, through the loop of the runtime."""
        return {"latents": denoise(step, self.latents, *inputs, self.coefficients, self.guidance, 0)}

    def one_step(self, inputs: tuple[Arrays, Arrays]) -> Arrays:
        """The inputs of a step in the middle of the schedule."""
        state, tables = inputs
        index = len(self.coefficients) // 2
        return {
            **state,
            **{name: table[index : index + 1] for name, table in tables.items()},
            "latents": self.latents,
            "previous_x0": noise(1, 0, self.latents.shape),
            "noise": noise(1, 1, self.latents.shape),
            "coefficients": self.coefficients[index : index + 1],
            "guidance": np.full(1, self.guidance, np.float32),
        }


def random_input(port: Port, index: int) -> NDArray[np.float32]:
    """Standard normal values of the port's own size; a scale is 1."""
    shape = tuple(dim.opt for dim in port.dims)
    return noise(2, index, shape) if shape else np.ones((), np.float32)


def step_request(bundle: Bundle, load: Callable[[str], Graph]) -> StepRequest:
    """Random request inputs, put through `schedule` and `request` for the rewritten step; `load` opens a graph by name."""
    solver = bundle.solver()
    ports = [port for port in bundle.graph("step_plain").inputs if port.name not in (*OWN, "timestep")]
    inputs: Arrays = {port.name: random_input(port, index) for index, port in enumerate(ports)}
    taken = {port.name for port in bundle.graph("request").inputs}
    state = load("request")({name: value for name, value in inputs.items() if name in taken})
    tables = load("schedule")({"timestep": solver.timesteps})
    reads = {port.name for port in bundle.graph("step").inputs}
    return StepRequest(
        latents=random_input(bundle.port("step", "latents"), len(ports)),
        coefficients=np.array(solver.coefficients),  # a copy: PyTorch warns of arrays that it may not write to
        guidance=bundle.guidance,
        rewritten=(
            {name: value for name, value in {**inputs, **state}.items() if name in reads},
            {name: value for name, value in tables.items() if name in reads},
        ),
        plain=(inputs, {"timestep": np.array(solver.timesteps)}),
    )
