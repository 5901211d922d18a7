"""Guidance in parts: the network runs for one branch at a time, so that two devices can share a request, or one branch be left.

    v = v_u + g (v_c - v_u)     `step`: both branches are calls of `step_branch` ahead of it, the one without conditions first
    v = v_c                     `step_conditional`, where g is 1: one call

`step` and `step_conditional` hold no weights. A base brings its network for one branch, one row of every input for a request,
and what the branch without conditions reads in the place of the conditions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from motionrt.export.onnx.from_torch import Range
from motionrt.export.systems.extrapolated import FRAMES
from motionrt.export.systems.rows import like, mixed, solved
from motionrt.export.systems.system import ALL, Array, Graph, Network, Step
from motionrt.runtime.bundle.manifest import Node, Where

BRANCH, CONDITIONAL, UNCONDITIONAL = "branch", "conditional", "unconditional"
PARTS = ("without", "conditioned")  # what the branches give, and what is behind the names of their values
OUTPUTS = ("next_latents", "x0")


@dataclass(frozen=True)
class Branch:
    """A base's network for one branch. `network`, `changes`, `inputs`: as of a `Step` that gives `output`, v. `reads`: port ->
    what the branch without conditions reads there; of these `makes` are made of the conditions by the graph `unconditional`,
    value -> what it is made of: the constant `motion [1, M, D]`, and zeros. `strength`: see `Combined`."""

    network: Network
    changes: Mapping[str, str]
    inputs: Mapping[str, Array]
    reads: Mapping[str, str]
    makes: Mapping[str, str]
    motion: Tensor
    strength: nn.Module | None = None

    def unconditional(self, batch: Range) -> Graph:
        """The graph of what the branch without conditions reads."""
        inputs = {source: self.inputs[source] for source in self.makes.values()}
        return Graph(Network(Unconditional(self.motion, list(inputs)).eval()), inputs, tuple(self.makes), {"batch": batch})

    def plan(self) -> list[str | Node]:
        """What runs before the loop, once for each branch."""
        first, second = PARTS
        asked = [Node(f"request_{BRANCH}", self.reads, {ALL: first}), Node(f"request_{BRANCH}", {}, {ALL: second})]
        return [UNCONDITIONAL, *asked]

    def ahead(self) -> dict[str, tuple[Node, ...]]:
        """The calls ahead of the loop's steps."""
        first, second = PARTS
        without = Node(f"step_{BRANCH}", {**self.reads, ALL: first}, {"output": first})
        conditioned = Node(f"step_{BRANCH}", {ALL: second}, {"output": second})
        return {"step": (without, conditioned), f"step_{CONDITIONAL}": (conditioned,)}

    def steps(self, inputs: Mapping[str, Array], sizes: Mapping[str, Range]) -> tuple[Step, ...]:
        """The steps of the loop; `inputs`: of the step with both branches in one."""
        batch, frames = {"batch": sizes["batch"]}, inputs["latents"]
        solver = {name: inputs[name] for name in (*FRAMES, "coefficients")}
        one = solver | {PARTS[1]: frames}
        both = solver | {"guidance": inputs["guidance"], PARTS[0]: frames, PARTS[1]: frames}
        alone, combined = Network(Conditional().eval()), Network(Combined(self.strength).eval())
        return (
            Step(self.network, self.changes, self.inputs, ("output",), sizes, suffix=f"_{BRANCH}"),
            Step(combined, dict.fromkeys(both, "step"), both, OUTPUTS, batch),
            Step(alone, dict.fromkeys(one, "step"), one, OUTPUTS, batch, suffix=f"_{CONDITIONAL}"),
        )


WHERE = {"step": Where(f"step_{CONDITIONAL}", "guidance", 1.0)}


class Combined(nn.Module):
    """Guidance and the solver's update, of v of both branches."""

    def __init__(self, strength: nn.Module | None = None) -> None:
        """`strength`: guidance `[B]`, latents -> that of each frame, which the latents are multiplied by; None: the same in
        all."""
        super().__init__()
        self.strength = strength

    def forward(
        self, latents: Tensor, previous_x0: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, without: Tensor,
        conditioned: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`coefficients [B, 6]`, `guidance [B]`, all others `[B, F, C, H, W]` -> (next latents, x0), as of a step."""
        scale = like(guidance, latents) if self.strength is None else self.strength(guidance, latents)
        return solved(coefficients, latents, mixed(without, conditioned, scale), previous_x0, noise)


class Conditional(nn.Module):
    """The solver's update, of v of the branch with conditions alone."""

    def forward(
        self, latents: Tensor, previous_x0: Tensor, noise: Tensor, coefficients: Tensor, conditioned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`coefficients [B, 6]`, all others `[B, F, C, H, W]` -> (next latents, x0), as of a step."""
        return solved(coefficients, latents, conditioned, previous_x0, noise)


class Unconditional(nn.Module):
    """What stands for the conditions where there are none: constant motion tokens, and zeros."""

    def __init__(self, motion: Tensor, names: list[str]) -> None:
        """`motion [1, M, D]`; `names` of the conditions, in order."""
        super().__init__()
        self.names = names
        self.tokens: Tensor
        self.register_buffer("tokens", motion.float())

    def forward(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        """`[B, ...]` each -> the same sizes."""
        return tuple(
            self.tokens.expand(value.shape[0], -1, -1) if name == "motion" else torch.zeros_like(value)
            for name, value in zip(self.names, conditions, strict=True)
        )
