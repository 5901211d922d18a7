"""Modulated norms of an ONNX graph: norm(x; w, b) * m + a becomes norm(x; w m, b m + a), two passes over x less.

m and a are one row [1, .., 1, D] each, as adaptive layer norm has them; the products are of one row. Real arithmetic makes the
two forms equal; in floating point the new one rounds once where the old one rounds three times.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from motionrt.export.onnx.walk import constant, is_last, named, only_reader


def fold_modulation(graph: ir.Graph) -> None:
    """Fold in place, wherever shapes prove that m and a are single rows."""
    for norm in list(graph):
        if norm.op_type == "LayerNormalization" and not norm.domain and len(norm.outputs) == 1 and _over_last_axis(norm):
            _fold(graph, norm)


def _fold(graph: ir.Graph, norm: ir.Node) -> None:
    x, weight, bias = (*norm.inputs, None)[:3]
    times, scale = _row(norm.outputs[0], "Mul")
    if times is None or scale is None or x is None or weight is None:
        return
    plus, shift = _row(times.outputs[0], "Add")
    end = times if plus is None else plus
    nodes: list[ir.Node] = []

    def made(what: str, op: str, *inputs: ir.Value) -> ir.Value:
        attributes = dict(norm.attributes) if op == norm.op_type else {}
        nodes.append(ir.node(op, inputs, attributes, name=f"{end.outputs[0].name}.folded.{what}"))
        return named(nodes[-1])

    rows = [made("weight_row", "Mul", scale, weight)]
    if bias is not None:
        rows.append(made("bias_row", "Mul", scale, bias))
        if shift is not None:
            rows[1] = made("bias_sum", "Add", rows[1], shift)
    elif shift is not None:
        rows.append(shift)
    flat = graph.initializers.get("flat_row") or constant(graph, "flat_row", np.array([-1], np.int64))
    weights = [made(str(number), "Reshape", row, flat) for number, row in enumerate(rows, 1)]
    old, new = end.outputs[0], made("norm", norm.op_type, x, *weights)
    new.type, new.shape = old.type, old.shape
    new.name, old.name = old.name, new.name  # it may be an output of the graph
    graph.insert_before(end, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _over_last_axis(norm: ir.Node) -> bool:
    axis = norm.attributes.get("axis")
    return axis is None or is_last(axis.as_int(), norm.outputs[0])


def _row(value: ir.Value, op: str) -> tuple[ir.Node | None, ir.Value | None]:
    """The `op` that alone reads `value`, if its other operand is one row of the last axis, and that row; else None, None."""
    node = only_reader(value, op)
    if node is None:
        return None, None
    left, right = node.inputs
    other = right if left is value else left
    if other is None or other.shape is None or value.shape is None or len(other.shape) > len(value.shape) or not other.shape:
        return None, None
    *ones, width = other.shape
    return (node, other) if all(one == 1 for one in ones) and width == value.shape[-1] else (None, None)
