"""Motion-augmented attention on a GPU: parity on the chip, then times against everything else that computes the same.

    .venv-dev/bin/python benchmarks/gpu/gpu_augmented.py         # Motion-I2V's four grids, fp16; gpu_suite.py runs it too

Candidates: the released form (moved rows in memory, all of them projected) and ours in plain torch (frame 0 projected once,
then gathered), eager and compiled, and our kernel. All of them with the projections to queries, keys and values, in which they
differ; `kernel_alone` and `gathered_alone` are the attention on rows that are projected already. `projections` and `copy` (of
the rows) are the yardsticks. Times are of device events, as in gpu_kernel.py. Nothing is timed where parity fails. On a machine
without a GPU only the parity of the torch forms is checked, at a tiny shape, with --cpu-check.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrt.benchmarks import harness
from motionrt.benchmarks.gpu.augmented import Problem, Shape, check, make_problem
from motionrt.benchmarks.gpu.gpu_kernel import ROTATED_BYTES, Form, compiled, event_seconds, runnable, shapes_in_turn
from motionrt.kernels.motion_augmented_attention import reference

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("motion_i2v 40x64", 2, (40, 64), 16, 8, 40),
        Shape("motion_i2v 20x32", 2, (20, 32), 16, 8, 80),
        Shape("motion_i2v 10x16", 2, (10, 16), 16, 8, 160),
        Shape("motion_i2v 5x8", 2, (5, 8), 16, 8, 160),
    )
}
RATIOS = (("released_eager", "kernel"), ("released_compiled", "kernel"), ("gathered_compiled", "kernel"))
ALONE = ("kernel_alone", "gathered_alone")  # of rows that are projected: their input is the same in all rounds


def alone(problem: Problem) -> dict[str, Form]:
    """The attention without projections, whatever it is called with; launched, and in plain torch."""
    from motionrt.kernels.motion_augmented_attention_triton import launch

    table, rows = problem.table, problem.inputs(problem.hidden)
    given: tuple[Any, ...] = (*rows, table.sources, table.weights, list(table.sums), table.beyond, False)
    return {"kernel_alone": lambda hidden: launch(*given), "gathered_alone": lambda hidden: reference(*given)}


def measure(shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Parity, times and rows of one shape."""
    from motionrt.kernels.motion_augmented_attention_triton import launch

    problem = make_problem(shape, dtype, "cuda")
    forms = {**runnable(compiled(problem.forms()), problem.hidden), "kernel": problem.by(launch)}
    errors = check(problem, forms)
    size = problem.hidden.element_size() * problem.hidden.numel()
    inputs = [problem.hidden.clone() for _ in range(max(2, -(-ROTATED_BYTES // (2 * size))))]
    target = torch.empty_like(problem.hidden)

    def projections(hidden: Tensor) -> Tensor:
        return problem.inputs(hidden)[0]

    timed: dict[str, Form] = {**forms, **alone(problem), "projections": projections, "copy": target.copy_}
    torch.cuda.reset_peak_memory_stats()
    seconds = event_seconds(timed, inputs, calls=options.calls, warmups=options.warmups, rounds=options.rounds)
    result = harness.Comparison("fp64", 0.0, options.warmups, {name: errors.get(name, 0.0) for name in timed}, seconds)
    ceiling = 2 * size / float(np.median(seconds["copy"]))
    released, ours = shape.flops
    print(f"{shape.name}, {dtype}: copy {ceiling / 1e9:.0f} GB/s")
    for name in timed:
        middle = float(np.median(seconds[name]))
        moved = 2 * size if name == "copy" else shape.bytes(problem.hidden.element_size()) if name in ALONE else None
        row: dict[str, Any] = {
            **result.row(name),
            "error": {"max_abs_difference_to_fp64": errors[name]} if name in errors else None,
            "what": "motion_augmented_attention",
            "shape": [shape.branches, shape.places, shape.frames, shape.inner],
            "heads": shape.heads,
            "model": shape.name,
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "calls_per_round": options.calls,
            "gb_per_s": None if moved is None else moved / middle / 1e9,
            "share_of_copy": None if moved is None else moved / middle / ceiling,
            "tflop_per_s": (released if "released" in name else ours) / middle / 1e12 if name in forms else None,
            "note": options.note,
        }
        harness.append_row("gpu_augmented", row, folder=options.results)
        print("{backend:>20}: p50 {p50_ms:.4f} ms, p95 {p95_ms:.4f} ms".format(**row))
    for slow, fast in RATIOS:
        print(f"  {slow} / {fast}: {result.ratio(slow, fast) if slow in timed else 'not run'}")


def cpu_check() -> None:
    """The torch forms agree with fp64, here and now: what can be known without a GPU."""
    problem = make_problem(Shape("tiny", 2, (6, 8), 16, 4, 8), torch.float32, "cpu")
    for name, error in check(problem, problem.forms()).items():
        print(f"{name}: {error:.1e} from fp64")


def main(arguments: list[str] | None = None) -> None:
    """Every shape in turn, or a word where there is no GPU."""
    shapes_in_turn(arguments, "augmented kernel", "Motion-augmented attention", SHAPES, "float16", measure, cpu_check)


if __name__ == "__main__":
    main()
