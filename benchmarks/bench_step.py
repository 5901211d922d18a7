"""How much faster is one denoising step after the compiler pass? The rewritten step against the plain one, one run.

    .venv-dev/bin/python benchmarks/bench_step.py --rounds 50

Candidates: `rewritten` (graph `step`) and `plain` (graph `step_plain`: the same step as it was written), both in ONNX
Runtime, and `eager`, the plain module in PyTorch, where that is installed. All must agree over a whole schedule first.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness
from motionrt.runtime.backend import Graph, OnnxRuntimeBackend
from motionrt.runtime.bundle import Bundle, Port, sha256_of
from motionrt.runtime.noise import noise
from motionrt.runtime.sampler import sample

DEMO = harness.ROOT / "demo"
TOLERANCE = 1e-4  # of latents with unit variance, after all steps, in fp32
OWN = ("latents", "previous_x0", "noise", "coefficients", "guidance")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Request:
    """Random inputs of one request. `rewritten` and `plain` hold what each form reads: state, and tables [T, ...]."""

    latents: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    guidance: float
    rewritten: tuple[Arrays, Arrays]
    plain: tuple[Arrays, Arrays]

    def denoise(self, step: Graph, inputs: tuple[Arrays, Arrays]) -> Arrays:
        """All steps, through the sampler of the runtime."""
        state, tables = inputs
        latents = sample(
            step,
            latents=self.latents,
            state=state,
            tables=tables,
            coefficients=self.coefficients,
            guidance=self.guidance,
            noise=lambda index: noise(0, index + 1, self.latents.shape),
        )
        return {"latents": latents}

    def one_step(self, inputs: tuple[Arrays, Arrays]) -> Arrays:
        """The inputs of a step in the middle of the schedule."""
        state, tables = inputs
        index = len(self.coefficients) // 2
        return {
            **state,
            **{name: table[index] for name, table in tables.items()},
            "latents": self.latents,
            "previous_x0": noise(1, 0, self.latents.shape),
            "noise": noise(1, 1, self.latents.shape),
            "coefficients": self.coefficients[index],
            "guidance": np.asarray(self.guidance, np.float32),
        }


def random_input(port: Port, index: int) -> NDArray[np.float32]:
    """Standard normal values of the port's own size; a scale is 1."""
    shape = tuple(dim.opt for dim in port.dims)
    return noise(2, index, shape) if shape else np.ones((), np.float32)


def make_request(bundle: Bundle, load: Callable[[str], Graph]) -> Request:
    """Random request inputs, put through `schedule` and `request` for the rewritten step."""
    solver = bundle.solver()
    ports = [port for port in bundle.graph("step_plain").inputs if port.name not in (*OWN, "timestep")]
    inputs: Arrays = {port.name: random_input(port, index) for index, port in enumerate(ports)}
    taken = {port.name for port in bundle.graph("request").inputs}
    state = load("request")({name: value for name, value in inputs.items() if name in taken})
    tables = load("schedule")({"timesteps": solver.timesteps})
    reads = {port.name for port in bundle.graph("step").inputs}
    return Request(
        latents=random_input(bundle.port("step", "latents"), len(ports)),
        coefficients=np.array(solver.coefficients),  # a copy: PyTorch warns of arrays that it may not write to
        guidance=bundle.guidance,
        rewritten=(
            {name: value for name, value in {**inputs, **state}.items() if name in reads},
            {name: value for name, value in tables.items() if name in reads},
        ),
        plain=(inputs, {"timestep": np.array(solver.timesteps[:, None])}),
    )


def demo_export() -> Any:
    """The module demo/export.py, by path: the build side of the demo. It imports PyTorch."""
    spec = importlib.util.spec_from_file_location("motionrt_demo_export", DEMO / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    """Raise ParityError where the bundle was exported from another checkpoint: parity could only fail, and obscurely."""
    exported = bundle.manifest.get("provenance", {}).get("checkpoint")
    if exported is not None and exported != sha256_of(checkpoint):
        raise harness.ParityError(
            f"bundle {bundle.path} was exported from another checkpoint than {checkpoint}. "
            f"Export it again: `motionrt export {checkpoint} {bundle.path}`."
        )


def eager_step(checkpoint: Path, threads: int) -> Graph | None:
    """The plain module in PyTorch behind the same call; None where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(threads)
    step: Graph = demo_export().eager_step(checkpoint)
    return step


def check_schedule(request: Request, steps: Mapping[str, tuple[Graph, tuple[Arrays, Arrays]]]) -> dict[str, float]:
    """Denoise with every form, and return the largest difference from `plain`; ParityError above the tolerance."""
    results = {name: request.denoise(step, inputs) for name, (step, inputs) in steps.items()}
    errors = {name: harness.difference(result, results["plain"]) for name, result in results.items()}
    for name, error in errors.items():
        if error > TOLERANCE:
            raise harness.ParityError(f"after all steps {name} differs from plain by {error:.3g}; allowed {TOLERANCE:.3g}")
    return errors


def main(arguments: list[str] | None = None) -> None:
    """Check, time, print the ratios and append one row for each candidate."""
    parser = argparse.ArgumentParser(description="The rewritten step against the plain step and PyTorch eager.")
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint.safetensors")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warmups", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)

    bundle = Bundle.open(options.bundle)
    backend = OnnxRuntimeBackend(threads=options.threads)
    request = make_request(bundle, lambda name: backend.load(bundle, name))
    steps = {
        "plain": (backend.load(bundle, "step_plain"), request.plain),
        "rewritten": (backend.load(bundle, "step"), request.rewritten),
    }
    eager = eager_step(options.checkpoint, options.threads)
    if eager is None:
        print("eager: not run: PyTorch is not installed")
    else:
        check_checkpoint(bundle, options.checkpoint)
        steps["eager"] = (eager, request.plain)
    whole = check_schedule(request, steps)

    def candidate(step: Graph, inputs: Arrays) -> harness.Candidate:
        return lambda: step(inputs)

    candidates = {name: candidate(step, request.one_step(inputs)) for name, (step, inputs) in steps.items()}
    result = harness.compare(candidates, reference="plain", tolerance=TOLERANCE, warmups=options.warmups, rounds=options.rounds)
    for name in candidates:
        row = {
            **result.row(name),
            "what": f"{bundle.name} step",
            "shape": list(request.latents.shape),
            "dtype": "float32",
            "threads": options.threads,
            "max_abs_difference_after_all_steps": whole[name],
            "note": options.note,
        }
        if name != "rewritten":
            ratio = result.ratio(name, "rewritten")
            row["over_rewritten"] = [ratio.value, ratio.low, ratio.high]
            print(f"{name} / rewritten: {ratio} (95 % of {options.rounds} rounds resampled)")
        path = harness.append_row("bench_step", row, folder=options.results)
        print("{backend:>10}: p50 {p50_ms:.2f} ms, p95 {p95_ms:.2f} ms, p99 {p99_ms:.2f} ms, n {n}".format(**row))
    print(f"rows appended: {path.name}; after all steps they differ by at most {max(whole.values()):.1e}")


if __name__ == "__main__":
    main()
