"""Steps of models of the published depth on a GPU, bf16: DynamiCrafter's with its adapters, and the three of Motion-I2V.

    .venv-dev/bin/python benchmarks/gpu/gpu_mid.py                                   # gpu_suite.py runs it too
    .venv-dev/bin/python benchmarks/gpu/gpu_mid.py --steps video --stages released_eager ours_graph

Steps, at the middle sizes of mid_models.py and warp/forms.py: `dynamicrafter`; `drawn` and `plain`, stage 1 with and without
its ControlNet; `video`, stage 2, whose `released_*` warps frame 0 by a splat in every attention and projects all of it, as the
release does. Of the others, `released_*` is the step as it is written. `ours_*` is the rewritten step and `base_*`
DynamiCrafter's without adapters, as gpu_step.py has them; rows go to gpu_step.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.benchmarks import harness
from motionrt.benchmarks.gpu import gpu_step
from motionrt.benchmarks.models import mid_models
from motionrt.benchmarks.models.full_step import step_inputs
from motionrt.benchmarks.warp import forms
from motionrt.export.compiler.partition import partition
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories
from motionrt.export.systems.motion_i2v.step import DRAWN_CHANGES, FLOW_CHANGES, GUIDED, DrawnStep, FlowStep

STAGES = ("released_eager", "ours_graph", "base_eager", "ours_eager", "released_compiled", "ours_compiled", "base_compiled")
EXACT = ("timestep", "moves", "fs")  # inputs that are not rounded: places would not be whole pixels
Values = dict[str, Tensor]


class Named(nn.Module):
    """A step that is called by names, in the order of its arguments, and gives a sequence: some take tables of any number."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, **values: Tensor) -> tuple[Tensor, ...]:
        found = self.step(*values.values())
        return (found,) if isinstance(found, Tensor) else tuple(found)


@dataclass(frozen=True)
class Way:
    """A step as a module, and its inputs of one request in the order of its arguments."""

    module: nn.Module
    values: Values


@dataclass(frozen=True)
class Subject:
    """What is measured. `name`, `latents`, `layers` are what gpu_step's rows name; `ours`: what the pass is for, with what
    `changes` declares; `base`: the step without adapters, where there are any."""

    name: str
    latents: tuple[int, int, int, int]
    layers: int
    released: Way
    ours: Way
    changes: Mapping[str, str]
    outputs: tuple[str, ...]
    base: Way | None = None


def dynamicrafter(toy: bool) -> Subject:
    """DynamiCrafter's step with two passes."""
    model = mid_models.MODELS["dynamicrafter-toy" if toy else "dynamicrafter-mid"]
    shape = model.shape
    way, base = Way(model.step(adapter=True), model.feed()), Way(model.step(adapter=False), model.feed())
    latents = (shape["F"], 4, shape["H"], shape["W"])
    return Subject(model.name, latents, 1 if toy else 2, way, way, model.inputs, model.outputs, base)


def _flow(toy: bool, drawn: bool) -> Subject:
    """A step of stage 1, with its ControlNet or without."""
    size = forms.TOY if toy else forms.MID
    config = {**size.config, "in_channels": 8}
    torch.manual_seed(0)
    net = forms.all_matter(FlowUNet(config))
    control = forms.all_matter(Trajectories(config)) if drawn else None
    frames, channels, height, width = size.latents
    still, text = (1, channels, height, width), (1, *size.text)
    shapes = {
        "latents": (1, frames - 1, *still[1:]), "coefficients": (1, 2), "image_latents": still, "text": text,
        "hint": (1, frames - 1, channels + 1, height, width), "guidance": (1,), "negative_text": text,
    }  # fmt: skip
    for name, part in (("times", net), ("drawn_times", control)):
        if part is not None:
            shapes[name] = (1, frames - 1, sum(block.time_emb_proj.out_features for block in part.resnets()))
    changes = {**(DRAWN_CHANGES if drawn else FLOW_CHANGES), **GUIDED}
    draw = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shapes[name], generator=draw) for name in changes}
    values |= {"coefficients": torch.tensor([[0.9, -0.3]]), "guidance": torch.tensor([3.0])}
    step = FlowStep(net) if control is None else DrawnStep(net, control)
    way = Way(step.eval(), values)
    kind = "drawn" if drawn else "plain"
    layers = size.config["layers_per_block"]
    return Subject(f"{size.name} {kind}", (frames - 1, *still[1:]), layers, way, way, changes, forms.OUTPUTS)


def video(toy: bool) -> Subject:
    """A step of stage 2."""
    size = forms.TOY if toy else forms.MID
    released, ours = (Way(form.step(size), form.feed(size)) for form in (forms.FORMS["released"], forms.FORMS["ours"]))
    changes = forms.FORMS["ours"].changes(size)
    layers = size.config["layers_per_block"]
    return Subject(f"{size.name} video", size.latents, layers, released, ours, changes, forms.OUTPUTS)


STEPS: Mapping[str, Callable[[bool], Subject]] = {
    "dynamicrafter": dynamicrafter,
    "drawn": lambda toy: _flow(toy, True),
    "plain": lambda toy: _flow(toy, False),
    "video": video,
}


def placed(way: Way, device: str, dtype: torch.dtype) -> Way:
    """On `device` in `dtype`, but for whole numbers and what must be exact."""

    def moved(name: str, value: Tensor) -> Tensor:
        exact = name in EXACT or not value.is_floating_point()
        return value.to(device) if exact else value.to(device, dtype)

    return Way(way.module.to(device, dtype).eval(), {name: moved(name, value) for name, value in way.values.items()})


def run(suite: gpu_step.Suite, subject: Subject) -> None:
    """All stages of one step: as released, ours, and without adapters."""
    device, dtype = suite.device, suite.dtype

    def as_written(stage: str, way: Way) -> None:
        moved = placed(way, device, dtype)
        flops = gpu_step.counted(Named(moved.module), moved.values, device)
        for mode in ("eager", "compiled"):
            make = lambda mode=mode: (gpu_step.plain(Named(moved.module), moved.values, mode), mode)  # noqa: E731
            suite.stage(f"{stage}_{mode}", flops, make)
            suite.free()

    as_written("released", subject.released)
    if any(suite.due(stage) for stage in suite.options.stages if stage.startswith("ours")):
        ours, start = placed(subject.ours, device, dtype), perf_counter()
        cut = partition(ours.module, tuple(ours.values.values()), subject.changes, outputs=subject.outputs)
        print(f"{subject.name}: partitioned in {perf_counter() - start:.0f} s", flush=True)
        inputs = step_inputs(cut, ours.values)
        for mode in ("graph", "eager", "compiled"):
            compute = lambda mode=mode: gpu_step.ours(cut, inputs, mode, device)  # noqa: E731
            suite.stage(f"ours_{mode}", cut.classes["step"].flops, compute)
            suite.free()
    if subject.base is not None and any(suite.due(stage) for stage in suite.options.stages if stage.startswith("base")):
        as_written("base", subject.base)


def main(arguments: list[str] | None = None, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
    """Run the stages on the GPU, one step after the other; `device` and `dtype` are for the test of this file at toy size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["mid", "toy"], default="mid")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES[:3]))
    parser.add_argument("--budget", type=float, default=1500.0, help="seconds after which no stage starts")
    harness.add_options(parser, rounds=20, warmups=3)
    options = parser.parse_args(arguments)
    if device == "cuda" and not torch.cuda.is_available():
        print("steps of middle size: not run: no CUDA device")
        return
    start = perf_counter()
    for name in options.steps:
        if perf_counter() - start > options.budget:
            print(f"{name}: not run: the time is up")
            continue
        subject: Any = STEPS[name](options.size == "toy")
        suite = gpu_step.Suite(subject, device, dtype, options)
        suite.start = start  # the budget is for all of them
        run(suite, subject)
        suite.free()


if __name__ == "__main__":
    main()
