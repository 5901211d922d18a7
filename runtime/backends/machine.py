"""The processor and the GPUs of this machine; these told by the NVIDIA driver itself: no package, no toolkit, no nvidia-smi.

Source of the calls and constants: CUDA driver API reference (cuDeviceGetAttribute: compute capability 75 and 76).
"""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU. `target`: "sm_89"; `memory`: bytes; `driver`: its version; `cuda`: the newest CUDA that the driver knows."""

    name: str
    target: str
    memory: int
    driver: str
    cuda: str


def find_gpus(library: ctypes.CDLL | None = None) -> list[Gpu] | str:
    """The GPUs, or why there is none. `library` is for tests."""
    if library is None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError:
            return f"no NVIDIA driver ({_LIBRARY} is not there)"
    number, text, size = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()

    def ask(name: str, *arguments: object) -> bool:
        return int(getattr(library, name)(*arguments)) == 0

    if not ask("cuInit", 0):
        return "the NVIDIA driver is installed but finds no GPU that it can use"
    if not ask("cuDeviceGetCount", ctypes.byref(number)) or number.value == 0:
        return "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES set?)"
    count = number.value
    version = number.value if ask("cuDriverGetVersion", ctypes.byref(number)) else 0
    cuda = f"{version // 1000}.{version % 1000 // 10}" if version else "unknown"
    gpus = []
    for index in range(count):
        device = ctypes.c_int()
        capability = []
        if not ask("cuDeviceGet", ctypes.byref(device), index):
            return f"the NVIDIA driver does not give GPU {index}"
        for attribute in (_MAJOR, _MINOR):
            ask("cuDeviceGetAttribute", ctypes.byref(number), attribute, device)
            capability.append(number.value)
        ask("cuDeviceGetName", text, len(text), device)
        ask("cuDeviceTotalMem_v2", ctypes.byref(size), device)
        target = f"sm_{capability[0]}{capability[1]}"
        gpus.append(Gpu(text.value.decode(errors="replace"), target, size.value, driver_version() or "unknown", cuda))
    return gpus


def driver_version() -> str | None:
    """The NVIDIA driver's version, such as "580.65.06", as the kernel module tells it; None where it does not."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def processor() -> str:
    """The processor's name, where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
