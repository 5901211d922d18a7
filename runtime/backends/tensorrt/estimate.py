"""What building an engine will take, from the size of its ONNX: memory, disk and time. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from motionrt.runtime.dtypes import DTYPES

MIB = 2**20
# Measured by benchmarks/questions/bench_build.py: a builder process holds about 3x its engine above what it starts with, and an
# engine is its weights and some kernels. The time is that of a 610 MB fp16 engine, 10 s on two cores, and of small ones.
START_BYTES, KERNEL_BYTES, MEMORY_PER_ENGINE = 220 * MIB, 6 * MIB, 3.0
START_SECONDS, SECONDS_PER_MIB = 1.0, 0.016


@dataclass(frozen=True)
class Estimate:
    """Bytes that building one engine will take: the engine's size, memory at the peak, disk beside the old engine."""

    engine: int
    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {mib(self.engine)} of engine, {mib(self.memory)} of memory, {mib(self.disk)} of disk while building"

    @property
    def seconds(self) -> float:
        """Of building, roughly: a graph of many different shapes takes longer than one of many equal layers."""
        return START_SECONDS + SECONDS_PER_MIB * self.engine / MIB


def estimate(onnx_bytes: int) -> Estimate:
    """What building from `onnx_bytes` of converted ONNX, weights included, will take."""
    engine = onnx_bytes + KERNEL_BYTES
    return Estimate(engine, START_BYTES + int(MEMORY_PER_ENGINE * engine), engine + onnx_bytes)


def estimate_from_bundle(bundle_bytes: int, dtype: str) -> Estimate:
    """What building a bundle's graph of `bundle_bytes`, float32 weights included, in `dtype` will take."""
    return estimate(bundle_bytes * DTYPES[dtype].bytes // DTYPES["float32"].bytes)


def available_memory() -> int | None:
    """Bytes that this machine could give a new process, or None where that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def mib(count: int) -> str:
    """Bytes in words."""
    return f"{count / MIB:.0f} MiB" if count < 4096 * MIB else f"{count / MIB / 1024:.1f} GiB"
