"""Products in 8 bits: which ones the pass takes, what it makes of odd graphs, and how far the demo's step is from float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from motionrt.export.engines.calibration import form_graph, tops_of
from motionrt.export.engines.graph import engine_graph, save
from motionrt.export.engines.quantised import (
    LEAST_SIDE,
    NothingToQuantise,
    channel_scales,
    codes_of,
    dynamic,
    products,
    static,
)
from motionrt.runtime.backends.onnxruntime import AS_WRITTEN
from motionrt.runtime.backends.tensorrt.engine_file import Span
from motionrt.runtime.bundle.bundle import Bundle

BUNDLE = Bundle.open(Path(__file__).resolve().parents[3] / "demo/bundle")
DYNAMIC_BOUND = 2.5e-2  # relative L2 of a step's outputs; 1.9e-2 was measured
STATIC_BOUND = 4e-2  # of scales that are not fitted to the noise it is tried on
Arrays = dict[str, np.ndarray[Any, Any]]


def run(model: ir.Model, path: Path, feed: Arrays) -> Arrays:
    """The outputs in ONNX Runtime, of the bytes that would be kept."""
    save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry(*AS_WRITTEN)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([port.name for port in session.get_outputs()], session.run(None, feed), strict=True))


def far(want: Arrays, got: Arrays) -> float:
    """The largest relative L2 distance of an output."""
    return max(float(np.linalg.norm(got[name] - value) / np.linalg.norm(value)) for name, value in want.items())


def noise(name: str = "step") -> Arrays:
    rng = np.random.default_rng(0)
    return {p.name: rng.standard_normal([d.opt for d in p.dims]).astype(p.dtype) for p in BUNDLE.graph(name).inputs}


def made(
    weights: list[np.ndarray[Any, Any]], *, dtype: int = TensorProto.FLOAT, gemm: bool = False, rows: int = 32,
) -> ir.Model:  # fmt: skip
    """An engine graph: x [2, rows, K] (or [rows, K]) through weights [K, N], one after the other, each stored in `dtype`."""
    lead = [rows] if gemm else [2, rows]
    stored = {TensorProto.FLOAT: np.float32, TensorProto.BFLOAT16: ml_dtypes.bfloat16, TensorProto.FLOAT16: np.float16}[dtype]
    nodes, kept, value = [], [], "x"
    for i, weight in enumerate(weights):
        array = weight.astype(stored)
        kept.append(helper.make_tensor(f"w{i}", dtype, array.shape, array.tobytes(), raw=True))
        nodes.append(helper.make_node("Cast", [f"w{i}"], [f"f{i}"], to=TensorProto.FLOAT))
        if gemm:
            kept.append(numpy_helper.from_array(np.linspace(-1, 1, weight.shape[0], dtype=np.float32), f"b{i}"))
            nodes.append(helper.make_node("Gemm", [value, f"f{i}", f"b{i}"], [f"y{i}"], f"product{i}", transB=1))
        else:
            nodes.append(helper.make_node("MatMul", [value, f"f{i}"], [f"y{i}"], f"product{i}"))
        value = f"y{i}"
    width = weights[0].shape[1 if gemm else 0]
    graph = helper.make_graph(
        nodes, "made", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*lead, width])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)], kept,
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return engine_graph(ir.serde.deserialize_model(proto), ({"x": Span(*[(*lead, width)] * 3)},), "float32")


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0]), np.float32)


def test_the_demos_step_has_its_linear_layers_in_int8_and_nothing_else(tmp_path: Path) -> None:
    """6 layers in each of 4 blocks: not the last product, nor those of the motion path, whose operands are no weights."""
    model = form_graph(BUNDLE, "step", "float32")
    before = Counter(node.op_type for node in model.graph)
    names = [product.weight for product in products(model)]
    assert len(names) == 24 and all("transformer_blocks" in name for name in names)
    assert dynamic(model) == 24
    after = Counter(node.op_type for node in model.graph)
    assert after["MatMulInteger"] == 24 and after["MatMul"] == before["MatMul"] - 24
    assert after["DynamicQuantizeLinear"] == 16, "q, k and v share what they read"
    assert {op: count for op, count in before.items() if op not in ("MatMul", "Cast", "Mul")}.items() <= after.items()
    feed = noise()
    want = run(form_graph(BUNDLE, "step", "float32"), tmp_path / "exact.onnx", feed)
    got = run(model, tmp_path / "ours.onnx", feed)
    assert 1e-5 < far(want, got) < DYNAMIC_BOUND
    assert (tmp_path / "ours.onnx").stat().st_size < 0.5 * (tmp_path / "exact.onnx").stat().st_size


def test_static_int8_is_near_with_scales_that_were_seen(tmp_path: Path) -> None:
    feed, plain = noise(), form_graph(BUNDLE, "step", "float32")
    reads = {product.weight: str(product.node.inputs[0].name) for product in products(plain)}
    plain.graph.outputs.extend(dict.fromkeys(product.node.inputs[0] for product in products(plain)))
    want = run(plain, tmp_path / "exact.onnx", feed)
    amax = {weight: tops_of(want[name])[1] for weight, name in reads.items()}
    model = form_graph(BUNDLE, "step", "float32")
    assert static(model, amax, "int8") == 24
    counts = Counter(node.op_type for node in model.graph)
    assert counts["QuantizeLinear"] == 16 and counts["DequantizeLinear"] == 16 + 24
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = node.inputs[2].const_value
            assert zero.dtype == ir.DataType.INT8 and not zero.numpy().any()
    got = run(model, tmp_path / "ours.onnx", feed)
    assert 1e-5 < far({name: want[name] for name in got}, got) < STATIC_BOUND


@pytest.mark.parametrize("again", [False, True], ids=["of two weights", "of one weight, used twice"])
def test_a_product_that_reads_another_ones_is_rounded_too(again: bool, tmp_path: Path) -> None:
    """As in a gradient, which multiplies by the transposes of two layers with nothing between them."""
    feed = {"x": random(2, 32, 80, seed=9)}

    def chain() -> ir.Model:
        model = made([random(80, 80, seed=seed) for seed in range(4)])
        first, second = (product.node for product in products(model))
        if again:
            second.replace_input_with(1, first.inputs[1])
        return model

    plain, model = chain(), chain()
    amax = {product.weight: 4.0 for product in products(plain)}
    assert static(model, amax, "int8") == 2
    counts = Counter(node.op_type for node in model.graph)
    assert counts["QuantizeLinear"] == 2 and counts["DequantizeLinear"] == 2 + len(amax)
    assert 1e-5 < far(run(plain, tmp_path / "exact.onnx", feed), run(model, tmp_path / "ours.onnx", feed)) < 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_scales_have_the_dtype_of_the_network_and_no_cast_stands_between(kind: str, dtype: str) -> None:
    model = form_graph(BUNDLE, "step", dtype)
    amax = {product.weight: 8.0 for product in products(model)}
    assert static(model, amax, kind) == 24
    wanted = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[dtype]
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert node.inputs[1].const_value.dtype == wanted
            assert [use.node.op_type for use in node.outputs[0].uses()] == ["MatMul"] * len(list(node.outputs[0].uses()))


@pytest.mark.parametrize("form", ["dynamic", "int8", "fp8"])
def test_the_same_graph_gives_the_same_bytes_and_a_second_pass_finds_nothing(form: str, tmp_path: Path) -> None:
    written = []
    for time in (0, 1):
        model = form_graph(BUNDLE, "step", "float32" if form == "dynamic" else "float16")
        quantise: Callable[[ir.Model], int] = dynamic if form == "dynamic" else lambda model: static(
            model, {product.weight: 3.0 for product in products(model)}, form
        )  # fmt: skip
        quantise(model)
        with pytest.raises(NothingToQuantise):
            dynamic(model)
        save(model, tmp_path / f"{time}.onnx")
        written.append((tmp_path / f"{time}.onnx").read_bytes())
    assert written[0] == written[1]
    onnx.checker.check_model(onnx.load_from_string(written[0]), full_check=form == "dynamic")


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("width", [64, 77, 131])
def test_weights_of_any_dtype_form_and_odd_size(width: int, gemm: bool, dtype: int, tmp_path: Path) -> None:
    """Between a first and a last product, which stay, one of odd width; a channel whose weights are all 0 stays 0."""
    middle = random(width, width, seed=1)
    middle[:, 5] = 0
    middle[:, 6] = 1e-9
    weights = [random(80, width), middle, random(width, 70, seed=2)]
    stored = [weight.T.copy() for weight in weights] if gemm else weights
    feed = {"x": random(*([33] if gemm else [2, 33]), 80, seed=3)}
    want = run(made(stored, dtype=dtype, gemm=gemm, rows=33), tmp_path / "exact.onnx", feed)
    for name, quantise in (("dynamic", dynamic), ("static", lambda model: static(model, {"w1": 4.0}, "int8"))):
        model = made(stored, dtype=dtype, gemm=gemm, rows=33)
        assert [product.weight for product in products(model)] == ["w1"]
        assert quantise(model) == 1
        got = run(model, tmp_path / "ours.onnx", feed)
        assert all(np.isfinite(value).all() for value in got.values())
        assert 0 < far(want, got) < 2.5e-2, name


def test_no_processor_saturates_what_is_measured(tmp_path: Path) -> None:
    """All of a row at the top: in 8 bits two of its products leave the 16 bits of x86 without VNNI, and come out at half."""
    weights = [np.ones((64, 64), np.float32) / 64] * 3
    feed = {"x": np.ones((2, 32, 64), np.float32)}
    want = run(made(weights), tmp_path / "exact.onnx", feed)
    model = made(weights)
    assert dynamic(model) == 1
    assert far(want, run(model, tmp_path / "ours.onnx", feed)) < 1e-3


def test_a_channel_of_zeros_has_scale_one_and_codes_never_leave_the_grid() -> None:
    weight = random(64, 3)
    weight[:, 0], weight[:, 1] = 0, 3e-12
    for kind, top, share in (("int8", 127, 0.01), ("int7", 64, 0.02), ("fp8", 448, 0.07)):
        for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            scales = channel_scales(weight, kind, dtype)
            assert scales[0] == 1 and (scales > 0).all()
            codes = codes_of(weight, scales, kind).astype(np.float32)
            assert np.abs(codes).max() <= top and not codes[:, 0].any()
            error = np.abs(codes * scales - weight)[:, 2].max()
            assert error <= np.abs(weight[:, 2]).max() * share


@pytest.mark.parametrize(
    ("shapes", "rows", "why"),
    [
        ([(80, 80), (80, 80)], 32, "only a first and a last one"),
        ([(80, LEAST_SIDE - 1), (LEAST_SIDE - 1, 80), (80, 80)], 32, "a small weight"),
        ([(80, 80), (80, 80), (80, 80)], 7, "few rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_pay_is_left_alone(shapes: list[tuple[int, int]], rows: int, why: str) -> None:
    model = made([random(*shape) for shape in shapes], rows=rows)
    assert products(model) == [], why
    with pytest.raises(NothingToQuantise, match=f"no weight of {LEAST_SIDE} by {LEAST_SIDE} or more"):
        dynamic(model)
    with pytest.raises(NothingToQuantise):
        static(model, {}, "int8")


def test_a_weight_with_three_dimensions_and_a_product_of_two_results_are_left_alone() -> None:
    model = made([random(80, 80), random(80, 80), random(80, 80)])
    (product,) = products(model)
    weight = product.node.inputs[1]
    weight.const_value = ir.tensor(np.stack([weight.const_value.numpy()] * 2), name=weight.name)
    assert products(model) == []
    model = made([random(80, 80), random(80, 80), random(80, 80)])
    (product,) = products(model)
    product.node.replace_input_with(1, product.node.inputs[0])
    assert products(model) == []


def test_scales_of_another_graph_are_refused_and_skipped_ones_stay() -> None:
    weights = [random(80, 80, seed=seed) for seed in range(4)]
    with pytest.raises(ValueError, match="1 products that the graph has not got, such as 'elsewhere'"):
        static(made(weights), {"w1": 1.0, "elsewhere": 1.0}, "int8")
    model = made(weights)
    assert dynamic(model, skip={"w1"}) == 1 and [node.name for node in model.graph if node.op_type == "MatMul"] == [
        "product0", "product1", "product3",
    ]  # fmt: skip
    with pytest.raises(NothingToQuantise):
        dynamic(made(weights), skip={"w1", "w2"})


def test_percentiles_leave_out_what_sticks_out() -> None:
    numbers = np.linspace(-1, 1, 100_001, dtype=np.float32).reshape(1, -1)
    numbers[0, 7] = 1000
    largest, top = tops_of(numbers)
    assert largest == 1000 and 0.99 < top <= 1
    assert tops_of(np.array([[3.0, -4.0]], np.float32)) == (4.0, 4.0)
    assert tops_of(np.zeros((2, 2), np.float32)) == (0.0, 0.0)
