"""The one table of dtypes: what each is called by NumPy, ONNX, ONNX Runtime, safetensors and TensorRT.

Graphs of a bundle are typed in float32; their weights are stored in one of `WEIGHTS`, and a backend computes in one of them, or
in part in one of `QUANTISED` (`--precision`). Ports have one of `PORTS`: NumPy has no bfloat16, and a caller need not know what
a backend computes in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """`bytes` of one element; `onnx`: the number in TensorProto.DataType; names elsewhere, "" where there is none."""

    name: str
    bytes: int
    onnx: int
    safetensors: str
    tensorrt: str
    epsilon: float = 0.0  # relative spacing of numbers, for those that a backend computes in

    @property
    def ort(self) -> str:
        """ONNX Runtime's name of a tensor of it."""
        inner = {"float32": "float", "float64": "double"}.get(self.name, self.name)
        return f"tensor({inner})"


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("float32", 4, 1, "F32", "FLOAT", 2.0**-23),
        DType("float16", 2, 10, "F16", "HALF", 2.0**-10),
        DType("bfloat16", 2, 16, "BF16", "BF16", 2.0**-7),
        DType("float64", 8, 11, "F64", ""),
        DType("int64", 8, 7, "I64", "INT64"),
        DType("int32", 4, 6, "I32", "INT32"),
        DType("int16", 2, 5, "I16", ""),
        DType("int8", 1, 3, "I8", "INT8", 2.0**-7),
        DType("uint8", 1, 2, "U8", "UINT8"),
        DType("bool", 1, 9, "BOOL", "BOOL"),
    )
}
WEIGHTS = ("float32", "float16", "bfloat16")
QUANTISED = ("int8", "fp8")  # of the products of a graph alone; opt-in: no backend takes them unasked
PREFERRED = ("float16", "bfloat16", "float32")  # where all three were built: half is faster, and float16 finer than bfloat16
PORTS = ("float32", "int64", "uint8")
