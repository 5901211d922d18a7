"""What DynamiCrafter reads of a still, and how it shows latents: CLIP's tokens through a Resampler, and the image autoencoder.

The release encodes 16 equal frames and reads the latent of one; here one is encoded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.checkpoints.encoders import ClipPixels
from motionrt.export.systems.motionrag import Resampler


def squashing_matrix(length: int, size: int, blurred: bool) -> Tensor:
    """Resizing one axis from `length` to `size` as a matrix `[size, length]` float32: kornia's `resize` with bicubic
    interpolation, aligned corners and antialiasing, which blurs both axes (`blurred`) where one of them shrinks."""
    axis = torch.eye(length, dtype=torch.float64)
    if blurred:
        sigma = max((length / size - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2
        kernel = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
        padded = F.pad(axis[:, None], (reach, reach), mode="reflect")
        axis = F.conv1d(padded, (kernel / kernel.sum())[None, None])[:, 0]
    shrunk = F.interpolate(axis.T[None, None], size=(size, length), mode="bicubic", align_corners=True)
    return shrunk[0, 0].float()


class ImageTokens(nn.Module):
    """CLIP's last hidden states (no final norm) through the Resampler. A picture is squashed to CLIP's square: its shape is not
    kept, and nothing is cut off."""

    def __init__(self, clip: Any, projector: Resampler, size: tuple[int, int]) -> None:
        super().__init__()
        self.clip, self.projector = clip, projector
        side = clip.config.image_size
        self.seen = ClipPixels(*(squashing_matrix(length, side, max(size) > side) for length in size))

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [-1, 1] -> `[B, m, D]`, frame 0's tokens first."""
        tokens: Tensor = self.projector(self.clip(pixel_values=self.seen(image)).last_hidden_state)
        return tokens


class EncodeStill(nn.Module):
    """A still as tokens, and as a draw from the autoencoder's posterior in the scale of latents."""

    def __init__(self, tokens: ImageTokens, vae: Any) -> None:
        super().__init__()
        self.tokens, self.vae = tokens, vae

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`image [B, 3, H, W]` in [-1, 1], `noise [B, 4, h, w]` -> image_context `[B, m, D]`, image_latents `[B, 4, h, w]`."""
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(image)).chunk(2, dim=1)
        drawn = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise
        return self.tokens(image), self.vae.config.scaling_factor * drawn
