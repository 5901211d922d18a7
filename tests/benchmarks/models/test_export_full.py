"""The full-size export at toy size: its row, its memory, and what its bundle gives against the modules in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.export.checkpoints.motionrag_files import CamaSize, ResamplerSize, SosToken  # noqa: E402
from motionrt.export.checkpoints.safetensors_file import read_header  # noqa: E402
from motionrt.export.engines.build import Options  # noqa: E402
from motionrt.export.engines.onnx_forms import build_forms  # noqa: E402
from motionrt.export.systems import cogvideox  # noqa: E402
from motionrt.export.systems.motionrag_system import Sources  # noqa: E402
from motionrt.export.systems.steps import step_args  # noqa: E402
from motionrt.export.systems.svd import svd_system  # noqa: E402
from motionrt.runtime.backends.onnx_form import form_folder  # noqa: E402
from motionrt.runtime.backends.onnxruntime import OnnxRuntimeBackend  # noqa: E402
from motionrt.runtime.memory.rows import Reference  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[3]
shared = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/shared_graphs.py")
models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
FRAMES, SIZE, LATENTS, MOTION = 9, (16, 32), (3, 4, 4, 8), (3, 64)


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[Any, Any]]:
    """benchmarks/models/export_full.py and benchmarks/models/sparse_models.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        from motionrt.benchmarks.models import export_full, sparse_models

        yield export_full, sparse_models


@pytest.fixture(scope="module")
def toy(scripts: tuple[Any, Any]) -> Any:
    """Every part at a toy size."""
    vae = {
        "block_out_channels": [4, 4, 8], "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2, "sample_height": 24,
        "sample_width": 32, "scaling_factor": 0.7, "down_block_types": ["CogVideoXDownBlock3D"] * 3,
        "up_block_types": ["CogVideoXUpBlock3D"] * 3,
    }  # fmt: skip
    t5 = {
        "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    temporal = {
        "down_block_types": ["DownEncoderBlock2D"] * 2, "block_out_channels": [32, 32], "layers_per_block": 1,
        "latent_channels": 4,
    }  # fmt: skip
    clip = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 224,
        "patch_size": 56, "projection_dim": 24,
    }  # fmt: skip
    videomae = {
        "image_size": 32, "patch_size": 16, "num_frames": 16, "tubelet_size": 2, "hidden_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32, "use_mean_pooling": True,
    }  # fmt: skip
    dinov2 = {
        "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 70, "patch_size": 14, "mlp_ratio": 2
    }  # fmt: skip
    return scripts[1].Sizes(
        videomae, dinov2, ResamplerSize(64, 1, 1, 3, 24, 64, 2), ResamplerSize(64, 1, 1, 3, 48, 64, 2),
        CamaSize(3, 64, 1, 1, 96), {**models.COGVIDEOX, "num_layers": 1}, vae, t5, {"out_channels": 4, **models.UNET}, temporal,
        clip,
    )  # fmt: skip


def fill(root: Path) -> None:
    """Random weights in the place of zeros, in the dtype of each file; T5's are as large as makes float16 overflow."""
    draw = torch.Generator().manual_seed(0)
    for path in sorted(root.rglob("*.safetensors")):
        filled = {}
        for key, value in load_file(path).items():
            spread, centre = (0.1, 0.5) if value.ndim == 1 else (value[0].numel() ** -0.5, 0.0)
            spread *= 1e6 if key.endswith(".DenseReluDense.wo.weight") else 1.0
            filled[key] = (torch.randn(value.shape, generator=draw) * spread + centre).to(value.dtype)
        save_file(filled, path)


@pytest.fixture(scope="module")
def world(scripts: tuple[Any, Any], toy: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle of toy files that hold random bf16 weights, and its row."""
    full, sparse = scripts
    root = tmp_path_factory.mktemp("full") / "work"
    sparse.write_cogvideox(root, toy)
    fill(root)
    with shared.shared_graphs(tmp_path_factory.mktemp("graphs")):
        row = full.export(root, full.Request("cogvideox-5b-i2v", FRAMES, steps=(2,)))
    return root, row


def test_the_row_tells_memory_stages_graphs_and_counts(scripts: tuple[Any, Any], world: tuple[Path, dict[str, Any]]) -> None:
    full, row = scripts[0], world[1]
    assert [stage["stage"] for stage in row["stages"]] == [
        "open and check files", "unconditional tokens", "text", "motion", "appearance", "cama", "encode", "decode", "partition",
        "schedule", "request", "step", "partition", "step_extrapolated", "inspect",
    ]  # fmt: skip
    assert row["peak_anonymous_mb"] == max(stage["peak_mb"] for stage in row["stages"]) > 100
    assert row["ru_maxrss_mb"] >= row["peak_anonymous_mb"] * 0.99
    graphs = row["graphs"]
    assert set(graphs) == {
        "text", "text_query", "motion", "appearance", "cama", "encode", "decode", "schedule", "request", "step",
        "step_extrapolated",
    }  # fmt: skip
    for name, graph in graphs.items():
        inferred = graph["inner_values_inferred"]
        if name in ("encode", "decode"):  # ONNX has no shape inference for GroupNormalization
            assert 0 < inferred < graph["inner_values"]
        else:
            assert 0 < inferred == graph["inner_values"]
    assert row["bundle_bytes"] > sum(graph["weights_bytes"] for graph in graphs.values()) > 5e5
    classes = row["classes"]
    counted = full.Expected(
        classes["schedule"]["parameters"] + classes["constant"]["parameters"], classes["model"]["parameters"], 1
    )
    full.check_counts(row, counted)
    with pytest.raises(ValueError, match="is expected"):
        full.check_counts(row, full.EXPECTED["cogvideox-5b-i2v"])


def test_more_memory_than_allowed_is_no_row(
    scripts: tuple[Any, Any], world: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, (root, _) = scripts[0], world
    monkeypatch.setattr(full, "export_system", lambda *arguments, **named: np.ones(30_000_000)[0])
    monkeypatch.setattr(full, "inspect", lambda bundle: {})
    with pytest.raises(MemoryError, match="beyond the page cache; allowed are 50"):
        full.export(root, full.Request("cogvideox-5b-i2v", FRAMES, steps=(2,)), limit=5e7)


# In a process of its own: one that has run a thousand tests gives and takes memory of its own accord.
HOLDS_AND_GIVES_BACK = """
import sys
import numpy as np
from motionrt.benchmarks.models.anonymous_memory import AnonymousMemory, anonymous

with AnonymousMemory() as memory:
    before = anonymous()
    mapped = np.memmap(sys.argv[1], np.uint8, "r")
    assert mapped.max() == 0
    print(memory.peak() - before)
    held = np.ones(50_000_000, np.uint8)
    print(memory.peak() - before)
    del held
    memory.peak()  # the stretch that held it ends here
    print(memory.peak() - before)
"""


def test_memory_beyond_the_page_cache_is_what_was_written_to_and_not_what_was_mapped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    command = [sys.executable, "-c", HOLDS_AND_GIVES_BACK, str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after_mapping, holding, given_back = (int(line) for line in done.stdout.split())
    assert after_mapping < 20_000_000
    assert 45_000_000 < holding < 70_000_000
    assert given_back < 20_000_000


def test_the_files_for_svd_are_those_that_its_export_takes(scripts: tuple[Any, Any], toy: Any, tmp_path: Path) -> None:
    scripts[1].write_svd(tmp_path, toy)
    sources = Sources(
        tmp_path / "base", tmp_path / "rag", tmp_path / "videomae", tmp_path / "dinov2", sos=SosToken(seed=42), steps=(2,)
    )
    system = svd_system(sources, frames=3, height=16, width=32)
    assert system.graphs["encode"].network.wide == ("vae.*",)  # force_upcast: what diffusers does in float16


def test_the_files_for_motionclone_are_those_that_its_export_takes(scripts: tuple[Any, Any], tmp_path: Path) -> None:
    """At full size: they are holes, and of all weights only the text encoder's are read."""
    full, sparse = scripts
    sparse.write_motionclone(tmp_path)
    system = full.open_system(tmp_path, full.Request("motionclone", 16, size=(512, 512)), lambda text: None)
    assert system.memory is not None and [part.dims for part in system.memory.record] == [(16, 4, 64, 64)]


def reference(root: Path, feeds: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """Outputs of the modules behind the graphs, in fp32 with the same stored weights."""
    sources = Sources(root / "base", root / "rag", root / "videomae", root / "dinov2", sos=SosToken(seed=42), steps=(2,))
    system = cogvideox.cogvideox_system(sources, frames=FRAMES)
    networks = {name: graph.network for name, graph in system.graphs.items()} | {"step": system.steps[0].network}
    modules = {name: networks[name].loaded() for name in feeds}
    results = {}
    with torch.no_grad():
        for name, module in modules.items():
            found = module(*(torch.from_numpy(value) for value in feeds[name].values()))
            results[name] = [found] if isinstance(found, torch.Tensor) else list(found)
    return results


def test_a_bundle_of_bfloat16_files_computes_in_float32_and_its_form_in_float16_where_that_holds(
    world: tuple[Path, dict[str, Any]], toy: Any, record_property: Any
) -> None:
    """The graphs are those of the modules with the same weights; float16 loses digits and not range, as T5's would."""
    root, _ = world
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return draw.standard_normal(shape).astype(np.float32)

    args = step_args(cogvideox.INPUTS, toy.transformer, LATENTS, MOTION)
    step = {name: normal(*value.shape) for name, value in args.items()} | {
        "timestep": np.array([500]), "guidance": np.array([2.0], "f4"), "motion_scale": np.array([1.0], "f4")
    }  # fmt: skip
    feeds = {
        "text": {"input_ids": draw.integers(0, 40, (1, models.TEXT_TOKENS))},
        "motion": {"video": np.tanh(normal(1, FRAMES, 3, *SIZE))},
        "appearance": {"image": np.tanh(normal(1, 3, *SIZE))},
        "encode": {"image": np.tanh(normal(1, 3, *SIZE)), "noise": normal(1, *LATENTS[1:])},
        "decode": {"latents": normal(1, *LATENTS)},
        "step": {name: step[name] for name in args},
    }
    tuple(build_forms(root / "bundle", Options((), "onnxruntime", "float16")))
    made: dict[str, dict[str, list[Any]]] = {}
    still = draw.integers(0, 256, (*SIZE, 3), np.uint8)
    for precision in ("float32", "float16"):
        backend = OnnxRuntimeBackend(1, precision=precision)
        with MotionPipeline.from_bundle(root / "bundle", backend=backend) as pipeline:
            results = {name: list(pipeline.graph(name)(feed).values()) for name, feed in feeds.items() if name != "step"}
            state = dict(step)
            for name in ("schedule", "request", "step"):
                state |= pipeline.graph(name)({port.name: state[port.name] for port in pipeline.bundle.graph(name).inputs})
            results["step"] = [state["next_latents"], state["x0"]]
            record = {name: results[name][0][0] for name in ("motion", "appearance")}
            references = [Reference(0, 1.0, "", "", 0.0, 1.0, record)]
            video = pipeline(still, "w5 w9", seed=1, steps=2, references=references).frames
            assert video.shape == (FRAMES, *SIZE, 3) and video.std() > 0
        made[precision] = results
    text = {key: stored.dtype for key, stored in read_header(root / "bundle" / "graphs" / "text.safetensors")[0].items()}
    assert {dtype for key, dtype in text.items() if key.startswith("model.")} == {torch.bfloat16}, text
    reads = ir.load(form_folder(root / "bundle", "float16") / "text.onnx").graph
    wide = [value.name for value in reads.initializers.values() if ".wo." in str(value.name)]
    assert wide and all(reads.initializers[name].dtype == ir.DataType.FLOAT for name in wide), wide
    for name, want in reference(root, feeds).items():
        for precision, allowed in (("float32", 2e-5), ("float16", 2e-3)):
            for ours, theirs in zip(made[precision][name], want, strict=True):
                error = float(np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs))
                record_property(f"relative L2 of {name} in {precision}", error)
                print(f"{name} {precision}: relative L2 {error:.2e}")
                assert error < allowed and (precision == "float32" or error > 0), name
