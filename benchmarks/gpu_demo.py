"""The demo on a GPU: its plain step in PyTorch and in ONNX Runtime's CUDA provider, and steps of training, for gpu_suite.py.

The demo is tiny, so its step measures launches and copies rather than the device's peak; but it has real weights, and each
result is checked against ONNX Runtime on the CPU. Rows go to gpu_demo.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_step
import harness
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.seam import Graph
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.by_path import load_by_path
from motionrt.runtime.dtypes import DTYPES, WEIGHTS
from motionrt.runtime.errors import MotionRTError

TOLERANCE = 1e-3  # one step in fp32 on two devices, TF32 off; of a lower precision, 16 of its epsilons
BATCH = 8


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=bench_step.DEMO / "bundle")
    parser.add_argument("--checkpoint", type=Path, default=bench_step.DEMO / "checkpoint.safetensors")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warmups", type=int, default=10)
    return parser.parse_args(arguments)


def step(arguments: list[str], *, device: str) -> None:
    """The plain module in PyTorch eager on `device`, host arrays in and out, in turns with ONNX Runtime on the CPU."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    options = options_of(arguments)
    build = load_by_path(bench_step.DEMO / "export.py")
    module = build.step_module(options.checkpoint).to(device)

    def eager(arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Host arrays to the device, one step, and back: `.cpu()` waits for the device."""
        with torch.no_grad():
            results = module(**{name: torch.as_tensor(arrays[name]).to(device) for name in build.INPUTS})
        return {name: value.cpu().numpy() for name, value in zip(build.STEP_OUTPUTS, results, strict=True)}

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    _against_cpu(options, f"{device}_eager", eager, "step_plain", name)


def onnxruntime_step(arguments: list[str], *, device: str) -> None:
    """The rewritten step in ONNX Runtime's CUDA provider, or why not: it is not there, or not all of the graph runs on it."""
    options = options_of(arguments)
    bundle = Bundle.open(options.bundle)
    try:
        graph = OnnxRuntimeBackend(device=device).load(bundle, "step")
    except MotionRTError as error:
        print(f"onnxruntime: not run: {error}")
        return
    _against_cpu(options, f"onnxruntime_{device}", graph, "step", device)


def programs(arguments: list[str], *, device: str) -> None:
    """The bundle's torch program of the step in each precision, as `--backend torch` runs it: on CUDA with the kernel in it."""
    from motionrt.runtime.backends.torch_backend import TorchBackend

    options = options_of(arguments)
    for precision in WEIGHTS:
        graph = TorchBackend(device, precision=precision).load(Bundle.open(options.bundle), "step")
        _against_cpu(options, f"torch_{device}", graph, "step", device, precision)


def _against_cpu(
    options: argparse.Namespace, backend: str, call: Graph, form: str, device: str, precision: str = "float32"
) -> None:
    """Check `call`, which computes in `precision`, against the bundle's graph `form` on the CPU in float32, time both in turns,
    append both rows."""
    bundle = Bundle.open(options.bundle)
    here = OnnxRuntimeBackend(threads=1)
    request = bench_step.make_request(bundle, lambda name: here.load(bundle, name))
    bench_step.check_checkpoint(bundle, options.checkpoint)
    inputs = request.one_step(request.plain if form == "step_plain" else request.rewritten)
    on_cpu = here.load(bundle, form)
    candidates: dict[str, harness.Candidate] = {"cpu": lambda: on_cpu(inputs), backend: lambda: call(inputs)}
    tolerance = harness.allowance(max(TOLERANCE, 16 * DTYPES[precision].epsilon), on_cpu(inputs))
    result = harness.compare(
        candidates, reference="cpu", tolerance=tolerance, warmups=options.warmups, rounds=options.rounds
    )  # fmt: skip
    for name in candidates:
        row = {
            **result.row(name), "what": f"{bundle.name} {form}, host to host", "shape": list(request.latents.shape),
            "dtype": precision if name == backend else "float32", "device": device if name == backend else "cpu",
        }  # fmt: skip
        harness.append_row("gpu_demo", row, folder=options.results)
        print(f"{row['backend']:>10}: {harness.times(row)}")


def train(arguments: list[str], *, device: str) -> None:
    """Seconds of a training step of the demo's denoiser: forward, backward, AdamW, on random data, as large as the recipe's.

    The recipe itself (demo/train.py) is written for a CPU and is not run here; this says what a GPU would make of its
    longest stage. The loss must fall: steps that do not learn would be timed for nothing.
    """
    import torch

    from gpu_ceilings import clock, facts

    options = options_of(arguments)
    build = load_by_path(bench_step.DEMO / "export.py")
    module = build.step_module(options.checkpoint).to(device).train()
    feed = {name: value.to(device) for name, value in build.step_feed(BATCH).items()}
    goal = torch.randn_like(feed["latents"])
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses: list[float] = []

    def advance() -> None:
        loss = (module(**feed)[1] - goal).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))

    seconds = clock(advance, device, rounds=options.rounds, warmups=options.warmups)
    if not losses[-1] < losses[0]:
        raise harness.ParityError(f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g} in {len(losses)} steps")
    row = {
        "what": f"demo denoiser, one training step, batch {BATCH}", "backend": f"{device}_eager", **harness.summary(seconds),
        "warmups": options.warmups, "dtype": "float32", **facts(device), "loss": [losses[0], losses[-1]],
        "note": "random data, guidance in the loss",
    }  # fmt: skip
    harness.append_row("gpu_demo", row, folder=options.results)
    print("{what}: p50 {p50_ms:.2f} ms, n {n}".format(**row))
