"""The torch backend: a bundle's programs on CUDA (compiled, one CUDA graph for a whole step) or on the CPU.

Only `motionrt.runtime.backends.open` imports this module, and only when it is asked for: it imports torch.

What runs how: the graphs of denoising loops by `mode`, the others, which a request calls once, eagerly. Static buffers
belong to the executor: inputs are copied into them, one replay computes a step, and the results are copied out of them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrt.runtime.backends.kinds import ONNXRUNTIME, TORCH
from motionrt.runtime.backends.machine import check_threads
from motionrt.runtime.backends.seam import Array, Backend, Checked, DeviceValue, Executor, first_line
from motionrt.runtime.backends.torch_program import load_program
from motionrt.runtime.bundle.bundle import Bundle, GraphSpec, Port
from motionrt.runtime.errors import BackendError, BackendWarning, InputError

MODES = ("auto", "graph", "compile", "eager")
WARMUPS = 3  # runs before a capture: compilation, autotuning and lazy library state must not fall into it

Call = Callable[..., Sequence[Tensor]]


class TorchBackend:
    """Runs the torch programs of a bundle.

    device: "cpu", "cuda" or "cuda:1". mode, for the graphs of the loop: "graph" (`torch.compile` and a CUDA graph),
    "compile", "eager", or "auto": graph on CUDA, eager on the CPU. What fails falls back to the next, with a
    `BackendWarning` that says why. precision: what is computed in, with the islands of precision.py: "float32", "float16",
    "bfloat16"; None is float32 on the CPU and bfloat16 on CUDA. fallback: runs graphs that have no program; None refuses
    them. threads: of torch, for the whole process. Raises `InputError` for bad arguments, `BackendError` where there is no
    such device.
    """

    def __init__(
        self, device: str = "cpu", *, mode: str = "auto", precision: str | None = None, fallback: Backend | None = None,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}.")
        threads = check_threads(threads)
        self.device = _device(device)
        self.mode = mode if mode != "auto" else "graph" if self.device.type == "cuda" else "eager"
        if self.mode == "graph" and self.device.type != "cuda":
            raise InputError(f"mode is 'graph' on {device}; CUDA graphs need a CUDA device. Use 'compile' or 'eager'.")
        self.precision = precision or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.fallback = fallback
        if threads is not None:
            torch.set_num_threads(threads)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self.parallel_load = False
        self.label = f"torch {torch.__version__} {name} {self.mode} {self.precision}"

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Load graph `name`, warmed up at its declared sizes (`opt`), so that no request pays for it.

        Raises `BackendError` if the bundle has no program of it (and there is no fallback) or it fails, `BundleError` if
        it is damaged, would execute code, or has not the ports that bundle.json declares.
        """
        spec = bundle.graph(name)
        if name not in bundle.programs:
            if self.fallback is not None:
                return self.fallback.load(bundle, name)
            raise BackendError(
                f"bundle {bundle.path} has no torch program of graph '{name}' (it has: "
                f"{', '.join(sorted(bundle.programs)) or 'none'}). Export it again with programs, use the backend "
                f"{ONNXRUNTIME.name}, or allow ONNX Runtime for such graphs: --allow-onnxruntime."
            )
        declared = bundle.programs[name]
        bundle.graph_path(name)  # the weights are the ONNX graph's own, and are verified as such
        data = bundle.path / spec.data.file if spec.data is not None else None
        program = load_program(bundle.program_path(name), name, data, self.device, getattr(torch, self.precision))
        counts = len(program.examples), len(program.module.graph.output_node().all_input_nodes)
        if counts[0] != len(declared.inputs) or counts[1] > len(declared.outputs):
            raise BackendError(
                f"program '{name}' takes {counts[0]} inputs and gives {counts[1]} outputs; bundle.json declares "
                f"{len(declared.inputs)} and {len(declared.outputs)}. Export the bundle again."
            )
        examples = dict(zip(declared.inputs, program.examples, strict=True))
        executor = TorchExecutor(spec, program.module, examples, declared.outputs, self.device)
        executor.prepare(self.mode if bundle.in_loop(name) else "eager")
        return Checked(spec, executor)


class TorchValue(DeviceValue):
    """A tensor on `device`, of the port's `dtype`; a graph that computes in less converts it, and others may read it too."""

    def __init__(self, tensor: Tensor, dtype: np.dtype[Any] | str) -> None:
        self.tensor, self.device = tensor, tensor.device
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(dtype)
        self._converted: dict[torch.dtype, Tensor] = {tensor.dtype: tensor}

    def __getitem__(self, index: Any) -> TorchValue:
        return TorchValue(self.tensor[index], self.dtype)

    def to_host(self) -> Array:
        """See `DeviceValue`."""
        return np.array(self.tensor.cpu().to(getattr(torch, str(self.dtype))).numpy())

    def converted(self, dtype: torch.dtype) -> Tensor:
        """The tensor in `dtype`; converted once, however many steps read it."""
        if dtype not in self._converted:
            self._converted[dtype] = self.tensor.to(dtype)
        return self._converted[dtype]


class TorchExecutor(Executor):
    """One program. Not safe to call from several threads at once."""

    library = "torch"
    device: torch.device

    def __init__(
        self,
        spec: GraphSpec,
        module: Callable[..., Any],
        examples: Mapping[str, Tensor],
        outputs: Sequence[str],
        device: torch.device,
    ) -> None:
        """`examples`: tensors (fake ones do) like the program's inputs, in its order. Values are converted to their dtypes
        once, and given their layout where the axis before the last is the dense one (a kernel would copy another). Results
        have the declared dtypes.
        """
        self.spec, self.outputs, self.device = spec, tuple(outputs), torch.zeros((), device=device).device  # with its number
        self.dtypes = {name: example.dtype for name, example in examples.items()}
        self._transposed = {name: example.ndim for name, example in examples.items() if _is_transposed(example)}
        self._ports = {port.name: port for port in spec.inputs}
        self._shapes = {port.name: tuple(dim.opt for dim in port.dims) for port in spec.inputs}
        self.mode = "eager"
        declared = {port.name: port.dtype for port in spec.outputs}
        self._kinds = [declared[name] for name in self.outputs]

        def call(*values: Tensor) -> Sequence[Tensor]:
            results = module(*values)
            results = (results,) if isinstance(results, Tensor) else results
            return tuple(result.to(getattr(torch, kind)) for result, kind in zip(results, self._kinds, strict=True))

        self._eager: Call = call
        self._call: Call = call
        self._static: _Static | None = None

    def prepare(self, mode: str) -> None:
        """Compile and capture as `mode` says, falling back with a `BackendWarning`, and run once at the declared sizes."""
        with self._current():
            self._prepare(mode)

    def _prepare(self, mode: str) -> None:
        inputs = [
            self._laid_out(name, torch.zeros(self._shapes[name], dtype=dtype, device=self.device))
            for name, dtype in self.dtypes.items()
        ]
        if mode in ("graph", "compile"):
            compiled = torch.compile(self._eager, fullgraph=True, dynamic=False)
            if self._attempt("torch.compile", "eager", lambda: self._compute(compiled, inputs)):
                self._call, self.mode = compiled, "compile"
        if mode == "graph":

            def capture() -> None:
                self._static = _Static(lambda *values: self._compute(self._call, values), inputs)

            if self._attempt("CUDA graph capture", f"{self.mode} without one", capture):
                self.mode = "graph"
        if self.mode == "eager":
            try:
                self._compute(self._eager, inputs)
            except Exception as error:
                raise BackendError(f"torch failed in graph '{self.spec.name}': {first_line(error)}") from None
        self._synchronize()

    def place(self, port: Port, array: Array) -> TorchValue:
        """See `Executor`. The array is copied: what is on the device must not change with the caller's."""
        return TorchValue(self._laid_out(port.name, torch.from_numpy(array.copy()).to(self.device)), port.dtype)

    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `Executor`."""
        values = {
            name: value if isinstance(value, TorchValue) else self.place(self._ports[name], value)
            for name, value in ((name, inputs[name]) for name in self.dtypes)
        }
        fits = all(value.shape == self._shapes[name] for name, value in values.items())
        with self._current():
            if self._static is not None and fits:
                results = self._static.run(list(values.values()))
            else:  # other sizes than those prepared for: nothing is compiled in the middle of a request
                tensors = [value.converted(self.dtypes[name]) for name, value in values.items()]
                results = self._compute(self._call if fits else self._eager, tensors)
            self._synchronize()
        named = zip(self.outputs, results, self._kinds, strict=True)
        return {name: TorchValue(result, kind) for name, result, kind in named}

    def _laid_out(self, name: str, value: Tensor) -> Tensor:
        if value.ndim != self._transposed.get(name):
            return value
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)

    def _compute(self, call: Call, values: Sequence[Tensor]) -> Sequence[Tensor]:
        # cuDNN rounds fp32 convolutions to TF32 unless told otherwise, and the results are those of ONNX Runtime
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return call(*values)

    def _attempt(self, what: str, instead: str, action: Callable[[], object]) -> bool:
        try:
            action()
            self._synchronize()
        except Exception as error:  # compilers and drivers raise anything
            message = f"graph '{self.spec.name}': {what} failed ({first_line(error)}); running {instead}, which is slower."
            warnings.warn(message, BackendWarning, stacklevel=4)
            return False
        return True

    def _current(self) -> AbstractContextManager[object]:
        """Make the GPU the thread's current one, which captures and Triton's launches go to, whatever device tensors are on."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class _Static:
    """A captured call: fixed input and output buffers, and one replay between them."""

    def __init__(self, call: Call, inputs: Sequence[Tensor]) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.replay, self.outputs = capture(call, self.inputs)
        self.held: list[Callable[[], TorchValue | None]] = [lambda: None] * len(self.inputs)

    def run(self, values: Sequence[TorchValue]) -> Sequence[Tensor]:
        """Copy what has changed into the buffers, replay, and copy the results out of theirs, for the caller to keep."""
        for index, (buffer, value) in enumerate(zip(self.inputs, values, strict=True)):
            if self.held[index]() is not value:  # what every step reads is already there
                buffer.copy_(value.tensor)
                self.held[index] = weakref.ref(value)
        self.replay()
        return [output.clone() for output in self.outputs]


def capture(call: Call, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], list[Tensor]]:
    """`call(*inputs)` as a CUDA graph: (replay, outputs). A replay reads the memory of `inputs` and writes that of outputs."""
    side: Any = torch.cuda.Stream(inputs[0].device)  # type: ignore[no-untyped-call, unused-ignore]
    side.wait_stream(torch.cuda.current_stream(inputs[0].device))
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            call(*inputs)
    torch.cuda.current_stream(inputs[0].device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = list(call(*inputs))
    return graph.replay, outputs


def _is_transposed(example: Tensor) -> bool:
    """Whether the axis before the last is the dense one (and not because the last has one element)."""
    if example.ndim < 2 or not all(isinstance(size, int) for size in (*example.shape[-2:], *example.stride()[-2:])):
        return False
    return example.stride(-2) == 1 and example.stride(-1) != 1 and example.shape[-1] > 1


def _device(name: str) -> torch.device:
    TORCH.parse(name)
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise BackendError(
            f"device is {name!r}; torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices. "
            "Use --device cpu, or install a driver and a CUDA build of torch."
        )
    return device
