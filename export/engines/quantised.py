"""A graph's matrix products in 8 bits: the last pass over an engine graph (graph.py), in three forms.

`dynamic`: int8 for ONNX Runtime on a CPU. Each activation is measured when it is there (`DynamicQuantizeLinear`, u8 with a
zero point), so nothing has to be known of it beforehand; weights are s8, with a scale for each output channel.

`static`, "int8" or "fp8": a pair of `QuantizeLinear` and `DequantizeLinear` before each product (QDQ), which OpenVINO and
TensorRT fuse into 8-bit kernels. Activations have one scale that was measured before (calibration.py), weights one for each
output channel, and zero points are 0: OpenVINO refuses u8 with another, TensorRT refuses any other. Scales have the dtype of
the network around them: a cast in between would stop the fusion. fp8 is E4M3, whose largest number is 448.

On processors weights use 7 of their 8 bits, in both forms: on x86 without VNNI, ONNX Runtime and OpenVINO add two products
u8 x s8 in 16 bits, which hold 2 x 255 x 64 and not 2 x 255 x 127.

Which products are taken (`products`): those of a weight with two dimensions that are large enough to pay. What a step has of a
system's motion (motion_cross_attention and the like) multiplies what a request computed, not weights, and so stays as it is; so
do convolutions, norms, attention and all pointwise operations. Same graph, same result, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from motionrt.export.engines.precision import FOLDED, lazily
from motionrt.runtime.backends.precision import HEAVY

KINDS = {  # the largest number, and the dtypes of ONNX and NumPy
    "int8": (127.0, ir.DataType.INT8, np.dtype(np.int8)),
    "int7": (64.0, ir.DataType.INT8, np.dtype(np.int8)),
    "fp8": (448.0, ir.DataType.FLOAT8E4M3FN, np.dtype(ml_dtypes.float8_e4m3fn)),
}
LEAST_SIDE = 64  # of a weight: below that quantising costs what the product saves
LEAST_ROWS = 16  # of an activation, as far as its sizes are known: fewer are a timestep's or a pooled vector's
LEAST_OPSET = 21  # QuantizeLinear and DequantizeLinear of all these dtypes


class NothingToQuantise(ValueError):
    """The graph has no product that is taken."""


@dataclass(frozen=True)
class Product:
    """One matrix product that is taken. `weight`: its name as stored; `turned`: a Gemm's, stored as [N, K]."""

    node: ir.Node
    weight: str
    turned: bool


def products(model: ir.Model) -> list[Product]:
    """The products that 8 bits are for, in order. `model`: an engine graph, with shapes.

    Left out besides what the module says: the first products (nothing heavy before them) and the last (nothing heavy behind
    them), where an error is seen most, and those of few rows or small weights.
    """
    nodes = list(model.graph)
    behind, ahead = set[ir.Value | None](), set[ir.Node]()
    for node in nodes:
        if any(value in behind for value in node.inputs) or node.op_type in HEAVY:
            behind.update(node.outputs)
    first = {node for node in nodes if node.op_type in HEAVY and not any(value in behind for value in node.inputs)}
    for node in reversed(nodes):
        readers = [use.node for value in node.outputs for use in value.uses()]
        if any(reader in ahead or reader.op_type in HEAVY for reader in readers):
            ahead.add(node)
    found = [_product(node) for node in nodes if node.op_type in ("MatMul", "Gemm") and node in ahead and node not in first]
    return [product for product in found if product is not None]


def _product(node: ir.Node) -> Product | None:
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or data.const_value is not None or weight.const_value is None or data.shape is None:
        return None
    sizes = weight.const_value.shape.numpy()
    turned = False
    if node.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        if any(node.attributes[key].value != value for key, value in plain.items() if key in node.attributes):
            return None
        turned = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    rows = [size for size in data.shape.dims[:-1] if isinstance(size, int)]
    few = int(np.prod(rows, dtype=np.int64)) < LEAST_ROWS  # sizes that are open count as 1
    return None if len(sizes) != 2 or min(sizes) < LEAST_SIDE or few else Product(node, weight_name(weight), turned)


def weight_name(value: ir.Value) -> str:
    """The name of a weight as the bundle's graph stores it, whatever the passes before made of it."""
    name = str(value.name).partition(FOLDED)[0]
    return name.removesuffix(".float16").removesuffix(".bfloat16").removesuffix(".float")


def dynamic(model: ir.Model, skip: Collection[str] = ()) -> int:
    """Make the products of a float32 engine graph int8 as ONNX Runtime computes it, in place; how many they are.

    skip: names of weights whose products are left. Raises `NothingToQuantise`.
    """
    chosen = _chosen(model, skip)
    made = _Maker(model.graph)
    for product in chosen:
        node = product.node
        data = node.inputs[0]
        assert data is not None
        codes, scale, zero = made.measured(data, node)
        weight, weights_scale = made.weight(product, "int7", ir.DataType.FLOAT)
        name = node.name or product.weight
        whole = made.add(node, "MatMulInteger", [codes, weight, zero], f"{name}.whole", ir.DataType.INT32)
        number = made.add(node, "Cast", [whole], f"{name}.number", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        both = made.add(node, "Mul", [scale, weights_scale], f"{name}.scale", ir.DataType.FLOAT)
        made.replace(product, "Mul", [number, both])
    return made.finish(len(chosen))


def static(
    model: ir.Model, amax: Mapping[str, float], kind: str, skip: Collection[str] = (), weights: str | None = None
) -> int:
    """Put QDQ before the products that `amax` names, in place; how many they are. kind: "int8" or "fp8"; weights: theirs, where
    it is another: "int7" on processors.

    amax: for each weight's name the largest absolute value of what is multiplied by it. The network may be in any dtype.
    Raises `NothingToQuantise`, and ValueError for names that the graph has not got.
    """
    if model.graph.opset_imports.get("", 0) < LEAST_OPSET:
        raise ValueError(f"the graph is of opset {model.graph.opset_imports.get('')}; 8 bits need {LEAST_OPSET}")
    chosen = [item for item in _chosen(model, skip) if item.weight in amax]
    if lacking := sorted(set(amax) - {product.weight for product in _chosen(model, ())}):
        raise ValueError(f"there are scales of {len(lacking)} products that the graph has not got, such as '{lacking[0]}'")
    if not chosen:
        raise NothingToQuantise(_NOTHING)
    shared: dict[ir.Value | None, float] = {}  # one scale for all products that read a value
    for product in chosen:
        data = product.node.inputs[0]
        shared[data] = max(shared.get(data, 0.0), amax[product.weight])
    largest = [shared[product.node.inputs[0]] for product in chosen]  # now: a product may read another one's, to be replaced
    made = _Maker(model.graph)
    for product, most in zip(chosen, largest, strict=True):
        node = product.node
        data = node.inputs[0]
        assert data is not None and data.dtype is not None
        left = made.rounded(data, most, kind, node)
        right = made.numbers(product, weights or kind, kind, data.dtype)
        made.replace(product, "MatMul", [left, right])
    return made.finish(len(chosen))


_NOTHING = f"no weight of {LEAST_SIDE} by {LEAST_SIDE} or more is multiplied between its first and its last products"


def _chosen(model: ir.Model, skip: Collection[str]) -> list[Product]:
    found = [product for product in products(model) if product.weight not in skip]
    if not found:
        raise NothingToQuantise(_NOTHING)
    return found


def least_scale(dtype: ir.DataType) -> float:
    """The smallest scale that is used: below 2^-20 float16 has too few digits."""
    return 2.0**-20 if dtype == ir.DataType.FLOAT16 else 2.0**-100


def channel_scales(weight: NDArray[np.float32], kind: str, dtype: ir.DataType = ir.DataType.FLOAT) -> NDArray[np.float32]:
    """The scale [N] of each output channel of a weight [K, N], a number that `dtype` has; 1 where all weights are 0."""
    most = np.abs(weight).max(0)
    scales = np.where(most > 0, np.maximum(most / KINDS[kind][0], least_scale(dtype)), 1.0)
    return scales.astype(dtype.numpy()).astype(np.float32)


def codes_of(weight: NDArray[np.float32], scales: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """The weight [K, N] in units of its scales, rounded to `kind`."""
    top, _, dtype = KINDS[kind]
    units = np.clip(weight / scales, -top, top)
    return (units if kind == "fp8" else np.rint(units)).astype(dtype)


class _Maker:
    """Nodes and constants of the pass; what several products share is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._measured: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._weights: dict[tuple[ir.Value, bool, ir.DataType], tuple[ir.Value, ir.Value]] = {}
        self._numbers: dict[ir.Value, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}

    def add(
        self, before: ir.Node, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, **attributes: int
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=name)
        (result,) = node.outputs
        result.name, result.type = name, ir.TensorType(dtype)
        self._graph.insert_before(before, node)
        return result

    def measured(self, data: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """u8 codes, scale and zero point of an activation, found when it is there."""
        if data not in self._measured:
            node = ir.node("DynamicQuantizeLinear", [data], name=f"{data.name}.u8", num_outputs=3)
            codes, scale, zero = node.outputs
            codes.name, scale.name, zero.name = f"{data.name}.u8", f"{data.name}.unit", f"{data.name}.zero"
            codes.type = zero.type = ir.TensorType(ir.DataType.UINT8)
            scale.type = ir.TensorType(ir.DataType.FLOAT)
            self._graph.insert_before(before, node)
            self._measured[data] = codes, scale, zero
        return self._measured[data]

    def rounded(self, data: ir.Value, amax: float, kind: str, before: ir.Node) -> ir.Value:
        """An activation through QDQ."""
        if data not in self._rounded:
            top, dtype, _ = KINDS[kind]
            outer = data.dtype
            assert outer is not None
            number = max(amax / top, least_scale(outer)) if amax > 0 else 1.0
            scale = self._constant(f"{data.name}.unit", np.asarray(number, outer.numpy()), outer)
            zero = self.zeros(kind, None)
            codes = self.add(before, "QuantizeLinear", [data, scale, zero], f"{data.name}.{kind}", dtype)
            back = self.add(before, "DequantizeLinear", [codes, scale, zero], f"{data.name}.{kind}.number", outer)
            back.shape = data.shape
            self._rounded[data] = back
        return self._rounded[data]

    def weight(self, product: Product, kind: str, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Codes [K, N] and scales [N] of a weight; both are computed when they are written, one weight at a time."""
        value, turned = product.node.inputs[1], product.turned
        assert value is not None and value.const_value is not None
        key = value, turned, dtype
        if key not in self._weights:
            source, name = value.const_value, f"{product.weight}.{kind}"
            if name in self._graph.initializers:  # the same weight, used in two forms
                name = f"{name}.{len(self._weights)}"
            sizes = source.shape.numpy()
            columns = int(sizes[0 if turned else 1])

            def array() -> NDArray[np.float32]:
                numbers: NDArray[np.float32] = source.numpy().astype(np.float32)
                return numbers.T if turned else numbers

            def codes() -> ir.Tensor:
                found = array()
                made = np.ascontiguousarray(codes_of(found, channel_scales(found, kind, dtype), kind))
                return ir.tensor(made, dtype=KINDS[kind][1], name=name)

            def scales() -> ir.Tensor:
                return ir.tensor(channel_scales(array(), kind, dtype).astype(dtype.numpy()), dtype=dtype, name=f"{name}.unit")

            shape = ir.Shape(sizes[::-1] if turned else sizes)
            units = self._lazy(f"{name}.unit", scales, dtype, ir.Shape([columns]))
            self._weights[key] = self._lazy(name, codes, KINDS[kind][1], shape), units
        return self._weights[key]

    def numbers(self, product: Product, kind: str, grid: str, dtype: ir.DataType) -> ir.Value:
        """A weight [K, N] as numbers again; `grid`: the kind whose zero point it has."""
        codes, scale = self.weight(product, kind, dtype)
        if codes not in self._numbers:  # where it is read first, and read by all after it
            inputs = [codes, scale, self.zeros(grid, scale)]
            self._numbers[codes] = self.add(product.node, "DequantizeLinear", inputs, f"{codes.name}.number", dtype, axis=1)
        return self._numbers[codes]

    def zeros(self, kind: str, like: ir.Value | None) -> ir.Value:
        """The zero point 0, as many as `like` has scales; one if None."""
        _, dtype, numbers = KINDS[kind]
        shape = () if like is None or like.shape is None else tuple(like.shape.numpy())
        return self._constant(f"zero.{kind}" + "".join(f".{size}" for size in shape), np.zeros(shape, numbers), dtype)

    def replace(self, product: Product, op: str, inputs: list[ir.Value]) -> None:
        """Put `op` in the place of a product; a Gemm's third operand is added."""
        node = product.node
        (result,) = node.outputs
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        name, dtype, shape = result.name, result.dtype, result.shape
        assert dtype is not None
        result.name = f"{name}.replaced"
        new = self.add(node, op, inputs, f"{node.name or name}.{'product' if bias else 'made'}", dtype)
        if bias is not None:
            new = self.add(node, "Add", [new, bias], f"{node.name or name}.made", dtype)
        new.name, new.shape = name, shape
        result.replace_all_uses_with(new)
        self._graph.remove(node, safe=True)

    def finish(self, count: int) -> int:
        """Drop the weights that nothing reads any more; `count`."""
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
        return count

    def _constant(self, name: str, array: NDArray[Any], dtype: ir.DataType) -> ir.Value:
        if name not in self._constants:
            made = ir.tensor(array, dtype=dtype, name=name)
            self._constants[name] = self._lazy(name, lambda: made, dtype, ir.Shape(array.shape))
        return self._constants[name]

    def _lazy(self, name: str, make: Callable[[], ir.Tensor], dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazily(make, dtype, shape, name))
        self._graph.register_initializer(value)
        return value
