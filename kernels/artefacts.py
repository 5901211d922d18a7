"""What is known of a kernel that was compiled for a GPU that is not here, and how it is written. Needs Triton and no GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from motionrt.kernels.tiles import SHARED_LIMIT

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The oldest PTX that knows the target: a driver loads PTX no newer than itself (8.0: CUDA 12.0; 8.6: 12.7; 8.7: 12.8).
# Triton refuses or crashes below these; the cubin beside it needs no PTX at all.
PTX_VERSION = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 120: 87}


@dataclass(frozen=True)
class Report:
    """One compiled kernel: bytes of shared memory per program, registers per thread, bytes spilled per thread."""

    name: str
    target: int
    registers: int
    shared: int
    spills: int
    warps: int
    ptx_version: str
    entry: str

    @property
    def faults(self) -> list[str]:
        """Why it must not be shipped; empty where it may."""
        limit = SHARED_LIMIT[self.target]
        faults = [f"{self.spills} bytes of registers spilled; allowed: 0"] if self.spills else []
        return faults + ([f"{self.shared} bytes of shared memory; sm_{self.target} has {limit}"] if self.shared > limit else [])


def ptx_for(target: int, ptx_version: int | None = None) -> int:
    """The version of PTX for `target` (90): `ptx_version`, or the oldest that knows it. ValueError for a target that no kernel
    has a tile for, or PTX that is too old for it."""
    if target not in PTX_VERSION:
        raise ValueError(f"the kernel is asked for sm_{target}; allowed: {', '.join(f'sm_{known}' for known in PTX_VERSION)}.")
    version = PTX_VERSION[target] if ptx_version is None else ptx_version
    if version < PTX_VERSION[target]:  # said here: Triton would abort the process
        raise ValueError(f"ptx_version is {version}; sm_{target} needs {PTX_VERSION[target]} or newer (a newer driver).")
    return version


def reported(name: str, target: int, warps: int, compiled: Any) -> tuple[Report, str, bytes]:
    """(report, PTX, cubin) of a compiled kernel of Triton."""
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    version = re.search(r"\.version (\S+)", ptx)
    registers, spills = _resources(cubin)
    shared, entry = int(compiled.metadata.shared), compiled.metadata.name
    return Report(name, target, registers, shared, spills, warps, version[1] if version else "?", entry), ptx, cubin


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread, as the cubin itself declares them; cuobjdump comes with Triton.

    These kernels have no arrays, so whatever is on the stack is a spilled register.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    return int(used[0]), int(used[1]) + int(used[2])


def write(folder: Path, report: Report, ptx: str, cubin: bytes) -> None:
    """PTX, cubin and facts, each written beside its place and renamed into it."""
    facts = json.dumps({**dataclasses.asdict(report), "triton": triton.__version__}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("ptx", ptx.encode()), ("cubin", cubin), ("json", facts.encode())):
        partial = folder / f"{report.name}.{suffix}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / f"{report.name}.{suffix}")
