"""An fp32 ONNX graph as an fp16 or bf16 one with explicit fp32 islands, for builders that take precision from the ONNX.

Every floating-point value gets one of two precisions, and a Cast stands wherever they meet:

- the heavy ops (matrix products, convolutions, attention) read and write the low precision; tensor cores and ONNX Runtime
  alike accumulate them in fp32, and a fused attention keeps its softmax in fp32 (TensorRT refuses to be told so);
- norms, softmax, reductions, sines and exponentials, rotations, sampling by coordinates and comparisons are fp32
  (`FULL_OPS`);
- what only feeds the graph's outputs after the last heavy op is fp32: guidance, the solver's update, an energy;
- a pointwise or moving op whose operands are all fp32 stays there (modulation right after a norm, masks, positions);
- everything else is low, the residual stream among it.

Graph inputs and outputs keep their dtypes, so that whoever calls the graph cannot tell. Same graph, same result, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

LOW = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
FULL = ir.DataType.FLOAT
OURS = ("motion_cross_attention", "motion_cross_attention_residual")  # where a plugin computes it, fp32 inside as in the op
HEAVY_OPS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", *OURS})
FULL_OPS = frozenset({
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "LpNormalization", "Softmax", "LogSoftmax", "Softplus", "Sin", "Cos", "Exp", "Log", "Pow", "Sqrt", "Reciprocal",
    "CumSum", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd",
    "GridSample", "RotaryEmbedding", "Range", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf",
    "ArgMax", "ArgMin",
})  # fmt: skip
KEEPS = {"Resize": (1, 2), "Upsample": (1,)}  # operands that an op reads as fp32 whatever its data is: scales
MINUS_INFINITY = 1e30  # constants beyond it stand for infinity in masks; they become what both low precisions hold
FLOAT16_MAX = 6.5e4
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def to_precision(model: ir.Model, dtype: str) -> ir.Model:
    """Convert `model`, in place: fp32, inlined, with types inferred for every value. `dtype`: "float16" or "bfloat16".

    Raises ValueError for graphs with branches or loops, and for values of unknown type.
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
    late = _only_for_outputs(nodes)
    precision: dict[ir.Value, ir.DataType] = {value: FULL for value in graph.inputs if _is_float(value)}
    caster = _Caster(graph)
    for node in nodes:
        operands = [(index, value) for index, value in enumerate(node.inputs) if value is not None and _is_float(value)]
        kept = KEEPS.get(node.op_type, ())
        flowing = [value for index, value in operands if value.const_value is None and index not in kept]
        if node.op_type == "Cast":
            chosen = FULL  # from an integer: the operand itself is no float
        elif node.op_type in HEAVY_OPS:
            chosen = low
        elif node.op_type in FULL_OPS or node in late:
            chosen = FULL
        elif not flowing and node.op_type == "Gather":  # an embedding table: half the bytes
            chosen = low
        elif all(precision[value] == FULL for value in flowing):
            chosen = FULL
        else:
            chosen = low
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


def _only_for_outputs(nodes: list[ir.Node]) -> set[ir.Node]:
    """Ops after the last heavy one on every way to the outputs: all that reads them is such an op, or the caller."""
    late: set[ir.Node] = set()
    for node in reversed(nodes):
        if node.op_type in HEAVY_OPS or node.op_type in FULL_OPS - {"GridSample"}:
            continue
        readers = [use.node for value in node.outputs for use in value.uses()]
        ends = any(value.is_graph_output() for value in node.outputs)
        if (readers or ends) and all(reader in late or reader.op_type == "GridSample" for reader in readers):
            late.add(node)
    return late


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
            assert value.const_value is not None
            array = value.const_value.numpy().astype(np.float32)
            # Also where it is used in fp32: masks are built there, and narrowed at the attention.
            array = np.where(np.abs(array) >= MINUS_INFINITY, np.sign(array) * np.float32(FLOAT16_MAX), array)
            tensor = ir.tensor(np.asarray(array.astype(wanted.numpy()), order="C"), dtype=wanted, name=name)
            made = ir.Value(name=name, type=ir.TensorType(wanted), shape=value.shape, const_value=tensor)
            self._graph.register_initializer(made)
            return made

        return self._once(value, wanted, make)


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
