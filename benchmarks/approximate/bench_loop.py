"""How much faster is the whole loop with each recipe, and against diffusers eager and compiled at its best dtype? In turns.

    .venv-dev/bin/python benchmarks/approximate/bench_loop.py --model cogvideox-mid --steps 25 50
    .venv-dev/bin/python benchmarks/approximate/bench_loop.py --model svd-mid --steps 25 50
    .venv-dev/bin/python benchmarks/approximate/bench_loop.py --model demo --steps 8        # a request, from words to frames

Recipes are combined and run as they are, never multiplied. Steps are left out by the schedules that `bench_quality.py` finds on
the demo for the same number of steps, and what each costs in quality is measured there: these mid models have random weights
(mid_bundle.py). `eager`, `compiled` and their bfloat16 forms (autocast; frozen weights) run diffusers' modules as they were
written, every step of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.benchmarks import harness
from motionrt.benchmarks.approximate.bench_quality import build_forms, schedules, with_forms
from motionrt.benchmarks.approximate.recipes import RECIPES, told_of
from motionrt.benchmarks.pipeline import DEMO
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.calibrate import Found, extrapolating, with_schedule
from motionrt.runtime.errors import MotionRTError
from motionrt.runtime.pipeline import MotionPipeline, Request
from motionrt.runtime.schedules import extrapolated

Floats = NDArray[np.float32]
Ways = dict[str, tuple[harness.Candidate, dict[str, Any]]]  # by name: what is timed, and what its rows say of it
RIVALS = ("eager", "compiled", "eager bfloat16", "compiled bfloat16")


def ours(
    bundle: Path, memory: Path | None, asked: Mapping[str, Any], steps: int, found: Mapping[float, Found],
    options: argparse.Namespace,
) -> Ways:  # fmt: skip
    """Every recipe that runs here, as a whole job: the conditions of the request, the tables of the schedule, the loop."""
    ways: Ways = {}
    for recipe in (one for one in RECIPES if one.name == "exact" or one.name in options.recipes):
        if recipe.budget is not None and recipe.budget not in found:
            continue
        try:
            pipeline = recipe.opened(bundle, memory, options.threads)
            pipeline.load()
            pipeline(**asked, steps=2)  # OpenVINO is compared with ONNX Runtime at the first call of a graph
        except MotionRTError as error:
            print(f"{recipe.name}: not run: {error}")
            continue
        loop, told = extrapolating(pipeline.bundle), told_of((True,) * steps)
        solver = pipeline.bundle.manifest.loops[loop].default[0]
        if recipe.budget is not None:
            one = found[recipe.budget]
            rows = moved(pipeline, loop, one, steps)
            pipeline.bundle = with_schedule(pipeline.bundle, loop, "recipe", rows)
            told, solver = told_of(one.runs), "recipe"

        def call(pipeline: MotionPipeline = pipeline, solver: str = solver) -> dict[str, NDArray[Any]]:
            return {"frames": pipeline(**asked, solver=solver, steps=steps).frames}

        ways[recipe.name] = call, {**told, "computed_by": pipeline.backend.label}
    return ways


def moved(pipeline: MotionPipeline, loop: str, found: Found, steps: int) -> Floats:
    """The pattern of a schedule that was found on the demo, in the rows of this bundle's own solver."""
    spec = pipeline.bundle.manifest.loops[loop]
    return extrapolated(spec, pipeline.bundle.schedule(loop, spec.default[0], steps).rows, found.runs)


def rivals(model: Any, steps: int, options: argparse.Namespace) -> Ways:
    """diffusers' module in the same loop: its own inputs, every step."""
    import torch
    from torch import Tensor, nn

    from motionrt.benchmarks.approximate.mid_bundle import schedule
    from motionrt.benchmarks.models.step_rivals import compiled_step, torch_step

    class Autocast(nn.Module):
        """A module in bfloat16 where torch's autocast says so."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return tuple(value.float() for value in self.inner(**inputs))

    feed = {name: value.numpy() for name, value in model.feed().items()}
    rows, ways = schedule(model, steps), Ways()
    for name in options.rivals:
        module = model.step(adapter=True)
        if name.endswith("bfloat16"):
            module = Autocast(module)
        step: Any
        if name.startswith("compiled"):
            step = compiled_step(
                module, tuple(feed), model.outputs, threads=options.threads, example=feed, mode=options.compile_mode
            )
            if step is None:
                continue
        else:
            step = torch_step(module, tuple(feed), model.outputs, threads=options.threads)

        def call(step: Callable[..., dict[str, Floats]] = step, rows: Floats = rows) -> dict[str, NDArray[Any]]:
            latents, x0 = feed["latents"], np.zeros_like(feed["latents"])
            for row in rows:
                made = step({
                    **feed, "latents": latents, "previous_x0": x0, "coefficients": row[None, 3:9],
                    "timestep": row[1:2].astype(feed["timestep"].dtype), "guidance": row[2:3],
                })  # fmt: skip
                latents, x0 = made["next_latents"], made["x0"]
            return {"latents": latents}

        call(rows=rows[:2])  # what a step gave is compiled for once more
        ways[name] = call, {**told_of((True,) * steps), "computed_by": f"torch {name}"}
    return ways


def measure(ways: Ways, model: str, steps: int, options: argparse.Namespace) -> None:
    """All of them in turns, in a new order each round, and a row for each."""
    calls = {name: call for name, (call, _) in ways.items()}
    for call in calls.values():  # whatever is loaded, compiled or put somewhere at first
        for _ in range(options.warmups):
            call()
    order, seconds = np.random.default_rng(0), {name: np.empty(options.rounds) for name in calls}
    for index in range(options.rounds):
        for name in order.permutation([*calls]).tolist():
            seconds[name][index] = harness.clock(calls[name], rounds=1, warmups=0)[0]
    result = harness.Comparison("exact", 0.0, options.warmups, {}, seconds)
    for name, (_, told) in ways.items():
        row = {"backend": name, **harness.summary(seconds[name]), "warmups": options.warmups, "model": model, "steps": steps}
        row |= {"what": "request" if model == "demo" else "loop", "threads": options.threads, **told}
        row |= {f"over_{other.replace(' ', '_')}": result.ratio(other, name).as_row() for other in ("exact", *options.rivals)
                if other in calls and other != name}  # fmt: skip
        harness.append_row("bench_loop", row, folder=options.results)
        faster = "" if name == "exact" else f", {result.ratio('exact', name)} of exact"
        print(f"{model}, {steps} steps, {name}: {told['network_runs']} runs, {harness.times(row)}{faster}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Time, print the ratios and append one row for each candidate and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a name in mid_models.MODELS")
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--work", type=Path, default=harness.ROOT / "out" / "mid", help="folder where exported models are kept")
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="*", default=names, choices=names, help="all if not given; exact is always one")
    parser.add_argument("--rivals", nargs="*", default=["compiled bfloat16"], choices=RIVALS)
    parser.add_argument("--compile-mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    options = parser.parse_args(arguments)
    for steps in options.steps:
        found = schedules(DEMO / "bundle", steps)
        if options.model == "demo":
            options.rivals = []
            still, prompt = DEMO / "inputs" / "red_star.png", "a red star slides to the right"
            with tempfile.TemporaryDirectory() as folder:
                asked = {"image": still, "prompt": prompt, "references": 4}
                ways = ours(with_forms(Path(folder)), DEMO / "memory", asked, steps, found, options)
                measure(ways, "demo", steps, options)
            continue
        from motionrt.benchmarks.approximate.mid_bundle import CALIBRATED, given, mid_bundle
        from motionrt.benchmarks.models.mid_models import MODELS
        from motionrt.export.engines.calibration import measure_scales

        model = MODELS[options.model]
        bundle = mid_bundle(model, options.work)
        measure_scales(Bundle.open(bundle), ["step"], [Request({}, given=given(model), steps=CALIBRATED)])
        build_forms(bundle)
        ways = ours(bundle, None, {"given": given(model)}, steps, found, options)
        measure(ways | rivals(model, steps, options), model.name, steps, options)


if __name__ == "__main__":
    main()
