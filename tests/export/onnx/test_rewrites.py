"""The rewrites of whole graphs: each keeps the numbers, shrinks what it should, and lets alone what it cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from diffusers.models.embeddings import apply_rotary_emb  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from motionrt.export.onnx import streamed as exporter  # noqa: E402
from motionrt.export.onnx.from_torch import Example, Range  # noqa: E402
from motionrt.export.onnx.rewrites import rewrite  # noqa: E402
from motionrt.export.onnx.streamed import stream_module, stream_real  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
TEXT, VIDEO, WIDTH = 3, 40, 16  # so that the tables are large enough to be held outside of a streamed graph


class Rotated(nn.Module):
    """Rotations of fp32 and of fp16 rows after the text, one assigned, one joined, and of all rows."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        angle = torch.randn(VIDEO, WIDTH // 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, dim=1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assigned = x.clone()
        assigned[:, :, TEXT:] = self.rotate(assigned[:, :, TEXT:])
        return assigned, torch.cat([y[:, :, :TEXT], self.rotate(y[:, :, TEXT:])], dim=2), self.rotate(z)

    def rotate(self, v: Tensor) -> Tensor:
        return apply_rotary_emb(v, (self.cos, self.sin))


def feed(batch: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    rows = {"x": TEXT + VIDEO, "y": TEXT + VIDEO, "z": VIDEO}
    values = {name: torch.randn(batch, 2, n, WIDTH, generator=draw) for name, n in rows.items()}
    return values | {"y": values["y"].half()}


EXAMPLES = [Example({"batch": b}, feed(b)) for b in (2, 3, 1)]
OUTPUTS = ("after text", "after text in fp16", "all rows")
Graphs = tuple[onnx.ModelProto, onnx.ModelProto]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """The graph before the rewrites, and the published one, which the exporter checked against PyTorch at three batches."""
    before: list[onnx.ModelProto] = []

    def spy(model: ir.Model, outside: Any) -> None:
        held_outside = [value for value in model.graph.initializers.values() if value.const_value is None]
        for value in held_outside:
            value.const_value = ir.tensor(outside(value.name))
        before.append(ir.to_proto(model))
        for value in held_outside:
            value.const_value = None
        rewrite(model, outside)

    path = tmp_path_factory.mktemp("rotated") / "graph.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "rewrite", spy)
        stream_real(path, Rotated(), EXAMPLES, OUTPUTS, {"batch": Range(1, 2, 4)})
    return before[0], onnx.load(path)


def run(model: onnx.ModelProto, inputs: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_a_rotation_is_one_node(graphs: Graphs) -> None:
    plain, model = graphs
    onnx.checker.check_model(model, full_check=True)
    counts = ops(model)
    assert ops(plain)["Neg"] == 3 and ops(plain)["RotaryEmbedding"] == 0
    assert counts["RotaryEmbedding"] == 3
    assert counts["Expand"] == 4, "tables with rows for text, and without: each repeated once"
    assert not counts.keys() & {"Neg", "Slice", "Split", "Squeeze", "Unsqueeze", "Reshape", "Mul", "Add"}
    assert counts["Cast"] == 2, "fp16 is rotated in fp32, as in the module"
    assert [value.name for value in model.graph.output] == list(OUTPUTS)
    tables = [tuple(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert sorted(tables) == sorted(2 * [(1, n, WIDTH // 2) for n in (VIDEO, TEXT + VIDEO)])


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_rotation_keeps_the_numbers(batch: int, graphs: Graphs) -> None:
    inputs = {name: value.numpy() for name, value in feed(batch).items()}
    for name, want, got in zip(OUTPUTS, *(run(model, inputs) for model in graphs), strict=True):
        step = np.finfo(want.dtype).eps * max(1.0, np.abs(want).max())
        assert got.dtype == want.dtype and got.shape == want.shape
        assert np.abs(got.astype(np.float64) - want).max() <= step, f"{name}: more than the last place of the largest"
        if name != "all rows":
            np.testing.assert_array_equal(got[:, :, :TEXT], want[:, :, :TEXT])


def changed(plain: onnx.ModelProto, change: Callable[[onnx.GraphProto], None]) -> tuple[Counter[str], Graphs]:
    """A graph as exported, changed, and what the rewrites make of that."""
    before = onnx.ModelProto()
    before.CopyFrom(plain)
    change(before.graph)
    model = ir.from_proto(before)
    rewrite(model)
    return Counter(node.op_type for node in model.graph), (before, ir.to_proto(model))


def test_pairs_that_differ_are_not_rotated_by_the_op(graphs: Graphs) -> None:
    """The op has one cosine for both of a pair."""

    def unpair(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                value = numpy_helper.to_array(tensor).copy()
                value[..., 5, 3] += 1e-3
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    counts, _ = changed(graphs[0], unpair)
    assert counts["RotaryEmbedding"] == 0 and counts["Neg"] == 3


def test_rows_that_are_joined_in_another_order_stay_apart(graphs: Graphs) -> None:
    """Rotated alone and joined as before, with the numbers of before."""

    def swap(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Concat" and any(a.name == "axis" and a.i == 2 for a in node.attribute):
                node.input[:] = list(node.input)[::-1]

    counts, (before, after) = changed(graphs[0], swap)
    assert counts["RotaryEmbedding"] == 3 and counts["Concat"] - counts["Shape"] == 2 and counts["Slice"] == 4
    inputs = {name: value.numpy() for name, value in feed(2).items()}
    for want, got in zip(run(before, inputs), run(after, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=float(4 * np.finfo(want.dtype).eps))


def repeated(other: list[Any], value: list[Any], wide: list[Any], op: str = "Mul", first: bool = False) -> ir.Model:
    """other op expand(value), as exporters write it, with the shapes given for its values."""
    float_ = TensorProto.FLOAT
    operands = ["wide", "other"] if first else ["other", "wide"]
    graph = helper.make_graph(
        [helper.make_node("Expand", ["value", "sizes"], ["wide"]), helper.make_node(op, operands, ["result"])],
        "g",
        [
            helper.make_tensor_value_info("other", float_, other),
            helper.make_tensor_value_info("value", float_, value),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [len(wide)]),
        ],
        [helper.make_tensor_value_info("result", float_, None)],
        value_info=[helper.make_tensor_value_info("wide", float_, wide)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


@pytest.mark.parametrize("first", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Div"])
@pytest.mark.parametrize(
    ("other", "value", "wide"),
    [(["b", 5, 4], [1, 1, 4], ["b", 1, 4]), ([2, 5, 4], [4], [2, 1, 4]), ([7, 2, 5], [2, 1], [2, 5])],
    ids=["a named size", "fewer axes", "a larger other"],
)
def test_an_expand_that_its_reader_repeats_goes(other: Any, value: Any, wide: Any, op: str, first: bool) -> None:
    model = repeated(other, value, wide, op, first)
    plain = ir.to_proto(model)
    rewrite(model)
    assert [node.op_type for node in model.graph] == [op]
    sizes = [[3 if size == "b" else size for size in shape] for shape in (other, value, wide)]
    draw = np.random.default_rng(0)
    inputs: dict[str, Any] = {
        name: draw.standard_normal(shape).astype(np.float32) for name, shape in zip(("other", "value"), sizes, strict=False)
    }
    inputs["sizes"] = np.array(sizes[2])
    (want,), (got,) = run(plain, inputs), run(ir.to_proto(model), inputs)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("other", "value", "wide"),
    [
        (["c", 5, 4], [1, 1, 4], ["b", 1, 4]),
        ([None, 5, 4], [1, 1, 4], [None, 1, 4]),
        ([1, 5, 4], [1, 1, 4], [2, 1, 4]),
        ([4], [1, 4], [2, 4]),
    ],
    ids=["another size", "unknown sizes", "only the expand repeats", "an axis that only the expand has"],
)
def test_an_expand_that_makes_the_shape_stays(other: Any, value: Any, wide: Any) -> None:
    model = repeated(other, value, wide)
    rewrite(model)
    assert [node.op_type for node in model.graph] == ["Expand", "Mul"]


def test_two_expands_of_one_op_do_not_both_go() -> None:
    graph = ir.to_proto(repeated(["b", 1, 4], [1, 1, 4], ["b", 1, 4]))
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph.graph.node.insert(0, helper.make_node("Expand", ["other", "sizes"], ["also wide"]))
    graph.graph.node[2].input[0] = "also wide"
    graph.graph.value_info.append(helper.make_tensor_value_info("also wide", TensorProto.FLOAT, ["b", 1, 4]))
    model = ir.from_proto(graph)
    rewrite(model)
    assert sorted(node.op_type for node in model.graph) == ["Expand", "Mul"]


def test_tables_that_are_held_outside_are_read_and_put_outside_again(tmp_path: Path) -> None:
    module, path = Rotated(), tmp_path / "graph.onnx"
    stream_module(path, module, EXAMPLES, OUTPUTS, lambda name: None, {"batch": Range(1, 2, 4)})
    model = onnx.load(path, load_external_data=False)
    assert ops(model)["RotaryEmbedding"] == 3 and ops(model)["Neg"] == 0
    held = load_file(path.with_suffix(".safetensors"))
    assert len(held) == 4, "and not the tables that they were made of"
    for name, first in (("cos", 1.0), ("sin", 0.0)):
        half = getattr(Rotated(), name)[:, ::2]
        wide = torch.cat([torch.full((TEXT, WIDTH // 2), first), half])
        for want in (half, wide):
            assert any(torch.equal(value, want[None]) for key, value in held.items() if key.endswith(name))
    assert all(len(t.raw_data) < 1024 for t in model.graph.initializer)
    loaded = onnx.load(path)
    inputs = {name: value.numpy() for name, value in feed(3).items()}
    for want, got in zip(module(*feed(3).values()), run(loaded, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * torch.finfo(want.dtype).eps)


def test_the_demos_step_has_two_rotations_per_block_and_no_expanded_modulation() -> None:
    """The committed bundle, as `demo/export.py` made it."""
    counts = ops(onnx.load(ROOT / "demo/bundle/graphs/step.onnx", load_external_data=False))
    assert counts["RotaryEmbedding"] == 2 * counts["Attention"] == 8
    # of tables and latents, for the two halves of guidance; of cos and sin, for a batch
    assert counts["Neg"] == 0 and counts["Expand"] == 4
