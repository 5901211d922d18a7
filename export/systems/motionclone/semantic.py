"""Location-aware semantic guidance, of MotionClone's first version (arXiv 2406.05338v1 to v3; the spec's section 8): an option.

Beside the guided video runs another, `app`, with the same noise and prompt, which nothing guides. Where the reference has its
object, the guided video is to look as `app` does where it has its own. Features are keys K of the guided attentions, averaged
over places by a mask, f(K, m) = sum m K / sum m, for each frame:

    E = semantic  1/layers sum_l ( mse(f(K, fg), f(K_app, m)) + mse(f(K, bg), f(K_app, 1 - m)) )

A binary mask m is where the attention to the object's token, of the lowest 0 and the highest 1 in its frame, is above 0.3. The
reference's are m G and (1 - m)(1 - G), with a Gaussian G of 5 places around its centre. Without tokens f is over all places.

That version had the reference at every timestep, by inversion; here its mask is of the timestep that its motion is read at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from motionrt.export.systems.motionclone.step import GUIDED, Extract, distance, updated
from motionrt.export.systems.motionclone.unet import TappedUNet
from motionrt.export.systems.rows import like, paired, repeated

THRESHOLD, SIGMA = 0.3, 5.0
REGIONS = ("foreground", "background")
SEMANTIC: Mapping[str, str] = MappingProxyType(
    {**GUIDED, **dict.fromkeys(("app", "semantic", "object_token", *REGIONS), "step")}
)


def found(attention: Tensor, token: Tensor) -> Tensor:
    """Where frames have an object: attention `[B, F, P, n]` to all tokens, `token [B]` -> 0 or 1, `[B, F, P]`."""
    chosen = (torch.arange(attention.shape[-1]) == token[:, None]).to(attention.dtype)
    seen = (attention * chosen[:, None, None]).sum(-1)
    low, high = seen.amin(-1, keepdim=True), seen.amax(-1, keepdim=True)
    return (seen - low > THRESHOLD * (high - low)).to(attention.dtype)


def regions(mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """A reference's binary mask `[B, F, P]`, rows of `width` places -> its foreground and background."""
    places = torch.arange(mask.shape[-1])
    x, y = (places % width).to(mask.dtype), torch.div(places, width, rounding_mode="floor").to(mask.dtype)
    total = mask.sum(-1, keepdim=True).clamp_min(1e-6)
    away = (x - (mask * x).sum(-1, keepdim=True) / total).square() + (y - (mask * y).sum(-1, keepdim=True) / total).square()
    near = torch.exp(-away / (2 * SIGMA**2))
    return mask * near, (1 - mask) * (1 - near)


def pooled(keys: Tensor, mask: Tensor) -> Tensor:
    """Keys `[B, P, F, C]` averaged by a mask `[B, F, P]`: `[B, F, C]`; 0 where the mask is empty."""
    weights = mask / mask.sum(-1, keepdim=True).clamp_min(1e-6)
    return (keys * weights.transpose(1, 2)[..., None]).sum(1)


def apart(keys: Sequence[Tensor], others: Sequence[Tensor], own: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean squared differences of features by masks `own` and `theirs`, one or more, `[B]`."""
    parts = [
        (pooled(key, mask) - pooled(other, other_mask)).square().mean((1, 2)) / len(keys)
        for key, other in zip(keys, others, strict=True)
        for mask, other_mask in zip(own, theirs, strict=True)
    ]
    return reduce(torch.add, parts)


class SemanticExtract(Extract):
    """`Extract` that also gives the masks of the first clip, from the words that say what it shows."""

    def forward(self, reference_latents: Tensor, reference_scores: Tensor, start: Tensor, *more: Tensor) -> Any:
        """`more`: last `clip_text [B, L, D]` and `clip_token [B]` (0: none) -> what `Extract` gives, then foreground
        and background `[B, F, P]`."""
        *rest, text, token = more
        motion = super().forward(reference_latents, reference_scores, start, *rest)
        noised = self.signal * reference_latents[:, 0] + self.spread * start
        self.net.head(noised, self.net.embedded(self.timestep).expand(noised.shape[0], -1), text)
        attention, _ = self.net.words_and_keys(noised.shape[1])
        foreground, background = regions(found(attention, token), noised.shape[-1] // self.net.factor)
        there = (token > 0).to(foreground.dtype)[:, None, None]
        return *motion, there * foreground + 1 - there, there * background


class SemanticStep(nn.Module):
    """`GuidedStep` with the gradient of both energies, and the step of `app`."""

    def __init__(self, unet: TappedUNet) -> None:
        super().__init__()
        self.net = unet

    def forward(
        self, latents: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor, text: Tensor, negative_text: Tensor,
        weight: Tensor, motion_scale: Tensor, motion_weights: Tensor, motion_targets: Tensor, app: Tensor, semantic: Tensor,
        object_token: Tensor, foreground: Tensor, background: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As `GuidedStep`, with `app [B, F, C, h, w]`, `semantic`, `object_token` (0: none) `[B]` and masks `[B, F, P]` -> the
        next latents, the energy `[B]`, the next `app`."""
        frames, embedding, strength = latents.shape[1], self.net.embedded(timestep), weight * motion_scale
        with torch.no_grad():
            hidden_a, skips_a, _ = self.net.head(app, embedding, text)
            attention, others = self.net.words_and_keys(frames)
            mask = found(attention, object_token)
            there = (object_token > 0).to(app.dtype)[:, None, None]
            theirs = there * mask + 1 - there, there * (1 - mask)
        with torch.enable_grad():
            tracked = latents.detach().requires_grad_()
            hidden, skips, seen = self.net.head(tracked, embedding, text)
            _, keys = self.net.words_and_keys(frames)
            off = distance(seen, motion_weights, motion_targets)
            away = apart(keys, others, (foreground, background), theirs)
            (gradient,) = torch.autograd.grad([off, away], tracked, [strength, motion_scale * semantic])
        with torch.no_grad():
            outputs = []
            for value, (inner, kept) in ((latents, (hidden, skips)), (app, (hidden_a, skips_a))):
                hidden_u, skips_u, _ = self.net.head(value, embedding, negative_text)
                halves = zip((hidden_u, *skips_u), (inner, *kept), strict=True)
                both = [paired(*(half.detach().unflatten(0, (-1, frames)) for half in two)).flatten(0, 1) for two in halves]
                twice = repeated(embedding, 2), paired(negative_text, text)
                output = self.net.tail(both[0], tuple(both[1:]), *twice, frames)
                outputs.append(updated(value, output, coefficients, guidance))
            energy = strength * off.detach() + motion_scale * semantic * away.detach()
            return outputs[0] - like(coefficients[:, 6], latents) * gradient, energy, outputs[1]
