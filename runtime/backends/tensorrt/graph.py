"""One TensorRT engine behind the seam: contexts, buffers, CUDA graphs. backend.py finds and loads engines.

- A graph has, for each set of input shapes, one execution context with buffers of its own, kept from request to request. Its
  scratch memory is shared by all graphs of a backend (`Arena`): they run one after another, under one lock, on one stream.
- Results are copied out of those buffers and belong to the caller, who may keep as many as memory holds: what a
  request computed stays on the GPU for all of its steps, and requests that take turns never see each other's.
- A step is one launch: full TensorRT is captured here as a CUDA graph, TensorRT-RTX captures itself when it is told to.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from motionrt.runtime.backends.seam import Array, Checked, Executor
from motionrt.runtime.backends.tensorrt.device_memory import Allocation, Cuda, DeviceArray, Pool
from motionrt.runtime.backends.tensorrt.engine_file import EngineFile
from motionrt.runtime.backends.tensorrt.library import Library
from motionrt.runtime.backends.tensorrt.runtime_cache import RuntimeCache
from motionrt.runtime.bundle.bundle import GraphSpec, Port
from motionrt.runtime.dtypes import DTYPES
from motionrt.runtime.errors import BackendError, BackendWarning, InputError

_MAX_SHAPES = 8  # sets of input shapes that a graph keeps buffers for
_TYPES = {dtype.tensorrt: dtype.name for dtype in DTYPES.values() if dtype.tensorrt}


class Arena:
    """Scratch memory for one graph at a time: as large as the largest asks for. A new `generation` is a new address."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.size, self.generation = cuda, 0, 0
        self._memory: Allocation | None = None

    @property
    def address(self) -> int:
        return self._memory.address if self._memory is not None else 0

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes; those who use the old memory must take the new one before they run."""
        if size <= self.size:
            return
        self._memory = None  # first: two of them might not fit
        self._memory, self.size, self.generation = Allocation(self.cuda, size), size, self.generation + 1


class TensorRTExecutor(Executor):
    """One engine. `otherwise` loads the graph that takes inputs outside the engine's profiles, with one warning; None refuses.

    Safe to call from any thread.
    """

    device: Cuda

    def __init__(
        self, spec: GraphSpec, file: EngineFile, tensorrt: Library, arena: Arena, *, loop: bool,
        otherwise: Callable[[], Checked] | None,
    ) -> None:  # fmt: skip
        self.spec, self.file, self.tensorrt, self.arena, self.loop = spec, file, tensorrt, arena, loop
        self.library = tensorrt.name
        self.device = self.cuda = arena.cuda
        self._otherwise = otherwise
        self._other: Checked | None = None
        self.pool = Pool(self.cuda)
        self.capture = loop and file.flavor == "tensorrt"
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}
        with self.cuda.lock, self.cuda.active():
            self.engine = tensorrt.deserialize(file)
        self._check_engine()
        self.cache = RuntimeCache(file, self.cuda) if file.flavor == "rtx" else None

    def _check_engine(self) -> None:
        """The engine's own tensors against the bundle's: names, directions, dtypes."""
        engine, library = self.engine, self.tensorrt.module
        found: dict[str, tuple[bool, str]] = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = engine.get_tensor_dtype(name).name
            found[name] = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT, _TYPES.get(kind, kind)
        wanted = {port.name: (True, port.dtype) for port in self.spec.inputs}
        wanted |= {port.name: (False, port.dtype) for port in self.spec.outputs}
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                has, declares = _said(found.get(name)), _said(wanted.get(name))
                raise self.file.refuse(f"has for `{name}` {has}; the bundle declares {declares}")

    def prepare(self) -> None:
        """Run once at the first profile's `opt` shapes."""
        profile = self.file.profiles[0] if self.file.profiles else {}
        shapes = tuple(
            profile[port.name].opt if port.name in profile else tuple(dim.opt for dim in port.dims) for port in self.spec.inputs
        )
        with self.cuda.lock, self.cuda.active():
            bound = self._bind(shapes)
            for buffer in bound.inputs.values():
                self.cuda.upload(buffer.address, np.zeros(buffer.shape, buffer.dtype))
                self.cuda.synchronize()  # the zeros must live until they were read
            bound.launch()
            self.cuda.synchronize()
            if self.cache is not None:
                self.cache.save()

    def place(self, port: Port, array: Array) -> DeviceArray:
        """See `Executor`."""
        with self.cuda.lock, self.cuda.active():
            result = self.pool.take(port.name, array.shape, port.dtype)
            self.cuda.upload(result.address, array)
            self.cuda.synchronize()
        return result

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`; outside the engine's profiles the results are where the other graph left them."""
        shapes = tuple(value.shape for value in inputs.values())
        with self.cuda.lock, self.cuda.active():
            try:
                bound = self._bind(shapes)
            except InputError as error:
                if self._otherwise is None:
                    raise
                if self._other is None:
                    self._other = self._otherwise()
                    message = f"graph '{self.spec.name}' runs outside its engine for such inputs: {error}"
                    warnings.warn(message, BackendWarning, stacklevel=4)
                other = self._other
            else:
                return bound.run(inputs)
        return other.run(inputs)

    def _bind(self, shapes: tuple[tuple[int, ...], ...]) -> _Bound:
        """The context and buffers for these shapes, made at their first use; `InputError` outside every profile."""
        bound = self._bound.pop(shapes, None)
        if bound is None:
            named = dict(zip((port.name for port in self.spec.inputs), shapes, strict=True))
            profile = self.file.profile_for(named) if self.file.profiles else 0
            while len(self._bound) >= _MAX_SHAPES:
                del self._bound[next(iter(self._bound))]
            bound = _Bound(self, profile, named)
        self._bound[shapes] = bound  # the last one used goes last
        return bound

    def new_context(self) -> Any:
        """An execution context that takes its scratch memory from us."""
        library, engine = self.tensorrt.module, self.engine
        ours = library.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.cache is None:
            context = engine.create_execution_context(ours)
        else:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(ours)
            if self.loop:
                config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.cache.attach(config)
            context = engine.create_execution_context(config)
        if context is None:
            raise self.failed("create_execution_context gave nothing")
        return context

    def failed(self, what: str) -> BackendError:
        """The error for a call of TensorRT that did not succeed, with what its log says."""
        return BackendError(f"{self.library} failed in graph '{self.spec.name}': {what}: {self.tensorrt.log.text()}.")


class _Bound:
    """An execution context with its input and output buffers, for one set of shapes. Used inside the lock only."""

    def __init__(self, graph: TensorRTExecutor, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.graph, self.cuda = graph, graph.cuda
        self.context = context = graph.new_context()
        self.size = int(graph.engine.get_device_memory_size_for_profile_v2(profile))
        self.generation = -1
        self._replay: Callable[[], None] | None = None
        self._tried = False
        if profile:
            self._must(context.set_optimization_profile_async(profile, self.cuda.stream), f"choosing profile {profile}")
            self.cuda.synchronize()
        for name, shape in shapes.items():
            self._must(context.set_input_shape(name, shape), f"setting `{name}` to {list(shape)}")
        ports = {port.name: port.dtype for port in (*graph.spec.inputs, *graph.spec.outputs)}
        self.inputs = {name: self._place(name, shape, ports[name]) for name, shape in shapes.items()}
        if unknown := context.infer_shapes():
            raise graph.failed(f"the shapes of {', '.join(unknown)} are not known")
        self.outputs: dict[str, DeviceArray] = {}
        for port in graph.spec.outputs:
            shape = tuple(int(size) for size in context.get_tensor_shape(port.name))
            if min(shape, default=0) < 0:
                raise graph.failed(f"the shape of output `{port.name}` is {list(shape)}, which depends on values")
            self.outputs[port.name] = self._place(port.name, shape, port.dtype)
        self._held: dict[str, Callable[[], DeviceArray | None]] = {}

    def _place(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """A buffer for the input or output `name`, which the context uses from here on."""
        buffer = self.graph.pool.take(name, shape, dtype)
        self._must(self.context.set_tensor_address(name, buffer.address), f"binding `{name}`")
        return buffer

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Copy what has changed into the buffers, compute, and copy the results out; the caller holds `inputs`."""
        for name, buffer in self.inputs.items():
            value = inputs[name]
            if isinstance(value, DeviceArray):
                held = self._held.get(name)
                if held is None or held() is not value:  # what every step reads is already there
                    self.cuda.copy(buffer.address, value.address, value.nbytes)
                    self._held[name] = weakref.ref(value)
            else:
                self.cuda.upload(buffer.address, value)
                self._held.pop(name, None)
        self.launch()
        results = {}
        for name, buffer in self.outputs.items():
            results[name] = self.graph.pool.take(name, buffer.shape, str(buffer.dtype))
            self.cuda.copy(results[name].address, buffer.address, buffer.nbytes)
        try:
            self.cuda.synchronize()
        except BackendError as error:
            raise self.graph.failed(str(error)) from None
        return results

    def launch(self) -> None:
        """Queue the engine on what is in the input buffers: one CUDA graph where it was captured."""
        arena = self.graph.arena
        arena.reserve(self.size)
        if self.generation != arena.generation:
            if arena.size:
                self.context.set_device_memory(arena.address, arena.size)
            self.generation = arena.generation
            self._replay, self._tried = None, False  # a captured graph would use memory that is no longer ours
        if self._replay is not None:
            self._replay()
            return
        self._enqueue()  # also what TensorRT wants before a capture, once
        if self.graph.capture and not self._tried:
            self._tried = True
            self.cuda.synchronize()
            try:
                self._replay = self.cuda.capture(self._enqueue)
            except BackendError as error:
                message = f"graph '{self.graph.spec.name}': CUDA graph capture failed ({error}); running without one: slower."
                warnings.warn(message, BackendWarning, stacklevel=2)

    def _enqueue(self) -> None:
        self.graph.tensorrt.log.lines.clear()
        self._must(self.context.execute_async_v3(self.cuda.stream), "execute_async_v3 returned False")

    def _must(self, done: Any, what: str) -> None:
        """TensorRT tells failure by a bool that is easily overlooked."""
        if not done:
            raise self.graph.failed(what)


def _said(port: tuple[bool, str] | None) -> str:
    return "nothing" if port is None else f"an {'input' if port[0] else 'output'} of {port[1]}"
