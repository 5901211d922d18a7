"""An SVD bundle from released files against diffusers' own pipeline with the plain adapters installed, same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from PIL import Image  # noqa: E402

from motionrt.export import svd  # noqa: E402
from motionrt.export.checkpoints import CheckpointError  # noqa: E402
from motionrt.export.motionrag import MotionAdapterCrossAttention  # noqa: E402
from motionrt.export.motionrag_files import SosToken  # noqa: E402
from motionrt.export.real import Sources, Stage  # noqa: E402
from motionrt.export.svd_bundle import export_svd  # noqa: E402
from motionrt.runtime.demo import load_by_path  # noqa: E402
from motionrt.runtime.memory_rows import Reference  # noqa: E402
from motionrt.runtime.noise import noise  # noqa: E402
from motionrt.runtime.pipeline import _ENCODER_DRAW, MotionPipeline  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
models = load_by_path(Path(__file__).parent / "real_models.py")
FRAMES, HEIGHT, WIDTH, SEED = 9, 16, 32, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Released files, their modules, and the bundle that was exported from them."""
    folder = tmp_path_factory.mktemp("svd")
    parts = models.write_svd(folder / "base")
    models.write_encoders(folder)
    blocks = {f"unet.{path}": a.to_q.in_features for path, a in svd.spatial_attentions(parts["unet"])}
    files = models.release.motionrag_states(blocks, overlay=False)
    models.release.save(folder / "rag", files)
    sources = Sources(
        folder / "base", folder / "rag", folder / "videomae", folder / "dinov2", folder / "converted", dtype="float32",
        sos=SosToken(seed=42), steps=(2, 4),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "add_text_query", models.packaged_text_query)
        export_svd(sources, folder / "bundle", frames=FRAMES, height=HEIGHT, width=WIDTH)
    pipeline = MotionPipeline.from_bundle(folder / "bundle", threads=1)
    return {"folder": folder, "parts": parts, "files": files, "sources": sources, "pipeline": pipeline}


class Handed(MotionAdapterCrossAttention):
    """The released processor, with the tokens put into its hands."""

    motion: Any = None
    scale: float = 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, motion=self.motion, motion_scale=self.scale)


@pytest.mark.parametrize(
    ("guidance", "scale"), [(3.0, 1.0), (3.0, 0.0), (1.0, 0.5)], ids=["guidance 1 to 3", "no motion", "no guidance, motion 0.5"]
)
def test_bundle_gives_the_video_of_diffusers_pipeline_with_plain_adapters(
    guidance: float, scale: float, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module
    from transformers import CLIPImageProcessor

    pipeline: MotionPipeline = world["pipeline"]
    draw = np.random.default_rng(0)
    still = draw.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    clips = draw.integers(0, 256, (2, FRAMES, 3, HEIGHT, WIDTH), np.uint8).astype(np.float32) / 127.5 - 1
    motion = pipeline.graph("motion")({"video": clips})["motion"]
    unconditional = pipeline.graph("motion")({"video": np.zeros_like(clips[:1])})["motion"]
    looks = pipeline.graph("appearance")({"image": clips[:, 0]})["appearance"]
    references = [Reference(i, 1.0, "", "", 0.0, 1.0, motion[i], looks[i]) for i in range(2)]
    seen: dict[str, Any] = {}
    for name in ("decode", "cama"):
        graph = pipeline.graph(name)
        monkeypatch.setitem(pipeline._graphs, name, lambda inputs, n=name, g=graph: seen.setdefault(n, (inputs, g(inputs)))[1])
    result = pipeline(still, "", seed=SEED, steps=4, guidance=guidance, motion_scale=scale, references=references)

    unet: Any = UNetSpatioTemporalConditionModel(**models.UNET)
    svd.install_svd_adapter(unet, 64)
    adapters = world["files"]["Motion-Adapter.ckpt"]["state_dict"]
    state = {k.removeprefix("unet."): v for k, v in adapters.items() if k.startswith("unet.")}
    unet.load_state_dict(world["parts"]["unet"].state_dict() | state, strict=True)
    predicted = torch.from_numpy(seen["cama"][1]["motion"]) if scale else torch.zeros(1, 3, 64)
    tokens = torch.cat([torch.from_numpy(unconditional), predicted]) if guidance > 1 else predicted
    for _, attention in svd.spatial_attentions(unet):
        attention.processor.__class__ = Handed
        attention.processor.motion, attention.processor.scale = tokens, scale
    scheduler = EulerDiscreteScheduler(**models.EULER)
    pipe = StableVideoDiffusionPipeline(
        world["parts"]["vae"], world["parts"]["image_encoder"], unet.eval(), scheduler, CLIPImageProcessor()
    )
    pipe.set_progress_bar_config(disable=True)
    shape = (1, FRAMES, 4, HEIGHT // 2, WIDTH // 2)
    monkeypatch.setattr(module, "randn_tensor", lambda size, **_: torch.from_numpy(noise(SEED, _ENCODER_DRAW, tuple(size))))
    with torch.no_grad():
        latents, frames = (
            pipe(
                Image.fromarray(still), height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=4,
                min_guidance_scale=1.0, max_guidance_scale=guidance, fps=7, motion_bucket_id=127, noise_aug_strength=0.02,
                decode_chunk_size=8, latents=torch.from_numpy(noise(SEED, 0, shape)), output_type=output,
            ).frames
            for output in ("latent", "pt")
        )  # fmt: skip
    ours = seen["decode"][0]["latents"]
    np.testing.assert_allclose(ours, latents, atol=2e-4 * max(1.0, float(latents.abs().max())))
    want = np.rint(frames[0].permute(0, 2, 3, 1).numpy() * 255)
    assert result.frames.shape == want.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(result.frames.astype(int) - want).max() <= 1  # two roundings to whole numbers


def test_the_step_has_no_cross_attention_left_and_no_text_graph(world: dict[str, Any]) -> None:
    manifest: Any = world["pipeline"].bundle.manifest
    assert "text" not in manifest["graphs"] and manifest["provenance"]["first_guidance"] == 1.0
    header = (world["folder"] / "bundle" / "graphs" / "step.safetensors").read_bytes()[:40000]
    assert b"attn1" in header and b"attn2" not in header and b"time_emb" not in header


def test_adapters_of_another_unet_are_refused(world: dict[str, Any], tmp_path: Path) -> None:
    files = dict(world["files"])
    state = files["Motion-Adapter.ckpt"]["state_dict"]
    name = next(key for key in state if key.endswith("to_q_ip.0.weight"))
    files["Motion-Adapter.ckpt"] = {**state, name: torch.ones(33, 32)}
    models.release.save(tmp_path / "rag", files)
    plain = world["sources"]
    sources = Sources(plain.base, tmp_path / "rag", plain.videomae, plain.dinov2, tmp_path / "converted", "float32", plain.sos)
    with pytest.raises(CheckpointError, match=r"to_q_ip.0.weight` has the shape \[33, 32\]; \[32, 32\] is expected"):
        export_svd(sources, tmp_path / "out", frames=FRAMES, height=HEIGHT, width=WIDTH)
    assert {path.name for path in tmp_path.iterdir()} == {"rag"}
