"""The kernel as a TensorRT plugin, without TensorRT: its PTX, launch parameters and arguments; and that they compute the op."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("torch")
from motionrt.kernels import tensorrt_plugin as plugin

SHAPE = (128, 4, 8, 32)  # D, N, M, d
INTERPRETED = """
import torch
from motionrt.kernels.motion_cross_attention import reference
from motionrt.kernels.motion_cross_attention_triton import constants, motion_cross_attention_kernel as kernel
from motionrt.kernels.tensorrt_plugin import SCALARS, scalar_arguments
from motionrt.kernels.tiles import choose_tile

def error(batch, length, inner, heads, tokens, width, shared):
    hidden, scale, residual = torch.randn(batch, length, inner), torch.tensor(0.7), inner == heads * width
    folded, values = torch.randn(1 if shared else batch, inner, heads * tokens), torch.randn(batch, heads, tokens, width)
    rows = folded.transpose(1, 2).contiguous()  # what the Transpose before the plugin gives
    tile = choose_tile(89, torch.float32, inner, heads, tokens, width)
    groups = -(-heads // tile.heads)
    out = torch.full((batch, length, heads * width), float("nan"))
    given = scalar_arguments((inner, heads, tokens, width), groups, length, folded.shape[0] == 1, values.shape[0] == 1)
    kernel[(-(-length // tile.rows) * groups, batch)](
        hidden, rows, values, scale, *(given[name] for name in SCALARS), out,
        **constants(tile, tokens, width, inner, torch.float32, residual),
    )
    wanted = reference(hidden.double(), folded.double(), values.double(), scale.double(), residual)
    return float((out - wanted).abs().max())

torch.manual_seed(0)
print(error(2, 17, 64, 2, 5, 32, True), error(1, 20, 32, 2, 9, 8, False))
"""


def test_kernel_and_scalars_compute_the_op() -> None:
    """With A shared by a batch, and without the residual; under Triton's interpreter, which wants a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(float(error) < 1e-4 for error in done.stdout.split()), done.stdout  # NaN, of a poisoned output, fails too


class Symbol:
    """A size in TensorRT's arithmetic; `fixed` where the engine's profiles agree on it."""

    def __init__(self, value: int, fixed: bool = True) -> None:
        self.value, self.is_constant = value, fixed

    def constant_value(self) -> int:
        assert self.is_constant
        return self.value

    def __mul__(self, other: Any) -> Symbol:
        fixed = self.is_constant and getattr(other, "is_constant", True)
        return Symbol(self.value * int(getattr(other, "value", other)), fixed)


class TensorDesc:
    def __init__(self, shape: list[Symbol], dtype: str) -> None:
        self.shape_expr, self.dtype = shape, SimpleNamespace(name=dtype)

    def like(self) -> TensorDesc:
        return TensorDesc(list(self.shape_expr), self.dtype.name)


class SymExprs:
    def __init__(self, length: int) -> None:
        self.values: list[Any] = [None] * length

    def __setitem__(self, index: int, value: Any) -> None:
        assert isinstance(value, SymInt32), "TensorRT takes 32-bit integers only"
        self.values[index] = value.value


class SymInt32:
    def __init__(self, value: Any) -> None:
        self.value = getattr(value, "value", value)
        assert type(self.value) is int and -(2**31) <= self.value < 2**31


class KernelLaunchParams:
    def __init__(self) -> None:
        self.grid_x = self.grid_y = self.grid_z = self.block_x = self.block_y = self.block_z = 1
        self.shared_mem = 0


class FakePlugin:
    """`tensorrt.plugin`, as strict about signatures and annotations as the real one (11.4) is."""

    TensorDesc, SymExprs, SymIntExprs, SymInt32, KernelLaunchParams = (
        TensorDesc,
        SymExprs,
        SymExprs,
        SymInt32,
        KernelLaunchParams,
    )
    AutoTuneCombination = type("AutoTuneCombination", (str,), {})

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Callable[..., Any]]] = {}

    def cdiv(self, one: Symbol, other: int) -> Symbol:
        return Symbol(-(-one.value // other), one.is_constant)

    def register(self, identifier: str) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            assert identifier not in self.found, "registered twice"
            signature = inspect.signature(function)
            assert all(p.annotation is TensorDesc for p in signature.parameters.values())
            assert signature.return_annotation is TensorDesc
            self.found[identifier] = {"register": function}
            return function

        return decorate

    def _other(self, kind: str, names: str, returned: Callable[[Any], bool]) -> Callable[[str], Callable[[Any], Any]]:
        def named(identifier: str) -> Callable[[Any], Any]:
            def decorate(function: Any) -> Any:
                signature = inspect.signature(function)
                inputs = list(inspect.signature(self.found[identifier]["register"]).parameters)
                assert list(signature.parameters) == inputs + names.split()
                assert returned(signature.return_annotation)
                self.found[identifier][kind] = function
                return function

            return decorate

        return named

    @property
    def autotune(self) -> Any:
        return self._other("autotune", "outputs", lambda r: typing.get_origin(r) is list)

    @property
    def aot_impl(self) -> Any:
        wanted = (str, str, KernelLaunchParams, SymExprs)
        return self._other("aot_impl", "outputs tactic", lambda r: typing.get_args(r) == wanted)


def tensors(dtype: str = "HALF", length: int = 300, batch: int = 2, fixed: bool = True) -> list[TensorDesc]:
    inner, heads, tokens, width = SHAPE
    hidden = TensorDesc([Symbol(batch, False), Symbol(length, False), Symbol(inner, fixed)], dtype)
    folded = TensorDesc([Symbol(1), Symbol(heads * tokens), Symbol(inner)], dtype)
    values = TensorDesc([Symbol(batch), Symbol(heads), Symbol(tokens), Symbol(width)], dtype)
    return [hidden, folded, values, TensorDesc([], "FLOAT")]


@pytest.fixture(scope="module")
def registered() -> FakePlugin:
    fake = FakePlugin()
    plugin.register(89, plugin=fake)
    return fake


def test_register_declares_both_plugins(registered: FakePlugin) -> None:
    assert list(registered.found) == ["motionrt::motion_cross_attention", "motionrt::motion_cross_attention_residual"]
    for functions in registered.found.values():
        out = functions["register"](*tensors())
        assert [size.value for size in out.shape_expr] == [2, 300, 128]
        (combination,) = functions["autotune"](*tensors(), (out,))
        assert len(combination.split(",")) == 5 and "BF16" in combination


def test_aot_gives_ptx_and_launch_without_tensorrt(registered: FakePlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # whoever imports it fails
    functions = registered.found["motionrt::motion_cross_attention_residual"]
    given = tensors()
    name, ptx, launch, extra = functions["aot_impl"](*given, (functions["register"](*given),), 0)
    head = re.search(rf"\.visible \.entry {name}\((.*?)\)", ptx, re.DOTALL)
    assert head is not None and name == "motion_cross_attention_kernel"
    kinds = [line.split()[1] for line in head[1].split(",")]
    assert kinds == [".u64"] * 4 + [".u32"] * 13 + [".u64"], "inputs, scalars, output, and nothing that TensorRT does not pass"
    assert ".target sm_89" in ptx and ".version 8.0" in ptx and "call.uni" not in ptx
    assert (launch.grid_x.value, launch.grid_y.value) == (3, 2)  # 300 rows in tiles of 128, two of a batch
    assert f".reqntid {launch.block_x}" in ptx and launch.block_x == 128
    assert 0 < launch.shared_mem <= 101376
    assert dict(zip(plugin.SCALARS, extra.values, strict=True)) == {
        "length": 300, "inner": 128, "heads": 4, "groups": 1, "s_hidden_b": 38400, "s_hidden_l": 128, "s_folded_b": 0,
        "s_folded_c": 128, "s_values_b": 1024, "s_values_n": 256, "s_values_m": 32, "s_out_b": 38400, "s_out_l": 128,
    }  # fmt: skip


def test_aot_refuses_sizes_that_profiles_change(registered: FakePlugin) -> None:
    functions = registered.found["motionrt::motion_cross_attention"]
    with pytest.raises(ValueError, match="motion_cross_attention: D must be the same in every profile"):
        functions["aot_impl"](*tensors(fixed=False), (), 0)


@pytest.mark.parametrize(
    "target, version, message",
    [(75, None, "asked for sm_75; allowed: sm_80, sm_86"), (120, 80, "ptx_version is 80; sm_120 needs 87 or newer")],
)
def test_compile_refuses(target: int, version: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin.compile_kernel(target, "fp16", "fp32", SHAPE, True, version)


PTX = ".version 8.0\n.visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{\n ld.param [k_param_0];\n}"


def test_strip_scratch_takes_only_what_is_not_read() -> None:
    assert re.findall(r"k_param_\d", plugin.strip_scratch(PTX, "k", 1)) == ["k_param_0", "k_param_0"]
    assert plugin.strip_scratch(PTX, "k", 2) == PTX.replace("k_param_1\n", "k_param_1\n\n")
    with pytest.raises(ValueError, match="has 2 parameters and reads k_param_1; not 1"):
        plugin.strip_scratch(PTX.replace("[k_param_0]", "[k_param_1]"), "k", 1)
    with pytest.raises(ValueError, match="has 2 parameters and reads no other; not 3"):
        plugin.strip_scratch(PTX, "k", 3)
    with pytest.raises(ValueError, match="no entry other"):
        plugin.strip_scratch(PTX, "other", 1)


def test_available_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no plugins that Python can register" in str(plugin.available("rtx"))
    real = plugin.importlib.util.find_spec
    for missing, said in (("triton", "triton is not installed"), ("tensorrt", r"pip install motionrt[tensorrt]")):
        hidden = (missing, "tensorrt")
        monkeypatch.setattr("importlib.util.find_spec", lambda name, hidden=hidden: None if name in hidden else real(name))
        assert said in str(plugin.available("tensorrt"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt.plugin cannot be loaded" in str(plugin.available("tensorrt"))
    for name in ("tensorrt", "tensorrt.plugin"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__version__="10.6.0", __path__=[]))  # type: ignore[arg-type]
    assert "TensorRT 10.6.0 has no plugins ahead of time" in str(plugin.available("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", SimpleNamespace(aot_impl=None))  # type: ignore[arg-type]
    assert plugin.available("tensorrt") is None


def test_targets_are_those_of_the_kernel() -> None:
    from motionrt.kernels.artefacts import PTX_VERSION

    assert plugin.TARGETS == tuple(f"sm_{target}" for target in PTX_VERSION)
    assert "no tiles for sm_75, only for sm_80" in str(plugin.available("tensorrt", ["sm_75"]))


DEMO = Path(__file__).resolve().parents[2] / "demo" / "bundle"


@pytest.fixture(scope="module")
def step() -> Callable[[str], Any]:
    """The demo's step as a builder with the plugin sees it, in a dtype."""
    ir = pytest.importorskip("onnx_ir")
    from motionrt.export.engines.graph import engine_graph
    from motionrt.export.engines.profiles import profiles_of
    from motionrt.runtime.bundle.bundle import Bundle

    def make(dtype: str) -> Any:
        bundle = Bundle.open(DEMO)
        return engine_graph(ir.load(bundle.graph_path("step")), profiles_of(bundle.graph("step")), dtype, keep_ops=True)

    return make


def test_use_plugin_rewrites_the_demo_step(step: Callable[[str], Any]) -> None:
    model = step("float16")
    nodes = [node for node in model.graph if node.domain == plugin.DOMAIN]
    assert nodes and not model.functions
    for node in nodes:
        assert node.attributes["plugin_namespace"].as_string() == "motionrt"
        before = node.inputs[1].producer()
        assert before.op_type == "Transpose" and before.attributes["perm"].as_ints() == (0, 2, 1)
        assert {value.dtype.name for value in (*node.inputs, *node.outputs)} == {"FLOAT16"}
        assert list(node.outputs[0].shape) == list(node.inputs[0].shape)


def test_the_rewritten_step_is_the_step(step: Callable[[str], Any]) -> None:
    """With a body for the plugin's nodes that takes A as they do, ONNX Runtime gives what the bundle's graph gives."""
    onnx, ir, ort = (pytest.importorskip(name) for name in ("onnx", "onnx_ir", "onnxruntime"))
    import numpy as np

    from motionrt.export.onnx.functions import motion_cross_attention_function

    made = step("float32")
    ir.external_data.load_to_model(made)
    model = ir.to_proto(made)
    for residual in (False, True):
        body = motion_cross_attention_function(residual, 23)
        for node in body.node:
            node.input[:] = ["turned" if name == "folded" else name for name in node.input]
        body.node.insert(0, onnx.helper.make_node("Transpose", ["folded"], ["turned"], perm=[0, 2, 1]))
        body.attribute.extend(["plugin_namespace", "plugin_version"])
        model.functions.append(body)
    rng, results = np.random.default_rng(0), []
    feed = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    inputs = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in feed.items()}
    for graph in (model.SerializeToString(), str(DEMO / "graphs" / "step.onnx")):
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        results.append(session.run(["next_latents", "x0"], inputs))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_build_takes_the_plugin_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if RTX had plugins: what the builder's process would be given."""
    for package in ("tensorrt_rtx", "onnx_ir"):
        pytest.importorskip(package)
    import onnx_ir as ir

    from motionrt.export.engines import build as engine_build
    from motionrt.runtime.errors import EngineError, InputError

    bundle = Path(shutil.copytree(DEMO, tmp_path / "bundle"))
    seen: dict[str, Any] = {}

    def stop(name: str, job: dict[str, Any], place: Path, *rest: Any) -> Any:
        ours = [node.op_type for node in ir.load(place / "graph.onnx").graph if node.domain == plugin.DOMAIN]
        seen.update(job=job, ours=ours)
        raise EngineError("stopped here")

    def build(graph: str, kernel: str) -> None:
        list(engine_build.build_engines(bundle, engine_build.Options(("sm_89",), graphs=(graph,), kernel=kernel)))

    with pytest.raises(InputError, match="--kernel is 'fast'; allowed: auto, body, plugin"):
        build("step", "fast")
    with pytest.raises(EngineError, match="cannot be put into these engines: TensorRT-RTX has no plugins"):
        build("step", "plugin")
    monkeypatch.setattr(engine_build, "run_builder", stop)
    for able, graph, kernel, ours in (
        (True, "step", "auto", True),
        (True, "step", "body", False),
        (True, "text", "auto", False),
        (False, "step", "auto", False),
    ):
        monkeypatch.setattr(engine_build, "available", lambda *given, able=able: None if able else "it is not there")
        with pytest.raises(EngineError, match="stopped here"):
            build(graph, kernel)
        assert bool(seen["ours"]) == ours and ("plugin" in seen["job"]) == ours, (able, graph, kernel)
        if ours:
            assert seen["job"]["plugin"]["target"] == 89
            assert (Path(seen["job"]["plugin"]["path"]) / "motionrt" / "kernels" / "tensorrt_plugin.py").is_file()
            assert not set(seen["job"]["operators"]) & set(plugin.NAMES), "the parser's own list does not have them"


def test_the_builders_process_registers_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx_ir")
    from motionrt.export.engines import from_onnx as engine_from_onnx

    seen: list[int] = []
    monkeypatch.setattr(plugin, "register", seen.append)
    monkeypatch.setattr(sys, "path", list(sys.path))
    engine_from_onnx.register_plugin(path="/somewhere", target=90)
    assert seen == [90] and sys.path[-1] == "/somewhere"
