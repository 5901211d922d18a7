"""The demo's step on a GPU, in the torch backend and in ONNX Runtime's CUDA provider: stages of gpu_suite.py.

The demo is tiny, so its step measures launches and copies rather than the device's peak; but it has real weights, and each
result is checked against ONNX Runtime on the CPU. Rows go to gpu_demo.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from motionrt.benchmarks import harness
from motionrt.benchmarks.pipeline import DEMO, open_pipeline, step_request
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.seam import Graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.dtypes import DTYPES, WEIGHTS
from motionrt.runtime.errors import MotionRTError

TOLERANCE = 1e-3  # one step in fp32 on two devices, TF32 off; of a lower precision, 16 of its epsilons


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=DEMO / "bundle")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warmups", type=int, default=10)
    return parser.parse_args(arguments)


def onnxruntime_step(arguments: list[str], *, device: str) -> None:
    """The rewritten step in ONNX Runtime's CUDA provider, or why not: it is not there, or not all of the graph runs on it."""
    options = options_of(arguments)
    bundle = Bundle.open(options.bundle)
    try:
        graph = OnnxRuntimeBackend(device=device).load(bundle, "step")
    except MotionRTError as error:
        print(f"onnxruntime: not run: {error}")
        return
    _against_cpu(options, f"onnxruntime_{device}", graph, device)


def programs(arguments: list[str], *, device: str) -> None:
    """The bundle's torch program of the step in each precision, as `--backend torch` runs it: on CUDA with the kernel in it."""
    from motionrt.runtime.backends.torch_backend import TorchBackend

    options = options_of(arguments)
    for precision in WEIGHTS:
        graph = TorchBackend(device, precision=precision).load(Bundle.open(options.bundle), "step")
        _against_cpu(options, f"torch_{device}", graph, device, precision)


def _against_cpu(options: argparse.Namespace, backend: str, call: Graph, device: str, precision: str = "float32") -> None:
    """Check `call`, which computes in `precision`, against the bundle's step on the CPU in float32, time both in turns, append
    both rows."""
    pipeline = open_pipeline(options.bundle, threads=1)
    request, bundle = step_request(pipeline), pipeline.bundle
    inputs, on_cpu = request.one_step(plain=False), pipeline.graph("step")
    candidates: dict[str, harness.Candidate] = {"cpu": lambda: on_cpu(inputs), backend: lambda: call(inputs)}
    tolerance = harness.allowance(max(TOLERANCE, 16 * DTYPES[precision].epsilon), on_cpu(inputs))
    result = harness.compare(candidates, reference="cpu", tolerance=tolerance, warmups=options.warmups, rounds=options.rounds)
    for name in candidates:
        row = {
            **result.row(name), "what": f"{bundle.name} step, host to host", "shape": request.shape,
            "dtype": precision if name == backend else "float32", "device": device if name == backend else "cpu",
        }  # fmt: skip
        harness.append_row("gpu_demo", row, folder=options.results)
        print(f"{row['backend']:>10}: {harness.times(row)}")
