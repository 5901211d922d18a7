"""Runs motion-augmented attention's kernel under Triton's interpreter, on the CPU, and prints one JSON line per case. A script:

    TRITON_INTERPRET=1 python tests/helpers/augmented_cases.py

As kernel_cases.py, whose reasons are here too; tests/kernels/test_augmented_interpreter.py reads the lines. Given a device
("cuda") the same cases run there as compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from kernel_cases import main, poisoned
from torch import Tensor

from motionrt.export.systems.motion_i2v.stencil import stencil
from motionrt.kernels.motion_augmented_attention import reference
from motionrt.kernels.motion_augmented_attention_triton import launch

NONE = "nothing arrives"


@dataclass(frozen=True)
class Case:
    """One call of the launcher: sizes, how frame 0 moves, layouts in memory, and how sharp the logits are."""

    name: str
    field: str = "random"
    grid: tuple[int, int] = (3, 5)
    frames: int = 5
    heads: int = 2
    width: int = 8
    requests: int = 1
    branches: int = 1
    crossed: bool = False
    logits: float = 1.0
    layout: str = "plain"
    index: str = "int64"
    dtype: str = "float32"


def cases() -> list[Case]:
    """Fields that fill slots, overflow them by one level of chunks or by all, leave targets empty or go over the edge."""
    found = [Case(field, field=field) for field in ("still", "edges", "one source each", NONE, "not finite")]
    for grid in ((1, 2), (3, 3), (3, 7)):
        for field in ("random", "zoom out", "one point"):
            found.append(Case(f"{field} on {grid[0]}x{grid[1]}", field=field, grid=grid, frames=3))
    found.append(Case("one point on 9x8: a deep tree", field="one point", grid=(9, 8), frames=2, heads=1))
    found.append(Case("released sizes: F16 N8 d40", field="zoom out", grid=(2, 4), frames=16, heads=8, width=40))
    for width in (1, 40, 64, 80, 160):
        found.append(Case(f"d{width}", field="zoom out", grid=(3, 3), width=width, heads=1))
    found += [Case(f"F{frames}", frames=frames, grid=(2, 3)) for frames in (2, 15, 16)]
    for field in ("random", "one point"):
        found.append(Case(f"two requests of two branches, {field}", field=field, requests=2, branches=2, grid=(3, 3)))
        found.append(Case(f"crossed, {field}", field=field, crossed=True, frames=6, requests=2, branches=2, grid=(3, 3)))
    found += [Case("three requests of one branch", requests=3, grid=(2, 3)), Case("crossed alone", crossed=True, grid=(2, 3))]
    found += [Case(f"layout: {layout}", layout=layout, branches=2, grid=(2, 3)) for layout in ("frames first", "sliced")]
    found += [Case("whole numbers of 32 bits", field="one point", index="int32")]
    found += [Case("one-hot logits", logits=3e3), Case("extreme logits", logits=1e18), Case("equal logits", logits=0.0)]
    for dtype in ("float16", "bfloat16"):
        for field in ("random", "one point", NONE):
            found.append(Case(f"{dtype}: {field}", field=field, width=40, grid=(3, 3), dtype=dtype))
        found.append(Case(f"{dtype}: sharp", logits=10.0, dtype=dtype))
        found.append(Case(f"{dtype}: F16 d160", frames=16, width=160, heads=1, grid=(2, 3), dtype=dtype))
    return found


@contextmanager
def true_bf16(device: str) -> Iterator[None]:
    """The interpreter keeps bfloat16 as whole numbers: its `dot` multiplies those, and it cuts off what does not fit. Here
    `dot` widens them first and numbers are rounded, as a GPU does; the kernel has no other arithmetic on them."""
    if device != "cpu":
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, trunc = builder.create_dot, builder.create_fp_trunc

    def wide(self: Any, one: Any) -> Any:
        return self.create_fp_ext(one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one

    def rounded(self: Any, one: Any, kind: Any) -> Any:
        if (one.dtype.scalar, kind.scalar) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(one.data).view(np.uint32)
            one = interpreter.TensorHandle((bits + 0x7FFF + (bits >> 16 & 1)).view(np.float32), tl.float32)
        return trunc(self, one, kind)

    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(self, a), wide(self, b), *rest)
    builder.create_fp_trunc = rounded
    try:
        yield
    finally:
        builder.create_dot, builder.create_fp_trunc = dot, trunc


def field_of(case: Case) -> Tensor:
    """`[requests, F - 1, 2, h, w]` in pixels of the grid."""
    height, width = case.grid
    draw = torch.Generator().manual_seed(5)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    noise = torch.rand(case.requests, case.frames - 1, 2, height, width, generator=draw)
    if case.field == "not finite":
        noise[..., 0] = float("nan")
        noise[..., 1, :] = float("inf")
        return noise
    return {
        "still": 0 * noise,
        "edges": noise + torch.tensor([width - 1.5, height - 1.5])[:, None, None],
        "random": 6 * noise - 3,
        "zoom out": torch.stack([-0.6 * x, -0.6 * y]) + 0.3 * noise,
        "one point": torch.stack([0.3 * width - x, 0.6 * height - y]) + 0.2 * noise,
        "one source each": (3 * noise).round(),
        NONE: noise + 2 * max(case.grid),
    }[case.field]


def tensors(case: Case, device: str) -> tuple[Any, ...]:
    """The arguments of a case but for `crossed`, in the memory layout that it asks for; around a slice is NaN."""
    random = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    places = case.grid[0] * case.grid[1]

    def rows() -> Tensor:
        size = (case.requests * case.branches, places, case.frames, case.heads, case.width)
        found = torch.randn(size, generator=random, dtype=torch.float64).to(dtype).to(device)
        if case.layout == "frames first":
            return found.transpose(1, 2).contiguous().transpose(1, 2)
        if case.layout == "sliced":
            wide = torch.full((size[0], places + 2, case.frames + 3, *size[3:]), float("nan"), dtype=dtype, device=device)
            wide[:, 1:-1, 1:-2] = found
            return wide[:, 1:-1, 1:-2]
        return found

    def positions(count: int) -> Tensor:
        found = torch.randn((count, case.heads, case.width), generator=random, dtype=torch.float64)
        return found.to(dtype).to(device)

    query, keys, values = rows() * case.logits if case.layout == "plain" else rows(), rows(), rows()
    at = (positions(case.frames) * case.logits, *(positions(2 * case.frames - 1) for _ in range(2)))
    table = stencil(field_of(case))
    kind = getattr(torch, case.index)
    sources, beyond, *sums = (index.to(kind).to(device) for index in (table.sources, table.beyond, *table.sums))
    return query, keys, values, *at, sources, table.weights.to(device), sums, beyond


def double(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same in fp64."""
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)


def run(case: Case, device: str) -> dict[str, Any]:
    """Errors of the kernel and of plain torch in the same dtype, both against fp64, as the tolerance law wants them."""
    given = tensors(case, device)
    truth = reference(*double(given), case.crossed)
    plain = reference(*given, case.crossed)
    before = [x.clone() for x in given if isinstance(x, Tensor)]
    with poisoned(), true_bf16(device):
        got = launch(*given, case.crossed)
    assert got.dtype == plain.dtype and got.shape == plain.shape and got.is_contiguous()
    after = [x for x in given if isinstance(x, Tensor)]
    assert all(torch.equal(x, y) or x.isnan().any() for x, y in zip(before, after, strict=True))
    return {
        "name": case.name,
        "error": float((got.double() - truth).abs().max()),
        "torch": float((plain.double() - truth).abs().max()),
        "levels": 1 + len(given[8]),
        "beyond": int((given[9] != given[6].shape[0] - given[9].shape[0] - 1).sum()),
        "empty": int((given[7][: given[9].shape[0]] == 0).all(1).sum()),
    }


if __name__ == "__main__":
    main(cases, run)
