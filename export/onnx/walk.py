"""What rewrites of an ONNX graph share: who makes and who reads a value, and new values with a name."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray


def by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of `ops`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in ops and node.domain == "" else None


def only_reader(value: ir.Value, op: str) -> ir.Node | None:
    """The node that alone reads `value`, if it is an `op`."""
    uses = list(value.uses())
    node = uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
    return node if node is not None and node.op_type == op and node.domain == "" else None


def is_last(axis: int | None, value: ir.Value) -> bool:
    """Whether `axis` is the last one of `value`."""
    return axis == -1 or (axis is not None and value.shape is not None and axis == len(value.shape) - 1)


def named(node: ir.Node) -> ir.Value:
    """A node's result, named as the node."""
    node.outputs[0].name = node.name
    return node.outputs[0]


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer of `graph`."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value
