"""What does folding the Motion-Adapter's query projection save? One layer, released against folded, in plain torch on the CPU.

    .venv-dev/bin/python benchmarks/questions/bench_kernel.py --rounds 10
    .venv-dev/bin/python benchmarks/questions/bench_kernel.py --case augmented       # Motion-I2V's attention, see below

The other case: what does moving projections of frame 0, instead of projecting moved rows, save in an attention of Motion-I2V?
The forms must agree with the released form in fp64 first. The same on a GPU, with the Triton kernels: gpu_kernel.py and
gpu_augmented.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from motionrt.benchmarks import harness
from motionrt.benchmarks.gpu import augmented
from motionrt.kernels.motion_cross_attention import choose_form, reference


@dataclass(frozen=True)
class Shape:
    """One layer's adapter: `batch` guidance halves, L rows, D wide, N heads of width d, M motion tokens."""

    name: str
    batch: int
    length: int
    inner: int
    heads: int
    tokens: int
    width: int

    @property
    def flops(self) -> int:
        """Of the folded form without padding: scores, and weights times V."""
        return 2 * self.batch * self.length * self.heads * self.tokens * (self.inner + self.width)

    def bytes(self, size: int) -> int:
        """That have to move at least: h once, out once, A and V once; `size` bytes a number."""
        rows = self.batch * self.length * (self.inner + self.heads * self.width)
        return size * (rows + self.batch * self.heads * self.tokens * (self.inner + self.width))


@dataclass(frozen=True)
class Problem:
    """Random tensors of a shape; A is folded in fp32 and rounded once, K-major. Weights give logits of about unit spread."""

    shape: Shape
    hidden: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    folded: Tensor
    scale: Tensor

    def released(self, hidden: Tensor) -> Tensor:
        """As MotionRAG's adapter runs: a projection, attention, a sum."""
        queries = F.linear(hidden, self.query).view(*hidden.shape[:2], self.shape.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, self.keys, self.values)
        return hidden + self.scale * out.transpose(1, 2).flatten(2)

    def fold(self, hidden: Tensor) -> Tensor:
        """The folded form in plain torch: the op's reference."""
        return reference(hidden, self.folded, self.values, self.scale, True)

    def truth(self, rows: slice) -> Tensor:
        """The released form in fp64 of the same rounded weights, for some rows."""
        hidden, keys, values = self.hidden[:, rows].double(), self.keys.double(), self.values.double()
        queries = (hidden @ self.query.double().T).view(*hidden.shape[:2], self.shape.heads, -1).transpose(1, 2)
        weights = (queries @ keys.transpose(2, 3) * self.shape.width**-0.5).softmax(-1)
        out: Tensor = hidden + self.scale.double() * (weights @ values).transpose(1, 2).flatten(2)
        return out


def make_problem(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """The same numbers on every device."""
    random = torch.Generator().manual_seed(seed)
    inside = shape.heads * shape.width

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(dtype).to(device)

    query = (normal(inside, shape.inner).float() / shape.inner**0.5).to(dtype)
    keys, values = (normal(shape.batch, shape.heads, shape.tokens, shape.width) for _ in range(2))
    by_head = query.float().view(shape.heads, shape.width, shape.inner)
    folded = (keys.float() @ by_head * shape.width**-0.5).flatten(1, 2).to(dtype).transpose(1, 2)
    hidden = normal(shape.batch, shape.length, shape.inner)
    return Problem(shape, hidden, query, keys, values, folded, torch.tensor(0.8, dtype=dtype, device=device))


def check(problem: Problem, forms: Mapping[str, Callable[[Tensor], Tensor]], factor: float = 2.0) -> dict[str, float]:
    """Errors of all `forms` against fp64, on the first and last 256 rows.

    Raises ParityError where one is above `factor` times the error of the released form in the same dtype, + 1e-6.
    """
    ends = [slice(0, 256), slice(max(0, problem.shape.length - 256), None)]
    return harness.errors_to_fp64(problem, forms, [(rows, problem.truth(rows)) for rows in ends], factor)


def main(arguments: list[str] | None = None) -> None:
    """Check, time in turns, print the ratio, append rows."""
    parser = argparse.ArgumentParser(description="Released form against ours, one layer, plain torch on the CPU.")
    parser.add_argument("--case", default="adapter", choices=("adapter", "augmented"))
    parser.add_argument("--length", type=int, default=6976, help="rows of h: 480x720x17 in CogVideoX, text included")
    parser.add_argument("--heads", type=int, default=48, help="D is 64 times this")
    parser.add_argument("--grid", default="20x32", help="places of the augmented attention, by default of its second level")
    parser.add_argument("--width", type=int, default=80, help="of its 8 heads")
    harness.add_options(parser, rounds=10, warmups=1, threads=1)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    with torch.no_grad():
        (adapter if options.case == "adapter" else attention)(options)


def in_turns(
    forms: Mapping[str, Callable[[Tensor], Tensor]], hidden: Tensor, options: argparse.Namespace
) -> harness.Comparison:
    """Times of all `forms` of the same input, held to the released one."""

    def candidate(form: Callable[[Tensor], Tensor]) -> harness.Candidate:
        return lambda: {"out": form(hidden).numpy()}

    return harness.compare(
        {name: candidate(form) for name, form in forms.items()},
        reference="released",
        tolerance=1e-4,
        warmups=options.warmups,
        rounds=options.rounds,
    )


def adapter(options: argparse.Namespace) -> None:
    """The Motion-Adapter's layer."""
    shape = Shape("adapter", 1, options.length, 64 * options.heads, options.heads, 25, 64)
    problem = make_problem(shape, torch.float32, "cpu")
    forms = {"released": problem.released, "folded": problem.fold}
    errors = check(problem, forms)
    result = in_turns(forms, problem.hidden, options)
    ratio = result.ratio("released", "folded")
    _, plain, folded = choose_form(shape.length, shape.inner, shape.heads, shape.tokens, shape.width)
    for name in forms:
        row: dict[str, Any] = {
            **result.row(name),
            "what": "one Motion-Adapter layer, plain torch",
            "shape": [shape.batch, shape.length, shape.inner],
            "heads": shape.heads,
            "tokens": shape.tokens,
            "dtype": "float32",
            "threads": options.threads,
            "error_to_fp64": errors[name],
            "note": options.note,
        }
        if name == "released":
            row["over_folded"] = ratio.as_row()
        path = harness.append_row("bench_kernel", row, folder=options.results)
        print(f"{row['backend']:>10}: {harness.times(row)}")
    print(f"released / folded: {ratio} (95 % of {options.rounds} rounds resampled); FLOP ratio {plain / folded:.2f}")
    print(f"rows appended: {path.name}")


def attention(options: argparse.Namespace) -> None:
    """Motion-I2V's augmented attention, with both branches of guidance and the projections to queries, keys and values."""
    height, across = (int(size) for size in options.grid.split("x"))
    shape = augmented.Shape("augmented", 2, (height, across), 16, 8, options.width)
    problem = augmented.make_problem(shape, torch.float32, "cpu")
    forms = problem.forms()
    errors = augmented.check(problem, forms)
    result = in_turns(forms, problem.hidden, options)
    ratio, (released, ours) = result.ratio("released", "gathered"), shape.flops
    for name in forms:
        row: dict[str, Any] = {
            **result.row(name),
            "what": "one augmented attention of Motion-I2V, plain torch",
            "shape": [shape.branches, shape.places, shape.frames, shape.inner],
            "heads": shape.heads,
            "dtype": "float32",
            "threads": options.threads,
            "flops": released if name == "released" else ours,
            "error_to_fp64": errors[name],
            "note": options.note,
        }
        if name == "released":
            row["over_gathered"] = ratio.as_row()
        path = harness.append_row("bench_kernel", row, folder=options.results)
        print(f"{row['backend']:>10}: {harness.times(row)}")
    print(f"released / gathered: {ratio} (95 % of {options.rounds} rounds resampled); FLOP ratio {released / ours:.2f}")
    print(f"rows appended: {path.name}")


if __name__ == "__main__":
    main()
