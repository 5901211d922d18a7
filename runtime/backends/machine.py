"""The processor and the GPUs of this machine; these told by the NVIDIA driver itself: no package, no toolkit, no nvidia-smi.
And how many cores this process may use.

Source of the calls and constants: CUDA driver API reference (cuDeviceGetAttribute: compute capability 75 and 76).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from motionrt.runtime.errors import BackendWarning, InputError, shown

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


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use, 1 or more: those of the machine that its affinity allows, and no more than the CPU quota
    of its control group (version 1 or 2) or of one above it pays for, rounded up. `root` is for tests.

    A container with a quota sees every core of its host: a thread for each of them would be paused most of the time, and
    the others would wait for it.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups, found = root / "sys/fs/cgroup", [float(cores)]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return cores
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        top = groups if number == "0" else groups / "cpu"
        own = top / name.lstrip("/")  # which a container may not see: then what it sees as the top is its own
        for folder in (own, *(parent for parent in own.parents if parent.is_relative_to(top))):
            files = ("cpu.max",) if number == "0" else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number: no quota
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                found.append(int(quota) / int(period) if int(quota) > 0 else cores)
    return max(1, math.ceil(min(found)))


def check_threads(threads: int | None) -> int | None:
    """`threads`, but no more than `usable_cores`: more only wait for each other, and take many times as long (64 threads on 2
    cores: 6 times). Where fewer than asked for are taken, a `BackendWarning` says so.

    None, for every core, stays None where that is what a library finds itself. Raises `InputError`.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {shown(threads)}; it must be 1 or more, or None for every core.")
    cores = usable_cores()
    if threads is None:
        return None if cores == os.cpu_count() else cores
    if threads > cores:
        text = f"threads is {shown(threads)}, and this process may use {cores} of the machine's cores: as many are taken."
        warnings.warn(text, BackendWarning, stacklevel=3)
    return min(threads, cores)


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
