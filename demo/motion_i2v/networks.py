"""The networks of the demo's Motion-I2V: those of the export (export/systems/motion_i2v/networks.py), small; an autoencoder of
fields; MotionClone's demo's image autoencoder and text encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import model as demo
import torch
import torch.nn.functional as F
from layers import Residual
from torch import Tensor, nn

from motionrt.export.systems.motion_i2v import augmented
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.motion_i2v.stencil import resized

TARGETS = demo.FRAMES - 1
REACH = 8.0  # px that the autoencoder of fields counts in
NOISE = 0.1  # on flow latents of unit variance, in its training: predicted ones will not be exact either
RENDER: dict[str, Any] = {**demo.UNET, "use_motion_mid_block": True}  # stage 2 begins with MotionClone's demo's weights
PREDICT: dict[str, Any] = {**RENDER, "in_channels": 8, "block_out_channels": (48, 64)}  # stage 1 begins with none
CONTROL: dict[str, Any] = {**PREDICT, "conditioning_channels": 5, "conditioning_hidden_channels": 64}


class FieldAutoencoder(nn.Module):
    """Fields to latents of an eighth of their size; and back, in layers: motion of object and camera, coverage of the object.

    Released weights have diffusers' `AutoencoderKL` here. Its norms divide by how far things go, which is what a field
    is about, and its layers of full size take most of the time: made small, it was still 8 px off after 200 steps.
    """

    def __init__(self, width: int = 64, fine: int = 32) -> None:
        super().__init__()
        channels = demo.LATENTS[1]
        self.patch = nn.Conv2d(32, 48, 3, padding=1)
        self.down = nn.Conv2d(48, width, 4, stride=2, padding=1)
        self.mix = nn.Sequential(Residual(width), Residual(width))
        self.to_latent = nn.Conv2d(width, channels, 1)
        self.from_latent = nn.Conv2d(channels, width, 3, padding=1)
        self.look_mix = nn.Sequential(Residual(width), Residual(width), Residual(width))
        self.split = nn.Conv2d(width, 4 * fine, 1)
        self.fine_mix = nn.Sequential(Residual(fine), Residual(fine))
        self.to_moves = nn.Conv2d(fine, 4, 3, padding=1)  # of the object and the background, at a quarter of the size
        self.to_cover = nn.Conv2d(fine, 16, 3, padding=1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def encode_raw(self, fields: Tensor) -> Tensor:
        """Fields as shares of the picture in [0, 1] `[N, 2, 64, 64]` -> unscaled latents `[N, 4, 8, 8]`."""
        x = F.gelu(self.patch(F.pixel_unshuffle((fields * 2 - 1) * (demo.SIZE / REACH), 4)))
        return self.to_latent(self.mix(F.gelu(self.down(x))))

    def encode(self, fields: Tensor) -> Tensor:
        """Fields as shares of the picture in [0, 1] `[N, 2, 64, 64]` -> latents `[N, 4, 8, 8]` of unit variance."""
        return (self.encode_raw(fields) - self.mean) / self.std

    def layers(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[N, 4, 8, 8]` -> motion of object and background px `[N, 2, 64, 64]`, coverage logits `[N, 1, 64, 64]`."""
        x = self.look_mix(F.gelu(self.from_latent(latents)))
        x = self.fine_mix(F.gelu(F.pixel_shuffle(self.split(x), 2)))
        moves = F.interpolate(self.to_moves(x).float() * REACH, scale_factor=4.0, mode="bilinear", align_corners=False)
        return moves[:, :2], moves[:, 2:], F.pixel_shuffle(self.to_cover(x), 4)

    def decode(self, latents: Tensor) -> Tensor:
        """`[N, 4, 8, 8]` -> fields as shares of the picture, about [0, 1], `[N, 2, 64, 64]`."""
        moved, behind, cover = self.layers(latents)
        return ((behind + torch.sigmoid(cover) * (moved - behind)) / demo.SIZE + 1) / 2


class MotionI2V(nn.Module):
    """All parts; the names are the checkpoint's key prefixes. `vae` and stage 2's `text_encoder` are MotionClone's demo's;
    `motion_text` is stage 1's."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = FieldAutoencoder()
        self.predict = FlowUNet(PREDICT)
        self.control = Trajectories(CONTROL)
        self.render = VideoUNet(RENDER)
        self.vae = demo.FrameAutoencoder()
        self.text_encoder, self.motion_text = demo.build_text(), demo.build_text()


def save(model: MotionI2V, path: Path) -> None:
    """Write a checkpoint in float16."""
    demo.save(model, path, _stored)


def load(path: str | Path) -> MotionI2V:
    """The model of a checkpoint, float32, in eval mode. `ValueError` where a name is missing or unknown."""
    return demo.filled(MotionI2V(), path, _stored)


def _stored(name: str, value: Tensor) -> bool:
    """Tables of positions are made anew."""
    return demo.is_weight(name, value) and not name.endswith("pos_embed.pe")


class Matrix(NamedTuple):
    """A splat of one grid as a matrix `[B, P places x n fields, P sources]`, in the place of a `Stencil`."""

    matrix: Tensor
    beyond: Tensor


def matrices(fields: Tensor, grids: Sequence[tuple[int, int]]) -> list[Matrix]:
    """Fields `[B, n, 2, H, W]` px as what stage 2 reads inside `quick`: as of `fields_of`, with every zero kept."""
    made = []
    for height, width in grids:
        axes = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        y, x = (axis.flatten().float() for axis in axes)
        moved = resized(fields, (height, width)).flatten(-2)
        away = [(place[:, None] - (place + moved[:, :, side])[:, :, None]).abs() for side, place in enumerate((x, y))]
        weight = (1 - away[0]).clamp(min=0) * (1 - away[1]).clamp(min=0)
        matrix = (weight / (weight.sum(-1, keepdim=True) + 1e-7)).transpose(1, 2).flatten(1, 2)
        made.append(Matrix(matrix, torch.empty(matrix.shape[0] * matrix.shape[1])))
    return made


@contextmanager
def quick() -> Iterator[None]:
    """For training on a CPU: attention as two products, and warps as `matrices`; both have a quicker backward in bfloat16."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), -1) @ value

    def warped(table: Matrix, features: Tensor) -> Tensor:
        return (table.matrix.to(features.dtype) @ features).unflatten(1, (features.shape[1], -1))

    kept = F.scaled_dot_product_attention, augmented.warped
    F.scaled_dot_product_attention, augmented.warped = attention, warped
    try:
        yield
    finally:
        F.scaled_dot_product_attention, augmented.warped = kept
