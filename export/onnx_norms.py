"""Modulated norms of an ONNX graph: norm(x; w, b) * m + a becomes norm(x; w m, b m + a), two passes over x less.

m and a are one row [1, .., 1, D] each, as adaptive layer norm has them; the products are of one row. Real arithmetic makes the
two forms equal; in floating point the new one rounds once where the old one rounds three times.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def fold_modulation(graph: ir.Graph) -> None:
    """Fold in place, wherever shapes prove that m and a are single rows."""
    for norm in list(graph):
        if norm.op_type != "LayerNormalization" or norm.domain or len(norm.outputs) != 1 or not _last_axis(norm):
            continue
        x, weight, bias = (*norm.inputs, None)[:3]
        times, scale = _row(norm.outputs[0], "Mul")
        if times is None or scale is None or x is None or weight is None:
            continue
        plus, shift = _row(times.outputs[0], "Add")
        end = times if plus is None else plus
        name = f"{end.outputs[0].name}.folded"
        rows = {"weight": ir.node("Mul", [scale, weight], name=f"{name}.weight_row")}
        nodes = [rows["weight"]]
        if bias is not None:
            rows["bias"] = ir.node("Mul", [scale, bias], name=f"{name}.bias_row")
            nodes.append(rows["bias"])
        if shift is not None and bias is not None:
            rows["bias"] = ir.node("Add", [rows["bias"].outputs[0], shift], name=f"{name}.bias_sum")
            nodes.append(rows["bias"])
        flat = _flat(graph)
        new_bias = rows["bias"].outputs[0] if "bias" in rows else shift
        inputs: list[ir.Value | None] = [x]
        for value in (rows["weight"].outputs[0], new_bias):
            if value is not None:
                nodes.append(ir.node("Reshape", [value, flat], name=f"{name}.{len(inputs)}"))
                inputs.append(nodes[-1].outputs[0])
        nodes.append(ir.node("LayerNormalization", inputs, dict(norm.attributes), name=f"{name}.norm"))
        for node in nodes:
            node.outputs[0].name = node.name
        old, new = end.outputs[0], nodes[-1].outputs[0]
        new.type, new.shape = old.type, old.shape
        new.name, old.name = old.name, new.name  # it may be an output of the graph
        graph.insert_before(end, nodes)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _last_axis(norm: ir.Node) -> bool:
    axis, shape = norm.attributes.get("axis"), norm.outputs[0].shape
    return axis is None or axis.as_int() == -1 or (shape is not None and axis.as_int() == len(shape) - 1)


def _row(value: ir.Value, op: str) -> tuple[ir.Node | None, ir.Value | None]:
    """The `op` that alone reads `value`, if its other operand is one row of the last axis, and that row; else None, None."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != op or uses[0].node.domain:
        return None, None
    node = uses[0].node
    other = node.inputs[1 - uses[0].idx]
    if other is None or other.shape is None or value.shape is None or len(other.shape) > len(value.shape) or not other.shape:
        return None, None
    *ones, width = other.shape
    return (node, other) if all(one == 1 for one in ones) and width == value.shape[-1] else (None, None)


def _flat(graph: ir.Graph) -> ir.Value:
    """The shape [-1], one for the graph."""
    name = "flat_row"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array([-1], np.int64), name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]), const_value=tensor)
        )
    return graph.initializers[name]
