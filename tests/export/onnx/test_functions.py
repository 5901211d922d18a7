"""The op's node in ONNX and the function of standard ops behind it: parity in ONNX Runtime, which has no kernel of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from motionrt.export.onnx.augmented_function import augmented_name
from motionrt.export.onnx.from_torch import OPSET, Example, Range
from motionrt.export.onnx.functions import DOMAIN, add_functions, function_name, motion_cross_attention_function
from motionrt.export.onnx.streamed import stream_real
from motionrt.export.systems.motion_i2v.stencil import stencil
from motionrt.kernels.motion_augmented_attention import motion_augmented_attention
from motionrt.kernels.motion_augmented_attention import reference as augmented_reference
from motionrt.kernels.motion_cross_attention import motion_cross_attention, reference


class Step(nn.Module):
    """The op as the pass leaves it: A is K-major, one layer with the residual, one without."""

    def forward(self, hidden: Tensor, rows: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        first = motion_cross_attention(hidden, rows.transpose(1, 2), values, scale, True)
        return first, motion_cross_attention(first, rows.transpose(1, 2), values, scale, False)


def feed(length: int, batch: int, heads: int = 3, tokens: int = 5, width: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(length)
    inner = heads * width
    return {
        "hidden": torch.randn((batch, length, inner), generator=random),
        "rows": torch.randn((batch, heads * tokens, inner), generator=random),
        "values": torch.randn((batch, heads, tokens, width), generator=random),
        "scale": torch.tensor(0.7),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "step.onnx"
    examples = [Example({"length": n, "batch": b}, feed(n, b)) for n, b in ((6, 2), (9, 3), (17, 1))]
    ranges = {"length": Range(1, 6, 64), "batch": Range(1, 2, 4)}
    stream_real(path, Step(), examples, ("first", "second"), ranges)  # raises unless ONNX Runtime agrees at all three
    return path


class Assigned(nn.Module):
    """Columns of x, doubled in place: an output for each slice."""

    def __init__(self, slices: list[slice]) -> None:
        super().__init__()
        self.slices = slices

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = []
        for columns in self.slices:
            y = x + 1
            y[:, columns] = 2 * y[:, columns]
            made.append(y)
        return tuple(made)


@pytest.mark.parametrize(
    ("slices", "joined"),
    [
        ([slice(2, None), slice(0, 3), slice(1, 4), slice(2, 100), slice(None)], True),
        ([slice(4, 2), slice(-2, None), slice(1, -1), slice(0, None, 2)], False),
    ],
    ids=["can be", "cannot"],
)
def test_an_assignment_to_a_slice_is_a_join_where_it_can_be(slices: list[slice], joined: bool, tmp_path: Path) -> None:
    examples = [Example({"batch": n}, {"x": torch.arange(6.0 * n).reshape(n, 6)}) for n in (2, 3)]
    names = tuple(f"y{index}" for index in range(len(slices)))
    path = tmp_path / "graph.onnx"
    stream_real(path, Assigned(slices), examples, names, {"batch": Range(1, 2, 4)})  # raises where numbers differ
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not joined or "ScatterND" not in kinds


def test_stream_real_keeps_the_op_as_one_node_with_a_function(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    ours = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    assert ours == [function_name(True), function_name(False)]
    assert {(f.domain, f.name) for f in model.functions} == {(DOMAIN, name) for name in ours}
    flat = onnx.inliner.inline_local_functions(model)
    assert not flat.functions and {node.domain for node in flat.graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no residual"])
@pytest.mark.parametrize("kind", [np.float32, np.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shared", [True, False], ids=["A of batch 1", "A of batch B"])
def test_motion_cross_attention_function_in_onnx_runtime(residual: bool, kind: type[np.floating], shared: bool) -> None:
    """One node, fed at sizes that nothing was traced with, sharp logits; scores must not be rounded to fp16."""
    inputs = feed(13, 2)
    arrays = {name: value.numpy().astype(kind) for name, value in inputs.items()}
    arrays["rows"] = 5 * arrays["rows"][: 1 if shared else 2].transpose(0, 2, 1)
    names = ["hidden", "folded", "values", "scale"]
    arrays["folded"] = arrays.pop("rows")
    element = TensorProto.FLOAT if kind == np.float32 else TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node(function_name(residual), names, ["out"], domain=DOMAIN)],
        "one",
        [helper.make_tensor_value_info(n, element, [None] * arrays[n].ndim) for n in names],
        [helper.make_tensor_value_info("out", element, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    model.ir_version = 10
    add_functions(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, arrays)
    call = [torch.from_numpy(np.ascontiguousarray(arrays[n])) for n in names]
    truth = reference(*(x.double() for x in call), residual=residual).numpy()
    ours = reference(*call, residual=residual).numpy()
    assert got.dtype == kind
    assert np.abs(got - truth).max() <= 2 * np.abs(ours - truth).max() + 1e-6


AUGMENTED = ("query", "keys", "values", "at_query", "at_keys", "at_values", "sources", "weights")


def augmented_feed(grid: tuple[int, int], requests: int, branches: int, frames: int = 4) -> dict[str, Tensor]:
    """A call of the augmented attention by the names of the function's inputs; more sources than slots, and none."""
    random = torch.Generator().manual_seed(3)
    (height, across), heads, width = grid, 2, 8
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(across).float(), indexing="ij")
    noise = torch.rand((requests, frames - 1, 2, height, across), generator=random)
    table = stencil(torch.stack([-0.7 * x, -0.7 * y]) + noise)
    rows = (requests * branches, height * across, frames, heads, width)
    sizes = (*[rows] * 3, (frames, heads, width), *[(2 * frames - 1, heads, width)] * 2)
    given = [torch.randn(size, generator=random) for size in sizes]
    found = dict(zip(AUGMENTED, (*given, table.sources, table.weights), strict=True))
    return {**found, **{f"sums_{n}": index for n, index in enumerate(table.sums, 2)}, "beyond": table.beyond}


def augmented_by(form: Any, feed: dict[str, Tensor], crossed: bool) -> Any:
    tensors = list(feed.values())
    return form(*tensors[:8], tensors[8:-1], tensors[-1], crossed)


@pytest.mark.parametrize("crossed", [False, True], ids=["own", "crossed"])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("grid, levels", [((1, 2), 1), ((3, 4), 2), ((9, 8), 4)])
@pytest.mark.parametrize("requests, branches", [(1, 2), (2, 1), (2, 2)])
def test_augmented_function_in_onnx_runtime(
    grid: tuple[int, int], levels: int, kind: torch.dtype, crossed: bool, requests: int, branches: int
) -> None:
    given = augmented_feed(grid, requests, branches)
    feed = {name: value.to(kind) if value.is_floating_point() and name != "weights" else value for name, value in given.items()}
    name = augmented_name(1 + len(feed) - 9, crossed)
    assert name == augmented_name(levels, crossed)
    elements = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int64: TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(name, list(feed), ["out"], domain=DOMAIN)],
        "one",
        [helper.make_tensor_value_info(n, elements[v.dtype], [None] * v.ndim) for n, v in feed.items()],
        [helper.make_tensor_value_info("out", elements[kind], None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)])
    model.ir_version = 10
    add_functions(model)
    (function,) = model.functions
    onnx.checker.check_function(function)
    assert all(node.domain == "" and onnx.defs.has(node.op_type, OPSET) for node in function.node)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: value.numpy() for name, value in feed.items()})
    wide = {name: value.double() if value.is_floating_point() else value for name, value in feed.items()}
    truth = augmented_by(augmented_reference, wide, crossed).numpy()
    ours = augmented_by(augmented_reference, feed, crossed).numpy()
    assert got.dtype == ours.dtype
    assert np.abs(got - truth).max() <= 2 * np.abs(ours - truth).max() + 1e-6


class Augmented(nn.Module):
    """Two depths in one graph, one of them crossed."""

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        one, two = given[:10], given[10:]  # the first has one level of sums
        forms = ((one, False), (two, True))
        first, second = (motion_augmented_attention(*x[:8], list(x[8:-1]), x[-1], crossed) for x, crossed in forms)
        return first * 2, second


def test_stream_real_keeps_the_augmented_attention_as_nodes_with_functions(tmp_path: Path) -> None:
    def feed(branches: int) -> dict[str, Tensor]:
        one, two = (augmented_feed(grid, 1, branches) for grid in ((3, 4), (9, 8)))
        return {**{f"one_{name}": v for name, v in one.items()}, **{f"two_{name}": v for name, v in two.items()}}

    given = feed(2)
    stream_real(tmp_path / "step.onnx", Augmented(), [Example({}, given)], ("first", "second"), {})  # raises unless they agree
    model = onnx.load(tmp_path / "step.onnx")
    onnx.checker.check_model(model, full_check=True)
    ours = [node.op_type for node in model.graph.node if node.domain == DOMAIN]
    assert ours == [augmented_name(2, False), augmented_name(4, True)] and {f.name for f in model.functions} == set(ours)


def test_add_functions_refuses_a_node_that_has_none() -> None:
    graph = helper.make_graph([helper.make_node("fold", ["x"], ["y"], domain=DOMAIN)], "g", [], [])
    with pytest.raises(ValueError, match="nodes of domain motionrt without a function: fold"):
        add_functions(helper.make_model(graph))


def test_motion_cross_attention_function_is_of_standard_ops_only() -> None:
    for residual in (True, False):
        function = motion_cross_attention_function(residual, OPSET)
        onnx.checker.check_function(function)
        for node in function.node:
            assert node.domain == "" and onnx.defs.has(node.op_type, OPSET)


def test_tensorrt_rtx_builds_the_function_without_a_plugin(exported: Path) -> None:
    """An engine for sm_89, ahead of time: no GPU is needed, and no kernel of ours either."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(exported.read_bytes()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        port = network.get_input(index)
        dims = [tuple(port.shape)] * 3
        for axis in (n for n, size in enumerate(port.shape) if size == -1):
            spread = (1, 2, 4) if axis == 0 else (1, 6, 64)
            dims = [(*d[:axis], s, *d[axis + 1 :]) for d, s in zip(dims, spread, strict=True)]
        if -1 in tuple(port.shape):
            profile.set_shape(port.name, *dims)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
