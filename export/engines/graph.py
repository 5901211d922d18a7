"""What an engine builder sees: a bundle's graph with its weights in it, our functions inlined, its sizes fixed.

A builder's parser must never meet a domain that it does not know: TensorRT-RTX aborts the whole process there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from motionrt.export.engines.precision import FOLDED, lazily, to_precision
from motionrt.kernels.tensorrt_plugin import NAMES, use_plugin
from motionrt.runtime.backends.tensorrt.engine_file import Profile

OURS = "motionrt"  # the domain of export/onnx/functions.py, which imports PyTorch; building an engine does not
OPSET_OF_ATTENTION = 23
FORMS = ("Cast", "Transpose", "Reshape")  # of weights
PROTOBUF_LIMIT = 2**31 - 2**26


def engine_graph(
    model: ir.Model, profiles: tuple[Profile, ...], dtype: str, external: Mapping[str, NDArray[Any]] | None = None,
    keep_ops: bool = False, wide: Sequence[str] = (),
) -> ir.Model:  # fmt: skip
    """Make `model` what the builder sees, in place. `external`: values of initializers that live outside of the graph.

    A size that is the same in every profile is written into the graph; `dtype` "float32", "float16" or "bfloat16"; `wide`:
    the graph's own islands (`GraphSpec.wide`).
    `keep_ops` leaves the nodes of our own domain that TensorRT has plugins for, as these take them
    (kernels/tensorrt_plugin.py).
    """
    for name, value in (external or {}).items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(np.asarray(value, order="C"), name=name)
    # Those that are kept stay to the end: shapes are inferred through their bodies
    common.InlinePass(criteria=lambda function: not (keep_ops and function.name in NAMES))(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for value in model.graph.inputs:
        spans = [profile[value.name] for profile in profiles]
        sides = zip(*(side for span in spans for side in (span.min, span.max)), strict=True)
        assert value.shape is not None
        value.shape = ir.Shape(sizes[0] if len(set(sizes)) == 1 else value.shape[i] for i, sizes in enumerate(sides))
    declared = [value.shape for value in model.graph.outputs]
    for value in model.graph.outputs:  # what inference says of them now, not what the exporter said of all sizes
        value.shape = None
    _fold_weights(model.graph)
    for index, value in enumerate(model.graph.outputs):
        if value.producer() is None:  # a weight or an input handed through: a network's output must be made in it
            through = ir.node("Identity", [value], name=f"{value.name}.through")
            (made,) = through.outputs
            made.type, made.name, value.name = value.type, value.name, f"{value.name}.inner"
            model.graph.append(through)
            model.graph.outputs[index] = made
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    common.ShapeInferencePass()(model)
    fuse_attention(model)
    common.ShapeInferencePass()(model)
    if dtype != "float32":
        to_precision(model, dtype, wide)
    if keep_ops:
        use_plugin(model)
    for value, shape in zip(model.graph.outputs, declared, strict=True):
        value.shape = value.shape if value.shape is not None else shape  # where inference cannot tell
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    model.graph.sort()
    return model


def _fold_weights(graph: ir.Graph) -> None:
    """Casts and changes of form of weights become the weights that are meant, so that each is stored once, in one precision."""
    for node in list(graph):
        if node.op_type not in FORMS or any(v is None or v.const_value is None or v.is_graph_input() for v in node.inputs):
            continue
        (result,), source = node.outputs, node.inputs[0].const_value
        if result.is_graph_output():
            continue
        shape, dtype = tuple(source.shape.numpy()), source.dtype
        if node.op_type == "Transpose":
            axes = node.attributes["perm"].as_ints()
            change, shape = (lambda array, axes=axes: array.transpose(axes)), tuple(shape[axis] for axis in axes)
        elif node.op_type == "Reshape":
            sizes = node.inputs[1].const_value.numpy()
            if (sizes == 0).any():  # means "as before" or "empty", by an attribute
                continue
            known = int(np.prod([size for size in sizes if size > 0], dtype=np.int64))
            shape = tuple(int(np.prod(shape, dtype=np.int64)) // known if size < 0 else int(size) for size in sizes)
            change = lambda array, shape=shape: array.reshape(shape)  # noqa: E731
        else:
            dtype = ir.DataType(node.attributes["to"].as_int())
            change = lambda array, dtype=dtype: array.astype(dtype.numpy())  # noqa: E731
        name = f"{node.inputs[0].name}{FOLDED}"
        while name in graph.initializers:
            name += "_"

        def make(source: Any = source, change: Any = change, name: str = name, dtype: ir.DataType = dtype) -> ir.Tensor:
            return ir.tensor(np.asarray(change(source.numpy()), order="C"), dtype=dtype, name=name)

        made = ir.Value(name=name, const_value=lazily(make, dtype, ir.Shape(shape), name))
        made.type, made.shape = ir.TensorType(dtype), ir.Shape(shape)
        graph.register_initializer(made)
        result.replace_all_uses_with(made)
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def fuse_attention(model: ir.Model) -> int:
    """Write `softmax(q k^T * scale + mask) v` on [B, N, L, d] as one Attention node, in place; how many were found.

    Exporters write it out where the module does. Only what the node can say is touched: a scalar scale, one mask, which
    is repeated for every query where it has one row for all: a mask of that form is not everywhere understood.
    """
    found = 0
    masks: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "Softmax" and (parts := _attention_parts(node)) is not None:
            query, keys, values, mask, scale, last = parts
            turned = ir.node("Transpose", [keys], {"perm": [0, 1, 3, 2]}, name=f"{node.name}.keys")
            turned.outputs[0].name = f"{node.outputs[0].name}.keys"
            if mask is not None:
                if mask not in masks:
                    masks[mask] = _mask_for_all(model.graph, mask, query, node)
                mask = masks[mask]
            fused = ir.node(
                "Attention", [query, turned.outputs[0], values, *([mask] if mask is not None else [])], {"scale": scale},
                name=f"{node.name}.attention",
            )  # fmt: skip
            fused.outputs[0].name = f"{last.outputs[0].name}.fused"
            model.graph.insert_before(last, [turned, fused])
            last.outputs[0].replace_all_uses_with(fused.outputs[0])
            model.graph.remove(last, safe=True)
            found += 1
    if found and model.graph.opset_imports[""] < OPSET_OF_ATTENTION:
        model.graph.opset_imports[""] = OPSET_OF_ATTENTION
    common.RemoveUnusedNodesPass()(model)
    return found


def _mask_for_all(graph: ir.Graph, mask: ir.Value, query: ir.Value, before: ir.Node) -> ir.Value:
    """`mask` as [.., Lq, Lk]: one that has a single row, repeated for the queries."""
    if mask.shape is None or mask.shape[-2] != 1:
        return mask
    one = ir.Value(name=f"{mask.name}.one", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    one.const_value = ir.tensor(np.array([1], np.int64), name=one.name)
    graph.register_initializer(one)
    length = ir.node("Shape", [query], {"start": 2, "end": 3}, name=f"{mask.name}.queries")
    length.outputs[0].name = length.name
    sizes = ir.node("Concat", [one, one, length.outputs[0], one], {"axis": 0}, name=f"{mask.name}.sizes")
    sizes.outputs[0].name = sizes.name
    rows = ir.node("Expand", [mask, sizes.outputs[0]], name=f"{mask.name}.rows")
    rows.outputs[0].name = rows.name
    graph.insert_before(before, [length, sizes, rows])
    return rows.outputs[0]


def _attention_parts(softmax: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value | None, float, ir.Node] | None:
    """Query, transposed keys, values, mask, scale and the last node of the attention around `softmax`, if it is one."""
    (weights,) = softmax.outputs
    axis, uses = softmax.attributes.get("axis"), list(weights.uses())
    if weights.is_graph_output() or len(uses) != 1 or (axis is not None and axis.as_int() not in (-1, 3)):
        return None
    if uses[0].node.op_type != "MatMul" or uses[0].idx != 0:
        return None
    last, scores, mask, scale = uses[0].node, softmax.inputs[0], None, 1.0
    if (add := _made_by(scores, "Add")) is not None:
        sides = [value for value in add.inputs if _made_by(value, "MatMul", "Mul", "Div") is not None]
        scaled = [value for value in sides if _score(value) is not None]
        if len(scaled) != 1:
            return None
        scores = scaled[0]
        (mask,) = (value for value in add.inputs if value is not scores)
    if (split := _score(scores)) is None:
        return None
    product, scale = split
    query, keys, values = product.inputs[0], product.inputs[1], last.inputs[1]
    ranks = {len(v.shape) if v is not None and v.shape is not None else None for v in (query, keys, values)}
    if ranks != {4} or product.outputs[0].is_graph_output() or last.outputs[0].is_graph_output():
        return None
    return query, keys, values, mask, scale, last


def _score(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    """The matrix product behind `value` and the scalar constant that scales it."""
    if (product := _made_by(value, "MatMul")) is not None:
        return product, 1.0
    node = _made_by(value, "Mul", "Div")
    if node is None or node.inputs[1] is None or node.inputs[1].const_value is None or node.inputs[1].const_value.size != 1:
        return None
    number = float(node.inputs[1].const_value.numpy().reshape(()))
    product = _made_by(node.inputs[0], "MatMul")
    return None if product is None else (product, number if node.op_type == "Mul" else 1.0 / number)


def _made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes `value`, if it is one of `ops` and nothing else reads the value."""
    if value is None or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    node = value.producer()
    return node if node is not None and node.op_type in ops else None


def save(model: ir.Model, path: Path) -> None:
    """Write the graph, the same bytes for the same graph; weights go beside it where protobuf could not hold them.

    Without notes, and without the shapes of inner values, which a parser infers itself.
    """
    for node in model.graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    beside = f"{path.stem}.weights" if size > PROTOBUF_LIMIT else None
    if beside is None:  # values that lie beside the bundle's graph come into this one
        ir.external_data.load_to_model(model)
    ir.save(model, path, external_data=beside)


def count_attentions(model: ir.Model) -> int:
    """How many Attention nodes the graph has."""
    return sum(node.op_type == "Attention" and node.domain == "" for node in model.graph)


def count_motion_ops(model: ir.Model) -> int:
    """How many nodes of our own domain the graph has, before they are inlined."""
    return sum(node.domain == OURS for node in model.graph)
