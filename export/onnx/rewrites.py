"""Exact rewrites of a whole ONNX graph, after onnxscript's optimiser: fewer and larger nodes with the same numbers.

- Rotation of pairs, x * cos + [-x1, x0, -x3, x2, ..] * sin, is one standard `RotaryEmbedding` (opset 23) with fp32 tables;
  casts around it stay. Where only the rows after the first t are rotated and joined to those again, all are rotated, with
  cos 1 and sin 0 in the first t: x * 1 - y * 0 is x for every finite y.
- A norm that is multiplied by one row, and has one added, is a norm with other weights (onnx_norms.py).
- `Expand` before an Add, Mul, Sub or Div whose other operand already has the size: the op repeats the value itself.

The shapes that PyTorch's exporter left on the values are the proof that two sizes are one; where there is none, nothing is
done. A rotation may differ by rounding (fused multiply-adds), repeating by nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from motionrt.export.onnx.norms import fold_modulation
from motionrt.export.onnx.walk import by, constant, is_last, named, only_reader

OPSET_OF_ROTATION = 23
REPEATING = frozenset({"Add", "Mul", "Sub", "Div"})
Table = NDArray[Any]


def rewrite(model: ir.Model, outside: Callable[[str], Table | None] = lambda name: None) -> None:
    """Rewrite `model` in place. `outside(name)`: the value of an initializer that holds none; asked for rotary tables only."""
    if model.graph.opset_imports.get("", 0) >= OPSET_OF_ROTATION:
        _Rotations(model.graph, outside).rewrite()
    _drop_expands(model.graph)
    fold_modulation(model.graph)
    common.RemoveUnusedNodesPass()(model)


class _Rotations:
    """The rotations of a graph; tables are made once for all that share them and their batch."""

    def __init__(self, graph: ir.Graph, outside: Callable[[str], Table | None]) -> None:
        self._graph, self._outside = graph, outside
        self._made: dict[tuple[object, ...], list[ir.Value]] = {}
        self._read: dict[ir.Value, Table | None] = {}

    def rewrite(self) -> None:
        for node in list(self._graph):
            if node.op_type == "Add" and (parts := _rotation(node)) is not None:
                value, *sides = parts
                rows = tuple(value.shape or ())[2:]
                tables = [table for side in sides if (table := self._table(side)) is not None and table.shape == rows]
                if len(tables) == 2 and all((t[:, ::2] == t[:, 1::2]).all() for t in tables):
                    self._replace(node, value, [np.ascontiguousarray(t[:, ::2]) for t in tables])

    def _replace(self, add: ir.Node, value: ir.Value, tables: list[Table]) -> None:
        """Put one node in the place of `add`, which rotates `value [B, N, S, d]` by tables [S, d/2]."""
        result, before = add.outputs[0], add
        casts = [node for node in (by(value, "Cast"), only_reader(result, "Cast")) if node is not None]
        raw = casts[0].inputs[0] if len(casts) == 2 else value
        end = casts[1].outputs[0] if len(casts) == 2 else result
        if raw is not None and (joint := _joint(raw, end)) is not None:
            whole, rows, last = joint
            tables = [
                np.concatenate([np.full((rows, t.shape[1]), n, np.float32), t]) for n, t in zip((1, 0), tables, strict=True)
            ]
            value, result, before = whole, last.outputs[0], last
            if len(casts) == 2:
                widened = ir.node("Cast", [whole], {"to": int(ir.DataType.FLOAT)}, name=f"{result.name}.widen")
                value = _typed(widened, ir.DataType.FLOAT, whole.shape)
                self._graph.insert_before(before, widened)
        rotated = ir.node(
            "RotaryEmbedding", [value, *self._repeated(tables, value, before)], {"interleaved": 1}, name=f"{result.name}.rotary"
        )
        made = _typed(rotated, ir.DataType.FLOAT, value.shape)
        self._graph.insert_before(before, rotated)
        if result.dtype not in (None, ir.DataType.FLOAT):
            assert result.dtype is not None
            narrowed = ir.node("Cast", [made], {"to": int(result.dtype)}, name=f"{result.name}.narrow")
            made = _typed(narrowed, result.dtype, value.shape)
            self._graph.insert_before(before, narrowed)
        if result.is_graph_output():
            made.name, result.name = result.name, f"{result.name}.spelled"
        ir.convenience.replace_all_uses_with(result, made, replace_graph_outputs=True)

    def _repeated(self, tables: list[Table], value: ir.Value, before: ir.Node) -> list[ir.Value]:
        """Tables [B, S, d/2] for `value [B, N, S, d]`: the op takes no batch of 1 for B."""
        assert value.shape is not None
        batch = value.shape[0]
        key = (batch if isinstance(batch, int) or batch.value is not None else value, *(t.tobytes() for t in tables))
        if key not in self._made:
            name = f"rotary_{len(self._made)}"
            rows = constant(self._graph, f"{name}_rows", np.array(tables[0].shape, np.int64))
            first = ir.node("Shape", [value], {"start": 0, "end": 1}, name=f"{name}_batch")
            sizes = ir.node("Concat", [named(first), rows], {"axis": 0}, name=f"{name}_sizes")
            nodes = [first, sizes]
            for kind, table in zip(("cos", "sin"), tables, strict=True):
                held = constant(self._graph, f"{name}_{kind}", table[None])
                nodes.append(ir.node("Expand", [held, named(sizes)], name=f"{name}_{kind}_repeated"))
                _typed(nodes[-1], ir.DataType.FLOAT, ir.Shape([batch, *table.shape]))
            self._graph.insert_before(before, nodes)
            self._made[key] = [node.outputs[0] for node in nodes[2:]]
        return self._made[key]

    def _table(self, value: ir.Value) -> Table | None:
        """The initializer behind `value` as [S, d], if it is one up to leading axes of size 1."""
        rows = tuple(value.shape or ())[-2:]
        while (node := by(value, "Unsqueeze", "Identity")) is not None and node.inputs[0] is not None:
            value = node.inputs[0]
        if not value.is_initializer() or value.is_graph_input() or value.dtype != ir.DataType.FLOAT:
            return None
        if value not in self._read:
            assert value.name is not None
            array = self._outside(value.name) if value.const_value is None else value.const_value.numpy()
            fits = array is not None and array.shape[-2:] == rows and array.size == rows[0] * rows[1]
            self._read[value] = array.reshape(rows) if array is not None and fits else None
        return self._read[value]


def _rotation(add: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """The value and both tables, as the graph has them, if `add` makes x * cos + rotated(x) * sin."""
    muls = [by(value, "Mul") for value in add.inputs]
    if muls[0] is None or muls[1] is None:
        return None
    for straight, turned in (muls, muls[::-1]):
        assert straight is not None and turned is not None
        for (value, cos), (other, sin) in itertools.product(_orders(straight), _orders(turned)):
            source = _turned(other)
            if source is not None and _unwidened(value) is _unwidened(source):
                return value, cos, sin
    return None


def _orders(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    left, right = node.inputs
    if left is not None and right is not None:
        yield from ((left, right), (right, left))


def _turned(value: ir.Value | None) -> ir.Value | None:
    """x `[B, N, S, d]` where `value` is [-x1, x0, -x3, x2, ..] of its last axis; casts to fp32 aside."""
    if (whole := by(_unwidened(value), "Reshape")) is None or (stack := by(whole.inputs[0], "Concat")) is None:
        return None
    columns = [_column(side) for side in stack.inputs]
    minus = by(columns[0], "Neg")
    if len(columns) != 2 or minus is None or not is_last(stack.attributes["axis"].as_int(), stack.outputs[0]):
        return None
    pairs = _half(columns[1], 0)
    split = by(pairs, "Reshape")
    if pairs is None or split is None or _half(minus.inputs[0], 1) is not pairs or split.inputs[0] is None:
        return None
    source = split.inputs[0]
    sizes, back, cut = (tuple(v.shape or ()) for v in (source, whole.outputs[0], pairs))
    if len(sizes) != 4 or sizes != back or not isinstance(sizes[3], int):
        return None
    return source if cut == (*sizes[:3], sizes[3] // 2, 2) else None


def _column(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is x with a last axis of size 1 added."""
    node = by(value, "Unsqueeze")
    return node.inputs[0] if node is not None and is_last(_int(node.inputs[1]), node.outputs[0]) else None


def _half(value: ir.Value | None, index: int) -> ir.Value | None:
    """`pairs` where `value` is `pairs[..., index]`."""
    squeeze = by(value, "Squeeze")
    piece = by(squeeze.inputs[0], "Slice") if squeeze is not None else None
    if squeeze is None or piece is None or piece.inputs[0] is None:
        return None
    if len(squeeze.inputs) != 2 or not is_last(_int(squeeze.inputs[1]), piece.outputs[0]):
        return None
    start, end, axis, step = _slice(piece)
    return piece.inputs[0] if (start, end, step) == (index, index + 1, 1) and is_last(axis, piece.inputs[0]) else None


def _joint(part: ir.Value, rotated: ir.Value) -> tuple[ir.Value, int, ir.Node] | None:
    """(x, t, the Concat) where `rotated`, made of `part` = x[:, :, t:], is read only to be joined to x[:, :, :t] again."""
    join, tail = only_reader(rotated, "Concat"), by(part, "Slice")
    if join is None or tail is None or len(join.inputs) != 2 or join.inputs[1] is not rotated:
        return None
    head, whole = by(join.inputs[0], "Slice"), tail.inputs[0]
    if head is None or whole is None or head.inputs[0] is not whole or join.attributes["axis"].as_int() not in (2, -2):
        return None
    length = whole.shape[2] if whole.shape is not None and len(whole.shape) == 4 else None
    first, rest = _slice(head), _slice(tail)
    rows, end = first[1], rest[1]
    if not isinstance(length, int) or rows is None or end is None or not 0 < rows < length <= end:
        return None
    return (whole, rows, join) if first in _along(0, rows) and rest in _along(rows, end) else None


def _along(start: int, end: int) -> tuple[tuple[int, int, int, int], ...]:
    """What `_slice` says of rows `start` to `end` of the sequence of [B, N, S, d]."""
    return ((start, end, 2, 1), (start, end, -2, 1))


def _slice(node: ir.Node) -> tuple[int | None, int | None, int | None, int | None]:
    """Start, end, axis and step of a Slice along one axis."""
    start, end, axis, step = (_int(value) for value in [*node.inputs[1:], *[None] * 4][:4])
    return start, end, axis, 1 if len(node.inputs) < 5 else step


def _drop_expands(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Expand" or node.inputs[0] is None:
            continue
        value, (wide,) = node.inputs[0], node.outputs
        for use in list(wide.uses()):
            if use.node.op_type in REPEATING and _reaches(use.node.inputs[1 - use.idx], value, wide):
                use.node.replace_input_with(use.idx, value)


def _reaches(other: ir.Value | None, value: ir.Value, wide: ir.Value) -> bool:
    """Whether an op of `other` and `value` has the shape that it has with `value` expanded to `wide`."""
    if other is None or other.shape is None or value.shape is None or wide.shape is None:
        return False
    shapes = (list(reversed(shape)) for shape in (wide.shape, value.shape, other.shape))
    return all(
        _one(size, had) or _one(size, there)
        for size, had, there in itertools.islice(itertools.zip_longest(*shapes, fillvalue=1), len(wide.shape))
    )


def _one(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two sizes are known to be the same."""
    return a == b and (isinstance(a, int) or a.value is not None)


def _unwidened(value: ir.Value | None) -> ir.Value | None:
    """What `value` is cast from, if it is a cast to fp32."""
    node = by(value, "Cast")
    return node.inputs[0] if node is not None and node.attributes["to"].as_int() == ir.DataType.FLOAT else value


def _int(value: ir.Value | None) -> int | None:
    """The one integer that `value` holds."""
    held = value.const_value if value is not None else None
    return int(held.numpy().reshape(())) if held is not None and held.size == 1 else None


def _typed(node: ir.Node, kind: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    value = named(node)
    value.type, value.shape = ir.TensorType(kind), shape
    return value
