"""Fields of displacements to latents and back, by an autoencoder of two channels, and what is drawn as the ControlNet reads it.

The autoencoder's pictures are (d / (W, H) + 1) / 2, d in pixels (x, y): 0.5 is no motion, and 0 and 1 a picture's size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from motionrt.export.systems.motionclone.frames import EncodeFrames

ENCODED = 3  # fields at once: that bounds memory


def picture_of(field: Tensor) -> Tensor:
    """Displacements `[..., 2, H, W]` in pixels -> the same as the autoencoder has them."""
    return (field / _size(field) + 1) / 2


def field_of(picture: Tensor) -> Tensor:
    """Back, `[..., 2, H, W]`; never further than the picture's size."""
    return (2 * picture - 1).clamp(-1, 1) * _size(picture)


def _size(field: Tensor) -> Tensor:
    height, width = field.shape[-2:]
    return torch.tensor([width, height], dtype=field.dtype, device=field.device)[:, None, None]


def coarse(mask: Tensor, height: int) -> Tensor:
    """`[B, 1, H, W]` at the places of latents, `[B, 1, h, w]`: every H / h-th pixel."""
    every = mask.shape[-2] // height
    return mask[..., ::every, ::every]


class Mean(EncodeFrames):
    """The mean of an AutoencoderKL's posterior, which is not scaled: `[N, c, H, W]` -> `[N, 4, h, w]`."""

    def forward(self, pictures: Tensor) -> Tensor:
        return self.mean(pictures)


class Sparse(nn.Module):
    """What is drawn to what the ControlNet reads: latents and the mask. `encode`: pictures of fields `[N, 2, H, W]` to latents
    `[N, 4, h, w]`, which the release does not scale here."""

    def __init__(self, encode: nn.Module) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, flow: Tensor, mask: Tensor) -> Tensor:
        """Displacements `[1, n, 2, H, W]` in pixels, 0 where none is drawn; `mask [1, 1, H, W]` -> `[1, n, 5, h, w]`."""
        latents = torch.cat([self.encode(part) for part in picture_of(flow[0]).split(ENCODED)])[None]
        seen = coarse(mask, latents.shape[-2])[:, None].expand(-1, flow.shape[1], -1, -1, -1)
        return torch.cat([latents, seen], 2)


class DecodeFields(nn.Module):
    """Latents of fields to displacements. `decode`: latents `[1, n, 4, h, w]` to pictures of fields `[1, n, 2, H, W]`, such as
    `DecodeFrames`."""

    def __init__(self, decode: nn.Module) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, latents: Tensor) -> Tensor:
        """`[1, n, 4, h, w]` -> `[1, n, 2, H, W]` in pixels."""
        return field_of(self.decode(latents))


class Held(nn.Module):
    """A field that leaves what the brush holds where it is."""

    def forward(self, field: Tensor, brush: Tensor) -> Tensor:
        """`[1, n, 2, H, W]`, `[1, 1, H, W]` (1: held) -> `[1, n, 2, H, W]`."""
        return field * (1 - brush[:, None])


class Strides(nn.Module):
    """How far the fields look ahead, in pictures of the training videos: `strength` x 8, 16, ..."""

    def __init__(self, fields: int, stride: float) -> None:
        super().__init__()
        self.steps: Tensor
        self.register_buffer("steps", stride * torch.arange(1, fields + 1, dtype=torch.float32), persistent=False)

    def forward(self, strength: Tensor) -> Tensor:
        """`[1]` -> `[1, n]`."""
        return strength[:, None] * self.steps


class Joined(nn.Module):
    """The first picture and the others."""

    def forward(self, reference: Tensor, moved: Tensor) -> Tensor:
        """`[1, 4, h, w]`, `[1, n, 4, h, w]` -> `[1, n + 1, 4, h, w]`."""
        return torch.cat([reference[:, None], moved], 1)
