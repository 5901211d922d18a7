"""One step of DynamiCrafter as a function: the passes of guidance and the sampler's update are in it.

    v = v_u + g (v_c - v_u)                                  v_u: empty prompt, grey picture (and grey clip)
    v = v_u + g_i (v_i - v_u) + g (v_c - v_i)                three passes: v_i has the empty prompt alone
    v <- p v std(v_c) / std(v) + (1 - p) v                   p: `guidance_rescale` (Lin 2024, arXiv 2305.08891, eq. 15, 16)

The sampler's update is a row of numbers: rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from motionrt.export.systems.dynamicrafter.unet import Conditions, DynamiCrafterUNet
from motionrt.export.systems.rows import like, paired, repeated, solved
from motionrt.export.systems.system import Array

CHANGES: Mapping[str, str] = MappingProxyType(
    {
        "latents": "step",
        "previous_x0": "step",
        "noise": "step",
        "coefficients": "step",
        "guidance": "step",
        "timestep": "schedule",
        "fs": "request",
        "guidance_rescale": "request",
        "text": "request",
        "image_context": "request",
        "image_latents": "request",
    }
)
MOTION: Mapping[str, str] = MappingProxyType({"motion": "request", "motion_scale": "request"})
THREE: Mapping[str, str] = MappingProxyType({"image_guidance": "request"})


class DynamiCrafterStep(nn.Module):
    """The step of a network. `text [1, n, D]`, `image [1, m, D]`, and with adapters `motion [1, M, Dm]`: what the pass without
    conditions reads, constants of the checkpoint. `three`: passes of guidance instead of two."""

    def __init__(
        self, unet: DynamiCrafterUNet, text: Tensor, image: Tensor, motion: Tensor | None = None, three: bool = False
    ) -> None:
        super().__init__()
        self.unet, self.three = unet, three
        self.unconditional_text: Tensor
        self.unconditional_image: Tensor
        self.unconditional_motion: Tensor | None
        self.register_buffer("unconditional_text", text, persistent=False)
        self.register_buffer("unconditional_image", image, persistent=False)
        self.register_buffer("unconditional_motion", motion, persistent=False)

    @property
    def changes(self) -> dict[str, str]:
        """What each input changes with, in the order of `forward`."""
        adapted = self.unconditional_motion is not None
        return {**CHANGES, **(MOTION if adapted else {}), **(THREE if self.three else {})}

    def inputs(self, latents: tuple[int, int, int, int]) -> dict[str, Array]:
        """Shapes of any number of requests, for `latents` F, C, h, w."""
        frames, one = Array(("batch", *latents)), Array(("batch",))
        shapes = {
            "latents": frames, "previous_x0": frames, "noise": frames, "coefficients": Array(("batch", 6)),
            "image_latents": Array(("batch", *latents[1:])),
            "text": Array(("batch", *self.unconditional_text.shape[1:])),
            "image_context": Array(("batch", *self.unconditional_image.shape[1:])),
        }  # fmt: skip
        if self.unconditional_motion is not None:
            shapes["motion"] = Array(("batch", *self.unconditional_motion.shape[1:]))
        return {name: shapes.get(name, one) for name in self.changes}

    def forward(
        self, latents: Tensor, previous_x0: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor,
        fs: Tensor, guidance_rescale: Tensor, text: Tensor, image_context: Tensor, image_latents: Tensor, *more: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`latents`, `previous_x0`, `noise` `[B, F, 4, h, w]`; `coefficients [B, 6]`; `guidance`, `timestep`, `fs`,
        `guidance_rescale` `[B]`; `text [B, n, D]`; `image_context [B, m, D]`; `image_latents [B, 4, h, w]`; with adapters
        `motion [B, M, Dm]` and `motion_scale [B]`; with three passes `image_guidance [B]` -> (next latents, x0), both
        `[B, F, 4, h, w]`. Row b is of request b, which may be at a step of its own.
        """
        batch, passes = latents.shape[0], 3 if self.three else 2
        kind = self.unconditional_text.dtype  # of the weights; guidance and solver keep what came in, fp32 in a bundle
        empty, grey = (x.expand(batch, -1, -1) for x in (self.unconditional_text, self.unconditional_image))
        words, pictures = text.to(kind), image_context.to(kind)
        motion: Tensor | None = None
        scale: Tensor | float = 1.0
        if self.unconditional_motion is not None:
            tokens = more[0].to(kind)
            motion = paired(self.unconditional_motion.expand(batch, -1, -1), *[tokens] * (passes - 1))
            scale = like(repeated(more[1].to(kind), passes), motion)
        conditions = Conditions(
            paired(empty, *[empty] * (passes - 2), words), paired(grey, *[pictures] * (passes - 1)), motion, scale
        )
        still = image_latents[:, None].expand(-1, latents.shape[1], -1, -1, -1)
        embedding = self.unet.embedded(timestep, fs)
        made = self.unet(torch.cat([latents, still], dim=2).to(kind), embedding, conditions, passes).to(latents.dtype)
        without, *half, full = made.unflatten(0, (-1, passes)).unbind(1)
        strength = like(guidance, full)
        if self.three:
            output = without + like(more[-1], full) * (half[0] - without) + strength * (full - half[0])
        else:
            output = without + strength * (full - without)
        output = rescaled(output, full, guidance_rescale)
        return solved(coefficients, latents, output, previous_x0, noise)


def rescaled(output: Tensor, full: Tensor, share: Tensor) -> Tensor:
    """The guided `output [B, ...]`, `share [B]` of it with the spread of `full`, the output of the pass with all conditions."""
    axes = tuple(range(1, output.ndim))
    spread, wanted = ((x - x.mean(axes, keepdim=True)).square().sum(axes, keepdim=True) for x in (output, full))
    part = like(share, output)
    return output * (part * (wanted / spread).sqrt() + (1 - part))
