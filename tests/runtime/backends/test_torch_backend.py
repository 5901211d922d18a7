"""The torch backend: the same results as ONNX Runtime end to end, the device seam, and plain words for what is wrong."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from PIL import Image  # noqa: E402
from pytest import MonkeyPatch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from motionrt.export.onnx.from_torch import Example, Range, dynamic_shapes  # noqa: E402
from motionrt.export.onnx.streamed import stream_real  # noqa: E402
from motionrt.export.onnx.torch_programs import ParityError, check_program, write_program  # noqa: E402
from motionrt.kernels import motion_cross_attention  # noqa: E402
from motionrt.runtime.backends import torch_backend  # noqa: E402
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend  # noqa: E402
from motionrt.runtime.backends.open import (  # noqa: E402
    RunOptions,
    open_backend,
)
from motionrt.runtime.backends.seam import Checked, fetch  # noqa: E402
from motionrt.runtime.backends.torch_backend import TorchBackend, TorchExecutor  # noqa: E402
from motionrt.runtime.backends.torch_program import load_program  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle, Dim, GraphSpec, Port  # noqa: E402
from motionrt.runtime.cli.main import main  # noqa: E402
from motionrt.runtime.dtypes import DTYPES  # noqa: E402
from motionrt.runtime.errors import BackendError, BackendWarning, BundleError, InputError  # noqa: E402
from motionrt.runtime.files import sha256_of  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

DEMO = Path(__file__).resolve().parents[3] / "demo"
LATENTS = (2, 4, 4, 4)
Edit = Callable[..., Path]


class FakeStep(nn.Module):
    """The `step` of tests/helpers/fake_bundle.py in torch."""

    def forward(
        self,
        latents: Tensor,
        previous_x0: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        modulation: Tensor,
        context: Tensor,
        negative_context: Tensor,
        image_latents: Tensor,
    ) -> tuple[Tensor, Tensor]:
        guided = negative_context + guidance[:, None] * (context - negative_context)
        v = latents * modulation.view(-1, 1, 4, 1, 1) + guided.view(-1, 1, 4, 1, 1) + image_latents
        p0, p1, c0, c1, c2, c3 = coefficients[:, :, None, None, None, None].unbind(1)
        x0 = p0 * latents + p1 * v
        return c0 * latents + c1 * x0 + c2 * previous_x0 + c3 * noise, x0


def step_feed(batch: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("latents", "previous_x0", "noise"), (batch, *LATENTS))
    shapes |= {"coefficients": (batch, 6), "guidance": (batch,), "modulation": (batch, 4)}
    shapes |= {"context": (batch, 4), "negative_context": (batch, 4), "image_latents": (batch, *LATENTS)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def fake_modules(module: nn.Module | None = None) -> dict[str, tuple[nn.Module, list[Example], Sequence[str]]]:
    examples = [Example({"B": batch}, step_feed(batch)) for batch in (2, 3)]
    return {"step": (module or FakeStep(), examples, ("next_latents", "x0"))}


@pytest.fixture(scope="module")
def fake_programs(fake_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake bundle with a program of its step, which has no weights. Shared: copy it before changing it."""
    path = tmp_path_factory.mktemp("programs") / "bundle"
    shutil.copytree(fake_bundle, path)
    module, examples, outputs = fake_modules()["step"]
    shapes = dynamic_shapes(module, examples, {"B": Range(1, 1, 4)})
    entry = write_program(path / "programs" / "step.pt2", module, examples[0].feed, outputs, shapes)
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["graphs"]["step"]["program"] = entry
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def edit_programs(fake_programs: Path, tmp_path: Path) -> Edit:
    def edit(change: Callable[[dict[str, Any]], object]) -> Path:
        path = tmp_path / "edited"
        shutil.copytree(fake_programs, path)
        manifest = json.loads((path / "bundle.json").read_text())
        change(manifest)
        (path / "bundle.json").write_text(json.dumps(manifest))
        return path

    return edit


def arrays(batch: int = 1, seed: int = 0) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in step_feed(batch, seed).items()}


def place(graph: Checked, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: graph.put(name, value) for name, value in values.items()}


def loop(step: Checked, seed: int = 0, steps: int = 5) -> NDArray[np.float32]:
    """The latents after `steps` steps: what all of them read and the tables are put once, as a pipeline does."""
    rng, feed = np.random.default_rng(seed), arrays(seed=seed)
    state = place(step, {name: feed[name] for name in ("context", "negative_context", "image_latents")})
    tables = {"modulation": (steps, 4), "coefficients": (steps, 6), "guidance": (steps,)}
    rows = place(step, {name: (0.5 * rng.standard_normal(shape)).astype(np.float32) for name, shape in tables.items()})
    latents, x0 = feed["latents"], np.zeros_like(feed["latents"])
    for t in range(steps):
        noise = np.random.default_rng(t).standard_normal((1, *LATENTS)).astype(np.float32)
        given = {name: table[t : t + 1] for name, table in rows.items()}
        results = step.run({**state, **given, "latents": latents, "previous_x0": x0, "noise": noise})
        latents, x0 = results["next_latents"], results["x0"]
    return np.asarray(latents)


# --- the same results as ONNX Runtime ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_bundle() -> Path:
    """The shipped bundle, whose loop has programs."""
    return DEMO / "bundle"


def test_the_demos_video_is_that_of_onnxruntime(demo_bundle: Path) -> None:
    """End to end from a prompt: the same references, latents and frames, motion on and off, both solvers."""
    image, prompt = DEMO / "inputs" / "red_star.png", "a red star slides straight to the left"
    latents: dict[str, list[NDArray[Any]]] = {"onnxruntime": [], "torch": []}
    frames: dict[str, list[NDArray[Any]]] = {"onnxruntime": [], "torch": []}
    for name in latents:
        backend = open_backend(RunOptions(name, threads=1, allow_onnxruntime=True))
        with MotionPipeline.from_bundle(demo_bundle, DEMO / "memory", backend=backend) as pipeline:
            assert (pipeline.graph("step").executor.device is not None) == (name == "torch")
            for options in ({}, {"motion_scale": 0.0}, {"solver": "dpm", "steps": 6, "references": 3}):
                job = pipeline.start(pipeline.request(image, prompt, seed=3, **options))
                job.keep = True
                for _ in job:
                    pass
                assert job.frames is not None
                latents[name].append(np.asarray(job.values["latents"]))
                frames[name].append(job.frames)
    for ours, theirs in zip(latents["torch"], latents["onnxruntime"], strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(frames["torch"], frames["onnxruntime"], strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize("precision", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_command_line_reaches_the_kernels_op(precision: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """From `generate` to the op that is the Triton kernel on CUDA and its reference on the CPU: once a block and step."""
    calls: list[str] = []
    plain = motion_cross_attention.reference
    monkeypatch.setattr(motion_cross_attention, "reference", lambda *a: (calls.append(str(a[0].dtype)), plain(*a))[1])
    with pytest.raises(SystemExit) as caught:
        main([
            "generate", "-b", str(DEMO / "bundle"), "-m", str(DEMO / "memory"), "-i", str(DEMO / "inputs" / "red_star.png"),
            "-p", "a red star slides straight to the left", "-o", str(tmp_path / "star.mp4"), "--steps", "3",
            "--backend", "torch", "--precision", precision, "--threads", "1",
        ])  # fmt: skip
    assert not caught.value.code and (tmp_path / "star.mp4").is_file()
    blocks, warmup = 4, 1
    assert calls == [f"torch.{precision}"] * blocks * (3 + warmup)


def demo_feed(name: str, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of a graph of the demo's bundle, of the sizes that it is tuned for; those of the step as a request makes them."""
    bundle, rng = Bundle.open(DEMO / "bundle"), np.random.default_rng(seed)
    feed: dict[str, NDArray[Any]] = {}
    for before in ("schedule", "request") if name == "step" else ():
        backend = OnnxRuntimeBackend(1)
        made = backend.load(bundle, before)(demo_feed(before, seed))
        feed |= {key: value[3:4] if before == "schedule" else value for key, value in made.items()}
    fixed = {"coefficients": [0.8, -0.6, 0.7, 0.3, 0.0, 0.0], "guidance": 2.0, "motion_scale": 1.0}
    for port in bundle.graph(name).inputs:
        if port.name == "timestep":
            feed[port.name] = np.linspace(990, 10, port.shape[0]).astype(port.dtype)
        elif port.name not in feed:
            value = fixed.get(port.name)
            drawn = rng.standard_normal(port.shape) if value is None else np.broadcast_to(value, port.shape)
            feed[port.name] = np.asarray(drawn, port.dtype)
    return {port.name: feed[port.name].reshape(port.shape) for port in bundle.graph(name).inputs}


@pytest.mark.parametrize("precision", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("name", ["schedule", "request", "step"])
def test_a_lower_precision_loses_no_more_than_plain_torch_in_it(name: str, precision: str, demo_bundle: Path) -> None:
    """Against the float32 graph; the yardstick is the same program with every weight and value in that dtype."""
    bundle, feed = Bundle.open(demo_bundle), demo_feed(name)
    want = OnnxRuntimeBackend(1).load(bundle, name)(feed)
    got = TorchBackend(precision=precision).load(bundle, name)(feed)
    kind, spec = getattr(torch, precision), bundle.graph(name)
    plain = load_program(
        bundle.program_path(name), name, bundle.path / spec.data.file, torch.device("cpu")  # type: ignore[union-attr]
    ).module.to(kind)
    for node in plain.graph.nodes:
        if node.kwargs.get("dtype") == torch.float32:
            node.kwargs = {**node.kwargs, "dtype": kind}
    plain.recompile()
    inputs = [torch.from_numpy(feed[key]) for key in bundle.programs[name].inputs]
    with torch.no_grad():
        rounded = plain(*(value.to(kind) if value.is_floating_point() else value for value in inputs))

    def error(value: Any, key: str) -> float:
        difference = np.asarray(value, np.float64) - want[key]
        return float(np.linalg.norm(difference) / max(np.linalg.norm(want[key].astype(np.float64)), 1e-30))

    for key, value in zip(bundle.programs[name].outputs, rounded, strict=True):
        ours, theirs = error(got[key], key), error(value.float().numpy(), key)
        assert got[key].dtype == np.float32 and ours <= 1.1 * theirs + 1e-7, (key, ours, theirs)
    worst = max(error(got[key], key) for key in want)
    assert worst > 0.01 * DTYPES[precision].epsilon, f"{name} differs by {worst}: nothing was rounded"


def test_weights_are_those_of_the_onnx_graph(demo_bundle: Path) -> None:
    """A bundle holds them once: in the file beside the graph, which the program names nothing of that is not there."""
    bundle = Bundle.open(demo_bundle)
    for name in ("schedule", "request", "step"):
        assert bundle.program_path(name).stat().st_size < 400_000
        with zipfile.ZipFile(bundle.program_path(name)) as archive:
            (weights,) = (n for n in archive.namelist() if n.endswith("model_weights_config.json"))
            assert json.loads(archive.read(weights))["config"] == {}


@pytest.mark.slow
def test_programs_take_every_declared_size(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    rng = np.random.default_rng(0)
    assert list(bundle.programs) == ["schedule", "request", "step", "step_extrapolated"]
    for name in bundle.programs:
        spec = bundle.graph(name)
        ours, theirs = TorchBackend().load(bundle, name), OnnxRuntimeBackend(1).load(bundle, name)
        for pick in ("min", "max"):
            feed = {}
            for port in spec.inputs:
                shape = tuple(min(getattr(d, pick), 9) if d.name == "steps" else getattr(d, pick) for d in port.dims)
                value = rng.uniform(-1, 1, shape) if port.dtype == "float32" else rng.integers(0, 40, shape)
                feed[port.name] = np.asarray(value, port.dtype)
            want = theirs(feed)
            for key, value in ours(feed).items():
                assert value.dtype == want[key].dtype
                limit = 1e-4 * max(1.0, float(np.abs(want[key]).max()))
                np.testing.assert_allclose(value, want[key], rtol=0, atol=limit, err_msg=f"{name} {key} {pick}")


def test_step_and_loop_give_what_onnxruntime_gives(fake_programs: Path) -> None:
    bundle = Bundle.open(fake_programs)
    ours, theirs = TorchBackend(threads=1).load(bundle, "step"), OnnxRuntimeBackend(1).load(bundle, "step")
    for batch in (1, 2):
        got, want = ours(arrays(batch)), theirs(arrays(batch))
        assert list(got) == list(want)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-6)
    np.testing.assert_allclose(loop(ours), loop(theirs), atol=1e-5)


# --- the device seam --------------------------------------------------------------------------------------------------


def fake_capture(call: Any, inputs: Any) -> Any:
    """A CUDA graph's manners on the CPU: fixed memory, and nothing but the buffers is read when it is replayed."""
    outputs = [value.clone() for value in call(*inputs)]

    def replay() -> None:
        for buffer, value in zip(outputs, call(*inputs), strict=True):
            buffer.copy_(value)

    return replay, outputs


def static_step(path: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(torch_backend, "capture", fake_capture)
    patch.setattr(torch, "compile", lambda call, **_: call)
    backend = TorchBackend()
    backend.mode = "graph"
    step = backend.load(Bundle.open(path), "step")
    assert step.executor.mode == "graph"  # type: ignore[attr-defined]
    return step


def test_static_buffers_change_nothing(fake_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, static = TorchBackend().load(Bundle.open(fake_programs), "step"), static_step(fake_programs, monkeypatch)
    for seed in (0, 1, 0):  # requests after one another: nothing of an earlier one stays behind
        np.testing.assert_array_equal(loop(static, seed), loop(eager, seed))
    np.testing.assert_array_equal(static(arrays(2))["x0"], eager(arrays(2))["x0"])  # another size: not captured


def test_state_is_copied_once_for_a_loop(fake_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = static_step(fake_programs, monkeypatch)
    copied: list[tuple[int, ...]] = []
    for buffer in static.executor._static.inputs:
        monkeypatch.setattr(buffer, "copy_", lambda value, b=buffer: (copied.append(b.shape), b.set_(value.clone())))
    loop(static, steps=5)
    assert copied.count((1, 4)) == 2 + 5  # context and negative context, each once, and a row of the modulation
    assert copied.count((1, 6)) == 5  # a row of the table, each step


def test_results_of_a_call_belong_to_the_caller(fake_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (TorchBackend().load(Bundle.open(fake_programs), "step"), static_step(fake_programs, monkeypatch)):
        first = step(arrays(seed=0))
        kept = {name: value.copy() for name, value in first.items()}
        stays = step.run(arrays(seed=0))
        step(arrays(seed=1))
        step.run({**arrays(seed=1), "latents": stays["next_latents"]})
        for name in kept:
            np.testing.assert_array_equal(first[name], kept[name])
            np.testing.assert_array_equal(fetch(stays[name]), kept[name])


def test_put_copies_and_takes_any_layout(fake_programs: Path) -> None:
    step = TorchBackend().load(Bundle.open(fake_programs), "step")
    feed = arrays()
    want = step(feed)["x0"]
    held = place(step, place(step, feed))  # twice is once
    for value in feed.values():
        value.fill(0)
    np.testing.assert_array_equal(fetch(step.run(held)["x0"]), want)
    flipped = {name: np.flip(value, 0) if value.ndim else value for name, value in arrays(2).items()}
    frozen = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in flipped.items()}
    for value in frozen.values():
        value.setflags(write=False)
    np.testing.assert_array_equal(step(flipped)["x0"], step(frozen)["x0"])
    assert place(OnnxRuntimeBackend(1).load(Bundle.open(fake_programs), "step"), feed) == feed


def test_a_value_loses_nothing_where_one_of_its_graphs_computes_in_less(fake_programs: Path) -> None:
    bundle, feed = Bundle.open(fake_programs), arrays()
    low, full = (TorchBackend(precision=precision).load(bundle, "step") for precision in ("bfloat16", "float32"))
    held = place(low, feed)
    low.run(held)
    assert place(full, held) == held
    for name, value in full(held).items():
        np.testing.assert_array_equal(value, full(feed)[name])
    for name, value in feed.items():
        np.testing.assert_array_equal(np.asarray(held[name]), value)


def test_compiled_step_equals_eager(fake_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, whose C++ compiler takes a minute on a small machine: what is tested is that one graph is traced."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    bundle = Bundle.open(fake_programs)
    compiled = TorchBackend(mode="compile").load(bundle, "step")
    assert compiled.executor.mode == "compile"  # type: ignore[attr-defined]
    np.testing.assert_allclose(loop(compiled), loop(TorchBackend().load(bundle, "step")), atol=1e-5)


class Product(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        assert torch.compiler.is_compiling() or video.stride(-2) == 1
        return 2 * video


def test_values_get_the_layout_that_the_program_was_traced_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that wants its matrices K-major must not copy them at each step, whatever the host's layout is."""
    dims = (Dim("", 3, 3, 3), Dim("", 5, 5, 5))
    spec = GraphSpec("g", "g.onnx", "", (Port("video", "float32", dims),), (Port("out", "float32", dims),))
    monkeypatch.setattr(torch_backend, "capture", fake_capture)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    value = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    for mode in ("eager", "graph"):
        executor = TorchExecutor(spec, Product(), {"video": torch.empty(5, 3).t()}, ("out",), torch.device("cpu"))
        executor.prepare(mode)
        graph = Checked(spec, executor)
        for given in (value, np.asfortranarray(value), value[::-1, ::-1]):
            np.testing.assert_array_equal(graph({"video": given})["out"], 2 * given)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "graph"])
def test_cuda_gives_what_the_cpu_gives(fake_programs: Path, mode: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    bundle = Bundle.open(fake_programs)
    step = TorchBackend("cuda", mode=mode, precision="float32").load(bundle, "step")
    assert step.executor.mode == mode  # type: ignore[attr-defined]
    for seed in (0, 1, 0):
        np.testing.assert_allclose(loop(step, seed), loop(TorchBackend().load(bundle, "step"), seed), atol=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
def test_demo_on_cuda_gives_what_onnxruntime_gives(demo_bundle: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    frames = []
    options = RunOptions("torch", "cuda", allow_onnxruntime=True, precision="float32")
    for backend in (OnnxRuntimeBackend(), open_backend(options)):
        with MotionPipeline.from_bundle(demo_bundle, DEMO / "memory", backend=backend) as pipeline:
            pipeline.warm()
            result = pipeline(DEMO / "inputs" / "red_star.png", "a red star slides straight to the left", seed=3)
            frames.append(result.frames.astype(int))
    assert np.abs(frames[0] - frames[1]).max() <= 2


# --- falling back, and bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["compile", "capture"])
def test_what_fails_falls_back_and_says_why(fake_programs: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such luck\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail if broken == "compile" else lambda call, **_: call)
    monkeypatch.setattr(torch_backend, "capture", fail if broken == "capture" else fake_capture)
    backend = TorchBackend()
    backend.mode = "graph"
    what = "torch.compile" if broken == "compile" else "CUDA graph capture"
    if broken == "compile":
        monkeypatch.setattr(torch, "compile", lambda call, **_: fail)  # fails when it is first called, as inductor does
    with pytest.warns(BackendWarning, match=rf"graph 'step': {what} failed \(RuntimeError: no such luck\); running") as seen:
        step = backend.load(Bundle.open(fake_programs), "step")
    assert len(seen) == 1
    np.testing.assert_array_equal(loop(step), loop(TorchBackend().load(Bundle.open(fake_programs), "step")))


def test_a_graph_without_a_program_is_refused_or_runs_where_that_is_allowed(fake_programs: Path) -> None:
    bundle = Bundle.open(fake_programs)
    with pytest.raises(BackendError, match=r"no torch program of graph 'text' \(it has: step\).*--allow-onnxruntime"):
        TorchBackend().load(bundle, "text")
    text = open_backend(RunOptions("torch")).load(bundle, "text")  # on the CPU, where ONNX Runtime is no other device
    assert text({"input_ids": np.zeros((1, 6), np.int64)})["text"].shape == (1, 6, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda i: i.pop("noise"), "step: missing inputs: noise; unknown: none"),
        (lambda i: i.update(extra=np.zeros(2)), "unknown: extra"),
        (lambda i: i.update(noise=i["noise"].astype(np.float64)), "`noise` is float64; this bundle accepts float32"),
        (lambda i: i.update(guidance=2.0), "`guidance` is float, not an array"),
        (lambda i: i.update(latents=i["latents"][..., :3]), r"`latents` is \[1, 2, 4, 4, 3\]"),
        (lambda i: i.update(noise=np.repeat(i["noise"], 2, 0)), "`noise` has batch = 2 but `latents` has batch = 1"),
        (lambda i: i.update(guidance=np.full(1, np.nan, np.float32)), "`guidance` has 1 NaN"),
    ],
)
def test_inputs_are_refused_as_onnxruntime_refuses_them(
    fake_programs: Path, change: Callable[[Any], object], message: str
) -> None:
    step = TorchBackend().load(Bundle.open(fake_programs), "step")
    inputs = arrays()
    change(inputs)
    for call in (step, step.run):
        with pytest.raises(InputError, match=message):
            call(inputs)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"device": "tpu"}, InputError, "device is 'tpu'; the backend torch runs on cpu or cuda"),
        ({"device": "mps"}, InputError, "device is 'mps'"),
        ({"device": 3}, InputError, "device is 3"),
        ({"mode": "fast"}, InputError, "mode is 'fast'; it must be one of auto, graph"),
        ({"mode": "graph"}, InputError, "CUDA graphs need a CUDA device"),
        ({"threads": 0}, InputError, "threads is 0"),
        ({"device": "cuda:99"}, BackendError, "sees . CUDA devices. Use --device cpu"),
    ],
    ids=str,
)
def test_backend_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TorchBackend(**arguments)


def test_open_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_backend(), OnnxRuntimeBackend)
    with pytest.raises(InputError, match="backend is 'onnx'; it must be one of onnxruntime, openvino, torch"):
        open_backend(RunOptions("onnx"))
    with pytest.raises(InputError, match="device is 'tpu'; the backend onnxruntime runs on cpu"):
        open_backend(RunOptions(device="tpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"needs PyTorch: `pip install motionrt\[torch\]`"):
        open_backend(RunOptions("torch"))


def test_command_line_runs_the_torch_backend(
    fake_programs: Path, fake_memory: Path, still: NDArray[np.uint8], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(still).save(tmp_path / "still.png")
    common = ["generate", "-b", str(fake_programs), "-m", str(fake_memory), "-p", "a red ball"]
    common += ["-i", str(tmp_path / "still.png")]
    video = ["-o", str(tmp_path / "out.png")]
    for options, status, message in (
        (["--backend", "torch"], 0, "out.png: 3 frames"),
        (["--backend", "torch", "--precision", "int4"], 2, "precision is 'int4'; "),
        (["--backend", "torch", "--device", "cuda:99"], 2, "device is 'cuda:99'; torch"),
        (["--device", "tpu"], 2, "the backend onnxruntime runs on cpu"),
        (["--backend", "jax"], 2, "backend is 'jax'; it must be one of onnxruntime, openvino, torch"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*common, *video, *options])
        said = capsys.readouterr()
        assert (caught.value.code or 0) == status, said.err
        assert message in said.out + said.err
    saved = tmp_path / "bench.json"
    with pytest.raises(SystemExit) as caught:
        main(["bench", str(fake_programs), "-n", "2", "--backend", "torch", "--json", str(saved)])
    assert not caught.value.code, capsys.readouterr().err
    assert json.loads(saved.read_text())["backend"].startswith(f"torch {torch.__version__} cpu eager")


# --- programs of a bundle ---------------------------------------------------------------------------------------------


def test_programs_are_checked_when_they_are_used(fake_programs: Path, fake_bundle: Path, edit_programs: Edit) -> None:
    assert not Bundle.open(fake_bundle).programs  # bundles without the part open as before
    with pytest.raises(BundleError, match="has no torch program of graph 'step'"):
        Bundle.open(fake_bundle).program_path("step")
    bundle = Bundle.open(edit_programs(lambda m: None))
    (bundle.path / "programs" / "step.pt2").write_bytes(b"damaged")
    OnnxRuntimeBackend(1).load(Bundle.open(bundle.path), "step")  # others need not care
    with pytest.raises(BundleError, match="program 'step' of the bundle is damaged"):
        TorchBackend().load(bundle, "step")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.update(file="../step.pt2"), "must lie inside"),
        (lambda p: p.update(sha256="0"), "graph 'step': .*program.sha256"),
        (lambda p: p["inputs"].pop(), "the program of graph 'step' has the ports"),
        (lambda p: p.update(outputs=["y"]), r"the program of graph 'step' has the ports \['y'\]"),
        (lambda p: p.pop("torch"), "graph 'step': .*torch"),
        (lambda p: p.update(extra=1), "graph 'step': .*unknown field `extra`"),
    ],
)
def test_open_refuses_programs(edit_programs: Edit, change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(edit_programs(lambda m: change(m["graphs"]["step"]["program"])))


def rewritten(path: Path, change: Callable[[str, bytes], bytes], extra: Mapping[str, bytes] | None = None) -> None:
    """Write the archive of program step anew, with its digest; each member as `change` says."""
    file = path / "programs" / "step.pt2"
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: change(info.filename, archive.read(info)) for info in archive.infolist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {**members, **{f"{root}/{k}": v for k, v in (extra or {}).items()}}.items():
            archive.writestr(name, data)
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["graphs"]["step"]["program"]["sha256"] = sha256_of(file)
    (path / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, extra, message",
    [
        (lambda n, d: d.replace(b"Symbol('", b"exit('"), {}, "it holds the size"),
        (lambda n, d: d.replace(b"torch.ops.aten.mul.Tensor", b"os.system"), {}, "it calls 'os.system'"),
        (lambda n, d: b"pickle" if n.endswith("sample_inputs/model.pt") else d, {}, "pickled sample inputs"),
        (lambda n, d: d, {"data/constants/opaque_obj_0": b""}, "opaque_obj_0"),
        (lambda n, d: d, {"data/aotinductor/model/a.so": b""}, "it holds '.*a.so'"),
        (
            lambda n, d: b'{"config": {"w": {"use_pickle": true}}}' if n.endswith("weights_config.json") else d,
            {},
            "pickled tensors",
        ),
    ],
    ids=["size", "target", "sample inputs", "object", "library", "weights"],
)
def test_a_program_that_would_run_code_is_refused(
    edit_programs: Edit, change: Callable[[str, bytes], bytes], extra: dict[str, bytes], message: str
) -> None:
    path = edit_programs(lambda m: None)
    rewritten(path, change, extra)
    with pytest.raises(BundleError, match=f"program 'step' of the bundle is not one that motionrt writes .*{message}"):
        TorchBackend().load(Bundle.open(path), "step")


def test_load_says_what_it_cannot_read(edit_programs: Edit) -> None:
    path = edit_programs(lambda m: None)
    rewritten(path, lambda n, d: b"{}" if n.endswith("models/model.json") else d)
    with pytest.raises(BackendError, match=r"cannot load program 'step' \(.*\). Install the torch version"):
        TorchBackend().load(Bundle.open(path), "step")


class Scaled(nn.Module):
    """A module with a weight and a table."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(64, 64, generator=draw).half().float(), requires_grad=False)
        self.register_buffer("table", torch.randn(1, 64, generator=draw), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.table


SCALED = [Example({"B": b}, {"x": torch.randn(b, 64, generator=torch.Generator().manual_seed(b))}) for b in (2, 3)]


def test_stream_real_checks_both_forms_and_stores_weights_once(tmp_path: Path) -> None:
    program = tmp_path / "programs" / "g.pt2"
    entry = stream_real(tmp_path / "graphs" / "g.onnx", Scaled(), SCALED, ("y",), {"B": Range(1, 1, 4)}, torch_program=program)
    stored = load_file(tmp_path / "graphs" / "g.safetensors")
    assert {name: value.dtype for name, value in stored.items()} == {"weight": torch.float16, "table": torch.float32}
    assert entry["data"]["file"] == "graphs/g.safetensors" and entry["program"]["inputs"] == ["x"]
    data, state = tmp_path / "graphs" / "g.safetensors", dict(stored)
    state["table"] = state["table"] + 1
    save_file(state, data)
    with pytest.raises(ParityError, match="program g, output `y` at {'B': 2}: it differs"):
        check_program(program, entry["program"], data, SCALED, [[Scaled()(e.feed["x"])] for e in SCALED], 1e-5)
    for change, message in (
        (lambda t: t.pop("table"), "lacks `table`, which program 'g' takes"),
        (lambda t: t.update(table=torch.ones(1, 3)), r"weight `table` of program 'g' is \[1, 3\]; \[1, 64\] is expected"),
    ):
        broken = dict(stored)
        change(broken)
        save_file(broken, data)
        with pytest.raises(BundleError, match=message):
            load_program(program, "g", data, torch.device("cpu"))
    data.write_bytes(b"none")
    with pytest.raises(BundleError, match="weights .*g.safetensors cannot be read"):
        load_program(program, "g", data, torch.device("cpu"))
    with pytest.raises(BundleError, match="program 'g' takes weights, and its graph has no file of them"):
        load_program(program, "g", None, torch.device("cpu"))


def test_a_program_tells_nothing_of_the_build_machine(tmp_path: Path) -> None:
    module, examples, outputs = fake_modules()["step"]
    write_program(tmp_path / "step.pt2", module, examples[0].feed, outputs)
    with zipfile.ZipFile(tmp_path / "step.pt2") as archive:
        text = b"".join(archive.read(name) for name in archive.namelist())
    assert b".py" not in text and str(Path.home()).encode() not in text


def test_the_run_side_imports_no_torch_until_it_is_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, motionrt.runtime.backends.open as b; b.open_backend(); assert 'torch' not in sys.modules; "
        "b.open_backend(b.RunOptions('torch')); assert 'torch' in sys.modules and 'motionrt.export' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
