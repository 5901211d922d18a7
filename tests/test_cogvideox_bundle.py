"""A CogVideoX bundle from released files against diffusers' own pipeline with the plain adapters installed, same noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from motionrt.export.checkpoints import CheckpointError  # noqa: E402
from motionrt.export.cogvideox_bundle import export_cogvideox  # noqa: E402
from motionrt.export.motionrag import Cama, Resampler, install_cogvideox_adapter  # noqa: E402
from motionrt.export.motionrag_files import SosToken  # noqa: E402
from motionrt.export.real import Sources, Stage  # noqa: E402
from motionrt.runtime.demo import load_by_path  # noqa: E402
from motionrt.runtime.memory_rows import Reference  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import _ENCODER_DRAW, MotionPipeline  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
models = load_by_path(Path(__file__).parent / "real_models.py")
BLOCKS = {f"transformer.transformer_blocks.{i}.attn1": 64 for i in range(2)}
FRAMES, SEED = 17, 11


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Released files, their modules, and the bundle that was exported from them."""
    folder = tmp_path_factory.mktemp("cogvideox")
    parts = models.write_cogvideox(folder / "base") | models.write_encoders(folder)
    files = models.release.motionrag_states(BLOCKS, overlay=True)
    models.release.save(folder / "rag", files)
    sources = Sources(
        folder / "base", folder / "rag", folder / "videomae", folder / "dinov2", folder / "converted", dtype="float32",
        sos=SosToken(seed=42), steps=(2, 4),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "add_text_query", models.packaged_text_query)
        lines = export_cogvideox(sources, folder / "bundle", frames=FRAMES)
    yield {"folder": folder, "parts": parts, "files": files, "sources": sources, "lines": lines}


@pytest.fixture(scope="module")
def pipeline(world: dict[str, Any]) -> MotionPipeline:
    return MotionPipeline.from_bundle(world["folder"] / "bundle", threads=1)


def pixels(size: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def reference_tokens(world: dict[str, Any], clip: Any, image: Any) -> tuple[Any, Any]:
    """Motion tokens of clips `[n, 17, 3, H, W]` and appearance tokens of stills, by the spec (A2), with torch's own resize."""
    files, parts = world["files"], world["parts"]

    def prepared(x: Any, short: int, size: int, mode: str) -> Any:
        x = (x + 1) / 2
        height, width = x.shape[-2:]
        x = F.interpolate(x, size=(short, int(short * width / height)), mode=mode, antialias=True, align_corners=False)
        top, left = int(round((x.shape[-2] - size) / 2)), int(round((x.shape[-1] - size) / 2))
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return (x[..., top : top + size, left : left + size] - mean) / std

    picks = [*range(8), *range(9, 17)]
    frames = prepared(clip[:, picks].flatten(0, 1), 32, 32, "bilinear").unflatten(0, (len(clip), 16))
    resampler = Resampler(64, 2, 64, 1, 3, models.release.VIDEO_WIDTH, 64, 2)
    resampler.load_state_dict(files["motion_proj.ckpt"])
    motion = resampler(parts["videomae"].videomae(pixel_values=frames).last_hidden_state)
    resampler = Resampler(64, 1, 64, 1, 3, models.release.IMAGE_WIDTH, 64, 2)
    state = files["motion_transformer.ckpt"]["state_dict"]
    resampler.load_state_dict(
        {k.removeprefix("condition_proj."): v for k, v in state.items() if k.startswith("condition_proj.")}
    )
    seen = prepared(image, 256, 224, "bicubic")
    return motion, resampler(parts["dinov2"](pixel_values=seen).last_hidden_state)


@pytest.fixture(scope="module")
def request_(world: dict[str, Any], pipeline: MotionPipeline) -> dict[str, Any]:
    """A still, three clips with tokens from the bundle's graphs, and the same tokens and their prediction in torch."""
    still = pixels((24, 32, 3), 0)
    clips = torch.from_numpy(pixels((3, FRAMES, 3, 24, 32), 1)).float() / 127.5 - 1
    image = torch.from_numpy(still).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        motion, appearance = reference_tokens(world, clips, torch.cat([clips[:, 0], image]))
        unconditional, _ = reference_tokens(world, torch.zeros(1, FRAMES, 3, 24, 32), image)
        cama = Cama(3, 64, 2, 1, 96)
        state = world["files"]["motion_transformer.ckpt"]["state_dict"]
        sos = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(42)) / 8
        bare = {k: v for k, v in state.items() if k.startswith("transformer.")}
        cama.load_state_dict(bare | {"sos_token": sos})
        predicted = cama(motion[None], appearance[None, :3], appearance[3:])
    ours = pipeline.graph("motion")({"video": clips.numpy()})["motion"]
    looks = pipeline.graph("appearance")({"image": torch.cat([clips[:, 0], image]).numpy()})["appearance"]
    np.testing.assert_allclose(ours, motion, atol=2e-5)
    np.testing.assert_allclose(looks, appearance, atol=2e-5)
    references = [Reference(i, 1.0, "", "", 0.0, 1.0, ours[i], looks[i]) for i in range(3)]
    return {"still": still, "image": image, "references": references, "predicted": predicted, "unconditional": unconditional}


def reference_video(
    world: dict[str, Any], given: dict[str, Any], prompt_ids: Any, *, kind: str, guidance: float, scale: float,
    patch: pytest.MonkeyPatch, steps: int = 4,
) -> tuple[Any, Any]:  # fmt: skip
    """(latents, frames in [0, 1]) of diffusers' pipeline with the runtime's noise."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )
    from diffusers.models.autoencoders import vae as vae_module
    from diffusers.schedulers import scheduling_dpm_cogvideox as dpm_module

    torch.manual_seed(0)
    transformer: Any = CogVideoXTransformer3DModel(**models.COGVIDEOX)
    install_cogvideox_adapter(transformer, 64)
    state = load_file(world["folder"] / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name in ("17_frames.ckpt", "Motion-Adapter.ckpt"):
        loaded = world["files"][name]["state_dict"]
        state |= {k.removeprefix("transformer."): v for k, v in loaded.items() if k.startswith("transformer.")}
    transformer.load_state_dict(state, strict=True)
    scheduler = (CogVideoXDPMScheduler if kind == "dpm" else CogVideoXDDIMScheduler)(**models.SCHEDULER)
    text, vae = world["parts"]["text_encoder"], world["parts"]["vae"]
    pipe = CogVideoXImageToVideoPipeline(None, text, vae, transformer.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    shape = (1, 5, 4, 6, 8)
    step = {"index": 0}
    plain = scheduler.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        step["index"] += 1
        return plain(*args, **kwargs)

    def drawn(size: Any, **_: Any) -> Any:  # both draws of a step: the release discards the first
        return torch.from_numpy(noise(SEED, step["index"], size))

    patch.setattr(scheduler, "step", counted)
    patch.setattr(dpm_module, "randn_tensor", drawn)
    patch.setattr(
        vae_module, "randn_tensor", lambda size, **_: torch.from_numpy(noise(SEED, _ENCODER_DRAW, (1, *shape[2:])))[:, :, None]
    )
    motion = given["predicted"] if guidance <= 1 else torch.cat([given["unconditional"], given["predicted"]])
    with torch.no_grad():
        embeds = [text(ids)[0] for ids in prompt_ids]
        results = [
            pipe(
                image=(given["image"] + 1) / 2, prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1],
                height=24, width=32, num_frames=FRAMES, num_inference_steps=steps, guidance_scale=guidance,
                latents=torch.from_numpy(noise(SEED, 0, shape)), output_type=output,
                attention_kwargs={"motion": motion, "motion_scale": scale},
            ).frames
            for output in ("latent", "pt")
            if step.update(index=0) is None
        ]  # fmt: skip
    return results[0], results[1]


@pytest.mark.parametrize(
    ("kind", "guidance", "scale"),
    [("dpm", 3.0, 1.0), ("dpm", 1.0, 0.5), ("ddim", 3.0, 0.5), ("ddim", 3.0, 0.0)],
    ids=["dpm, guidance, motion 1", "dpm, no guidance, motion 0.5", "ddim, motion 0.5", "ddim, motion 0"],
)
def test_bundle_gives_the_video_of_diffusers_pipeline_with_plain_adapters(
    kind: str, guidance: float, scale: float, world: dict[str, Any], pipeline: MotionPipeline, request_: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prompt, negative = "w5 w9 w30", "w7"
    ids = [torch.from_numpy(pipeline.bundle.tokenize("text", text)["input_ids"]) for text in (prompt, negative)]
    assert ids[0].tolist() == [[5, 9, 30, 1, 0, 0]]
    latents, frames = reference_video(world, request_, ids, kind=kind, guidance=guidance, scale=scale, patch=monkeypatch)
    seen: list[Any] = []
    decode = pipeline.graph("decode")
    monkeypatch.setitem(pipeline._graphs, "decode", lambda inputs: (seen.append(inputs["latents"]), decode(inputs))[1])
    result = pipeline(
        request_["still"], prompt, negative_prompt=negative, seed=SEED, steps=4, solver=kind, guidance=guidance,
        motion_scale=scale, references=request_["references"],
    )  # fmt: skip
    np.testing.assert_allclose(seen[0], latents, atol=1e-4 * max(1.0, float(latents.abs().max())))
    want = np.rint(frames[0].permute(0, 2, 3, 1).numpy() * 255)
    assert result.frames.shape == want.shape == (FRAMES, 24, 32, 3)
    assert np.abs(result.frames.astype(int) - want).max() <= 1  # two roundings to whole numbers


def test_motion_changes_the_video(pipeline: MotionPipeline, request_: dict[str, Any]) -> None:
    videos = [
        pipeline(request_["still"], "w5", steps=2, motion_scale=scale, references=request_["references"]).frames
        for scale in (0.0, 1.0)
    ]
    assert (videos[0] != videos[1]).mean() > 0.2


def test_manifest_records_choices_keys_and_where_weights_belong(world: dict[str, Any], pipeline: MotionPipeline) -> None:
    manifest: Any = pipeline.bundle.manifest
    made = manifest["provenance"]
    assert made["sos_token"]["source"] == "seed 42" and made["overlay"] == "17_frames" and made["positions"] == "released"
    assert manifest["defaults"] == {"guidance": 3.0, "target_range": "correct"}
    assert any(line.startswith("transformer: 65 keys used, 0 missing, 0 unexpected") for line in made["keys"])
    keys = json.loads((world["folder"] / "bundle" / "keys.json").read_text())
    assert {"Motion-Adapter", "17_frames", "transformer", "vae", "VideoMAE", "DINOv2"} <= {k["what"] for k in keys}
    weights = manifest["partition"]["weights"]
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
        ("frames", "frames is 18; allowed: 1 . a multiple of 4, up to 49"),
    ],
)
def test_bad_bases_are_refused_before_anything_is_written(
    change: str, message: str, world: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world["folder"] / "base", base)
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
    plain = world["sources"]
    sources = Sources(base, plain.motionrag, plain.videomae, plain.dinov2, tmp_path / "converted", "float32", plain.sos)
    with pytest.raises(CheckpointError, match=message):
        export_cogvideox(sources, tmp_path / "out", frames=18 if change == "frames" else FRAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
