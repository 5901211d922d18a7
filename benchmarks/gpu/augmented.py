"""One motion-augmented temporal attention (Motion-I2V, arXiv 2401.15977, 4.2) as a problem for benchmarks, in several forms.

`benchmarks/questions/bench_kernel.py --case augmented` times the torch forms on a CPU, `gpu_augmented.py` all of them on a GPU.
The output's projection is the same in every form and in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from motionrt.benchmarks import harness
from motionrt.export.systems.motion_i2v.stencil import Stencil, stencil, warped
from motionrt.kernels.motion_augmented_attention import flops, moved_bytes, reference

CHECKED = 64  # places from the front and from the end


@dataclass(frozen=True)
class Shape:
    """One attention of one request: `branches` of guidance, a grid of places, F frames, N heads of width d."""

    name: str
    branches: int
    grid: tuple[int, int]
    frames: int
    heads: int
    width: int

    @property
    def places(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def inner(self) -> int:
        return self.heads * self.width

    @property
    def flops(self) -> tuple[int, int]:
        """(of the released form, of ours), with the projections to queries, keys and values."""
        return flops(self.branches, self.places, self.frames, self.heads, self.width)

    def bytes(self, size: int) -> int:
        """That the attention alone has to move at least, `size` bytes a number."""
        return moved_bytes(self.branches, self.places, self.frames, self.heads, self.width, size)


@dataclass(frozen=True)
class Problem:
    """Random normed rows `[B, P, F, C]`, weights that give logits of about unit spread, positions `[2 F - 1, C]`, a field."""

    shape: Shape
    hidden: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    table: Stencil

    def released(self, hidden: Tensor, places: slice = slice(None)) -> Tensor:
        """As Motion-I2V runs: 2 F - 1 rows a place, moved ones between the frames, all projected. Frame 0 is moved by our
        table, in fp32 or more; the release scatters it, which no compiler fuses. -> `[B, P, F, C]`"""
        kind = hidden.dtype
        wide = torch.promote_types(kind, torch.float32)
        table = self.table._replace(weights=self.table.weights.to(wide))
        first = hidden[:, :, 0].to(wide)  # branches move alike
        moved = torch.cat([warped(table, one[None]) for one in first]).to(kind)[:, places]
        hidden = hidden[:, places]
        pairs = torch.stack([hidden[:, :, 1:], moved], 3).flip(3).flatten(2, 3)
        every = torch.cat([hidden[:, :, :1], pairs], 2) + self.positions.to(kind)
        parts = ((every[:, :, ::2], self.query), (every, self.keys), (every, self.values))
        made = (self.by_head(rows, weight.to(kind)) for rows, weight in parts)
        asked, keys, values = (part.transpose(2, 3).flatten(0, 1) for part in made)
        found = F.scaled_dot_product_attention(asked, keys, values)
        return found.transpose(1, 2).flatten(2).view(hidden.shape)

    def inputs(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Rows and positions as the op takes them: projected, by heads, own positions before those that arrive."""
        order = torch.cat([self.positions[::2], self.positions[1::2]])
        tables = (self.positions[::2], order, order)
        weights = (self.query, self.keys, self.values)
        return (
            *(self.by_head(hidden, weight) for weight in weights),
            *(self.by_head(table, weight) for table, weight in zip(tables, weights, strict=True)),
        )

    def by_head(self, rows: Tensor, weight: Tensor) -> Tensor:
        """`[..., C]` projected -> `[..., N, d]`."""
        return F.linear(rows, weight).view(*rows.shape[:-1], self.shape.heads, self.shape.width)

    def by(self, form: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """Projections, and then the attention as `form`, the op's reference or its launcher, has it. -> `[B, P, F, C]`"""
        table = self.table

        def run(hidden: Tensor) -> Tensor:
            found = form(*self.inputs(hidden), table.sources, table.weights, list(table.sums), table.beyond, False)
            return found.flatten(3)

        return run

    def forms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Those that need no kernel of ours."""
        return {"released": self.released, "gathered": self.by(reference)}


def make_problem(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """The same numbers on every device. The field zooms out by a tenth and wavers: more than four sources come to some places,
    and none to others."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(dtype).to(device)

    (height, across), inner = shape.grid, shape.inner
    weights = (normal(inner, inner) / inner**0.5 for _ in range(3))
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(across).float(), indexing="ij")
    growing = torch.arange(1, shape.frames)[:, None, None, None] / (shape.frames - 1)
    zoom = -0.1 * growing * torch.stack([x - across / 2, y - height / 2])
    noise = torch.rand(shape.frames - 1, 2, height, across, generator=random) - 0.5
    table = stencil((zoom + noise)[None])
    sources, weighed, beyond, *sums = (x.to(device) for x in (table.sources, table.weights, table.beyond, *table.sums))
    hidden = normal(shape.branches, shape.places, shape.frames, inner)
    query, keys, values = weights
    positions = normal(2 * shape.frames - 1, inner)
    return Problem(shape, hidden, query, keys, values, positions, Stencil(sources, weighed, tuple(sums), beyond))


def check(problem: Problem, forms: Mapping[str, Callable[[Tensor], Tensor]], factor: float = 2.0) -> dict[str, float]:
    """Errors of all `forms` against the released form in fp64, on the first and last `CHECKED` places.

    Raises ParityError where one is above `factor` times the error of the released form in the same dtype, + 1e-6.
    """
    ends = [slice(0, CHECKED), slice(max(0, problem.shape.places - CHECKED), None)]
    truths = [(places, problem.released(problem.hidden.double(), places)) for places in ends]
    return harness.errors_to_fp64(problem, forms, truths, factor)
