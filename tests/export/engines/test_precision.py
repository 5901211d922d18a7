"""fp16 and bf16 graphs of the demo bundle: where the islands are, and that their numbers are no worse than those of eager mode.

The reference is the bundle's fp32 graph in ONNX Runtime. The yardstick is the same graph with every result rounded to the low
precision, which is what eager execution in that dtype computes; see tests/helpers/rounded_graph.py for how both run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from by_path import load_by_path
from onnx import TensorProto, helper, numpy_helper

from motionrt.export.engines.graph import count_attentions, engine_graph, fuse_attention, save
from motionrt.export.engines.precision import to_precision
from motionrt.export.engines.profiles import profiles_of
from motionrt.runtime.backends.onnx_weights import package_weights
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend
from motionrt.runtime.backends.precision import FULL, HEAVY
from motionrt.runtime.backends.tensorrt.engine_file import Span
from motionrt.runtime.bundle.bundle import Bundle

ROOT = Path(__file__).resolve().parents[3]
BUNDLE = Bundle.open(ROOT / "demo/bundle")
GRAPHS = tuple(name for name in BUNDLE.graphs if name != "step_extrapolated")  # which has no product: all of it stays float32
LOW = ("float16", "bfloat16")
EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
LOW_TYPE = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# How much of eager's error is left where fp32 islands matter most: sinusoids, the solver's update, sampling by coordinates.
ISLANDS_HELP = {"schedule": 0.6, "step": 0.8, "decode": 0.8}
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def rounded() -> ModuleType:
    return load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/rounded_graph.py")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], onnx.ModelProto]:
    """A graph of the demo bundle at its static profile as the builder sees it."""
    folder = tmp_path_factory.mktemp("converted")

    @lru_cache(maxsize=2)
    def convert(name: str, dtype: str) -> onnx.ModelProto:
        spec, path = BUNDLE.graph(name), BUNDLE.graph_path(name)
        external = package_weights(spec, path, BUNDLE.path) if spec.weights is not None else None
        save(engine_graph(ir.load(path), profiles_of(spec)[:1], dtype, external), folder / "graph.onnx")
        return onnx.load(folder / "graph.onnx")

    return convert


@pytest.fixture(scope="module")
def cases() -> Iterator[Callable[[str], tuple[Arrays, Arrays]]]:
    """Inputs and fp32 outputs of each graph; one graph's outputs are the next one's inputs, as in a request."""
    draw, backend = np.random.default_rng(3), OnnxRuntimeBackend(1)
    known: Arrays = {}

    def value(name: str, dtype: str, shape: tuple[int, ...], graph: str) -> np.ndarray[Any, Any]:
        if name in known and known[name].shape == shape:
            return known[name]
        if dtype == "int64":
            if name == "attention_mask":
                return np.concatenate([np.ones((shape[0], 12), np.int64), np.zeros((shape[0], shape[1] - 12), np.int64)], 1)
            if name in ("timestep", "timesteps"):
                return np.full(shape, 500)
            return draw.integers(1, 900 if graph == "text_query" else 20, shape)
        if name in ("image", "video"):
            return draw.random(shape, np.float32)
        return draw.standard_normal(shape).astype(np.float32)

    @cache
    def case(name: str) -> tuple[Arrays, Arrays]:
        for before in {"step": ("text", "encode", "schedule", "request"), "request": ("text", "encode")}.get(name, ()):
            _, results = case(before)
            known.update({key: array[0] if before == "schedule" else array for key, array in results.items()})
            if before == "text":
                known["negative_text"] = results["text"][:, ::-1].copy()
        spec = BUNDLE.graph(name)
        feed = {p.name: value(p.name, p.dtype, tuple(d.opt for d in p.dims), name) for p in spec.inputs}
        return feed, backend.load(BUNDLE, name)(feed)

    yield case


def worst(got: Arrays, wanted: Arrays) -> float:
    """The largest relative root mean square error of all outputs."""
    return max(
        float(np.sqrt(np.mean((got[n] - wanted[n]) ** 2, dtype=np.float64) / np.mean(wanted[n] ** 2, dtype=np.float64)))
        for n in wanted
    )


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "text_query" else ()) for n in GRAPHS])
def test_to_precision_is_no_worse_than_eager_in_that_dtype(
    name: str,
    converted: Callable[[str, str], onnx.ModelProto],
    cases: Callable[[str], tuple[Arrays, Arrays]],
    rounded: ModuleType,
) -> None:
    feed, wanted = cases(name)
    full = converted(name, "float32")
    assert worst(rounded.run(full, feed), wanted) <= 2e-5, "inlining, static sizes and fused attention change nothing in fp32"
    for dtype in LOW:
        ours = worst(rounded.run(rounded.emulate(converted(name, dtype), dtype), feed), wanted)
        eager = worst(rounded.run(rounded.all_low(full, dtype), feed), wanted)
        if name == "text_query":  # its mask is -3.4e38, which no eager fp16 or bf16 survives next to itself
            assert np.isnan(eager)
            eager = 2 * EPSILON[dtype]
        assert ours <= 1.3 * eager + 1e-5, (name, dtype, ours, eager)
        assert ours <= ISLANDS_HELP.get(name, 1.3) * eager, (name, dtype, ours, eager)
        assert ours >= 0.01 * EPSILON[dtype], f"{name} in {dtype} differs by {ours}: nothing was rounded"


@pytest.mark.parametrize("name", ["text", "cama", "decode", "step", "step_plain"])
def test_float16_graph_runs_as_it_is(
    name: str,
    converted: Callable[[str, str], onnx.ModelProto],
    cases: Callable[[str], tuple[Arrays, Arrays]],
    rounded: ModuleType,
) -> None:
    """The very file that the builder gets, in ONNX Runtime, which has fp16 kernels or widens where it has none."""
    feed, wanted = cases(name)
    assert worst(rounded.run(converted(name, "float16"), feed), wanted) <= 4 * EPSILON["float16"]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", GRAPHS)
def test_to_precision_types_and_islands(name: str, dtype: str, converted: Callable[[str, str], onnx.ModelProto]) -> None:
    model = converted(name, dtype)
    onnx.checker.check_model(model)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    graph = inferred.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    spec, low = BUNDLE.graph(name), LOW_TYPE[dtype]
    assert [(v.name, types[v.name]) for v in graph.input] == [(p.name, _type(p.dtype)) for p in spec.inputs]
    assert [(v.name, types[v.name]) for v in graph.output] == [(p.name, _type(p.dtype)) for p in spec.outputs]
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    heavy = 0
    for node in graph.node:
        assert node.domain == ""
        kinds = {types[n] for n in node.input if n and types[n] in floats}
        if node.op_type in HEAVY:
            heavy += 1
            assert kinds == {low}, node.name
        elif node.op_type in FULL:
            assert kinds <= {TensorProto.FLOAT}, node.name
    assert heavy > 0
    weights = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == low)
    wide = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == TensorProto.FLOAT)
    assert weights > 4 * wide, "weights are stored in the low precision"


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["step", "step_plain"])
def test_guidance_and_the_solver_stay_in_fp32(name: str, dtype: str, converted: Callable[[str, str], onnx.ModelProto]) -> None:
    """From the outputs back to the first heavy op there is no rounding but its own."""
    model = converted(name, dtype)
    made = {output: node for node in model.graph.node for output in node.output}
    read: set[str] = set()
    stack, ends, seen = [value.name for value in model.graph.output], set(), 0
    while stack:
        value = stack.pop()
        if value in read or value not in made:
            continue
        read.add(value)
        node = made[value]
        seen += 1
        if node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT:
            ends.add(made[node.input[0]].op_type)
            continue
        assert node.op_type not in HEAVY and not (node.op_type == "Cast" and node.attribute[0].i == LOW_TYPE[dtype])
        stack.extend(node.input)
    assert ends == {"MatMul"} and seen > 15, (ends, seen)
    assert {"guidance", "coefficients"} <= {n for node in model.graph.node for n in node.input if node.op_type != "Cast"}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_attention_is_one_node(name: str, converted: Callable[[str, str], onnx.ModelProto]) -> None:
    """What is left of Softmax is that of our own op, whose keys are as long as the model is wide."""
    source = onnx.load(BUNDLE.graph_path(name), load_external_data=False)
    spelled = sum(node.op_type == "Softmax" for node in source.graph.node)
    whole = sum(node.op_type == "Attention" for node in source.graph.node)
    ours = sum(node.domain == "motionrt" for node in source.graph.node)
    model = converted(name, "float16")
    assert sum(node.op_type == "Attention" for node in model.graph.node) == whole + spelled
    assert sum(node.op_type == "Softmax" for node in model.graph.node) == ours
    assert (name, spelled) in {("text_query", 6), (name, 0)} and (name != "step" or (whole, ours) == (4, 4))


def test_conversion_gives_the_same_bytes_again(converted: Callable[[str, str], onnx.ModelProto], tmp_path: Path) -> None:
    spec, path = BUNDLE.graph("step"), BUNDLE.graph_path("step")
    for index in range(2):
        save(engine_graph(ir.load(path), profiles_of(spec), "bfloat16"), tmp_path / f"{index}.onnx")
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def _type(dtype: str) -> int:
    return {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}[dtype]


def attention(
    scale: str = "Mul", mask: bool = True, axis: int = -1, reused: bool = False, factor: tuple[int, ...] = ()
) -> ir.Model:
    """softmax(q k^T * 0.5 + mask) v, spelled out; `reused`: the weights are an output too."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 5, 4]) for n in "qv"]
    ports.append(helper.make_tensor_value_info("kt", TensorProto.FLOAT, [2, 3, 4, 5]))
    ports.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, [2, 1, 1, 5]))
    nodes = [
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node(scale, ["s", "c"], ["t"]),
        *([helper.make_node("Add", ["t", "m"], ["u"])] if mask else []),
        helper.make_node("Softmax", ["u" if mask else "t"], ["w"], axis=axis),
        helper.make_node("MatMul", ["w", "v"], ["y0"]),
        helper.make_node("Identity", ["y0"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 5, 4])]
    if reused:
        outputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3, 5, 5]))
    constant = numpy_helper.from_array(np.full(factor, 0.5, np.float32), "c")
    graph = helper.make_graph(nodes, "g", ports, outputs, [constant])
    return ir.from_proto(
        onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    )


@pytest.mark.parametrize(("scale", "mask"), [("Mul", True), ("Div", True), ("Mul", False)])
def test_fuse_attention_keeps_the_numbers(scale: str, mask: bool, rounded: ModuleType) -> None:
    draw = np.random.default_rng(0)
    feed = {
        name: draw.standard_normal(shape).astype(np.float32)
        for name, shape in (("q", (2, 3, 5, 4)), ("v", (2, 3, 5, 4)), ("kt", (2, 3, 4, 5)), ("m", (2, 1, 1, 5)))
    }
    plain, fused = attention(scale, mask), attention(scale, mask)
    assert fuse_attention(fused) == 1 and count_attentions(fused) == 1
    assert not any(node.op_type == "Softmax" for node in fused.graph)
    wanted, got = rounded.run(ir.to_proto(plain), feed), rounded.run(ir.to_proto(fused), feed)
    assert worst(got, wanted) < 1e-6


@pytest.mark.parametrize("changes", [{"axis": 2}, {"reused": True}, {"factor": (5, 5)}], ids=["axis", "weights read", "scale"])
def test_fuse_attention_leaves_what_the_node_cannot_say(changes: dict[str, Any]) -> None:
    model = attention(**changes)
    assert fuse_attention(model) == 0 and count_attentions(model) == 0


@pytest.mark.parametrize("dtype", LOW)
def test_a_masks_infinity_stays_finite(dtype: str, rounded: ModuleType) -> None:
    """A query that may look at nothing gives the mean, as in fp32: -3.4e38 is -inf in fp16 and in bf16, and that is NaN."""
    model = attention()
    graph = ir.to_proto(model)
    graph.graph.node.insert(0, helper.make_node("Mul", ["n", "m"], ["blocked"]))
    graph.graph.initializer.append(numpy_helper.from_array(np.array(np.finfo(np.float32).min), "n"))
    for node in graph.graph.node[1:]:
        node.input[:] = ["blocked" if name == "m" else name for name in node.input]
    model = ir.from_proto(onnx.shape_inference.infer_shapes(graph))
    fuse_attention(model)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    values = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    feed = {"q": values, "v": values, "kt": values.transpose(0, 1, 3, 2).copy(), "m": np.ones((2, 1, 1, 5), np.float32)}
    got = rounded.run(rounded.emulate(ir.to_proto(to_precision(model, dtype)), dtype), feed)["y"]
    assert np.isfinite(got).all()


def test_output_that_is_a_weight_is_made_in_the_graph(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]),
        ],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    span = Span((4, 4), (4, 4), (4, 4))
    save(engine_graph(model, ({"x": span},), "float16"), tmp_path / "graph.onnx")
    made = onnx.load(tmp_path / "graph.onnx")
    onnx.checker.check_model(made)
    assert [value.name for value in made.graph.output] == ["y", "w"]
    assert {"y", "w"} <= {name for node in made.graph.node for name in node.output}


def test_to_precision_refuses_branches() -> None:
    body = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(ValueError, match="branches or loops"):
        to_precision(ir.from_proto(helper.make_model(graph)), "float16")
