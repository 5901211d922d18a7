"""What a GPU does: the motion-cross-attention kernels, then the demo's plain step in PyTorch eager, host arrays in and out.

    .venv-dev/bin/python benchmarks/gpu_suite.py
    .venv-dev/bin/python benchmarks/gpu_suite.py --engines          # TensorRT engines instead (gpu_engines.py)

Of the step this is a first small version: the demo's is tiny, so it measures launches and copies rather than the device's
peak. It exists so that every machine with a GPU writes rows in one form, for kernels and engines to be compared with later.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bench_step
import harness
from motionrt.runtime.backend import Graph, OnnxRuntimeBackend
from motionrt.runtime.bundle import Bundle

TOLERANCE = 1e-3  # one step in fp32 on two devices, TF32 off


def missing_gpu() -> str | None:
    """Why nothing can run here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def kernel_stages(options: argparse.Namespace) -> None:
    """The motion-cross-attention kernels: parity on the chip, then times (gpu_kernel.py); rows of their own file."""
    import gpu_kernel  # imports torch

    gpu_kernel.main(["--results", str(options.results), "--rounds", str(options.rounds), "--warmups", str(options.warmups)])


def engine_stages(options: argparse.Namespace) -> int:
    """TensorRT engines of the demo (gpu_engines.py), which needs no PyTorch to run; rows of their own file."""
    import gpu_engines

    common = ["--bundle", str(options.bundle), "--results", str(options.results), "--rounds", str(options.rounds)]
    common += ["--warmups", str(options.warmups)]
    return gpu_engines.main([*common, "--flavor", options.flavor, "--dtype", options.dtype])


def main(arguments: list[str] | None = None) -> None:
    """Check the GPU's step against the CPU's plain graph, time both, append rows."""
    parser = argparse.ArgumentParser(description="The plain demo step in PyTorch on the GPU.")
    parser.add_argument("--bundle", type=Path, default=bench_step.DEMO / "bundle")
    parser.add_argument("--checkpoint", type=Path, default=bench_step.DEMO / "checkpoint.safetensors")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for rows")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warmups", type=int, default=10)
    parser.add_argument("--step-budget", type=float, default=1500.0, help="seconds for the full-size step; 0 skips it")
    parser.add_argument("--engines", action="store_true", help="build, load, check and time engines; nothing else")
    parser.add_argument("--flavor", default="rtx", help="of the engines: rtx or tensorrt")
    parser.add_argument("--dtype", default="float16", help="of the engines: float16, bfloat16 or float32")
    parser.add_argument("--step-stages", nargs="+", default=[], help="of gpu_step.py; all if not given")
    options = parser.parse_args(arguments)

    if options.engines:
        raise SystemExit(engine_stages(options))
    reason = missing_gpu()
    if reason is not None:
        print(f"not run: {reason}")
        return
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    kernel_stages(options)
    bundle = Bundle.open(options.bundle)
    backend = OnnxRuntimeBackend(threads=1)
    request = bench_step.make_request(bundle, lambda name: backend.load(bundle, name))
    bench_step.check_checkpoint(bundle, options.checkpoint)
    build = bench_step.demo_export()
    module = build.step_module(options.checkpoint).to("cuda")

    def eager(arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Host arrays to the device, one step, and back: `.cpu()` waits for the device."""
        with torch.no_grad():
            results = module(**{name: torch.as_tensor(arrays[name]).to("cuda") for name in build.INPUTS})
        return {name: value.cpu().numpy() for name, value in zip(build.STEP_OUTPUTS, results, strict=True)}

    inputs = request.one_step(request.plain)

    def candidate(step: Graph) -> harness.Candidate:
        return lambda: step(inputs)

    candidates = {"cpu_plain": candidate(backend.load(bundle, "step_plain")), "cuda_eager": candidate(eager)}
    result = harness.compare(
        candidates, reference="cpu_plain", tolerance=TOLERANCE, warmups=options.warmups, rounds=options.rounds
    )
    for name in candidates:
        row = {
            **result.row(name),
            "what": f"{bundle.name} step, host to host",
            "shape": list(request.latents.shape),
            "dtype": "float32",
            "device": torch.cuda.get_device_name() if name == "cuda_eager" else "cpu",
            "cuda": torch.version.cuda,
            "peak_bytes": torch.cuda.max_memory_allocated() if name == "cuda_eager" else None,
        }
        path = harness.append_row("gpu_suite", row, folder=options.results)
        print("{backend:>10}: p50 {p50_ms:.3f} ms, p95 {p95_ms:.3f} ms, p99 {p99_ms:.3f} ms, n {n}".format(**row))
    print(f"rows appended: {path.name}; largest difference {max(result.errors.values()):.1e}")
    step_stages(options)


def step_stages(options: argparse.Namespace) -> None:
    """The full-size CogVideoX step, stage by stage (gpu_step.py), then its profile; rows of their own files."""
    if options.step_budget <= 0:
        print("full-size step: not run: --step-budget is 0")
        return
    import gpu_step  # imports torch
    import profile_step

    common = ["--results", str(options.results)]
    stages = ["--stages", *options.step_stages] if options.step_stages else []
    gpu_step.main([*common, "--budget", str(options.step_budget), *stages])
    if not options.step_stages:
        profile_step.main([*common, "--device", "cuda", "--size", "full"])


if __name__ == "__main__":
    main()
