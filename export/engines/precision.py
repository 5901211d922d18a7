"""A float32 ONNX graph as a float16 or bfloat16 one with explicit casts, for whoever takes precision from the ONNX.

The rules are those of runtime/backends/precision.py. Graph inputs and outputs keep their dtypes, so that whoever calls the
graph cannot tell. Same graph, same result, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from motionrt.runtime.backends.precision import Op, low_ops
from motionrt.runtime.dtypes import DTYPES

LOW = {name: ir.DataType(DTYPES[name].onnx) for name in ("float16", "bfloat16")}
FULL = ir.DataType.FLOAT
KEEPS = {"Resize": (1, 2), "Upsample": (1,)}  # operands that an op reads as fp32 whatever its data is: scales
MINUS_INFINITY = 1e30  # constants beyond it stand for infinity in masks; they become what both low precisions hold
FLOAT16_MAX = 6.5e4
LAZY_FROM = 1 << 16  # elements
FOLDED = ".folded"  # in the name of a weight whose form was changed: what stands before it is the name it is stored under
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_precision(model: ir.Model, dtype: str, wide: Sequence[str] = ()) -> ir.Model:
    """Convert `model`, in place: fp32, inlined, with types inferred for every value. `dtype`: "float16" or "bfloat16".

    `wide`: patterns of weights whose results overflow float16 (`GraphSpec.wide`); bfloat16 has the range of float32. Raises
    ValueError for graphs with branches or loops, and for values of unknown type.
    """
    graph = model.graph
    nodes = list(graph)
    if any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for n in nodes
        for attribute in n.attributes.values()
    ):
        raise ValueError("the graph has branches or loops; only straight graphs can be converted")
    low, ports = LOW[dtype], list(graph.outputs)
    _drop_casts_between_floats(graph, nodes)
    nodes = list(graph)
    ops = [_op(node) for node in nodes]
    lows = low_ops(ops, ports, wide if dtype == "float16" else ())
    precision: dict[ir.Value, ir.DataType] = {value: FULL for value in graph.inputs if _is_float(value)}
    caster = _Caster(graph)
    for node, here in zip(nodes, lows, strict=True):
        operands = [(index, value) for index, value in enumerate(node.inputs) if value is not None and _is_float(value)]
        kept = KEEPS.get(node.op_type, ())
        chosen = low if here else FULL
        for index, value in operands:
            wanted = FULL if index in kept else chosen
            if value.const_value is not None:
                node.replace_input_with(index, caster.constant(value, wanted))
            elif precision[value] != wanted and node.op_type != "Cast":
                node.replace_input_with(index, caster.cast(value, wanted, node))
        for value in node.outputs:
            if _is_float(value):
                precision[value] = chosen
                value.type = ir.TensorType(chosen)
    for index, value in enumerate(ports):
        if _is_float(value) and precision.get(value, FULL) != FULL:
            name, value.name = value.name, f"{value.name}.{dtype}"
            (widened,) = (out := ir.node("Cast", [value], {"to": int(FULL)}, name=f"{name}.widen")).outputs
            widened.name, widened.type, widened.shape = name, ir.TensorType(FULL), value.shape
            graph.append(out)
            graph.outputs[index] = widened
    _drop_unused_initializers(graph)
    return model


def _is_float(value: ir.Value) -> bool:
    if value.dtype is None:
        raise ValueError(f"the type of `{value.name}` is not known: run shape inference first")
    return value.dtype in _FLOATS


def _drop_casts_between_floats(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """A cast from float to float in an fp32 graph does nothing; precisions are chosen anew here."""
    for node in nodes:
        if node.op_type not in ("Cast", "CastLike") or node.inputs[0] is None:
            continue
        source, (result,) = node.inputs[0], node.outputs
        if _is_float(source) and _is_float(result) and not result.is_graph_output():
            if source.const_value is not None and source.dtype != FULL:
                continue  # a weight stored as fp16: folded by whoever loaded the graph
            result.replace_all_uses_with(source)
            graph.remove(node, safe=True)


def _op(node: ir.Node) -> Op:
    kept = KEEPS.get(node.op_type, ())
    floats = [(i, value) for i, value in enumerate(node.inputs) if value is not None and i not in kept and _is_float(value)]
    return Op(
        node.op_type,
        tuple(value for _, value in floats if value.const_value is None),
        tuple(value for value in node.outputs if _is_float(value)),
        tuple(str(value.name).partition(FOLDED)[0] for _, value in floats if value.const_value is not None),
        widens=node.op_type == "Cast",  # from an integer: those between floats are gone
    )


class _Caster:
    """Casts and constants in the wanted precision, each made once, with names that depend on nothing but the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def _once(self, value: ir.Value, wanted: ir.DataType, make: Callable[[str], ir.Value]) -> ir.Value:
        key = (value, wanted)
        if key not in self._made:
            self._made[key] = make(f"{value.name}.{wanted.name.lower()}")
        return self._made[key]

    def cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        def make(name: str) -> ir.Value:
            node = ir.node("Cast", [value], {"to": int(wanted)}, name=name)
            (result,) = node.outputs
            result.name, result.type, result.shape = name, ir.TensorType(wanted), value.shape
            self._graph.insert_before(before, node)
            return result

        return self._once(value, wanted, make)

    def constant(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        def make(name: str) -> ir.Value:
            source = value.const_value
            assert source is not None

            def narrowed() -> ir.Tensor:
                array = source.numpy().astype(np.float32)
                # Also where it is used in fp32: masks are built there, and narrowed at the attention.
                array = np.where(np.abs(array) >= MINUS_INFINITY, np.sign(array) * np.float32(FLOAT16_MAX), array)
                return ir.tensor(np.asarray(array.astype(wanted.numpy()), order="C"), dtype=wanted, name=name)

            tensor = lazily(narrowed, wanted, source.shape, name)
            made = ir.Value(name=name, type=ir.TensorType(wanted), shape=value.shape, const_value=tensor)
            self._graph.register_initializer(made)
            return made

        return self._once(value, wanted, make)


def lazily(make: Callable[[], ir.Tensor], dtype: ir.DataType, shape: ir.Shape, name: str) -> ir.TensorProtocol:
    """What `make` gives: at once where it is small, else when it is written, one at a time: models are larger than memory."""
    if int(np.prod(shape.numpy(), dtype=np.int64)) < LAZY_FROM:
        return make()
    return ir.LazyTensor(make, dtype=dtype, shape=shape, name=name, cache=False)


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
