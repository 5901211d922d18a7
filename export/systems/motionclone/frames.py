"""Frames and latents of AnimateDiff: the image autoencoder of Stable Diffusion, which sees every frame on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ENCODED = 4  # frames of a clip at once: that bounds memory


class EncodeFrames(nn.Module):
    """Frames to the mean of the autoencoder's posterior, `ENCODED` of them after the others.

    The release draws from the posterior, with a generator that depends on what ran before; a mean is the same every time.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def mean(self, image: Tensor) -> Tensor:
        """`image [B, 3, H, W]` in [-1, 1] -> the mean `[B, 4, h, w]`, float32."""
        moments = self.vae.encoder(image)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments.chunk(2, dim=1)[0]

    def encoded(self, image: Tensor) -> Tensor:
        """The same in the scale of latents."""
        return self.vae.config.scaling_factor * self.mean(image)

    def forward(self, video: Tensor) -> Tensor:
        """`video [K, F, 3, H, W]` in [-1, 1] -> latents `[K, F, 4, h, w]`, float32."""
        chunks = video.split(ENCODED, 1)
        return torch.cat([self.encoded(chunk.flatten(0, 1)).unflatten(0, (-1, chunk.shape[1])) for chunk in chunks], 1)


class EncodeImage(EncodeFrames):
    """One picture: `image [1, 3, H, W]` in [-1, 1] -> `[1, 4, h, w]`, float32."""

    def forward(self, image: Tensor) -> Tensor:
        return self.encoded(image)


class DecodeFrames(nn.Module):
    """Latents to pictures; no frame sees another, so that any chunk of them gives the same."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """`latents [1, F, 4, h, w]` -> `[1, F, 3, H, W]` float32, about [-1, 1]."""
        rows = latents.flatten(0, 1) / self.vae.config.scaling_factor
        if self.vae.post_quant_conv is not None:
            rows = self.vae.post_quant_conv(rows)
        return self.vae.decoder(rows).unflatten(0, latents.shape[:2])
