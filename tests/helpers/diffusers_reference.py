"""diffusers' own pipelines with MotionRAG's plain adapters installed, on noise that is handed to them: what a bundle must give.

Loaded by path: the tests are not a package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from by_path import load_by_path
from safetensors.torch import load_file
from torch import Tensor

from motionrt.export.systems import svd_step as svd
from motionrt.export.systems.motionrag import Cama, MotionAdapterCrossAttention, Resampler, install_cogvideox_adapter

release = load_by_path(Path(__file__).resolve().parents[2] / "tests/helpers/release_files.py")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOS_SEED = 42
Draw = Callable[[str, int, tuple[int, ...]], np.ndarray]  # (node, 0 at the start and t + 1 in step t, shape) -> normal numbers


def seen(pictures: Tensor, short: int, size: int, mode: str) -> Tensor:
    """Pictures `[n, 3, H, W]` in [-1, 1] as an encoder sees them (A2), with torch's own resize."""
    pictures = (pictures + 1) / 2
    height, width = pictures.shape[-2:]
    scaled = F.interpolate(pictures, size=(short, int(short * width / height)), mode=mode, antialias=True, align_corners=False)
    top, left = int(round((scaled.shape[-2] - size) / 2)), int(round((scaled.shape[-1] - size) / 2))
    mean, std = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    return (scaled[..., top : top + size, left : left + size] - mean) / std


def cast(module: Any, dtype: torch.dtype) -> Any:
    """`module`, or a copy of it in `dtype`."""
    return module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)


@torch.no_grad()
def motion_tokens(
    parts: Mapping[str, Any], files: Mapping[str, Any], clips: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Motion tokens `[n, M, D]` of clips `[n, F, 3, H, W]` in [-1, 1]; all is computed in `dtype`, as the release does."""
    return projected(files, video_features(parts, clips, dtype))


@torch.no_grad()
def video_features(parts: Mapping[str, Any], clips: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """VideoMAE's features `[n, tokens, E]` of clips `[n, F, 3, H, W]` in [-1, 1]."""
    picks = np.linspace(0, clips.shape[1] - 1, 16).round().astype(int)  # 17 frames: all but the ninth
    frames = seen(clips[:, picks].flatten(0, 1), 32, 32, "bilinear").unflatten(0, (len(clips), 16))
    features: Tensor = cast(parts["videomae"], dtype).videomae(pixel_values=frames.to(dtype)).last_hidden_state
    return features


@torch.no_grad()
def projected(files: Mapping[str, Any], features: Tensor) -> Tensor:
    """Motion tokens `[n, M, D]` of features `[n, tokens, E]`, of one clip or fused, by the Resampler in their dtype."""
    resampler = Resampler(release.WIDTH, 2, 64, 1, release.TOKENS, release.VIDEO_WIDTH, release.WIDTH, 2)
    resampler.load_state_dict(files["motion_proj.ckpt"])
    tokens: Tensor = resampler.to(features.dtype)(features)
    return tokens


@torch.no_grad()
def appearance_tokens(
    parts: Mapping[str, Any], files: Mapping[str, Any], stills: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Appearance tokens `[n, M, D]` of stills `[n, 3, H, W]`."""
    resampler = Resampler(release.WIDTH, 1, 64, 1, release.TOKENS, release.IMAGE_WIDTH, release.WIDTH, 2)
    state = files["motion_transformer.ckpt"]["state_dict"]
    inside = "condition_proj."
    resampler.load_state_dict({k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)})
    pixels = seen(stills, 256, 224, "bicubic")
    tokens: Tensor = resampler.to(dtype)(cast(parts["dinov2"], dtype)(pixel_values=pixels.to(dtype)).last_hidden_state)
    return tokens


@torch.no_grad()
def predicted_motion(files: Mapping[str, Any], motion: Tensor, looks: Tensor, still: Tensor) -> Tensor:
    """CAMA's prediction `[1, M, D]` from references `[K, M, D]`, most similar first, and the still's tokens `[1, M, D]`."""
    cama = Cama(release.TOKENS, release.WIDTH, 2, 1, 96)
    state = files["motion_transformer.ckpt"]["state_dict"]
    draw = torch.Generator().manual_seed(SOS_SEED)
    sos = torch.randn(1, release.TOKENS, release.WIDTH, generator=draw) / release.WIDTH**0.5
    cama.load_state_dict({k: v for k, v in state.items() if k.startswith("transformer.")} | {"sos_token": sos})
    tokens: Tensor = cama.to(still.dtype)(motion[None], looks[None], still)
    return tokens


def adapter_state(files: Mapping[str, Any], name: str, inside: str) -> dict[str, Tensor]:
    state = files[name]["state_dict"]
    return {k.removeprefix(inside): v for k, v in state.items() if k.startswith(inside)}


def cogvideox_video(
    base: Path, config: Mapping[str, Any], scheduler_config: Mapping[str, Any], parts: Mapping[str, Any],
    files: Mapping[str, Any], *, image: Tensor, ids: Sequence[Tensor], motion: Tensor, unconditional: Tensor, frames: int,
    kind: str = "dpm", steps: int = 4, guidance: float = 3.0, dynamic: bool = False, scale: float = 1.0, draw: Draw,
    learned: bool = False, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, list[int]]:  # fmt: skip
    """(latents `[1, F, C, h, w]`, frames `[T, 3, H, W]` in [0, 1], noises drawn in each step) of diffusers' pipeline.

    `image [1, 3, H, W]` in [-1, 1]; `ids`: tokens of the prompt and the negative prompt; `motion`, `unconditional`
    `[1, M, D]`. At scale 0 no adapter is installed at all. `learned`: the beginning of the learned position table as if it
    were the model's own for `frames`. All is computed in `dtype`.
    """
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXTransformer3DModel,
    )
    from diffusers.models.autoencoders import vae as vae_module
    from diffusers.schedulers import scheduling_dpm_cogvideox as dpm_module

    transformer: Any = CogVideoXTransformer3DModel(**config)
    state = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    if frames != config["sample_frames"]:
        state |= adapter_state(files, "17_frames.ckpt", "transformer.")
    if scale:
        install_cogvideox_adapter(transformer, motion.shape[-1])
        state |= adapter_state(files, "Motion-Adapter.ckpt", "transformer.")
    transformer.load_state_dict(state, strict=True)
    latents = ((frames - 1) // 4 + 1, config["out_channels"], config["sample_height"], config["sample_width"])
    if learned:
        rows = config["max_text_seq_length"] + latents[0] * latents[2] * latents[3] // config["patch_size"] ** 2
        transformer.patch_embed.pos_embedding = transformer.patch_embed.pos_embedding[:, :rows]
        transformer.patch_embed.sample_frames = frames
    scheduler = (CogVideoXDPMScheduler if kind == "dpm" else CogVideoXDDIMScheduler)(**scheduler_config)
    text, vae = cast(parts["text_encoder"], dtype), cast(parts["vae"], dtype)
    pipe = CogVideoXImageToVideoPipeline(None, text, vae, transformer.eval().to(dtype), scheduler)
    pipe.set_progress_bar_config(disable=True)
    draws: list[int] = []
    plain, found = scheduler.step, {}

    def step(*args: Any, **kwargs: Any) -> Any:
        draws.append(0)
        return plain(*args, **kwargs)

    def drawn(size: Any, **_: Any) -> Tensor:
        draws[-1] += 1
        if 1 < len(draws) < steps and draws[-1] == 1:
            return torch.full(tuple(size), torch.nan, dtype=dtype)  # what a step between the ends draws first is thrown away
        return torch.from_numpy(draw("video", len(draws), tuple(size))).to(dtype)

    def encoder_noise(size: Any, **_: Any) -> Tensor:
        return torch.from_numpy(draw("encode", 0, (1, *latents[1:])))[:, :, None].to(dtype)

    def on_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        found["latents"] = values["latents"]
        return {}

    tokens = (motion if guidance <= 1 else torch.cat([unconditional, motion])).to(dtype)
    extra = {"attention_kwargs": {"motion": tokens, "motion_scale": scale}} if scale else {}
    with (
        torch.no_grad(), patch.object(scheduler, "step", step), patch.object(dpm_module, "randn_tensor", drawn),
        patch.object(vae_module, "randn_tensor", encoder_noise),
    ):  # fmt: skip
        embeds = [text(one)[0] for one in ids]
        video = pipe(
            image=(image + 1) / 2, prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1],
            height=image.shape[-2], width=image.shape[-1], num_frames=frames, num_inference_steps=steps,
            guidance_scale=guidance, use_dynamic_cfg=dynamic, output_type="pt",
            latents=torch.from_numpy(draw("video", 0, (1, *latents))).to(dtype), callback_on_step_end=on_step, **extra,
        ).frames  # fmt: skip
    return found["latents"], video[0], draws


class Handed(MotionAdapterCrossAttention):
    """The released processor of SVD, with the tokens put into its hands."""

    motion: Any = None
    scale: float = 1.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, motion=self.motion, motion_scale=self.scale)


def svd_video(
    config: Mapping[str, Any], scheduler_config: Mapping[str, Any], parts: Mapping[str, Any], files: Mapping[str, Any], *,
    still: np.ndarray, motion: Tensor, unconditional: Tensor, frames: int, steps: int = 4, guidance: float = 3.0,
    scale: float = 1.0, draw: Draw, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(latents `[1, F, 4, h, w]`, frames `[F, 3, H, W]` in [0, 1]) of diffusers' pipeline; `still` uint8 `[H, W, 3]`."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module
    from PIL import Image
    from transformers import CLIPImageProcessor

    unet: Any = UNetSpatioTemporalConditionModel(**config)
    state = parts["unet"].state_dict()
    if scale:
        svd.install_svd_adapter(unet, motion.shape[-1])
        state = state | adapter_state(files, "Motion-Adapter.ckpt", "unet.")
    unet.load_state_dict(state, strict=True)
    if scale:
        for _, attention in svd.spatial_attentions(unet):
            attention.processor.__class__ = Handed
            attention.processor.motion = (torch.cat([unconditional, motion]) if guidance > 1 else motion).to(dtype)
            attention.processor.scale = scale
    scheduler = EulerDiscreteScheduler(**scheduler_config)
    vae, clip = cast(parts["vae"], dtype), cast(parts["image_encoder"], dtype)
    pipe = StableVideoDiffusionPipeline(vae, clip, unet.eval().to(dtype), scheduler, CLIPImageProcessor())
    pipe.set_progress_bar_config(disable=True)
    height, width = still.shape[:2]
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    found: dict[str, Tensor] = {}

    def encoder_noise(size: Any, **_: Any) -> Tensor:
        return torch.from_numpy(draw("encode", 0, tuple(size))).to(dtype)

    def on_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        found["latents"] = values["latents"]
        return {}

    start = torch.from_numpy(draw("video", 0, (1, frames, 4, height // factor, width // factor))).to(dtype)
    with torch.no_grad(), patch.object(module, "randn_tensor", encoder_noise):
        video = pipe(
            Image.fromarray(still), height=height, width=width, num_frames=frames, num_inference_steps=steps,
            min_guidance_scale=1.0, max_guidance_scale=guidance, fps=7, motion_bucket_id=127, noise_aug_strength=0.02,
            decode_chunk_size=8, latents=start, output_type="pt", callback_on_step_end=on_step,
        ).frames  # fmt: skip
    return found["latents"], video[0]
