"""The demo's text-to-video model for MotionClone: an AnimateDiff of 6 M parameters for clips of 16 frames of 64x64.

    model = load("demo/motionclone/checkpoint.safetensors")    # eval mode, float32
    latents = model.vae.encode(frames)                         # [N, 3, 64, 64] in [-1, 1] -> [N, 4, 8, 8]

The parts have the names of the classes that they are: diffusers' `UNetMotionModel` under `unet.`, transformers'
`CLIPTextModel` under `text_encoder.`, and the frame autoencoder below under `vae.`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).resolve().parents[1]))  # demo/layers.py, demo/recipe.py
import torch
import torch.nn.functional as F
from diffusers import UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from layers import Residual
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from motionrt.export.systems.motionclone.unet import FrameNorm

ModelT = TypeVar("ModelT", bound=nn.Module)
FRAMES, SIZE, FPS = 16, 64, 8
LATENTS = (FRAMES, 4, 8, 8)  # F, C, h, w
WORDS = 56  # of demo/tokenizer.json: [PAD], [UNK] and the domain's
PAD, UNKNOWN, BOS, EOS, VOCABULARY = 0, 1, WORDS, WORDS + 1, 64
TEXT_TOKENS, TEXT_WIDTH = 12, 64
# As diffusers' DDIMScheduler takes it. Betas, steps and the last alpha are MotionClone's; the released model predicts noise.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
_BETAS = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
LEVELS = torch.cumprod(1 - _BETAS, 0).float()  # the share of signal ("alpha bar") at every timestep
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "block_out_channels": (80, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": TEXT_WIDTH,
    "use_motion_mid_block": False,
    "num_attention_heads": 4,
    "motion_num_attention_heads": 4,
    "motion_max_seq_length": 32,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_TOKENS,
    "projection_dim": TEXT_WIDTH,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def build_unet() -> UNetMotionModel:
    """The UNet with random weights: `[B, 4, F, 8, 8]`, timesteps `[B]`, text `[B F, 12, 64]` -> v `[B, 4, F, 8, 8]`.

    The motion modules' last projection is zero, as AnimateDiff starts from: untrained, they change nothing.
    """
    unet = UNetMotionModel(**UNET)
    for module in unet.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.norm.__class__ = FrameNorm
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    return unet


def build_text() -> CLIPTextModel:
    """The text encoder with random weights: ids `[B, 12]` int64 -> `last_hidden_state [B, 12, 64]`."""
    return CLIPTextModel(CLIPTextConfig(**TEXT))


class FrameAutoencoder(nn.Module):
    """Frames to latents of an eighth of their size, one by one; and back, in layers: background, sprite colour, coverage.

    The decoder also pools what it sees over all frames of a clip: generated latents differ a little from frame to frame,
    and an object is one shape all along.
    """

    def __init__(self, width: int = 80, look: int = 104, fine: int = 36, gist: int = 96) -> None:
        super().__init__()
        channels = LATENTS[1]
        self.patch = nn.Conv2d(48, 48, 3, padding=1)
        self.down = nn.Conv2d(48, width, 4, stride=2, padding=1)
        self.mix = nn.Sequential(Residual(width), Residual(width))
        self.to_latent = nn.Conv2d(width, channels, 1)
        self.from_latent = nn.Conv2d(channels, look, 3, padding=1)
        self.see = Residual(look)
        self.to_gist = nn.Conv2d(look, gist, 1)
        self.from_gist = nn.Sequential(nn.Linear(gist, gist), nn.GELU(), nn.Linear(gist, 2 * (look + fine)))
        self.look_mix = nn.Sequential(Residual(look), Residual(look))
        self.split = nn.Conv2d(look, 4 * fine, 1)
        self.fine_mix = nn.Sequential(Residual(fine), Residual(fine), Residual(fine))
        self.to_colours = nn.Conv2d(fine, 6, 3, padding=1)  # of the sprite and the background, at a quarter of the size
        self.to_cover = nn.Conv2d(fine, 16, 3, padding=1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def encode_raw(self, frames: Tensor) -> Tensor:
        """`[N, 3, 64, 64]` in [-1, 1] -> unscaled latents `[N, 4, 8, 8]`."""
        x = F.gelu(self.patch(F.pixel_unshuffle(frames, 4)))
        return self.to_latent(self.mix(F.gelu(self.down(x))))

    def encode(self, frames: Tensor) -> Tensor:
        """`[N, 3, 64, 64]` in [-1, 1] -> latents `[N, 4, 8, 8]` of unit variance."""
        return (self.encode_raw(frames) - self.mean) / self.std

    def layers(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clips `[B, F, 4, 8, 8]` -> sprite colour and background `[B F, 3, 64, 64]`, coverage logits `[B F, 1, 64, 64]`."""
        batch, frames = latents.shape[:2]
        x = self.see(F.gelu(self.from_latent(latents.flatten(0, 1))))
        gist = F.gelu(self.to_gist(x)).mean(dim=(2, 3)).unflatten(0, (batch, frames)).mean(dim=1, keepdim=True)
        change = self.from_gist(gist).expand(-1, frames, -1).flatten(0, 1)[..., None, None]
        look, fine = self.from_latent.out_channels, self.to_cover.in_channels
        scale, shift, fine_scale, fine_shift = change.split((look, look, fine, fine), dim=1)
        x = F.gelu(self.look_mix(x * (1 + scale) + shift))
        x = F.pixel_shuffle(self.split(x), 2)
        x = F.gelu(self.fine_mix(x * (1 + fine_scale) + fine_shift))
        colours = F.interpolate(self.to_colours(x), scale_factor=4.0, mode="bilinear", align_corners=False)
        return colours[:, :3], colours[:, 3:], F.pixel_shuffle(self.to_cover(x), 4)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips `[B, F, 4, 8, 8]` -> `[B, F, 3, 64, 64]` in [-1, 1]; pictures `[N, 4, 8, 8]`, each its own clip, likewise."""
        clips = latents if latents.ndim == 5 else latents[:, None]
        colour, behind, cover = self.layers(clips)
        frames = (behind + torch.sigmoid(cover) * (colour - behind)).clamp(-1.0, 1.0)
        return frames.unflatten(0, clips.shape[:2]) if latents.ndim == 5 else frames


class Decode(nn.Module):
    """A graph's decoder: latents of a clip `[1, F, 4, 8, 8]` to frames `[1, F, 3, 64, 64]`."""

    def __init__(self, vae: FrameAutoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)


class DemoModel(nn.Module):
    """All parts; the names are the checkpoint's key prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text()
        self.vae = FrameAutoencoder()


def is_weight(name: str, value: Tensor) -> bool:
    """Whether a checkpoint has it."""
    return value.is_floating_point()


def save(model: nn.Module, path: Path, stored: Callable[[str, Tensor], bool] = is_weight) -> None:
    """Write a checkpoint in float16, of what is `stored`."""
    state = {name: value.half().contiguous().clone() for name, value in model.state_dict().items() if stored(name, value)}
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    os.replace(partial, path)


def load(path: str | Path) -> DemoModel:
    """The model of a checkpoint; see `filled`."""
    return filled(DemoModel(), path)


def filled(model: ModelT, path: str | Path, stored: Callable[[str, Tensor], bool] = is_weight) -> ModelT:
    """`model` with the weights of a checkpoint that `save` wrote, float32, in eval mode. `ValueError` where a name is missing
    or unknown."""
    missing, unknown = model.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    missing = [name for name in missing if stored(name, model.state_dict()[name])]
    if missing or unknown:
        raise ValueError(f"{path} does not fit the model: missing {missing}, unknown {unknown}. Pack it again.")
    return model.eval().requires_grad_(False)
