"""A step that differentiates as an engine is built of it: its islands, its numbers in float16 and bfloat16, and the build.

The model is a small MotionClone with random weights. References and yardstick are those of test_precision.py: the float32
graph, and the same graph with every result rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402

from motionrt.export.engines.checks import scan_operators  # noqa: E402
from motionrt.export.engines.graph import count_attentions, engine_graph, save  # noqa: E402
from motionrt.export.engines.process import run_builder  # noqa: E402
from motionrt.export.exporter import Writer  # noqa: E402
from motionrt.export.onnx.from_torch import Range  # noqa: E402
from motionrt.export.systems.motionclone.step import GUIDED, GuidedStep  # noqa: E402
from motionrt.export.systems.motionclone.unet import TappedUNet, motion_unet  # noqa: E402
from motionrt.export.systems.system import Array, Network, Step  # noqa: E402
from motionrt.runtime.backends.precision import FULL, HEAVY  # noqa: E402
from motionrt.runtime.backends.tensorrt.engine_file import Span  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[3]
LOW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
FLOATS = (TensorProto.FLOAT, *LOW.values())
FRAMES, SIZE, TOKENS, WIDTH, HEADS = 4, 8, 5, 12, 2
CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": WIDTH,
    "num_attention_heads": HEADS, "motion_num_attention_heads": HEADS, "use_motion_mid_block": False,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}  # fmt: skip
WEIGHT = 2000.0
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def rounded() -> ModuleType:
    return load_by_path(ROOT / "tests/helpers/rounded_graph.py")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of the graphs that the guided step is cut into, and their entries."""
    torch.manual_seed(0)
    unet = TappedUNet(motion_unet(CONFIG), block=0)
    motion = Array((1, unet.layers, (SIZE // 2) ** 2, HEADS, FRAMES, FRAMES))
    one, text = Array((1,)), Array((1, TOKENS, WIDTH))
    arrays = {"latents": Array((1, FRAMES, 4, SIZE, SIZE)), "coefficients": Array((1, 7)), "text": text, "negative_text": text}
    arrays |= {"motion_weights": motion, "motion_targets": motion}
    step = Step(
        Network(GuidedStep(unet).eval().requires_grad_(False)), GUIDED, {name: arrays.get(name, one) for name in GUIDED},
        ("next_latents", "energy"), {"steps": Range(1, 25, 1000)}, "_guided", gradient=True,
    )  # fmt: skip
    writer = Writer(tmp_path_factory.mktemp("guided"), False, lambda text: None)
    writer.cut(step)
    return writer.folder, writer.graphs


@pytest.fixture(scope="module")
def feed(written: tuple[Path, dict[str, Any]], rounded: ModuleType) -> Arrays:
    """What a step reads. Its coefficients leave of the next latents nothing but the weighted gradient."""
    folder, entries = written
    draw = np.random.default_rng(2)
    normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)  # noqa: E731
    seen = (1, 4, (SIZE // 2) ** 2, HEADS, FRAMES, FRAMES)
    chosen = np.eye(FRAMES, dtype=np.float32)[draw.integers(0, FRAMES, seen[:-1])]
    values: Arrays = {
        "latents": normal(1, FRAMES, 4, SIZE, SIZE), "coefficients": np.array([[0, 0, 0, 0, 0, 0, -1]], np.float32),
        "guidance": np.array([8.5], np.float32), "timestep": np.array([801], np.float32), "text": normal(1, TOKENS, WIDTH),
        "negative_text": normal(1, TOKENS, WIDTH), "weight": np.array([WEIGHT], np.float32),
        "motion_scale": np.ones(1, np.float32), "motion_weights": chosen,
        "motion_targets": (chosen * draw.uniform(0.3, 0.9, seen)).astype(np.float32),
    }  # fmt: skip
    for name in ("schedule_guided", "request_guided"):
        inputs = [port["name"] for port in entries[name]["inputs"]]
        values |= rounded.run(folder / "graphs" / f"{name}.onnx", {key: values[key] for key in inputs})
    return {port["name"]: values[port["name"]] for port in entries["step_guided"]["inputs"]}


@pytest.fixture(scope="module")
def converted(
    written: tuple[Path, dict[str, Any]], feed: Arrays, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, ir.Model]]:
    """The step in a dtype as a builder finds it, in a folder of its own."""

    @cache
    def convert(dtype: str) -> tuple[Path, ir.Model]:
        profile = {name: Span(value.shape, value.shape, value.shape) for name, value in feed.items()}
        model = engine_graph(ir.load(written[0] / "graphs" / "step_guided.onnx"), (profile,), dtype)
        save(model, (place := tmp_path_factory.mktemp(dtype)) / "graph.onnx")
        return place, model

    return convert


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """With a type for group norms, which ONNX's inference passes over; they are islands in every dtype."""
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    return model


def gap(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Relative root mean square error."""
    return float(np.sqrt(np.mean((found.astype(np.float64) - wanted) ** 2) / np.mean(wanted.astype(np.float64) ** 2)))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT / 1000])
def test_gradient_is_no_worse_than_eager_whatever_its_weight(
    dtype: str, weight: float, converted: Callable[[str], tuple[Path, ir.Model]], feed: Arrays, rounded: ModuleType
) -> None:
    feed = {**feed, "weight": np.array([weight], np.float32)}
    plain = typed(onnx.load(converted("float32")[0] / "graph.onnx"))
    model = typed(onnx.load(converted(dtype)[0] / "graph.onnx"))
    wanted, eager = rounded.run(plain, feed), rounded.run(rounded.all_low(plain, dtype), feed)
    assert np.abs(wanted["next_latents"]).max() > 1e-4 * weight / WEIGHT
    found = [rounded.run(rounded.emulate(model, dtype), feed)]
    found += [rounded.run(model, feed)] if dtype == "float16" else []  # which ONNX Runtime computes as it is
    for ours in found:
        for name, value in wanted.items():
            assert gap(ours[name], value) <= 1.3 * gap(eager[name], value), name
        flat, other = ours["next_latents"].astype(np.float64).ravel(), wanted["next_latents"].astype(np.float64).ravel()
        assert flat @ other / np.linalg.norm(flat) / np.linalg.norm(other) > 0.999


@pytest.mark.parametrize("dtype", LOW)
def test_statistics_probabilities_and_energy_are_float32_on_both_ways(
    dtype: str, converted: Callable[[str], tuple[Path, ir.Model]]
) -> None:
    model = typed(onnx.load(converted(dtype)[0] / "graph.onnx"))
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    counts = dict.fromkeys(("ConvTranspose", "MatMul", "Softmax", "ReduceMean", "Pow", "Sqrt"), 0)
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        kinds = {types[name] for name in node.input if name and types[name] in FLOATS}
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
        assert node.op_type not in HEAVY or kinds == {LOW[dtype]}, node.name
        assert node.op_type not in FULL or kinds <= {TensorProto.FLOAT}, node.name
    assert min(counts.values()) > 0, counts
    stack, seen, ends = ["energy"], set[str](), set[str]()
    while stack:  # from the energy back to the probabilities: no rounding
        name = stack.pop()
        if name in made and name not in seen:
            seen.add(name)
            assert types[name] not in LOW.values(), name
            if made[name].op_type == "Softmax":
                ends.add(name)
            else:
                stack.extend(made[name].input)
    assert len(ends) == 4, "one for each guided attention"


def test_tensorrt_rtx_builds_the_guided_step(converted: Callable[[str], tuple[Path, ir.Model]]) -> None:
    """In float16: TensorRT-RTX 1.7.1 has no transposed convolution in bfloat16."""
    dtype = "float16"
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT-RTX: `pip install motionrt[rtx]`", exc_type=ImportError)
    place, model = converted(dtype)
    shapes = {value.name: tuple(value.shape.numpy()) for value in model.graph.inputs if value.shape is not None}
    job = {
        "flavor": "rtx", "targets": ["sm_89", "sm_120"], "dtype": dtype, "operators": scan_operators(model, "step_guided"),
        "profiles": [{str(name): asdict(Span(shape, shape, shape)) for name, shape in shapes.items()}], "onnx": "graph.onnx",
        "once": False, "full": False, "dtypes": {},
    }  # fmt: skip
    result = run_builder("step_guided", job, place)
    assert result["attentions"] == count_attentions(model) > 0 and result["decomposed"] == 0
    assert (place / "engine").stat().st_size > 100_000
