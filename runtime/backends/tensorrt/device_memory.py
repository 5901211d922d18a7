"""Memory of one CUDA GPU without PyTorch: arrays with an owner, a pool that allocates once, and one stream.

`Cuda` speaks to the driver (`cuda.bindings`, part of cuda-python): nothing here needs a CUDA toolkit. Whoever runs engines
uses only the methods of `Cuda`, so that a test can put host memory behind them.

Ownership: the memory of a `DeviceArray` goes back to its pool when nobody holds the array or a part of it, and is freed when
the pool is gone too. Nothing writes into an array that someone else holds.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.backends.kinds import ONNXRUNTIME, TENSORRT
from motionrt.runtime.backends.machine import driver_version, find_gpus
from motionrt.runtime.backends.seam import DeviceValue
from motionrt.runtime.errors import BackendError


def load_driver() -> ModuleType:
    """`cuda.bindings.driver`, initialised; `BackendError` without the package, the driver or a GPU."""
    try:
        from cuda.bindings import driver
    except ImportError:
        raise BackendError(f"TensorRT engines need cuda-python: {TENSORRT.install}.") from None
    if isinstance(gpus := find_gpus(), str):
        raise BackendError(
            f"a TensorRT engine needs an NVIDIA GPU: {gpus}. Run it on a machine with a GPU, or use the backend "
            f"{ONNXRUNTIME.name}."
        )
    (status,) = driver.cuInit(0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"the NVIDIA driver does not start ({_named(driver, status)}). Look at nvidia-smi.")
    module: ModuleType = driver
    return module


class Cuda:
    """GPU number `index`: its facts, one stream, allocations, copies and captured graphs.

    Copies are queued on the stream; what they read must live until `synchronize`. Every method but those of the class may
    be called from any thread inside `with cuda.active():`, which also restores the caller's own CUDA context.
    Raises `BackendError` where the driver refuses.
    """

    def __init__(self, index: int = 0, driver: Any = None) -> None:
        self._driver = driver = load_driver() if driver is None else driver
        count = self._call("cuDeviceGetCount")
        if not 0 <= index < count:
            raise BackendError(f"device is cuda:{index}; this machine has {count} GPUs, counted from 0.")
        self._device = self._call("cuDeviceGet", index)
        kind = driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", getattr(kind, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), self._device)
            for part in ("MAJOR", "MINOR")
        )
        self.name: str = self._call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self.target = f"sm_{major}{minor}"
        version = self._call("cuDriverGetVersion")
        self.driver = driver_version() or f"CUDA {version // 1000}.{version % 1000 // 10}"
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)  # the one that TensorRT's runtime uses
        with self.active():
            self._stream = self._call("cuStreamCreate", int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self.lock = threading.RLock()  # one request at a time computes; see runtime/backends/tensorrt/backend.py

    def _call(self, name: str, *arguments: Any) -> Any:
        """A driver function's result, or `BackendError` with its words."""
        status, *results = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            hint = " Free memory on the GPU, or use a smaller bundle." if "MEMORY" in str(status) else ""
            raise BackendError(f"CUDA failed in {name}: {_named(self._driver, status)}.{hint}")
        return results[0] if len(results) == 1 else results or None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this GPU the thread's current one for a block."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes, not cleared."""
        with self.active():
            return int(self._call("cuMemAlloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Give bytes back; what was queued on the stream still uses them first. Never raises: it runs where arrays die."""
        with suppress(BackendError), self.active():
            self._call("cuMemFree", address)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Queue host -> device; `array` is C-contiguous."""
        self._call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Queue device -> host."""
        self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue device -> device."""
        self._call("cuMemcpyDtoDAsync", to, source, size, self._stream)

    def synchronize(self) -> None:
        """Wait for everything queued; `BackendError` where a kernel failed."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, action: Callable[[], object]) -> Callable[[], None]:
        """What `action` queues, as one CUDA graph: the result launches it. Addresses are frozen into it."""
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            action()
        except BaseException:
            self._driver.cuStreamEndCapture(self._stream)  # leaves the stream usable; the reason is in the exception
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        executable = self._call("cuGraphInstantiate", graph, 0)
        self._call("cuGraphDestroy", graph)
        launch = _Launch(self, executable)
        weakref.finalize(launch, self._destroy, executable).atexit = False
        return launch

    def _launch(self, executable: Any) -> None:
        self._call("cuGraphLaunch", executable, self._stream)

    def _destroy(self, executable: Any) -> None:
        with suppress(BackendError), self.active():
            self._call("cuGraphExecDestroy", executable)


class _Launch:
    """A captured graph; destroyed with the last reference to it."""

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self._executable = cuda, executable

    def __call__(self) -> None:
        self._cuda._launch(self._executable)


class Allocation:
    """`size` bytes at `address`, freed with the last reference."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = size
        self.address = cuda.allocate(size)
        weakref.finalize(self, cuda.free, self.address).atexit = False  # at exit the driver frees everything


Key = tuple[str, tuple[int, ...], str]  # name, shape and dtype: one without the others has mixed up buffers elsewhere


class Pool:
    """Allocations that are made once per (name, shape, dtype) and used again."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.allocated = 0  # how often the device was asked
        self._free: dict[Key, list[Allocation]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """An array whose memory nobody else holds; its contents are those of whoever had it before."""
        key = (name, tuple(shape), dtype)
        free = self._free.setdefault(key, [])
        if not free:
            free.append(Allocation(self.cuda, math.prod(shape) * np.dtype(dtype).itemsize))
            self.allocated += 1
        allocation = free.pop()
        array = DeviceArray(self.cuda, allocation.address, tuple(shape), np.dtype(dtype))
        weakref.finalize(array, free.append, allocation).atexit = False
        return array


@dataclass(frozen=True, eq=False)
class DeviceArray(DeviceValue):
    """A contiguous array on the GPU `device`, or a part of the array `whole`, which it keeps alive."""

    device: Cuda
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    whole: DeviceArray | None = None

    @property
    def nbytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> DeviceArray:
        """See `DeviceValue`; nothing is copied."""
        if isinstance(index, tuple) and index == (slice(None), None):
            return self._view(0, (self.shape[0], 1, *self.shape[1:]))
        row = self.nbytes // max(len(self), 1)
        if isinstance(index, slice):
            start, stop, stride = index.indices(len(self))
            if stride == 1:
                return self._view(start * row, (max(stop - start, 0), *self.shape[1:]))
        elif isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of an array with {len(self)} rows")
            return self._view(int(index) % len(self) * row, self.shape[1:])
        raise TypeError(f"a device array takes a row number, a slice of rows or [:, None], not {index!r}")

    def _view(self, offset: int, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self.device, self.address + offset, shape, self.dtype, self)

    def to_host(self) -> NDArray[Any]:
        """See `DeviceValue`."""
        host = np.empty(self.shape, self.dtype)
        with self.device.lock, self.device.active():
            self.device.download(host, self.address)
            self.device.synchronize()
        return host


def _named(driver: Any, status: Any) -> str:
    _, text = driver.cuGetErrorString(status)
    name = str(getattr(status, "name", status)).removeprefix("CUDA_ERROR_")
    return f"{name}: {text.decode() if isinstance(text, bytes) else text}"
