"""A toy system for the exporter: one loop over a network of a few weights, and a picture of what it gives.

    python tests/helpers/toy_system.py OUT         # its bundle
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from motionrt.export.checkpoints.files import InMemory, KeyReport
from motionrt.export.compiler.weightless import meta
from motionrt.export.exporter import export_system
from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.system import Array, Graph, Network, Step, System, lengths
from motionrt.runtime.bundle.manifest import Loop, NumberInput, Output

WIDTH, STEPS = 8, 3
ROWS = {"even": {STEPS: np.array([[0, 9, 0.5, 1], [0, 5, 0.25, 2], [0, 1, 1, 3]], np.float32)}}


class Wave(nn.Module):
    """x' = c0 x + c1 tanh(A x) * sin(B t) s: the sine changes with time alone, and s with the request."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(1, WIDTH)

    def forward(self, latents: Tensor, coefficients: Tensor, timestep: Tensor, strength: Tensor | None = None) -> Tensor:
        """`latents [B, D]`, `coefficients [B, 2]`, `timestep [B]` float32, `strength [B]` -> `[B, D]`."""
        wave = torch.sin(self.time(timestep[:, None])) * (1.0 if strength is None else strength[:, None])
        c0, c1 = coefficients.unbind(1)
        return c0[:, None] * latents + c1[:, None] * torch.tanh(self.mix(latents)) * wave


class Picture(nn.Module):
    """`latents [B, D]` -> `video [B, 2, 3, 2, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = nn.Linear(WIDTH, 24)

    def forward(self, latents: Tensor) -> Tensor:
        return self.draw(latents).unflatten(1, (2, 3, 2, 2))


def network(make: Any, streamed: bool) -> Network:
    """What `make` makes with seeded weights, in memory or as places of its weights."""
    torch.manual_seed(3)
    module = make().eval()
    if not streamed:
        return Network(module)
    weights = {name: InMemory(value.detach()) for name, value in module.state_dict().items()}
    with meta():
        return Network(make().eval(), weights, (KeyReport("toy", "toy.safetensors", "float32", tuple(weights)),))


def toy(streamed: bool = False, scaled: bool = True) -> System:
    """The system. streamed: its weights as places of their files; scaled: with a number that a request gives."""
    batch = Range(1, 1, 4)
    inputs = {"latents": Array(("batch", WIDTH)), "coefficients": Array(("batch", 2)), "timestep": Array(("batch",))}
    changes = {"latents": "step", "coefficients": "step", "timestep": "schedule"}
    if scaled:
        inputs, changes = {**inputs, "strength": Array(("batch",))}, {**changes, "strength": "request"}
    wave = network(Wave, streamed)
    loop = Loop(
        graphs=("step_wave",), columns=("graph", "timestep", "c0", "c1"), schedules=lengths(ROWS), default=("even", STEPS),
        feeds={"timestep": ("timestep",), "coefficients": ("c0", "c1")}, carry={"next_latents": "latents"},
        start={"latents": "noise"}, gives={"latents": "latents"},
    )  # fmt: skip
    return System(
        "toy",
        inputs={"strength": NumberInput(1.0, help="Of the wave.")},
        graphs={"picture": Graph(network(Picture, streamed), {"latents": inputs["latents"]}, ("video",), {"batch": batch})},
        steps=(Step(wave, changes, inputs, ("next_latents",), {"batch": batch, "steps": Range(1, 8, 99)}, suffix="_wave"),),
        plan=("request_wave", "wave", "picture"),
        loops={"wave": loop},
        schedules={"wave": ROWS},
        output=Output("video", 2, 2, 2, 8.0),
    )


if __name__ == "__main__":
    export_system(toy(), Path(sys.argv[1]))
