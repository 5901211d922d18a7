"""A step of SVD by structure: its denoiser's own blocks at their real widths, as many levels as asked for, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

INPUTS: Mapping[str, str] = MappingProxyType(
    {
        "latents": "step",
        "coefficients": "step",
        "guidance": "step",
        "timestep": "schedule",
        "time_ids": "schedule",
        "context": "request",
        "image_latents": "request",
    }
)
OUTPUTS = ("next_latents", "x0")
WIDTHS, HEADS = (320, 640, 1280, 1280), (5, 10, 20, 20)  # of stable-video-diffusion-img2vid; heads of 64


class SvdStep(nn.Module):
    """Guidance per frame and an Euler step around the released UNet; the image context is one token."""

    def __init__(self, levels: int, layers: int) -> None:
        super().__init__()
        from diffusers import UNetSpatioTemporalConditionModel

        crossed = levels - 1
        self.unet: Any = UNetSpatioTemporalConditionModel(
            block_out_channels=WIDTHS[:levels],
            num_attention_heads=HEADS[:levels],
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * crossed + ("DownBlockSpatioTemporal",),
            up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * crossed,
        )

    def forward(
        self,
        latents: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        timestep: Tensor,
        time_ids: Tensor,
        context: Tensor,
        image_latents: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`latents`, `image_latents` [1, F, 4, H, W]; `coefficients [3]`: input scale, x0 from latents, from the output;
        `guidance [F]`; `timestep [1]`; `time_ids [1, 3]`; `context [1, 1, 1024]` -> (next latents, x0).
        """
        scaled = torch.cat([coefficients[0] * latents, image_latents], dim=2)
        sample = torch.cat([torch.cat([scaled[:, :, :4], torch.zeros_like(image_latents)], dim=2), scaled])
        both = torch.cat([torch.zeros_like(context), context])
        ids = torch.cat([time_ids, time_ids])
        output = self.unet(sample, timestep.expand(2), both, ids, return_dict=False)[0]
        without, with_image = output.chunk(2)
        guided = without + guidance[None, :, None, None, None] * (with_image - without)
        x0 = coefficients[1] * latents + coefficients[2] * guided
        return latents + coefficients[0] * (latents - x0), x0


def feed(frames: int, height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of one request, in the order of `INPUTS`."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return {
        "latents": normal(1, frames, 4, height, width),
        "coefficients": torch.tensor([0.5, 0.6, -0.4]),
        "guidance": torch.linspace(1.0, 3.0, frames),
        "timestep": torch.tensor([0.7]),
        "time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        "context": normal(1, 1, 1024),
        "image_latents": normal(1, frames, 4, height, width),
    }
