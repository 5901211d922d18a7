"""A bundle's graph in float64, by ONNX's own reference in NumPy: what two backends in float32 are both compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator


def in_float64(path: Path, inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs of the float32 graph `path` for `inputs`, with every number of it as float64. Convolutions take minutes."""
    model = inline_local_functions(onnx.load(path))
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if entry.type.tensor_type.elem_type == TensorProto.FLOAT:
            entry.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in model.graph.initializer:
        _widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
            elif attribute.name == "value_float":
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.array(attribute.f, np.float64))))
    feed = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in inputs.items()}
    results = ReferenceEvaluator(model).run(None, feed)
    assert all(result.dtype == np.float64 for result in results), "a float32 was left in it"
    return dict(zip([entry.name for entry in model.graph.output], results, strict=True))


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
