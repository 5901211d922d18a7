"""What a chip can do at its best: bytes copied per second, and a large bf16 matrix product. The yardsticks of everything else.

.venv-dev/bin/python benchmarks/gpu/gpu_ceilings.py            # gpu_suite.py runs it first
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from motionrt.benchmarks import harness


def waiting(device: str) -> Callable[[], object] | None:
    """What `harness.clock` waits with on `device`, "cuda" or "cpu"."""
    return torch.cuda.synchronize if device == "cuda" else None


def facts(device: str) -> dict[str, Any]:
    """What a row says of the device that computed."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def main(arguments: list[str] | None = None, *, device: str = "cuda", toy: bool = False) -> None:
    """Copy and multiply, print, append a row for each; `device` and `toy` are for the test of this file."""
    parser = argparse.ArgumentParser(description="Copy bandwidth and bf16 matrix product of this machine's GPU.")
    harness.add_options(parser, rounds=20, warmups=5)
    options = parser.parse_args(arguments)
    if device == "cuda" and not torch.cuda.is_available():
        print("ceilings: not run: no CUDA device")
        return
    size, side = (1 << 20, 64) if toy else (1 << 30, 8192)  # bytes: forty times the largest L2 cache
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # zeros would be faster than any data
    name = str(dtype).removeprefix("torch.")
    work: dict[str, tuple[Callable[[], object], str, float, str]] = {
        "copy": (lambda: target.copy_(source), "gb_per_s", 2 * size / 1e9, "uint8"),
        f"gemm {side}": (lambda: left @ right, "tflop_per_s", 2 * side**3 / 1e12, name),
    }
    for backend, (call, unit, amount, kind) in work.items():
        seconds = harness.clock(call, rounds=options.rounds, warmups=options.warmups, wait=waiting(device))
        row = {
            "what": "ceilings", "backend": backend, **harness.summary(seconds), "warmups": options.warmups, "dtype": kind,
            unit: amount / float(np.median(seconds)), **facts(device), "note": "random data; bytes read and written count",
        }  # fmt: skip
        harness.append_row("gpu_ceilings", row, folder=options.results)
        print(f"{backend}: p50 {row['p50_ms']:.3f} ms, {row[unit]:.1f} {unit}", flush=True)
    if not torch.equal(target, source):
        raise harness.ParityError("the copy is not what was copied")


if __name__ == "__main__":
    main()
