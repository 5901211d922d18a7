"""What does one request gain from a device for each branch of its guidance? CogVideoX's step in PyTorch, random weights.

    .venv-dev/bin/python benchmarks/guided/bench_branches.py --size mid --devices cpu cpu
    .venv-dev/bin/python benchmarks/guided/bench_branches.py --size full --dtype bfloat16 --devices cuda:0 cuda:1

Candidates: `pair`, the step as bundles have it, both branches a batch of two on the first device; `in turn`, a call for each
branch there; `side by side`, each on a device of its own, in a thread of its own, the other one's latents and output taken
across. All give the same step. Two that are the same CPU share its threads: half of them each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from motionrt.benchmarks import harness
from motionrt.benchmarks.models.full_step import OUTPUTS, SIZES, Size, build_step, feed
from motionrt.export.systems.cogvideox_step import BRANCH, CogVideoXBranch, CogVideoXStep
from motionrt.export.systems.split import Combined

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest value
Values = Mapping[str, Tensor]
Arrays = dict[str, NDArray[Any]]


def branch(step: CogVideoXStep, values: Values) -> Tensor:
    """v of one branch, `[1, F, C, H, W]`: the network on one row, with this branch's `text` and `motion`."""
    output: Tensor = CogVideoXBranch.forward(step, **values)  # type: ignore[arg-type]  # the weights are the step's
    return output


def branches(step: CogVideoXStep, values: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the branch without conditions reads, and the other."""
    conditioned = {name: values[name] for name in BRANCH}
    unconditional: Any = step.unconditional_motion
    return conditioned | {"text": values["negative_text"], "motion": unconditional}, conditioned


def combine(without: Tensor, conditioned: Tensor, values: Values) -> Arrays:
    """Guidance and the solver's update, as host arrays."""
    solver = {name: values[name] for name in ("latents", "previous_x0", "noise", "coefficients", "guidance")}
    return named(Combined()(**solver, without=without, conditioned=conditioned))


def named(made: tuple[Tensor, ...]) -> Arrays:
    return {name: value.float().cpu().numpy() for name, value in zip(OUTPUTS, made, strict=True)}


def candidates(
    step: CogVideoXStep, values: Values, devices: tuple[str, str], threads: int, pool: ThreadPoolExecutor
) -> dict[str, Callable[[], Arrays]]:
    """The three forms of a step; `pool`: two threads."""
    here, there = devices
    other = step if here == there else deepcopy(step).to(there)
    own, across = branches(step, values)
    fixed = {name: value.to(there) for name, value in across.items() if name != "latents"}

    def alone(module: CogVideoXStep, given: Values) -> Tensor:
        with torch.inference_mode():
            return branch(module, given)

    def conditioned() -> Tensor:
        return alone(other, fixed | {"latents": values["latents"].to(there)}).to(here)

    @torch.inference_mode()
    def pair() -> Arrays:
        torch.set_num_threads(threads)
        return named(step(*values.values()))

    @torch.inference_mode()
    def in_turn() -> Arrays:
        torch.set_num_threads(threads)
        return combine(alone(step, own), alone(step, across), values)

    @torch.inference_mode()
    def side_by_side() -> Arrays:
        parts = pool.submit(alone, step, own), pool.submit(conditioned)
        return combine(parts[0].result(), parts[1].result(), values)

    return {"pair": pair, "in turn": in_turn, "side by side": side_by_side}


def measure(options: argparse.Namespace, size: Size) -> None:
    """Compare, time, and append a row for each candidate."""
    kind, devices = getattr(torch, options.dtype), (options.devices[0], options.devices[1])
    step, values = build_step(size, kind, devices[0]), feed(size, kind, devices[0])
    unconditional: Any = step.unconditional_motion
    unconditional.normal_(generator=torch.Generator(devices[0]).manual_seed(7))  # of zeros, branches would be alike
    each = max(1, options.threads // 2) if devices == ("cpu", "cpu") else options.threads
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(each,)) as pool:
        forms = candidates(step, values, devices, options.threads, pool)
        tolerance = harness.allowance(TOLERANCE[options.dtype], forms["pair"]())
        compared = harness.compare(
            forms, reference="pair", tolerance=tolerance, warmups=options.warmups, rounds=options.rounds
        )
    common = {"what": "guided step", "model": size.name, "dtype": options.dtype, "devices": list(devices),
              "threads": options.threads, "note": options.note}  # fmt: skip
    for name in forms:
        ratio = compared.ratio("pair", name)
        row = {**common, **compared.row(name), "pair_over_this": ratio.as_row()}
        harness.append_row("bench_branches", row, folder=options.results)
        print(f"{size.name} {options.dtype}, {name}: {harness.times(row)}; {ratio} as fast as the pair")


def main(arguments: list[str] | None = None) -> None:
    """Measure one size."""
    parser = argparse.ArgumentParser(description="Both branches of guidance: one call, two, or two devices.")
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--devices", nargs=2, default=["cpu", "cpu"], metavar=("FIRST", "SECOND"))
    harness.add_options(parser, rounds=10, warmups=1, threads=2)
    options = parser.parse_args(arguments)
    measure(options, SIZES[options.size])


if __name__ == "__main__":
    main()
