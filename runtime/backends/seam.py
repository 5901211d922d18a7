"""The seam between the pipeline and the engines: one checked graph for every backend, and values that stay where they are.

    graph = backend.load(bundle, "step")        a `Checked`, whatever computes it
    value = graph.put("context", array)         where the graph computes; put once, read by every run
    results = graph.run({"context": value, "latents": array, ...})
    host = fetch(results["next_latents"])

A *value* is a NumPy array, or a `DeviceValue` where the graph computes on a device. Both have `shape`, `dtype`, `ndim`, `len`,
rows (`value[i]`, `value[a:b]`) and `np.asarray`, so a caller need not know which it holds. What one backend computed may be
given to a graph of another: it goes over the host by itself.

A backend gives an `Executor` for each graph, which only computes. That inputs are those which the bundle declares, finite
where they come from the host, and on the right side of the bus, is checked here, once for all backends.

Ownership: values are read-only for everyone, from `put` or `run` on. Results belong to the caller for as long as they are
kept: no later run writes into them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from motionrt.runtime.bundle.bundle import Bundle, GraphSpec, Port
from motionrt.runtime.errors import BackendError, BundleError, InputError, MotionRTError

Array = NDArray[Any]
Graph = Callable[[Mapping[str, Array]], dict[str, Array]]  # host arrays in and out: what a `Checked` is, called


class DeviceValue(ABC):
    """An array on a device. `device`: which one, equal for values that a graph there can read; `dtype`: that of the port."""

    device: Hashable
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("an array of no dimensions has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[DeviceValue]:
        return (self[row] for row in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: Any) -> DeviceValue:
        """A row, neighbouring rows (`value[a:b]`), or an axis of one put in after the first (`value[:, None]`)."""

    @abstractmethod
    def to_host(self) -> Array:
        """A copy on the host that belongs to the caller."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        host = self.to_host()
        return host if dtype is None else host.astype(dtype, copy=False)


class Executor(ABC):
    """What computes one graph. `library`: its name, for a sentence; `device`: that of its values, None for the host."""

    library: str
    device: Hashable = None

    @abstractmethod
    def execute(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute. `inputs`: every port, checked: C-contiguous host arrays and values of `device` in any mix.

        Returns when the results are computed; they lie on `device` and belong to the caller. Raises anything where it fails.
        """

    def place(self, port: Port, array: Array) -> Any:
        """`array`, C-contiguous, checked, for `port` or a table of rows for it, as a value of `device`."""
        return array


class Checked:
    """A loaded graph. `spec`: its declared interface. Safe to call from several threads where its executor is."""

    def __init__(self, spec: GraphSpec, executor: Executor) -> None:
        self.spec, self.executor = spec, executor
        self._ports = {port.name: port for port in spec.inputs}
        self._checks = [
            (port.name, np.dtype(port.dtype), tuple((dim.min, dim.max, dim.name) for dim in port.dims)) for port in spec.inputs
        ]

    def put(self, port: str, value: Any) -> Any:
        """`value` where the graph computes: an array for the input `port`, or a table [T, ...] whose rows are to be fed.

        One that is there already is returned as it is; on the CPU that is the array itself, if it is contiguous. The caller
        must not write into an array that it has put. `InputError` for an unknown port, another dtype and values that are not
        finite; shapes are checked when the graph runs.
        """
        if port not in self._ports:
            raise InputError(f"{self.spec.name} has no input `{port}`; this graph takes {', '.join(self._ports)}.")
        if isinstance(value, DeviceValue) and value.device == self.executor.device:
            return value
        declared, array = self._ports[port], _contiguous(fetch(value))
        if array.dtype != declared.dtype:
            raise self._refused(declared, str(array.dtype), "Convert it with .astype.")
        self._check_finite(port, array)
        return self.executor.place(declared, array)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The graph's outputs for `inputs`: host arrays, values of `put` and results of any graph's `run`, in any mix.

        Results stay where they were computed and belong to the caller. Raises `InputError` unless the inputs have the declared
        names, dtypes, ranks and sizes and those from the host are finite; `BackendError` where the engine fails.
        """
        self._check(inputs)
        device, feed = self.executor.device, dict[str, Any]()
        for name in self._ports:
            value = inputs[name]
            if not (isinstance(value, DeviceValue) and value.device == device):
                value = _contiguous(fetch(value))
                self._check_finite(name, value)
            feed[name] = value
        try:
            return self.executor.execute(feed)
        except MotionRTError:
            raise
        except Exception as error:  # the exceptions of engines share no base but Exception
            if out_of_memory(error):
                raise BackendError(f"too little memory to run graph '{self.spec.name}'. {ROOM}.") from None
            raise BackendError(f"{self.executor.library} failed in graph '{self.spec.name}': {first_line(error)}") from None

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """As `run`, with the results as host arrays."""
        return {name: fetch(value) for name, value in self.run(inputs).items()}

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Raise `InputError` unless `inputs` have the names, dtypes, ranks and sizes of the ports."""
        if inputs.keys() != self._ports.keys():
            missing = [name for name in self._ports if name not in inputs]
            unknown = sorted(inputs.keys() - self._ports.keys())
            raise InputError(
                f"{self.spec.name}: missing inputs: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}; "
                f"this graph takes {', '.join(self._ports)}."
            )
        sizes: dict[str, tuple[int, str]] = {}
        for name, dtype, dims in self._checks:
            value = inputs[name]
            if not isinstance(value, (np.ndarray, np.generic, DeviceValue)):
                raise self._refused(self._ports[name], f"{type(value).__name__}, not an array", "Convert it with .astype.")
            if value.dtype != dtype:
                raise self._refused(self._ports[name], str(value.dtype), "Convert it with .astype.")
            shape = value.shape
            fits = len(shape) == len(dims)
            if not (fits and all(low <= size <= high for size, (low, high, _) in zip(shape, dims, strict=True))):
                fix = "Change the array, or export a bundle with these sizes."
                raise self._refused(self._ports[name], str(list(shape)), fix)
            for size, (_, _, dim) in zip(shape, dims, strict=True):
                other, where = sizes.setdefault(dim, (size, name)) if dim else (size, name)
                if size != other:
                    raise InputError(
                        f"{self.spec.name} input `{name}` has {dim} = {size} but `{where}` has {dim} = {other}; "
                        "they must be equal."
                    )

    def _refused(self, port: Port, got: str, fix: str) -> InputError:
        accepts = f"this bundle accepts {port.dtype} [{', '.join(map(str, port.dims))}]"
        return InputError(f"{self.spec.name} input `{port.name}` is {got}; {accepts}. {fix}")

    def _check_finite(self, name: str, value: Array) -> None:
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad = int(value.size - np.isfinite(value).sum())
            raise InputError(
                f"{self.spec.name} input `{name}` has {bad} NaN or infinite values of {value.size}; all must be finite. "
                "If you did not give them, numbers of the request are too large to compute with: lower guidance and scales."
            )


def check_ports(spec: GraphSpec, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """`BundleError` unless a graph that was read has the inputs and outputs that bundle.json declares."""
    declared = {port.name for port in spec.inputs}, {port.name for port in spec.outputs}
    found = set(inputs), set(outputs)
    if declared != found:
        raise BundleError(
            f"graph '{spec.name}' has inputs {sorted(found[0])} and outputs {sorted(found[1])}; bundle.json declares "
            f"{sorted(declared[0])} and {sorted(declared[1])}. Export the bundle again."
        )


class Backend(Protocol):
    """What turns graphs of a bundle into `Checked` ones. `precision`: the dtype that it computes in, by name; `label`: what it
    is, for people; `parallel_load`: whether `load` may be called from several threads at once."""

    label: str
    precision: str
    parallel_load: bool

    def load(self, bundle: Bundle, name: str) -> Checked:
        """Load graph `name`; `BackendError` or `BundleError` where that fails."""


def fetch(value: Any) -> Any:
    """A value as a host array: itself if it is one."""
    return value if isinstance(value, np.ndarray) else np.asarray(value)


ROOM = "Free some, raise its limit, or hold one graph at a time (`motionrt generate --low-memory`, low_memory=True)"


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception of a library says that there was too little memory, in any of the ways that they have."""
    text = str(error).lower()
    words = (
        "bad_alloc", "bad allocation", "out of memory", "failed to allocate", "cannot allocate", "can't start new thread",
        "failed to map segment",  # of a library that is loaded
        "pyobject pointer is null",  # in Rust
    )  # fmt: skip
    return isinstance(error, MemoryError) or any(word in text for word in words)


def first_line(error: BaseException) -> str:
    """An exception in one line, for a sentence."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def _contiguous(value: Any) -> Array:
    """`value` in C order, itself if it is an array that is: NumPy's `ascontiguousarray` would make [1] of []."""
    array = np.asarray(value)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
