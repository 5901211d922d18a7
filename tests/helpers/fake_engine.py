"""A GPU and a TensorRT that are not there: the calls of `cuda.bindings.driver` and of `tensorrt` over host memory.

What is asked of the real ones is checked: nothing is computed before the stream is synchronised (a copy that reads host memory
which has died gives nonsense, as it may on a GPU), an address must lie inside one live allocation, a call that needs a
context must have one, scratch memory must be there and belong to one graph at a time. New and freed memory is 0xFF, which is
NaN. Engines compute with ONNX Runtime what the bundle's graph computes.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import motionrt
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.tensorrt.engine_file import EngineFile, EnginePort, Span, engine_folder
from motionrt.runtime.bundle.bundle import Bundle
from motionrt.runtime.bundle.manifest import GraphSpec
from motionrt.runtime.files import sha256_of

VERSION = "1.7.1.116"
SCRATCH = 4096  # bytes that an engine asks for, times the length of its graph's name


class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


OK = CUresult.CUDA_SUCCESS


class FakeDriver:
    """The driver; `capability` of its GPUs, `limit` bytes, and what was called, for tests to count."""

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, capability: tuple[int, int] = (8, 9), devices: int = 1, limit: int = 1 << 30) -> None:
        self.capability, self.devices, self.limit = capability, devices, limit
        self.live: dict[int, Any] = {}
        self.queue: list[Callable[[], object]] = []
        self.capturing: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.calls: dict[str, int] = {}
        self.moved = {"up": 0, "down": 0}  # bytes over the bus
        self.fails: set[str] = set()
        self.current = threading.local()

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "current":
            return found

        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name in self.fails:
                return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, None)
            if name.startswith(("cuMem", "cuStream", "cuGraph")):
                assert getattr(self.current, "depth", 0) > 0, f"{name} without a current context"
            return found(*arguments)

        return call

    def cuGetErrorString(self, status: CUresult) -> Any:
        return OK, status.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode()

    def cuDeviceGetCount(self) -> Any:
        return OK, self.devices

    def cuDeviceGet(self, index: int) -> Any:
        return OK, index

    def cuDeviceGetAttribute(self, kind: str, device: int) -> Any:
        return OK, self.capability[kind == "minor"]

    def cuDeviceGetName(self, length: int, device: int) -> Any:
        return OK, b"Fake GPU" + bytes(length - 8)

    def cuDriverGetVersion(self) -> Any:
        return OK, 13020

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return OK, "context"

    def cuCtxPushCurrent(self, context: str) -> Any:
        self.current.depth = getattr(self.current, "depth", 0) + 1
        return (OK,)

    def cuCtxPopCurrent(self) -> Any:
        self.current.depth -= 1
        return OK, "context"

    def cuStreamCreate(self, flags: int) -> Any:
        return OK, 77

    def used(self) -> int:
        return sum(len(buffer) for buffer in self.live.values())

    def cuMemAlloc(self, size: int) -> Any:
        if self.used() + size > self.limit:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        assert self.capturing is None, "memory was asked for during a capture"
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, 0xFF, size)
        self.live[ctypes.addressof(buffer)] = buffer
        return OK, ctypes.addressof(buffer)

    def cuMemFree(self, address: int) -> Any:
        self._drain()
        buffer = self.live.pop(address)
        ctypes.memset(buffer, 0xFF, len(buffer))
        return (OK,)

    def check(self, address: int, size: int) -> int:
        """`address`, if `size` bytes from there lie in one live allocation."""
        assert any(start <= address and address + size <= start + len(b) for start, b in self.live.items()), "a stray address"
        return address

    def enqueue(self, action: Callable[[], object]) -> None:
        (self.queue if self.capturing is None else self.capturing).append(action)

    def _drain(self) -> None:
        queue, self.queue = self.queue, []
        for action in queue:
            action()

    def cuMemcpyHtoDAsync(self, to: int, host: int, size: int, stream: int) -> Any:
        assert stream == 77
        self.moved["up"] += size
        self.enqueue(lambda: ctypes.memmove(self.check(to, size), host, size))
        return (OK,)

    def cuMemcpyDtoHAsync(self, host: int, source: int, size: int, stream: int) -> Any:
        assert stream == 77
        self.moved["down"] += size
        self.enqueue(lambda: ctypes.memmove(host, self.check(source, size), size))
        return (OK,)

    def cuMemcpyDtoDAsync(self, to: int, source: int, size: int, stream: int) -> Any:
        assert stream == 77
        self.enqueue(lambda: ctypes.memmove(self.check(to, size), self.check(source, size), size))
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> Any:
        assert self.capturing is None, "synchronised during a capture"
        self._drain()
        return (OK,)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> Any:
        self.capturing = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> Any:
        graph, self.capturing = self.capturing, None
        return OK, graph

    def cuGraphInstantiate(self, graph: list[Callable[[], object]], flags: int) -> Any:
        self.graphs[len(self.graphs) + 1] = graph
        return OK, len(self.graphs)

    def cuGraphDestroy(self, graph: Any) -> Any:
        return (OK,)

    def cuGraphExecDestroy(self, executable: int) -> Any:
        self._drain()
        self.graphs[executable] = [lambda: pytest_fail("a destroyed CUDA graph was launched")]
        return (OK,)

    def cuGraphLaunch(self, executable: int, stream: int) -> Any:
        self.queue.extend(self.graphs[executable])
        return (OK,)


def pytest_fail(text: str) -> None:
    raise AssertionError(text)


class _Enum(enum.Enum):
    INPUT = "input"
    OUTPUT = "output"


class FakeTensorRT:
    """The module `tensorrt` or `tensorrt_rtx`; `fails` names calls that return False or None, `says` what the log gets."""

    TensorIOMode = _Enum
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours", STATIC="static")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, message: str) -> None:
            raise NotImplementedError

    def __init__(self, driver: FakeDriver, version: str = VERSION) -> None:
        self.driver, self.__version__ = driver, version
        self.fails: set[str] = set()
        self.says = "the reason"
        self.contexts: list[FakeContext] = []
        self.configs: list[SimpleNamespace] = []
        self.logger: Any = None
        self.ports: Callable[[GraphSpec], Mapping[str, tuple[_Enum, str]]] = real_ports
        self.deserialized = 0

    def failing(self, name: str) -> bool:
        if name in self.fails:
            self.logger.log(self.ILogger.ERROR, f"{self.says}\nin {name}")
            return True
        return False

    def Runtime(self, logger: Any) -> Any:
        self.logger = logger

        def deserialize(data: bytes) -> FakeEngine | None:
            self.deserialized += 1
            return None if self.failing("deserialize_cuda_engine") else FakeEngine(self, **json.loads(data))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def real_ports(spec: GraphSpec) -> Mapping[str, tuple[_Enum, str]]:
    names = {"float32": "FLOAT", "int64": "INT64", "uint8": "UINT8"}
    ports = {port.name: (_Enum.INPUT, names[port.dtype]) for port in spec.inputs}
    return ports | {port.name: (_Enum.OUTPUT, names[port.dtype]) for port in spec.outputs}


class FakeEngine:
    """An engine; what it computes is the ONNX graph that its bytes name."""

    def __init__(self, library: FakeTensorRT, bundle: str, graph: str) -> None:
        opened = Bundle.open(bundle)
        self.library, self.spec = library, opened.graph(graph)
        self.compute = OnnxRuntimeBackend(1).load(opened, graph)
        self.tensors = library.ports(self.spec)
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> _Enum:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][1])

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH * len(self.spec.name)

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(cuda_graph_strategy="disabled", cache=None, strategy="static")

        def set_cache(cache: Any) -> bool:
            config.cache = cache
            return True

        config.create_runtime_cache = lambda: FakeCache(self.library)
        config.set_runtime_cache = set_cache
        config.set_execution_context_allocation_strategy = lambda value: setattr(config, "strategy", value)
        self.library.configs.append(config)
        return config

    def create_execution_context(self, how: Any) -> FakeContext | None:
        if self.library.failing("create_execution_context"):
            return None
        assert how == "ours" or how.strategy == "ours", "the context would allocate its own scratch memory"
        self.library.contexts.append(FakeContext(self))
        return self.library.contexts[-1]


class FakeCache:
    """A runtime cache that holds one word, and refuses what it does not know."""

    def __init__(self, library: FakeTensorRT) -> None:
        self.library, self.content = library, b""

    def deserialize(self, data: bytes) -> bool:
        if data != b"compiled":
            return False
        self.content = data
        return True

    def serialize(self) -> bytes:
        self.content = b"compiled"
        return self.content


class FakeContext:
    """An execution context: shapes, addresses and scratch memory as they were told, at the time of the launch."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.library, self.driver = engine, engine.library, engine.library.driver
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.profile = 0
        self.executed = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return not self.library.failing("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.shapes[name] = tuple(shape)
        return not self.library.failing("set_input_shape")

    def infer_shapes(self) -> list[str]:
        if self.library.failing("infer_shapes"):
            return [self.engine.spec.inputs[0].name]
        sizes = {d.name: s for p in self.engine.spec.inputs for d, s in zip(p.dims, self.shapes[p.name], strict=True)}
        for port in self.engine.spec.outputs:
            self.shapes[port.name] = tuple(_size(dim, sizes) for dim in port.dims)
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1,) if "get_tensor_shape" in self.library.fails else self.shapes[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return not self.library.failing("set_tensor_address")

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 16 == 0 and size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        if self.library.failing("execute_async_v3"):
            return False
        addresses, (scratch, size), driver, spec = dict(self.addresses), self.scratch, self.driver, self.engine.spec

        def compute() -> None:
            self.executed += 1
            ctypes.memset(driver.check(scratch, size), 0xEE, size)
            inputs = {port.name: self._array(addresses[port.name], port.name, port.dtype) for port in spec.inputs}
            for name, value in self.engine.compute(inputs).items():
                assert value.shape == self.shapes[name], f"{name} is {value.shape}, announced {self.shapes[name]}"
                ctypes.memmove(driver.check(addresses[name], value.nbytes), value.ctypes.data, value.nbytes)

        driver.enqueue(compute)
        return True

    def _array(self, address: int, name: str, dtype: str) -> Any:
        value = np.empty(self.shapes[name], dtype)
        ctypes.memmove(value.ctypes.data, self.driver.check(address, value.nbytes), value.nbytes)
        return value


def _size(dim: Any, sizes: Mapping[str, int]) -> int:
    if dim.min == dim.max:
        return int(dim.min)
    if dim.name in sizes:
        return sizes[dim.name]
    factor, _, name = dim.name.rpartition("*")
    return int(factor or 1) * sizes[name]


def write_engine(
    bundle: Path,
    graph: str,
    flavor: str = "rtx",
    targets: Sequence[str] = ("sm_89", "sm_120"),
    dtype: str = "float16",
    profiles: Sequence[Mapping[str, tuple[int, int, int]]] | None = None,
    **changes: Any,
) -> EngineFile:
    """Write a fake engine and its sidecar. `profiles`: sizes of named dimensions; else the declared ranges in one profile."""
    spec = Bundle.open(bundle).graph(graph)
    folder = engine_folder(bundle, flavor, targets, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{graph}-0123456789ab.engine"
    file.write_text(json.dumps({"bundle": str(bundle), "graph": graph}))

    def span(port: Any, sizes: Mapping[str, tuple[int, int, int]]) -> Span:
        sides = [sizes.get(dim.name, (dim.min, dim.opt, dim.max)) for dim in port.dims]
        return Span(*(tuple(side[index] for side in sides) for index in range(3)))

    def port(declared: Any) -> EnginePort:
        return EnginePort(declared.name, declared.dtype, tuple(d.min if d.min == d.max else -1 for d in declared.dims))

    facts: dict[str, Any] = {
        "file": file.name,
        "flavor": flavor,
        "library": VERSION,
        "motionrt": motionrt.__version__,
        "graph": graph,
        "targets": tuple(targets),
        "dtype": dtype,
        "onnx_sha256": spec.sha256,
        "weights_sha256": spec.weights_sha256,
        "built_from_sha256": "0" * 64,
        "recipe_sha256": "0" * 64,
        "profiles": tuple({p.name: span(p, sizes) for p in spec.inputs} for sizes in (profiles or [{}])),
        "inputs": tuple(port(p) for p in spec.inputs),
        "outputs": tuple(port(p) for p in spec.outputs),
        "kernel": "body",
        "attentions": 0,
        "engine_sha256": sha256_of(file),
        "engine_bytes": file.stat().st_size,
        "build_seconds": 1.0,
        "peak_rss_mib": 100.0,
    }
    sidecar = EngineFile(folder=folder, **{**facts, **changes})
    (folder / f"{graph}.json").write_text(sidecar.to_json())
    return sidecar
