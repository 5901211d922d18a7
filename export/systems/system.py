"""A system as data: all that the one exporter needs to know to write a bundle of it.

    system = cogvideox_system(sources, frames=17)     # opens every file and checks every key; writes nothing
    lines = export_system(system, out)                # export/exporter.py

What the run side reads (inputs, plan, loops, memory) is said in the structs of `runtime/bundle/manifest.py` themselves.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from motionrt.export.checkpoints.files import InMemory, KeyReport, Lazy
from motionrt.export.onnx.from_torch import Example, Range
from motionrt.runtime.bundle.manifest import Approximation, Input, Loop, MemorySpec, Node, Output, Weights

# Sizes of the examples that a graph is traced (the first two) and checked at, for those that may change.
_EXAMPLES = {
    "batch": (2, 3, 1, 1), "references": (4, 8, 1, 2), "tokens": (12, 7, 40, 1), "steps": (5, 8, 1, 2), "window": (2, 1, 1),
}  # fmt: skip

ALL = "*"  # see `System`
Schedules = Mapping[str, Mapping[int, NDArray[np.float32]]]  # name -> number of steps -> rows [T, R]


@dataclass(frozen=True)
class Network:
    """A module and where its weights are.

    `weights`: by the module's own names, of a module built with `meta`: they are streamed. None: the module is in memory, and
    its graph is checked against it. `package`: the weights stay in an installed package. `wide`: see `GraphSpec.wide`.
    `reports`: what became of the keys of the files. `choices`: what else than weights and sizes decides what it gives.
    """

    module: nn.Module
    weights: Mapping[str, Lazy] | None = None
    reports: tuple[KeyReport, ...] = ()
    wide: tuple[str, ...] = ()
    package: Weights | None = None
    choices: str = ""

    def loaded(self) -> nn.Module:
        """A copy of the module with its weights in memory, float32: for what is small, or runs once at export."""
        module = copy.deepcopy(self.module)
        state = {name: lazy.read().float() for name, lazy in (self.weights or {}).items()}
        module.load_state_dict(state, strict=False, assign=True)
        left = [name for name, value in module.named_parameters() if value.device.type == "meta"]
        if left:
            raise ValueError(f"weights are missing: {', '.join(left[:4])}")
        return module.eval()

    def digest(self) -> str:
        """SHA-256 of the weights as they are stored, and of `choices`."""
        if self.package is not None:
            return self.package.sha256
        weights = self.weights or {name: InMemory(value) for name, value in self.module.state_dict().items()}
        digest = hashlib.sha256(self.choices.encode())
        for name in sorted(weights):
            value = weights[name].read().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if value.numel():
                digest.update(value.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Array:
    """An input of a graph. `dims`: sizes, or the names of those that may change. Whole numbers are ids below `below`, or, where
    that is 0, a mask that leaves out the end of the last row."""

    dims: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    below: int = 0

    def drawn(self, sizes: Mapping[str, int], draw: torch.Generator | None) -> Tensor:
        """Random values, from -1 to 1 where they are float; on the meta device without `draw`."""
        shape = [dim if isinstance(dim, int) else sizes[dim] for dim in self.dims]
        if draw is None:
            return torch.empty(shape, dtype=self.dtype, device="meta")
        if self.dtype.is_floating_point:
            return torch.rand(shape, generator=draw, dtype=self.dtype) * 2 - 1
        if self.below:
            return torch.randint(self.below, shape, generator=draw, dtype=self.dtype)
        mask = torch.ones(shape, dtype=self.dtype)
        mask[-1, (shape[1] + 1) // 2 :] = 0
        return mask


@dataclass(frozen=True)
class Graph:
    """One graph of a bundle: its network, inputs and outputs in the module's order; `sizes`: ranges of those that may change.

    `weights_of`: a graph before it whose file holds its weights too.
    """

    network: Network
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    sizes: Mapping[str, Range] = field(default_factory=dict)
    weights_of: str | None = None

    @property
    def real(self) -> bool:
        """Whether the module is in memory."""
        return self.network.weights is None or self.network.package is not None

    def examples(self) -> list[Example]:
        """Inputs at two sizes or more; real ones where the module is in memory."""
        draw = torch.Generator().manual_seed(1) if self.real else None
        count = 2 + len(self.sizes) if self.real else 2
        found = []
        for index in range(count):
            sizes = {name: min(_EXAMPLES[name][index], span.max) for name, span in self.sizes.items()}
            found.append(Example(sizes, {name: array.drawn(sizes, draw) for name, array in self.inputs.items()}))
        return found


@dataclass(frozen=True)
class Step:
    """The network of a loop with guidance and solver in it, which the compiler cuts by what changes when.

    `changes`: input -> what it changes with, in the module's order. The graphs that come of it are named after their class
    (`step`, `request`, ...) with `suffix` behind; the loop's `tables` and the plan name those that there are. Without "batch"
    in `sizes` they are for one request. `gradient`: the module differentiates. `plain`: with the graph of the step before it
    was rewritten. `weights_of`: a graph before it whose file holds the weights of the step too.
    """

    network: Network
    changes: Mapping[str, str]
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    sizes: Mapping[str, Range] = field(default_factory=dict)
    suffix: str = ""
    gradient: bool = False
    plain: bool = False
    weights_of: str | None = None

    @property
    def most(self) -> int:
        """The most requests that a call may have."""
        return self.sizes["batch"].max if "batch" in self.sizes else 1

    def examples(self) -> list[dict[str, Tensor]]:
        """Inputs for 2, 3 and 1 requests, or for one each; real ones where the module is in memory."""
        draw = torch.Generator().manual_seed(1) if self.network.weights is None else None
        return [{name: array.drawn({"batch": rows}, draw) for name, array in self.inputs.items()} for rows in (2, 3, 1)]


@dataclass(frozen=True)
class TokenizerText:
    """A tokenizer as tokenizers JSON, its longest text in tokens, and its padding id."""

    json: str
    max_length: int
    pad_id: int = 0


@dataclass(frozen=True)
class System:
    """One system. A plan may name graphs that a cut turns out not to have (nothing depends on the request): they are left out.
    What a cut hands over has names that are not known before: a node of the plan whose `writes` are {"*": end} gives all that
    its graph does, each name with _end behind it, and {"*": end} in the `reads` of a call ahead of a step reads these.

    `schedules`: loop -> its rows, which fill in the loop's own `schedules`. The `fingerprint` of `memory` is the exporter's to
    fill in. `provenance`: what a bundle tells people of where it came from; `reports`: of the files' keys.
    """

    name: str
    inputs: Mapping[str, Input]
    graphs: Mapping[str, Graph]
    steps: tuple[Step, ...]
    plan: tuple[str | Node, ...]
    loops: Mapping[str, Loop]
    schedules: Mapping[str, Schedules]
    output: Output
    memory: MemorySpec | None = None
    tokenizers: Mapping[str, TokenizerText] = field(default_factory=dict)
    approximations: tuple[Approximation, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[KeyReport, ...] = ()


def lengths(schedules: Schedules) -> dict[str, tuple[int, ...]]:
    """What a loop's `schedules` says of its rows."""
    return {name: tuple(sorted(rows)) for name, rows in schedules.items()}
