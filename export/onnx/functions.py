"""What torch.onnx sees in the place of ops: our fused ops, and assignments to a slice.

A fused op is a node of domain `motionrt`, and its meaning is a model-local function of standard ops. A runtime that knows the
node may take a kernel for it; every other one (ONNX Runtime, TensorRT) expands the function when it loads the graph, so no
plugin is needed. Scores and softmax are fp32 in it, as in the op. Sizes are read from the inputs, so that one body serves every
layer of a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor

import motionrt.kernels.motion_augmented_attention
import motionrt.kernels.motion_cross_attention  # noqa: F401  (defines the op)
from motionrt.export.onnx.augmented_function import augmented_function, augmented_name

DOMAIN = "motionrt"
VERSION = 1
NAME = "motion_cross_attention"


def translations() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export`: nodes of our domain for our ops."""
    import onnxscript

    domain = onnxscript.values.Opset(DOMAIN, VERSION)

    def node(name: str, *inputs: Any) -> Any:
        parameter, kinds = onnx.defs.OpSchema.FormalParameter, ["tensor(float)", "tensor(int64)"]
        typed = {f"T{index}": kinds for index in range(len(inputs) + 1)}  # each of its own type
        first, *others = (parameter(f"x{index}", kind) for index, kind in enumerate(typed))
        constraints = [(kind, kinds, "") for kind, kinds in typed.items()]
        schema = onnx.defs.OpSchema(name, DOMAIN, VERSION, inputs=others, outputs=[first], type_constraints=constraints)
        return onnxscript.values.Op(domain, name, schema)(*inputs)

    def cross(hidden: Any, folded: Any, values: Any, scale: Any, residual: bool) -> Any:
        """A function has no branches, so there are two."""
        return node(function_name(residual), hidden, folded, values, scale)

    def augmented(
        query: Any, keys: Any, values: Any, at_query: Any, at_keys: Any, at_values: Any, sources: Any, weights: Any,
        sums: Sequence[Any], beyond: Any, crossed: bool,
    ) -> Any:  # fmt: skip
        """A function has no lists either, so there is one for every depth of the table."""
        first = (query, keys, values, at_query, at_keys, at_values, sources, weights)
        return node(augmented_name(1 + len(sums), crossed), *first, *sums, beyond)

    return {
        torch.ops.motionrt.motion_cross_attention.default: cross,
        torch.ops.motionrt.motion_augmented_attention.default: augmented,
    }


def _joined(x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    """`x` with `part` in the place of x[start:end] along `dim`, joined from pieces; torch.onnx would scatter row by row."""
    start, end = start or 0, sys.maxsize if end is None else end
    if step != 1 or not 0 <= start <= end or not (end == sys.maxsize or isinstance(x.shape[dim], int)):
        return NotImplemented
    head = [torch.ops.aten.slice.Tensor(x, dim, 0, start)] if start > 0 else []
    tail = [torch.ops.aten.slice.Tensor(x, dim, end, sys.maxsize)] if end < sys.maxsize and end < x.shape[dim] else []
    return torch.cat([*head, part, *tail], dim)


# Decompositions to run before `torch.onnx.export`.
JOINS: dict[Any, Callable[..., Any]] = {torch.ops.aten.slice_scatter.default: _joined}


def function_name(residual: bool) -> str:
    """The node's name: with or without the residual."""
    return f"{NAME}_residual" if residual else NAME


def motion_cross_attention_function(residual: bool, opset: int) -> onnx.FunctionProto:
    """out = residual * h + concat_n softmax(h A_n) (scale V_n); shapes as in kernels/motion_cross_attention.py."""

    def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs.split(), [output], **attributes)

    body = [
        node("Cast", "hidden", "hidden32", to=onnx.TensorProto.FLOAT),
        node("Cast", "folded", "folded32", to=onnx.TensorProto.FLOAT),
        node("MatMul", "hidden32 folded32", "columns"),  # [B, L, N*M]
        node("Shape", "values", "heads_tokens", start=1, end=3),
        node("Constant", "", "keep", value_ints=[0, 0]),
        node("Concat", "keep heads_tokens", "by_head", axis=0),
        node("Reshape", "columns by_head", "scores"),  # [B, L, N, M]
        node("Softmax", "scores", "weights32", axis=-1),
        node("CastLike", "weights32 hidden", "weights"),
        node("Transpose", "weights", "weights_by_head", perm=[0, 2, 1, 3]),
        node("CastLike", "scale hidden", "scale_like"),
        node("Mul", "values scale_like", "scaled_values"),  # not the result: M rows are fewer than L
        node("MatMul", "weights_by_head scaled_values", "attended"),  # [B, N, L, d]
        node("Transpose", "attended", "rows", perm=[0, 2, 1, 3]),
        node("Constant", "", "merged", value_ints=[0, 0, -1]),
        node("Reshape", "rows merged", "joined" if residual else "out"),  # [B, L, N*d]
    ]
    if residual:
        body.append(node("Add", "hidden joined", "out"))
    return helper.make_function(
        DOMAIN,
        function_name(residual),
        ["hidden", "folded", "values", "scale"],
        ["out"],
        body,
        [helper.make_opsetid("", opset)],
    )


def add_functions(model: onnx.ModelProto) -> None:
    """Give the model the functions of our domain that its nodes name, in place; nothing where it names none."""
    used = _names(model.graph.node)
    (opset,) = (o.version for o in model.opset_import if o.domain == "")
    functions = [f for f in (motion_cross_attention_function(r, opset) for r in (False, True)) if f.name in used]
    functions += [f for name in sorted(used) if (f := augmented_function(name, opset)) is not None]
    unknown = used - {f.name for f in functions}
    if unknown:
        raise ValueError(f"the graph has nodes of domain {DOMAIN} without a function: {', '.join(sorted(unknown))}")
    model.functions.extend(functions)
    if functions and not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))


def _names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {node.op_type for node in nodes if node.domain == DOMAIN}
