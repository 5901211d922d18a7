"""CogVideoX bundles from released files against diffusers' own pipeline with the plain adapters installed, same noise.

Bundles share the graphs that are the same. All 42 blocks: in torch, in `test_quirks.py`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from by_path import load_by_path  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError, InMemory  # noqa: E402
from motionrt.export.exporter import Writer, export_system, silent  # noqa: E402
from motionrt.export.systems.cogvideox import cogvideox_system  # noqa: E402
from motionrt.export.systems.motionrag_system import Sources  # noqa: E402
from motionrt.runtime.bundle.bundle import Bundle  # noqa: E402
from motionrt.runtime.errors import BundleError  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
plainly = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/diffusers_reference.py")
plain_run = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/plain_run.py")
shared = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/shared_graphs.py")
FRAMES, SEED, LAYERS, STEPS, SIZE = 17, 11, 3, 4, (16, 32)


def prepared(folder: Path, layers: int, encoders: Path) -> dict[str, Any]:
    """Released files of a model with `layers` blocks, their modules, and what an export of them is told."""
    config = models.cogvideox_config(layers)
    parts = models.write_cogvideox(folder / "base", config)
    blocks = {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(layers)}
    files = models.release.motionrag_states(blocks, overlay=True)
    models.release.save(folder / "rag", files)
    sources = models.sources(folder, plainly.SOS_SEED, (2, STEPS), encoders)
    return {"folder": folder, "parts": parts, "files": files, "sources": sources, "config": config}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with three blocks, and its bundle at 17 frames."""
    folder = tmp_path_factory.mktemp("cogvideox")
    encoders = models.write_encoders(folder)
    made = prepared(folder, LAYERS, folder)
    made["parts"] |= encoders
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        export_system(cogvideox_system(made["sources"], frames=FRAMES), folder / "bundle")
    return made


@pytest.fixture(scope="module")
def small(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of a model with two blocks; all else is as in `world`."""
    made = prepared(tmp_path_factory.mktemp("small"), 2, world["folder"])
    made["parts"] = {**world["parts"], **made["parts"]}
    return made


@pytest.fixture(scope="module")
def run(world: dict[str, Any]) -> Any:
    return plain_run.PlainRun(Bundle.open(world["folder"] / "bundle"))


def pixels(size: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.fixture(scope="module")
def request_(world: dict[str, Any], run: Any) -> dict[str, Any]:
    """A still, three clips with tokens from the bundle's graphs, and the same tokens and their prediction in torch."""
    still = pixels((*SIZE, 3), 0)
    clips = torch.from_numpy(pixels((3, FRAMES, 3, *SIZE), 1)).float() / 127.5 - 1
    image = torch.from_numpy(still).permute(2, 0, 1)[None].float() / 127.5 - 1
    parts, files = world["parts"], world["files"]
    stills = torch.cat([clips[:, 0], image, (image + 1) / 2])
    motion = plainly.motion_tokens(parts, files, torch.cat([clips, torch.zeros(1, *clips.shape[1:])]))
    looks = plainly.appearance_tokens(parts, files, stills)
    predicted = {
        target: plainly.predicted_motion(files, motion[:3], looks[:3], looks[index : index + 1])
        for index, target in ((3, "correct"), (4, "released"))
    }
    ours = run.call("motion", {"video": clips.numpy()})["motion"]
    theirs = run.call("appearance", {"image": stills.numpy()})["appearance"]
    np.testing.assert_allclose(ours, motion[:3], atol=2e-5)
    np.testing.assert_allclose(theirs, looks, atol=2e-5)
    references = {"reference_motion": ours[None], "reference_appearance": theirs[None, :3]}
    return {"image": image, "references": references, "predicted": predicted, "unconditional": motion[3:]}


def given(run: Any, request: dict[str, Any], prompt: str, negative: str, scale: float) -> dict[str, Any]:
    """The values of a request that the plan reads."""
    image = request["image"].numpy()
    texts = {"prompt": prompt, "negative_prompt": negative}
    tokens = {key: run.bundle.tokenize("text", text, models.TEXT_TOKENS) for key, text in texts.items()}
    ids = {f"{key}.input_ids": found["input_ids"] for key, found in tokens.items()}
    ranges = run.bundle.manifest.inputs["image"].gives
    stills = {name: ((image + 1) / 2 * (high - low) + low).astype(np.float32) for name, (low, high) in ranges.items()}
    return {**stills, **ids, **request["references"], "motion_scale": np.array([scale], np.float32)}


def compare(
    made: dict[str, Any], run: Any, request: dict[str, Any], *, frames: int = FRAMES, kind: str = "dpm",
    guidance: float = 3.0, dynamic: bool = False, scale: float = 1.0, target: str = "correct", learned: bool = False,
) -> None:  # fmt: skip
    """Assert that the bundle's latents and frames are those of diffusers' pipeline."""
    values, draw = given(run, request, "w5 w9 w30", "w7", scale), plain_run.drawn(SEED)
    ids = [torch.from_numpy(values[f"{name}.input_ids"]) for name in ("prompt", "negative_prompt")]
    assert ids[0].tolist() == [[5, 9, 30, 1, 0, 0]]
    latents, want, draws = plainly.cogvideox_video(
        made["sources"].base, made["config"], models.SCHEDULER, made["parts"], made["files"], image=request["image"], ids=ids,
        motion=request["predicted"][target], unconditional=request["unconditional"], frames=frames, kind=kind, steps=STEPS,
        guidance=guidance, dynamic=dynamic, scale=scale, draw=draw, learned=learned,
    )  # fmt: skip
    # diffusers' own count of noises: we draw one per step, and its first of two is never seen
    assert draws == ([1, 2, 2, 1] if kind == "dpm" else [0] * STEPS)
    times = run.bundle.schedule("video", kind, STEPS).rows[:, 1].astype(np.float64)
    # diffusers' "dynamic" guidance, from 1 to `guidance` as time goes on: a column like any other
    column = 1 + guidance * (1 - np.cos(np.pi * ((STEPS - times) / STEPS) ** 5.0)) / 2 if dynamic else guidance
    steps: list[Any] = []
    result = run(values, draw, schedules={"video": (kind, STEPS)}, columns={"guidance": column}, watch=steps.append)
    assert len(steps) == STEPS and result["latents"].shape == latents.shape
    np.testing.assert_allclose(result["latents"], latents, atol=1e-4 * max(1.0, float(latents.abs().max())))
    assert result["video"].shape == (1, frames, 3, *SIZE)
    np.testing.assert_allclose((result["video"][0].clip(-1, 1) + 1) / 2, want, atol=1 / 255)  # a step of 8 bits


@pytest.mark.parametrize(
    ("kind", "guidance", "dynamic", "scale"),
    [
        ("dpm", 3.0, False, 1.0), ("dpm", 1.0, False, 0.5), ("ddim", 3.0, False, 0.5), ("ddim", 3.0, False, 0.0),
        ("dpm", 3.0, True, 1.0),
    ],
    ids=["dpm, guidance, motion 1", "dpm, no guidance, motion 0.5", "ddim, motion 0.5", "ddim, no adapters", "dpm, dynamic"],
)  # fmt: skip
def test_bundle_gives_the_video_of_diffusers_pipeline_with_plain_adapters(
    kind: str, guidance: float, dynamic: bool, scale: float, world: dict[str, Any], run: Any, request_: dict[str, Any],
) -> None:  # fmt: skip
    compare(world, run, request_, kind=kind, guidance=guidance, dynamic=dynamic, scale=scale)


def test_motion_changes_the_video(run: Any, request_: dict[str, Any]) -> None:
    off, half, full = (
        run(given(run, request_, "w5", "", scale), plain_run.drawn(0), schedules={"video": ("dpm", 2)})["video"]
        for scale in (0.0, 0.5, 1.0)
    )
    assert min(np.abs(one - other).mean() for one, other in ((off, full), (half, full), (off, half))) > 1e-3


def test_49_frames_use_the_learned_positions_and_not_the_retuned_projections(
    small: dict[str, Any], request_: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = small["folder"] / "49"
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        lines = export_system(cogvideox_system(small["sources"], frames=49), out)
    assert not any(line.startswith("17_frames") for line in lines)
    run = plain_run.PlainRun(Bundle.open(out))
    assert run.bundle.port("step", "latents").shape == (1, 13, 4, 4, 8)
    compare(small, run, request_, frames=49)


def test_switches_for_positions_and_target_range_change_what_they_say(
    small: dict[str, Any], request_: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = small["folder"] / "switched"
    sources = replace(small["sources"], positions="learned", target_range="released")
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        export_system(cogvideox_system(sources, frames=FRAMES), out)
    run = plain_run.PlainRun(Bundle.open(out))
    assert run.bundle.manifest.inputs["image"].gives == {"image": (-1.0, 1.0), "appearance_image": (0.0, 1.0)}
    compare(small, run, request_, target="released", learned=True)
    for other in ({"target": "correct", "learned": True}, {"target": "released", "learned": False}):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            compare(small, run, request_, **other)


def test_a_bundle_of_a_fusion_without_cama_gives_the_video_of_diffusers_pipeline(
    small: dict[str, Any], request_: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`weight`, of two clips whose cosines are 0.6 and 0.2."""
    out, own = small["folder"] / "fused", small["sources"]
    sources = Sources(own.base, own.motionrag, own.videomae, fusion="weight", steps=own.steps)
    with shared.shared_graphs(shared.store(tmp_path_factory)):
        export_system(cogvideox_system(sources, frames=FRAMES), out, programs=False)
    run = plain_run.PlainRun(Bundle.open(out))
    clips = torch.from_numpy(pixels((2, FRAMES, 3, *SIZE), 1)).float() / 127.5 - 1
    features = plainly.video_features(small["parts"], clips)
    motion = plainly.projected(small["files"], (0.75 * features[0] + 0.25 * features[1])[None])
    ours = run.call("features", {"video": clips.numpy()})["features"]
    np.testing.assert_allclose(ours, features, atol=2e-5 * float(features.abs().max()))
    references = {"reference_features": ours[None], "reference_scores": np.array([[0.6, 0.2]], np.float32)}
    compare(small, run, {**request_, "references": references, "predicted": {"correct": motion}})


def test_manifest_says_what_the_system_is(run: Any) -> None:
    manifest = run.bundle.manifest
    assert [node.graph for node in manifest.nodes] == [
        "text", "text", "appearance", "cama", "encode", "request", "video", "pictures"
    ]  # fmt: skip
    assert manifest.nodes[1].writes == {"text": "negative_text"}
    assert list(manifest.inputs) == ["image", "prompt", "negative_prompt", "motion_scale", "guidance"]
    assert all(entry.help.endswith(".") for entry in manifest.inputs.values())
    video, pictures = manifest.loops["video"], manifest.loops["pictures"]
    assert video.tables == ("schedule",) and video.default == ("dpm", STEPS) and pictures.default == ("chunks", 2)
    assert (run.bundle.schedule("video").rows[:, 2] == 3.0).all() and manifest.inputs["guidance"].default == 3.0
    memory = manifest.memory
    assert [(part.name, part.dtype, part.dims) for part in memory.record] == [
        ("motion", "float16", (3, 64)), ("appearance", "float16", (3, 64))
    ]  # fmt: skip
    assert memory.absent == {"motion": "zeros", "motion_scale": 0} and memory.fingerprint.strip("0")
    first, following = run.bundle.graph("decode"), run.bundle.graph("decode_next")
    assert first.data == following.data and not (run.bundle.path / "graphs" / "decode_next.safetensors").exists()
    batched = [spec for name, spec in run.bundle.graphs.items() if name != "schedule"]
    sizes = {port.dims[0].name for spec in batched for port in (*spec.inputs, *spec.outputs)}
    assert sizes == {"batch", "2*batch"}  # guidance needs two rows of a request, which lie together
    assert [(port.name, str(port.dims[0])) for port in run.bundle.graph("schedule").inputs] == [("timestep", "steps 1-1000")]
    assert set(run.bundle.programs) == {"schedule", "request", "step", "step_extrapolated"}


def test_fingerprint_of_the_memory_follows_the_encoders_and_nothing_else(
    world: dict[str, Any], small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A denoiser of other weights reads the same memory; another VideoMAE makes another one."""
    made = cogvideox_system(small["sources"], frames=FRAMES)
    writer = Writer(world["folder"] / "bundle", False, silent)
    same = writer.fingerprinted(made, made.memory).fingerprint
    assert same == Bundle.open(world["folder"] / "bundle").manifest.memory.fingerprint
    motion = made.graphs["motion"]
    name = next(iter(motion.network.weights))
    weights = {**motion.network.weights, name: InMemory(motion.network.weights[name].read() + 1)}
    other = replace(made, graphs={**made.graphs, "motion": replace(motion, network=replace(motion.network, weights=weights))})
    assert writer.fingerprinted(other, made.memory).fingerprint != same


def test_manifest_records_choices_keys_and_where_weights_belong(world: dict[str, Any], run: Any) -> None:
    manifest = run.bundle.manifest
    made = manifest.provenance
    assert made["sos_token"]["source"] == "seed 42" and made["overlay"] == "17_frames" and made["positions"] == "released"
    assert made["target_range"] == "correct" and manifest.approximations == ()
    used = 17 + 24 * LAYERS  # of the base's transformer: 17 around the blocks
    assert any(line.startswith(f"transformer: {used} keys used, 0 missing, 0 unexpected") for line in made["keys"])
    keys = json.loads((world["folder"] / "bundle" / "keys.json").read_text())
    assert {"Motion-Adapter", "17_frames", "transformer", "vae", "VideoMAE", "DINOv2"} <= {k["what"] for k in keys}
    partition = manifest.partition
    assert sum(rule["rule"] == "reassociate" for rule in partition["rules"]) == LAYERS  # the adapter of every block
    weights = partition["weights"]
    assert weights["dead"]["parameters"] == 0 and weights["schedule"]["parameters"] > 0
    read = {kind: size["parameters"] for kind, size in weights.items() if kind not in ("model", "dead")}
    assert sum(read.values()) == weights["model"]["parameters"]
    on_disk = made["memory"]["weights"]
    assert on_disk["step"] > 4 * read["step"] and on_disk["schedule"] > 4 * read["schedule"]


def test_damaged_weights_beside_a_graph_are_found_when_it_is_loaded(world: dict[str, Any], tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(world["folder"] / "bundle", copy)
    data = bytearray((copy / "graphs" / "text.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "graphs" / "text.safetensors").write_bytes(data)
    bundle = Bundle.open(copy)
    assert bundle.graph_path("decode").is_file()
    with pytest.raises(BundleError, match="weights of graph 'text' of the bundle is damaged"):
        bundle.graph_path("text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("family", "holds a StableVideoDiffusionPipeline"),
        ("text to video", "a text-to-video model"),
        ("key gone", "transformer .* lacks key `proj_out.bias`"),
        ("key more", "vae .* has the unexpected key `extra`"),
        ("shape", r"`proj_out.weight` has the shape \[16, 65\]; \[16, 64\] is expected"),
        ("dtypes", "transformer .* mixes dtypes"),
        ("cut", "no intact safetensors file: it is cut off"),
        ("frames", "frames is 13; allowed: 1 . a multiple of 8, up to 49"),
    ],
)
def test_bad_bases_are_refused_before_anything_is_written(
    change: str, message: str, small: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small["folder"] / "base", base)
    file = base / ("vae" if change == "key more" else "transformer") / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if change == "family":
        (base / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    elif change == "text to video":
        config = json.loads((base / "transformer" / "config.json").read_text()) | {"in_channels": 4}
        (base / "transformer" / "config.json").write_text(json.dumps(config))
    elif change == "key gone":
        del state["proj_out.bias"]
    elif change == "key more":
        state["extra"] = torch.ones(1)
    elif change == "shape":
        state["proj_out.weight"] = torch.ones(16, 65)
    elif change == "dtypes":
        state["proj_out.bias"] = state["proj_out.bias"].half()
    save_file(state, file)
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    sources = replace(small["sources"], base=base)
    with pytest.raises(CheckpointError, match=message):
        export_system(cogvideox_system(sources, frames=13 if change == "frames" else FRAMES), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
