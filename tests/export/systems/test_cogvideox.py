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

from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.export.checkpoints.files import CheckpointError  # noqa: E402
from motionrt.export.systems.cogvideox import export_cogvideox  # noqa: E402
from motionrt.runtime.by_path import load_by_path  # noqa: E402
from motionrt.runtime.loop import dynamic_guidance  # noqa: E402
from motionrt.runtime.memory.rows import Reference  # noqa: E402
from motionrt.runtime.pipeline import MotionPipeline  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
models = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/tiny_models.py")
plainly = load_by_path(Path(__file__).resolve().parents[3] / "tests/helpers/diffusers_reference.py")
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
    with models.shared_graphs(tmp_path_factory.getbasetemp() / "graphs"):
        export_cogvideox(made["sources"], folder / "bundle", frames=FRAMES)
    return made


@pytest.fixture(scope="module")
def small(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files of a model with two blocks; all else is as in `world`."""
    made = prepared(tmp_path_factory.mktemp("small"), 2, world["folder"])
    made["parts"] = {**world["parts"], **made["parts"]}
    return made


@pytest.fixture(scope="module")
def pipeline(world: dict[str, Any]) -> MotionPipeline:
    return MotionPipeline.from_bundle(world["folder"] / "bundle", threads=1)


def pixels(size: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


@pytest.fixture(scope="module")
def request_(world: dict[str, Any], pipeline: MotionPipeline) -> dict[str, Any]:
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
    ours = pipeline.graph("motion")({"video": clips.numpy()})["motion"]
    theirs = pipeline.graph("appearance")({"image": stills.numpy()})["appearance"]
    np.testing.assert_allclose(ours, motion[:3], atol=2e-5)
    np.testing.assert_allclose(theirs, looks, atol=2e-5)
    references = [Reference(i, 1.0, "", "", 0.0, 1.0, ours[i], theirs[i]) for i in range(3)]
    return {"still": still, "image": image, "references": references, "predicted": predicted, "unconditional": motion[3:]}


def compare(
    made: dict[str, Any], pipeline: MotionPipeline, given: dict[str, Any], *, frames: int = FRAMES, kind: str = "dpm",
    guidance: float = 3.0, dynamic: bool = False, scale: float = 1.0, target: str = "correct", learned: bool = False,
) -> None:  # fmt: skip
    """Assert that the bundle's latents and frames are those of diffusers' pipeline."""
    prompt, negative = "w5 w9 w30", "w7"
    ids = [torch.from_numpy(pipeline.bundle.tokenize("text", text)["input_ids"]) for text in (prompt, negative)]
    assert ids[0].tolist() == [[5, 9, 30, 1, 0, 0]]
    latents, want, draws = plainly.cogvideox_video(
        made["sources"].base, made["config"], models.SCHEDULER, made["parts"], made["files"], image=given["image"], ids=ids,
        motion=given["predicted"][target], unconditional=given["unconditional"], frames=frames, kind=kind, steps=STEPS,
        guidance=guidance, dynamic=dynamic, scale=scale, seed=SEED, learned=learned,
    )  # fmt: skip
    # diffusers' own count of noises: we draw one per step, and its first of two is never seen
    assert draws == ([1, 2, 2, 1] if kind == "dpm" else [0] * STEPS)
    rows = pipeline.bundle.solver(kind, STEPS)
    seen: list[Any] = []
    generate = pipeline.graph("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline._graphs, "step", lambda inputs: seen.append(generate(inputs)) or seen[-1])
        result = pipeline(
            given["still"], prompt, negative_prompt=negative, seed=SEED, steps=STEPS, solver=kind, motion_scale=scale,
            guidance=dynamic_guidance(guidance, rows.timesteps) if dynamic else guidance, references=given["references"],
        )  # fmt: skip
    ours = seen[-1]["next_latents"]
    assert len(seen) == STEPS and ours.shape == latents.shape
    np.testing.assert_allclose(ours, latents, atol=1e-4 * max(1.0, float(latents.abs().max())))
    pictures = np.rint(want.permute(0, 2, 3, 1).numpy() * 255)
    assert result.frames.shape == pictures.shape == (frames, *SIZE, 3)
    assert np.abs(result.frames.astype(int) - pictures).max() <= 1  # two roundings to whole numbers


@pytest.mark.parametrize(
    ("kind", "guidance", "dynamic", "scale"),
    [
        ("dpm", 3.0, False, 1.0), ("dpm", 1.0, False, 0.5), ("ddim", 3.0, False, 0.5), ("ddim", 3.0, False, 0.0),
        ("dpm", 3.0, True, 1.0),
    ],
    ids=["dpm, guidance, motion 1", "dpm, no guidance, motion 0.5", "ddim, motion 0.5", "ddim, no adapters", "dpm, dynamic"],
)  # fmt: skip
def test_bundle_gives_the_video_of_diffusers_pipeline_with_plain_adapters(
    kind: str, guidance: float, dynamic: bool, scale: float, world: dict[str, Any], pipeline: MotionPipeline,
    request_: dict[str, Any],
) -> None:  # fmt: skip
    compare(world, pipeline, request_, kind=kind, guidance=guidance, dynamic=dynamic, scale=scale)


def test_motion_changes_the_video(pipeline: MotionPipeline, request_: dict[str, Any]) -> None:
    off, half, full = (
        pipeline(request_["still"], "w5", steps=2, motion_scale=scale, references=request_["references"]).frames
        for scale in (0.0, 0.5, 1.0)
    )
    assert min((off != full).mean(), (half != full).mean(), (off != half).mean()) > 0.2


def test_49_frames_use_the_learned_positions_and_not_the_retuned_projections(
    small: dict[str, Any], request_: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = small["folder"] / "49"
    with models.shared_graphs(tmp_path_factory.getbasetemp() / "graphs"):
        lines = export_cogvideox(small["sources"], out, frames=49)
    assert not any(line.startswith("17_frames") for line in lines)
    with MotionPipeline.from_bundle(out, threads=1) as pipeline:
        assert pipeline.bundle.model.latents == (13, 4, 4, 8)
        compare(small, pipeline, request_, frames=49)


def test_switches_for_positions_and_target_range_change_what_they_say(
    small: dict[str, Any], request_: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = small["folder"] / "switched"
    with models.shared_graphs(tmp_path_factory.getbasetemp() / "graphs"):
        export_cogvideox(replace(small["sources"], positions="learned", target_range="released"), out, frames=FRAMES)
    with MotionPipeline.from_bundle(out, threads=1) as pipeline:
        assert pipeline.bundle.target_range == "released"
        compare(small, pipeline, request_, target="released", learned=True)
        for other in ({"target": "correct", "learned": True}, {"target": "released", "learned": False}):
            with pytest.raises(AssertionError, match="Not equal to tolerance"):
                compare(small, pipeline, request_, **other)


def test_manifest_records_choices_keys_and_where_weights_belong(world: dict[str, Any], pipeline: MotionPipeline) -> None:
    manifest: Any = pipeline.bundle.manifest
    made = manifest["provenance"]
    assert made["sos_token"]["source"] == "seed 42" and made["overlay"] == "17_frames" and made["positions"] == "released"
    assert manifest["defaults"] == {"guidance": 3.0, "target_range": "correct"}
    used = 17 + 24 * LAYERS  # of the base's transformer: 17 around the blocks
    assert any(line.startswith(f"transformer: {used} keys used, 0 missing, 0 unexpected") for line in made["keys"])
    keys = json.loads((world["folder"] / "bundle" / "keys.json").read_text())
    assert {"Motion-Adapter", "17_frames", "transformer", "vae", "VideoMAE", "DINOv2"} <= {k["what"] for k in keys}
    partition = manifest["partition"]
    assert sum(rule["rule"] == "reassociate" for rule in partition["rules"]) == LAYERS  # the adapter of every block
    weights = partition["weights"]
    assert weights["dead"]["parameters"] == 0 and weights["schedule"]["parameters"] > 0
    read = {kind: size["parameters"] for kind, size in weights.items() if kind not in ("model", "dead")}
    assert sum(read.values()) == weights["model"]["parameters"]
    on_disk = made["memory"]["weights"]
    assert on_disk["step"] > 4 * read["step"] and on_disk["schedule"] > 4 * read["schedule"]


def test_damaged_weights_beside_a_graph_are_found_when_it_is_loaded(world: dict[str, Any], tmp_path: Path) -> None:
    from motionrt.runtime.errors import BundleError

    copy = tmp_path / "bundle"
    shutil.copytree(world["folder"] / "bundle", copy)
    data = bytearray((copy / "graphs" / "text.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "graphs" / "text.safetensors").write_bytes(data)
    pipeline = MotionPipeline.from_bundle(copy, threads=1)
    pipeline.graph("decode")
    with pytest.raises(BundleError, match="weights of graph 'text' of the bundle is damaged"):
        pipeline.graph("text")


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
    sources = replace(small["sources"], base=base, converted=tmp_path / "converted")
    with pytest.raises(CheckpointError, match=message):
        export_cogvideox(sources, tmp_path / "out", frames=13 if change == "frames" else FRAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
