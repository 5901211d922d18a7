"""One step of DynamiCrafter as a function: the passes of guidance and the sampler's update are in it.

    v = v_u + g (v_c - v_u)                                  v_u: empty prompt, grey picture (and grey clip)
    v = v_u + g_i (v_i - v_u) + g (v_c - v_i)                three passes: v_i has the empty prompt alone
    v <- p v std(v_c) / std(v) + (1 - p) v                   p: `guidance_rescale` (Lin 2024, arXiv 2305.08891, eq. 15, 16)

The sampler's update is a row of numbers: rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
    """The step of a network without adapters. `text [1, n, D]`, `image [1, m, D]`: what the pass without conditions reads,
    constants of the checkpoint. `three`: passes of guidance instead of two."""

    def __init__(self, unet: DynamiCrafterUNet, text: Tensor, image: Tensor, three: bool = False) -> None:
        super().__init__()
        self.unet, self.three = unet, three
        self.unconditional_text: Tensor
        self.unconditional_image: Tensor
        self.register_buffer("unconditional_text", text, persistent=False)
        self.register_buffer("unconditional_image", image, persistent=False)

    @property
    def count(self) -> int:
        """Passes of guidance."""
        return 3 if self.three else 2

    @property
    def changes(self) -> dict[str, str]:
        """What each input changes with, in the order of `forward`."""
        return {**CHANGES, **(THREE if self.three else {})}

    def inputs(self, latents: tuple[int, int, int, int]) -> dict[str, Array]:
        """Shapes of any number of requests, for `latents` F, C, h, w."""
        frames, one = Array(("batch", *latents)), Array(("batch",))
        shapes = {
            "latents": frames, "previous_x0": frames, "noise": frames, "coefficients": Array(("batch", 6)),
            "image_latents": Array(("batch", *latents[1:])),
            "text": Array(("batch", *self.unconditional_text.shape[1:])),
            "image_context": Array(("batch", *self.unconditional_image.shape[1:])),
        }  # fmt: skip
        return {name: shapes.get(name, one) for name in self.changes}

    def conditions(self, text: Tensor, image: Tensor) -> Conditions:
        """What the passes of every request read: `text [B, n, D]`, `image [B, m, D]`."""
        kind, batch = self.unconditional_text.dtype, text.shape[0]  # of the weights
        empty, grey = (x.expand(batch, -1, -1) for x in (self.unconditional_text, self.unconditional_image))
        more = self.count - 2
        words, pictures = text.to(kind), image.to(kind)
        return Conditions(paired(empty, *[empty] * more, words), paired(grey, pictures, *[pictures] * more))

    def passes(self, latents: Tensor, still: Tensor, embedding: Tensor, conditions: Conditions) -> Tensor:
        """`latents [B, F, 4, h, w]`, `still [B, 4, h, w]` -> what each pass gives, `[B, P, F, 4, h, w]`."""
        stills = still[:, None].expand(-1, latents.shape[1], -1, -1, -1)
        sample = torch.cat([latents, stills], dim=2).to(self.unconditional_text.dtype)
        made: Tensor = self.unet(sample, embedding, conditions, self.count)
        return made.to(latents.dtype).unflatten(0, (-1, self.count))

    def guided(self, made: Tensor, guidance: Tensor, rescale: Tensor, image_guidance: Tensor | None) -> Tensor:
        """Passes `[B, P, ...]`, numbers `[B]` -> `[B, ...]`."""
        without, *half, full = made.unbind(1)
        if image_guidance is None:
            output = without + like(guidance, full) * (full - without)
        else:
            output = without + like(image_guidance, full) * (half[0] - without) + like(guidance, full) * (full - half[0])
        return rescaled(output, full, rescale)

    def forward(
        self, latents: Tensor, previous_x0: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor,
        fs: Tensor, guidance_rescale: Tensor, text: Tensor, image_context: Tensor, image_latents: Tensor,
        image_guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`latents`, `previous_x0`, `noise` `[B, F, 4, h, w]`; `coefficients [B, 6]`; `guidance`, `timestep`, `fs`,
        `guidance_rescale` and with three passes `image_guidance` `[B]`; `text [B, n, D]`; `image_context [B, m, D]`;
        `image_latents [B, 4, h, w]` -> (next latents, x0), both `[B, F, 4, h, w]`. Row b is of request b, which may be at a
        step of its own.
        """
        conditions = self.conditions(text, image_context)
        made = self.passes(latents, image_latents, self.unet.embedded(timestep, fs), conditions)
        output = self.guided(made, guidance, guidance_rescale, image_guidance)
        return solved(coefficients, latents, output, previous_x0, noise)


class MotionStep(DynamiCrafterStep):
    """The step of a network with adapters; `motion [1, M, Dm]`: what the pass without conditions reads of it."""

    def __init__(self, unet: DynamiCrafterUNet, text: Tensor, image: Tensor, motion: Tensor, three: bool = False) -> None:
        super().__init__(unet, text, image, three)
        self.unconditional_motion: Tensor
        self.register_buffer("unconditional_motion", motion, persistent=False)

    @property
    def changes(self) -> dict[str, str]:
        return {**CHANGES, **MOTION, **(THREE if self.three else {})}

    def inputs(self, latents: tuple[int, int, int, int]) -> dict[str, Array]:
        found = super().inputs(latents)
        return found | {"motion": Array(("batch", *self.unconditional_motion.shape[1:]))}

    def forward(  # type: ignore[override]
        self, latents: Tensor, previous_x0: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor,
        fs: Tensor, guidance_rescale: Tensor, text: Tensor, image_context: Tensor, image_latents: Tensor, motion: Tensor,
        motion_scale: Tensor, image_guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `DynamiCrafterStep`, with `motion [B, M, Dm]` and `motion_scale [B]`."""
        tokens = motion.to(self.unconditional_motion.dtype)
        grey = self.unconditional_motion.expand(tokens.shape[0], -1, -1)
        moving = paired(grey, *[tokens] * (self.count - 1))
        scale = like(repeated(motion_scale.to(tokens.dtype), self.count), moving)
        conditions = replace(self.conditions(text, image_context), motion=moving, scale=scale)
        made = self.passes(latents, image_latents, self.unet.embedded(timestep, fs), conditions)
        output = self.guided(made, guidance, guidance_rescale, image_guidance)
        return solved(coefficients, latents, output, previous_x0, noise)


def rescaled(output: Tensor, full: Tensor, share: Tensor) -> Tensor:
    """The guided `output [B, ...]`, `share [B]` of it with the spread of `full`, the output of the pass with all conditions."""
    axes = tuple(range(1, output.ndim))
    spread, wanted = ((x - x.mean(axes, keepdim=True)).square().sum(axes, keepdim=True) for x in (output, full))
    part = like(share, output)
    return output * (part * (wanted / spread).sqrt() + (1 - part))
