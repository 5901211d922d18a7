"""Modulated norms: folded they give the same numbers with two large nodes less, and what is no single row is let alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
import pytest
from onnx import TensorProto, helper

from motionrt.export.onnx.norms import fold_modulation

ROWS, WIDTH = 40, 16
KINDS: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def graph(
    shape: tuple[int, ...], *, bias: bool = True, shift: bool = True, kind: int = TensorProto.FLOAT, late: bool = False
) -> onnx.ModelProto:
    """norm(x) * m + a with m and a of `shape`; `late`: m is made behind the norm; the batch is dynamic."""
    x, y = (helper.make_tensor_value_info(n, kind, ["B", ROWS, WIDTH]) for n in "xy")
    rows = [helper.make_tensor_value_info(n, kind, shape) for n in ("m", "a")[: 1 + shift]]
    draw = np.random.default_rng(0)
    weights = [onnx.numpy_helper.from_array(draw.standard_normal(WIDTH).astype(KINDS[kind]), n) for n in ("w", "b")[: 1 + bias]]
    nodes = [helper.make_node("LayerNormalization", ["x", *(w.name for w in weights)], ["n"], axis=-1, epsilon=1e-5)]
    nodes += [helper.make_node("Neg", ["m"], ["k"])] if late else []
    nodes.append(helper.make_node("Mul", ["n", "k" if late else "m"], ["p" if shift else "y"]))
    nodes += [helper.make_node("Add", ["a", "p"], ["y"])] if shift else []
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x, *rows], [y], weights), opset_imports=[helper.make_opsetid("", 23)], ir_version=10
    )
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(made)
    return inferred


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    rewritten = ir.from_proto(model)
    fold_modulation(rewritten.graph)
    common.RemoveUnusedNodesPass()(rewritten)
    result: onnx.ModelProto = ir.to_proto(rewritten)
    return result


def run(model: onnx.ModelProto, batch: int, shape: tuple[int, ...], kind: int) -> Any:
    draw = np.random.default_rng(1)
    feed = {"x": (batch, ROWS, WIDTH), "m": shape, "a": shape}
    values = {name: draw.standard_normal(size).astype(KINDS[kind]) for name, size in feed.items()}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: values[i.name] for i in session.get_inputs()})[0]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, WIDTH), (1, WIDTH), (WIDTH,)])
def test_a_modulated_norm_is_one_norm(shape: tuple[int, ...], shift: bool, bias: bool, late: bool, kind: int) -> None:
    plain = graph(shape, bias=bias, shift=shift, kind=kind, late=late)
    ours = folded(plain)
    onnx.checker.check_model(ours, full_check=True)
    assert [n.op_type for n in ours.graph.node if "y" in n.output] == ["LayerNormalization"]
    assert Counter(n.op_type for n in ours.graph.node)["LayerNormalization"] == 1
    for batch in (1, 3):
        want, got = (run(model, batch, shape, kind).astype(np.float64) for model in (plain, ours))
        assert want.shape == got.shape and np.abs(want - got).max() <= 8 * np.finfo(KINDS[kind]).eps * np.abs(want).max()


@pytest.mark.parametrize("shape", [(1, ROWS, WIDTH), (1, ROWS, 1), (3, 1, WIDTH), (1,)])
def test_what_is_no_single_row_stays(shape: tuple[int, ...]) -> None:
    plain = graph(shape)
    assert [n.op_type for n in folded(plain).graph.node] == [n.op_type for n in plain.graph.node]


def test_a_norm_with_another_reader_stays() -> None:
    plain = graph((1, 1, WIDTH))
    plain.graph.output.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, ["B", ROWS, WIDTH]))
    assert [n.op_type for n in folded(plain).graph.node] == [n.op_type for n in plain.graph.node]
