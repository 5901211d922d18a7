"""The demo model: every part of MotionRAG around a CogVideoX transformer, small enough to train on one CPU core.

    model = load("demo/checkpoint.safetensors")      # eval mode, float32
    tokens = model.motion_tokens(video)              # video [B, 17, 3, 64, 64] in [-1, 1] -> [B, M, D]

Shapes: B batch, F latent frames, C latent channels, H W latent grid, M motion tokens, D token width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from layers import Residual
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, T5Config, T5EncoderModel, VideoMAEConfig, VideoMAEModel

from motionrt.export.systems.motionrag import Cama, Resampler, install_cogvideox_adapter

FRAMES, SIZE, FPS = 17, 64, 8
LATENTS = (5, 16, 8, 8)  # F, C, H, W
TOKENS, WIDTH = 8, 64  # M, D
TEXT_TOKENS, TEXT_WIDTH, VOCABULARY, PAD, UNKNOWN = 12, 64, 96, 0, 1
SCHEDULER = {
    "prediction_type": "v_prediction",
    "snr_shift_scale": 1.0,
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
}
PARTS = (
    "autoencoder", "text", "motion_encoder", "motion_proj", "appearance_encoder", "appearance_proj", "cama", "denoiser",
)  # fmt: skip


class Mixer(nn.Module):
    """MLP-Mixer block (Tolstikhin et al. 2021) on `[N, C, 8, 8]`: over space, so that a place knows the whole picture,
    then a residual 3x3 block over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        places = LATENTS[2] * LATENTS[3]
        self.space = nn.Linear(places, places)
        self.channels = Residual(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x + F.gelu(self.space(x.flatten(2))).unflatten(-1, LATENTS[2:]))


class Autoencoder(nn.Module):
    """Causal layered autoencoder: frame 0 alone gives the look, each group of 4 frames a motion field for it.

    The decoder draws frame 0 as background, sprite colour and coverage, and carries the last two along the field; so
    an object stays sharp and itself while it moves, and the denoiser has only to get the motion right. (Plain
    convolutional decoders of this size gave 21 dB on the sprite.) Latents `[B, F, C, H, W]` have unit variance per
    channel, for frame 0 and for groups; F may be any 1 + n groups.
    """

    def __init__(self, width: int = 80, fine: int = 40) -> None:
        super().__init__()
        channels = LATENTS[1]
        self.patch = nn.Conv2d(48, 64, 3, padding=1)
        self.down = nn.Conv2d(64, width, 4, stride=2, padding=1)
        self.first_mix = nn.Sequential(Residual(width), Residual(width))
        self.to_first = nn.Conv2d(width, channels, 1)
        self.join = nn.Conv2d(5 * width, 2 * width, 1)
        self.group_mix = nn.Sequential(Mixer(2 * width), Mixer(2 * width))
        self.to_group = nn.Conv2d(2 * width, channels, 1)
        self.from_first = nn.Conv2d(channels, 128, 3, padding=1)
        self.look_mix = nn.Sequential(Residual(128), Residual(128))
        self.split = nn.Conv2d(128, 4 * fine, 1)
        self.fine_mix = nn.Sequential(Residual(fine), Residual(fine), Residual(fine))
        self.to_colours = nn.Conv2d(fine, 6, 3, padding=1)  # of the sprite and of the background, at a quarter of the size
        self.to_cover = nn.Conv2d(fine, 16, 3, padding=1)
        self.from_group = nn.Conv2d(2 * channels, 96, 1)
        self.motion_mix = nn.Sequential(Mixer(96), Mixer(96), Mixer(96))
        self.to_field = nn.Conv2d(96, 8, 1)
        self.mean: Tensor
        self.std: Tensor
        self.places: Tensor
        self.register_buffer("mean", torch.zeros(1, 2, channels, 1, 1))  # row 0: frame 0; row 1: groups
        self.register_buffer("std", torch.ones(1, 2, channels, 1, 1))
        axis = torch.arange(SIZE) + 0.5
        self.register_buffer("places", torch.stack(torch.meshgrid(axis, axis, indexing="xy")), persistent=False)  # x, y in px

    def encode_raw(self, video: Tensor) -> Tensor:
        """`[B, 1 + 4n, 3, 64, 64]` -> unscaled latents `[B, 1 + n, C, H, W]`."""
        batch, frames = video.shape[:2]
        groups = (frames - 1) // 4
        x = F.gelu(self.patch(F.pixel_unshuffle(video.flatten(0, 1), 4)))
        x = F.gelu(self.down(x)).unflatten(0, (batch, frames))
        first = self.to_first(self.first_mix(x[:, 0]))[:, None]
        if not groups:
            return first
        rest = x[:, 1:].unflatten(1, (groups, 4))
        rest = torch.cat([x[:, None, :1].expand(-1, groups, -1, -1, -1, -1), rest], dim=2)
        rest = F.gelu(self.join(rest.flatten(2, 3).flatten(0, 1)))
        return torch.cat([first, self.to_group(self.group_mix(rest)).unflatten(0, (batch, groups))], dim=1)

    def look(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frame 0's latent `[B, C, H, W]` -> sprite colour, background `[B, 3, 64, 64]`, coverage logits `[B, 1, 64, 64]`."""
        x = F.gelu(self.look_mix(F.gelu(self.from_first(first))))
        x = F.gelu(self.fine_mix(F.pixel_shuffle(self.split(x), 2)))
        colours = F.interpolate(self.to_colours(x), scale_factor=4.0, mode="bilinear", align_corners=False)
        return colours[:, :3], colours[:, 3:], F.pixel_shuffle(self.to_cover(x), 4)

    def field(self, latents: Tensor) -> Tensor:
        """`[B, 1 + n, C, H, W]` -> where each 8x8 patch of the frames after 0 comes from, px: `[B, 4n, 2 (x, y), 8, 8]`."""
        batch, count = latents.shape[0], latents.shape[1] - 1
        x = torch.cat([latents[:, 1:], latents[:, :1].expand(-1, count, -1, -1, -1)], dim=2).flatten(0, 1)
        x = 16 * self.to_field(self.motion_mix(F.gelu(self.from_group(x))))
        return x.unflatten(1, (4, 2)).unflatten(0, (batch, count)).flatten(1, 2)

    def draw(self, look: tuple[Tensor, Tensor, Tensor], field: Tensor) -> Tensor:
        """Layers of frame 0 (`look`) carried along `field [B, T, 2, 8, 8]` px -> `[B, T, 3, 64, 64]`, not clamped."""
        colour, background, cover = look
        batch, frames = field.shape[:2]
        field = F.interpolate(field.flatten(0, 1), scale_factor=8.0, mode="bilinear", align_corners=False)
        grid = ((field + self.places) * (2 / SIZE) - 1).permute(0, 2, 3, 1)
        layers = torch.cat([cover, colour], dim=1)[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
        # Logits are carried, not coverage: they vary smoothly across an edge, so it stays as sharp as in frame 0.
        moved = F.grid_sample(layers, grid, mode="bilinear", padding_mode="border", align_corners=False)
        moved = moved.unflatten(0, (batch, frames))
        behind = background[:, None]
        return behind + torch.sigmoid(moved[:, :, :1]) * (moved[:, :, 1:] - behind)

    def scale(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation for `latents [B, 1 + n, ...]`, each `[1, 1 + n, C, 1, 1]`."""
        count = latents.shape[1] - 1
        both = (torch.cat([x[:, :1], x[:, 1:].expand(-1, count, -1, -1, -1)], dim=1) for x in (self.mean, self.std))
        mean, std = both
        return mean, std

    def encode(self, video: Tensor) -> Tensor:
        """`[B, 17, 3, 64, 64]` in [-1, 1] -> `[B, 5, 16, 8, 8]`, unit variance."""
        raw = self.encode_raw(video)
        mean, std = self.scale(raw)
        return (raw - mean) / std

    def encode_image(self, image: Tensor) -> Tensor:
        """`[B, 3, 64, 64]` in [-1, 1] -> image latents `[B, 5, 16, 8, 8]`: the still's latent, then zeros."""
        return F.pad(self.encode(image[:, None]), (0, 0, 0, 0, 0, 0, 0, LATENTS[0] - 1))

    def decode(self, latents: Tensor) -> Tensor:
        """`[B, 5, 16, 8, 8]` -> `[B, 17, 3, 64, 64]` in [-1, 1]."""
        still = (0, 0, 0, 0, 0, 0, 1, 0)  # frame 0 comes from where it is
        return self.draw(self.look(latents[:, 0]), F.pad(self.field(latents), still)).clamp(-1.0, 1.0)


class Normalise(nn.Module):
    """[-1, 1] -> ImageNet-normalised pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2 - self.mean) / self.std


class MotionEncoder(nn.Module):
    """VideoMAE with its preprocessing inside: `[B, 17, 3, 64, 64]` in [-1, 1] -> features `[B, 128, 96]`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = VideoMAEModel(
            VideoMAEConfig(
                image_size=32, patch_size=8, num_frames=16, tubelet_size=2, hidden_size=96, num_hidden_layers=4,
                num_attention_heads=4, intermediate_size=384, use_mean_pooling=True,
            )
        )  # fmt: skip
        self.normalise = Normalise()
        self.picks = torch.linspace(0, FRAMES - 1, 16).round().long().tolist()

    def forward(self, video: Tensor) -> Tensor:
        frames = torch.cat([video[:, :8], video[:, 9:]], dim=1) if video.shape[1] == FRAMES else video[:, self.picks]
        small = F.interpolate(frames.flatten(0, 1), size=(32, 32), mode="bilinear", align_corners=False)
        pixels = self.normalise(small).unflatten(0, (video.shape[0], 16))
        return self.model(pixel_values=pixels).last_hidden_state


class AppearanceEncoder(nn.Module):
    """Dinov2 with its preprocessing inside: `[B, 3, 64, 64]` in [-1, 1] -> features `[B, 65, 96]`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Dinov2Model(
            Dinov2Config(image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=4)
        )
        self.normalise = Normalise()

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=self.normalise(image)).last_hidden_state


class TextEncoder(nn.Module):
    """T5 encoder, padding attended as CogVideoX does: ids `[B, 12]` int64 -> `[B, 12, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = T5EncoderModel(
            T5Config(
                vocab_size=VOCABULARY, d_model=TEXT_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                dropout_rate=0.0, relative_attention_num_buckets=16, relative_attention_max_distance=16,
                pad_token_id=PAD,
            )
        )  # fmt: skip

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).last_hidden_state


def resampler() -> Resampler:
    """Features of width 96 -> `[B, 8, 64]`."""
    return Resampler(dim=64, depth=2, dim_head=16, heads=4, num_queries=TOKENS, embedding_dim=96, output_dim=WIDTH, ff_mult=2)


def denoiser() -> CogVideoXTransformer3DModel:
    """CogVideoX transformer with Motion-Adapters: latents and image latents on channels (32) -> v (16)."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=2 * LATENTS[1], out_channels=LATENTS[1],
        time_embed_dim=128, text_embed_dim=TEXT_WIDTH, num_layers=4, sample_width=LATENTS[3], sample_height=LATENTS[2],
        sample_frames=FRAMES, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=False,
    )  # fmt: skip
    install_cogvideox_adapter(transformer, WIDTH)
    return transformer


def scheduler() -> CogVideoXDDIMScheduler:
    """The DDIM scheduler the denoiser was trained with."""
    return CogVideoXDDIMScheduler(**SCHEDULER)


class DemoModel(nn.Module):
    """All parts; the names are the checkpoint's key prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = Autoencoder()
        self.text = TextEncoder()
        self.motion_encoder = MotionEncoder()
        self.motion_proj = resampler()
        self.appearance_encoder = AppearanceEncoder()
        self.appearance_proj = resampler()
        self.cama = Cama(num_queries=TOKENS, dim=WIDTH, layers=4, heads=4, ff_dim=256)
        self.denoiser: Any = denoiser()
        self.uncond_motion: Tensor
        self.register_buffer("uncond_motion", torch.zeros(1, TOKENS, WIDTH))

    def motion_tokens(self, video: Tensor) -> Tensor:
        """`[B, 17, 3, 64, 64]` in [-1, 1] -> `[B, M, D]`."""
        return self.motion_proj(self.motion_encoder(video))

    def appearance_tokens(self, image: Tensor) -> Tensor:
        """`[B, 3, 64, 64]` in [-1, 1] -> `[B, M, D]`."""
        return self.appearance_proj(self.appearance_encoder(image))

    @torch.no_grad()
    def refresh_uncond(self) -> None:
        """Recompute `uncond_motion` from an all-zero (mid grey) clip."""
        self.uncond_motion.copy_(self.motion_tokens(torch.zeros(1, FRAMES, 3, SIZE, SIZE)))


def build() -> DemoModel:
    """A fresh model with random weights (from torch's global generator)."""
    return DemoModel()


def load(path: str | os.PathLike[str]) -> DemoModel:
    """The model of a checkpoint written by `save`, float32, eval mode. Raises on missing or unknown keys."""
    model = build()
    state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    for alias, name in (("text.model.encoder.embed_tokens.weight", "text.model.shared.weight"),):
        if alias in model.state_dict() and alias not in state:
            state[alias] = state[name]
    model.load_state_dict(state, strict=True)
    return model.eval()


def save(model: DemoModel, path: str | os.PathLike[str], half: bool = True) -> None:
    """Write every part as float16 (or float32) safetensors: temporary sibling, then rename."""
    state = {}
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if value.data_ptr() in seen and value.numel():  # tied weights are stored once
            continue
        seen.add(value.data_ptr())
        state[key] = (value.half() if half and value.is_floating_point() else value).contiguous().clone()
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    save_file(state, partial, metadata={"format": "pt", "precision": "float16" if half else "float32"})
    os.replace(partial, target)
