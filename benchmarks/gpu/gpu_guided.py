"""What guidance costs a step on a GPU: MotionClone's demo, whose guided step has a gradient in it, beside its plain step.

    .venv-dev/bin/python benchmarks/gpu/gpu_guided.py                 # gpu_suite.py runs it too

First the torch programs of both steps in float32 and float16, then TensorRT engines of both in float16 (gpu_engines.py), which
are built here. Each graph is given what a request gives it, checked against ONNX Runtime's float32, and then timed; rows go
to gpu_guided.jsonl and gpu_engines.jsonl. Engines need no PyTorch, and where they cannot be built the reason is said.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from motionrt.benchmarks import harness
from motionrt.benchmarks.gpu import gpu_engines
from motionrt.benchmarks.pipeline import DEMO
from motionrt.runtime.backends.seam import Backend
from motionrt.runtime.bundle.bundle import Bundle

STEPS = ("step_guided", "step_plain")


def both(bundle: Bundle, backend: Backend, inputs: Mapping[str, gpu_engines.Arrays], options: argparse.Namespace) -> None:
    """A row for each of `STEPS` on `backend`; ParityError, before anything is timed, where one is not what it should be."""
    rows = {name: gpu_engines.measure_graph(bundle, name, backend, inputs[name], options) for name in STEPS}
    guided, plain = (_seconds(rows[name]) for name in STEPS)
    for name, row in rows.items():
        row |= {"backend": backend.label, "dtype": options.dtype, "over_plain": 1.0 if name == STEPS[1] else guided / plain}
        harness.append_row("gpu_guided", row, folder=options.results)
        ratio = f"on the device {row['over_plain']:.2f} times the plain one"
        print(f"{backend.label}: {row['what']}: {harness.times(row)}; {ratio}", flush=True)


def _seconds(row: Mapping[str, Any]) -> float:
    """The median of a step, on the device alone where there is one."""
    return float(row.get("resident", row)["p50_ms"])


def main(
    arguments: list[str] | None = None, *, device: str = "cuda", precisions: tuple[str, ...] = ("float32", "float16")
) -> int:
    """Programs, then engines; 1 where an engine failed."""
    from motionrt.runtime.backends.torch_backend import TorchBackend

    parser = argparse.ArgumentParser(description="MotionClone's guided and plain step on this machine's GPU.")
    parser.add_argument("--bundle", type=Path, default=DEMO / "motionclone" / "bundle")
    harness.add_options(parser, rounds=50, warmups=10)
    options = parser.parse_args(arguments)
    inputs, _ = gpu_engines.record(options.bundle)
    for precision in precisions:
        options.dtype = precision
        both(Bundle.open(options.bundle), TorchBackend(device, precision=precision), inputs, options)
    again = ["--results", str(options.results), "--rounds", str(options.rounds), "--warmups", str(options.warmups)]
    return gpu_engines.main([*again, "--bundle", str(options.bundle), "--dtype", "float16", "--graphs", *STEPS])


if __name__ == "__main__":
    raise SystemExit(main())
