"""ONNX Runtime on a GPU behind the device seam: what a request computed stays there, bound to the next run's inputs.

Ownership: ONNX Runtime allocates the outputs of every run anew; an `OrtArray` keeps its value alive, nothing writes into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from motionrt.runtime.backends.onnxruntime import Array, check_finite, check_inputs, check_ports, describe, first_line
from motionrt.runtime.bundle.bundle import GraphSpec
from motionrt.runtime.dtypes import DTYPES, PORTS
from motionrt.runtime.errors import BackendError


class OrtArray:
    """An array on the device, or one that goes there when a graph first reads it; `np.asarray` copies it to the host.

    Rows of a table become values of their own, each once: ONNX Runtime cannot bind a part of a value.
    """

    resident = True

    def __init__(self, graph: OrtGraph, host: Array | None = None, value: Any = None) -> None:
        assert host is not None or value is not None
        self._graph, self._host, self._value = graph, host, value
        self._rows: dict[int, OrtArray] = {}
        self.shape: tuple[int, ...] = host.shape if host is not None else tuple(value.shape())
        self.dtype = host.dtype if host is not None else np.dtype(_NAMES[value.data_type()])

    @property
    def value(self) -> Any:
        """The `OrtValue` on the device."""
        if self._value is None:
            assert self._host is not None
            self._value = self._graph.upload(self._host)
        return self._value

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> OrtArray:
        if self._host is None:
            self._host = self._value.numpy()
        if not isinstance(index, int | np.integer):
            return OrtArray(self._graph, np.ascontiguousarray(self._host[index]))
        if int(index) not in self._rows:
            row = np.asarray(self._host[index])
            self._rows[int(index)] = OrtArray(self._graph, np.ascontiguousarray(row).reshape(row.shape))
        return self._rows[int(index)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        host = self._value.numpy() if self._host is None else np.array(self._host)
        return host if dtype is None else host.astype(dtype)


_NAMES = {DTYPES[name].ort: name for name in PORTS}


class OrtGraph:
    """One session behind the seam (`DeviceGraph`); results of `run` belong to the caller."""

    resident = True  # see backend.call

    def __init__(self, spec: GraphSpec, session: Any, kind: str, index: int) -> None:
        """`session`: an InferenceSession; `kind` and `index`: the device that its values lie on, such as "cuda", 0."""
        self.spec, self.session, self.kind, self.index = spec, session, kind, index

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Host arrays in and out."""
        check_inputs(self.spec, inputs)
        return {name: self.get(value) for name, value in self.run(inputs).items()}

    def put(self, name: str, value: Any) -> Any:
        """See `DeviceGraph`."""
        if isinstance(value, OrtArray):
            return value
        array = np.array(value)  # a copy: the device's value must not change with the caller's
        check_finite(self.spec, name, array)
        return OrtArray(self, np.ascontiguousarray(array).reshape(array.shape))

    def upload(self, array: Array) -> Any:
        """A host array as an `OrtValue` on the device."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(array, self.kind, self.index)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See `DeviceGraph`; but results hold for as long as they are kept."""
        check_ports(self.spec, {name: _describe(value) for name, value in inputs.items()})
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                check_finite(self.spec, name, value)
        names = [port.name for port in self.spec.outputs]
        try:
            binding = self.session.io_binding()
            for port in self.spec.inputs:
                value = inputs[port.name]
                if isinstance(value, OrtArray):
                    binding.bind_ortvalue_input(port.name, value.value)
                else:
                    binding.bind_cpu_input(port.name, np.ascontiguousarray(value).reshape(value.shape))
            for name in names:
                binding.bind_output(name, self.kind, self.index)
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            results = binding.get_outputs()
        except Exception as error:  # its exceptions share no base but Exception
            raise BackendError(f"ONNX Runtime failed in graph '{self.spec.name}': {first_line(error)}") from None
        return {name: OrtArray(self, value=value) for name, value in zip(names, results, strict=True)}

    def get(self, value: Any) -> Array:
        """See `DeviceGraph`."""
        return np.asarray(value)


def _describe(value: Any) -> tuple[str, tuple[int, ...]]:
    return (str(value.dtype), value.shape) if isinstance(value, OrtArray) else describe(value)
