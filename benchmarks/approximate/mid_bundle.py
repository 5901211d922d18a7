"""A model of mid_models.py as a bundle: its denoising loop alone, so that the runtime, its backends and its builds take it.

    path = mid_bundle(MODELS["cogvideox-mid"], folder)
    with MotionPipeline.from_bundle(path, threads=1) as pipeline:
        pipeline(given=given(MODELS["cogvideox-mid"]), steps=25)

What encoders would make is given by hand, and the frames are the latents: weights are random, and nobody looks at them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from motionrt.benchmarks.models.mid_graphs import digest
from motionrt.benchmarks.models.mid_models import Model
from motionrt.export.checkpoints.files import InMemory
from motionrt.export.exporter import export_system
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.cogvideox_step import solver_rows
from motionrt.export.systems.extrapolated import FRAMES, extrapolated_step
from motionrt.export.systems.motionrag_system import BATCH, VIDEO, motionrag_loop, solver_table
from motionrt.export.systems.svd_step import euler_rows
from motionrt.export.systems.system import Array, Network, Step, System
from motionrt.runtime.bundle.manifest import ColumnInput, NumberInput, Output

GUIDANCE = 3.0
CALIBRATED = 2  # steps that the scales of static int8 are measured with
STEPS = (25, 50, CALIBRATED)  # that there are rows for
OF_ROWS = (*FRAMES, "coefficients", "guidance", "timestep")  # what the loop itself feeds


def schedule(model: Model, steps: int) -> NDArray[np.float32]:
    """Rows of the solver that the published model is run with."""
    import diffusers

    if "image_context" in model.inputs:
        euler = diffusers.EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", timestep_spacing="leading", sigma_min=0.002,
            sigma_max=700.0, use_karras_sigmas=True, interpolation_type="linear",
        )  # fmt: skip
        return solver_table(*euler_rows(euler, steps), GUIDANCE)
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return solver_table(*solver_rows(scheduler, steps), GUIDANCE)


def given(model: Model) -> dict[str, NDArray[Any]]:
    """What a request computes before its loop, by name: the model's own inputs."""
    return {name: value.numpy() for name, value in model.feed().items() if name not in OF_ROWS}


def streamed(module: nn.Module) -> Network:
    """A module in memory as one whose weights are streamed: large ones are written as those of published models are."""
    weights = {name: InMemory(value.detach()) for name, value in module.named_parameters()}
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(value.to("meta"), requires_grad=False))
    return Network(module, weights)


def mid_bundle(model: Model, work: Path) -> Path:
    """The bundle of `model` with schedules of `STEPS`: what is in `work`, if nothing that it is made of changed."""
    out = work / f"{model.name}-{digest(Path(__file__))}"
    if (out / "bundle.json").exists():
        return out
    print(f"{model.name}: exporting its loop ...", flush=True)
    feed = model.feed()
    arrays = {name: Array(("batch", *value.shape[1:]), value.dtype, 1000) for name, value in feed.items()}
    sizes = {"batch": BATCH, "steps": Range(1, STEPS[0], 1000)}
    rows = {"solver": {count: schedule(model, count) for count in STEPS}}
    loop = motionrag_loop(rows, ("solver", STEPS[0]))
    frames = feed["latents"].shape
    with torch.no_grad():
        export_system(
            System(
                model.name,
                inputs={
                    "guidance": ColumnInput(VIDEO, "guidance", GUIDANCE),
                    **{name: NumberInput(0.0) for name in feed if name not in OF_ROWS},
                },
                graphs={},
                steps=(
                    Step(streamed(model.step(adapter=True).eval()), model.inputs, arrays, ("next_latents", "x0"), sizes),
                    extrapolated_step(arrays, sizes),
                ),
                plan=("request", VIDEO),
                loops={VIDEO: loop},
                schedules={VIDEO: rows},
                output=Output("latents", frames[1], frames[3], frames[4], 8.0),
            ),
            out, programs=False,
        )  # fmt: skip
    return out
