"""fp16 and bf16 graphs in fp32 arithmetic: every value of the low precision is rounded to it where it is made.

ONNX Runtime's CPU provider has no bf16 kernels. Products of two rounded numbers are exact in fp32 and tensor cores add them up
in fp32, so a graph of fp32 ops with a rounding after each says what the engine's arithmetic would, to the order of the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LOW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def emulate(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """A converted graph with every value of the low precision as a rounded fp32 one."""
    low = LOW[dtype]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    lows = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output) if v.type.tensor_type.elem_type == low}
    return _rewrite(model, low, lows)


def all_low(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """An fp32 graph as eager execution in the low precision runs it: the result of every op is rounded."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    floats = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    rounded = _rewrite(model, LOW[dtype], floats)
    for tensor in rounded.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(_round(numpy_helper.to_array(tensor), LOW[dtype]), tensor.name))
    return rounded


def _round(array: np.ndarray[Any, Any], low: int) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):
        return array.astype(helper.tensor_dtype_to_np_dtype(low)).astype(np.float32)


def _rewrite(model: onnx.ModelProto, low: int, lows: set[str]) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    del graph.node[:], graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == low:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for attribute in made.attribute:
            if made.op_type == "Cast" and attribute.name == "to" and attribute.i == low:
                attribute.i = TensorProto.FLOAT
        roundings = []
        for index, name in enumerate(node.output):
            if name in lows:
                made.output[index] = f"{name}.exact"
                roundings += [
                    helper.make_node("Cast", [f"{name}.exact"], [f"{name}.low"], to=low),
                    helper.make_node("Cast", [f"{name}.low"], [name], to=TensorProto.FLOAT),
                ]
        graph.node.extend([made, *roundings])
    return out


def run(model: onnx.ModelProto | Path, feed: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Run in ONNX Runtime with its rewrites off: they would take pairs of casts away."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))
