"""MotionClone's graphs (Ling et al. 2024, arXiv 2406.05338; the spec's sections 4 to 6): what is read of a clip, and a step.

A motion representation is, per guided attention, place, head and query frame, the strongest key frame of the reference clip
and how strong it is. The energy of K references with weights pi_r is

    E = lambda s sum_l 1/N_l sum_(p, h, i) sum_r pi_r (A[p, h, i, tau_r] - L_r)^2,       N_l = places x heads x F

Written with W_j = sum_r pi_r 1[tau_r = j] and M_j = sum_r pi_r 1[tau_r = j] L_r / W_j over the F keys, its gradient in A is
2 lambda s / N W (A - M) whatever K is, and for one reference E itself is the same. So references are fused once a request, and
a step neither knows how many there are nor gathers (whose gradient would be a scatter): it reads W and M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.systems.motionclone.unet import TappedUNet
from motionrt.export.systems.rows import guided, like, paired, repeated

CHANGES: Mapping[str, str] = MappingProxyType(
    {
        "latents": "step",
        "coefficients": "step",
        "guidance": "step",
        "timestep": "schedule",
        "text": "request",
        "negative_text": "request",
    }
)
# The motion is the same in all steps, but it changes with the seed, and what else belongs to a request does not.
GUIDED: Mapping[str, str] = MappingProxyType(
    {**CHANGES, **dict.fromkeys(("weight", "motion_scale", "motion_weights", "motion_targets"), "step")}
)


MOVES = 0.3  # of the range of a clip's changes from frame to frame: it moves where it changes more


def representation(seen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Probabilities `[R, P, N, F, F]` of every guided layer -> the strongest key's value and index `[R, layers, P, N, F]`."""
    values, indices = zip(*(layer.max(-1) for layer in seen), strict=True)
    return torch.stack(values, 1), torch.stack(indices, 1)


def fused(values: Tensor, indices: Tensor, shares: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Representations `[B, K, layers, P, N, F]` with shares `[B, K, P or 1]` -> W and M `[B, layers, P, N, F, F]`."""
    chosen = (indices[..., None] == torch.arange(frames)).to(values.dtype) * shares[:, :, None, :, None, None, None]
    weights = chosen.sum(1)
    targets = (chosen * values[..., None]).sum(1) / torch.where(weights > 0, weights, 1.0)
    return weights, targets


def by_place(latents: Tensor, shares: Tensor, factor: int) -> Tensor:
    """Shares of clips that each have places of their own: `latents [B, K, F, C, h, w]`, shares `[B, K]` -> `[B, K, P]`, where P
    are the places of a grid that is `factor` times coarser.

    A clip behind the first has the places where it moves, by its share of those that move there too; the first has the rest.
    """
    change = F.avg_pool2d((latents[:, :, 1:] - latents[:, :, :-1]).abs().mean((2, 3)), factor).flatten(2)
    low, high = change.amin(2, keepdim=True), change.amax(2, keepdim=True)
    behind = (torch.arange(latents.shape[1]) > 0).to(shares.dtype)[:, None]
    there = (change - low > MOVES * (high - low)).to(shares.dtype) * behind * shares[..., None]
    total = there.sum(1, keepdim=True)
    return torch.where(total > 0, there / torch.where(total > 0, total, 1.0), 1 - behind)


class Extract(nn.Module):
    """The motion of K clips from their latents, noised with the request's own noise: see `representation` and `fused`.

    `null_text [1, L, D]` of the empty prompt; `level`: alpha bar of `timestep` (400 as released); `composed`: whether it reads
    how far the clips have places of their own.
    """

    def __init__(
        self, unet: TappedUNet, null_text: Tensor, timestep: int, level: float, temperature: float, composed: bool = False
    ) -> None:
        super().__init__()
        self.net, self.temperature, self.composed = unet, temperature, composed
        self.null_text: Tensor
        self.timestep: Tensor
        self.register_buffer("null_text", null_text, persistent=False)
        self.register_buffer("timestep", torch.tensor([float(timestep)]), persistent=False)
        self.signal, self.spread = level**0.5, (1 - level) ** 0.5

    def seen(self, latents: Tensor, noise: Tensor, residuals: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """`latents`, `noise` `[R, F, C, h, w]`, `residuals [R F, c, h, w]` -> values and indices `[R, layers, P, N, F]`."""
        rows = latents.shape[0]
        embedding = self.net.embedded(self.timestep).expand(rows, -1)
        text = self.null_text.expand(rows, -1, -1)
        return representation(self.net.head(self.signal * latents + self.spread * noise, embedding, text, residuals)[2])

    def forward(
        self, reference_latents: Tensor, reference_scores: Tensor, start: Tensor, *more: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`reference_latents [B, K, F, C, h, w]`, `reference_scores [B, K]`, `start [B, F, C, h, w]`, where it is composed
        `composition [B]` from 0 (`shares` by score alone) to 1 (`by_place`), SparseCtrl's residuals `[B, K, F, c, h, w]` ->
        motion_weights, motion_targets `[B, layers, P, N, F, F]`."""
        batch, count, frames = reference_latents.shape[:3]
        residuals = more[1:] if self.composed else more
        noise = start[:, None].expand(-1, count, -1, -1, -1, -1)
        added = [residual.flatten(0, 2) for residual in residuals]
        values, indices = self.seen(reference_latents.flatten(0, 1), noise.flatten(0, 1), added)
        shares = torch.softmax(reference_scores / self.temperature, 1)[..., None]
        if self.composed:
            own = by_place(reference_latents, shares[..., 0], self.net.factor)
            shares = (1 - like(more[0], own)) * shares + like(more[0], own) * own
        return fused(values.unflatten(0, (batch, count)), indices.unflatten(0, (batch, count)), shares, frames)


class Represent(Extract):
    """The motion of clips for one `noise [1, F, C, h, w]` that all of them share, as a memory keeps it."""

    def __init__(self, unet: TappedUNet, null_text: Tensor, timestep: int, level: float, noise: Tensor) -> None:
        super().__init__(unet, null_text, timestep, level, 1.0)
        self.noise: Tensor
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`latents [K, F, C, h, w]` -> values and indices (uint8) `[K, layers, P, N, F]`."""
        values, indices = self.seen(latents, self.noise.expand(latents.shape[0], -1, -1, -1, -1))
        return values, indices.to(torch.uint8)


class Fuse(nn.Module):
    """K representations out of a memory as a step reads them."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, reference_values: Tensor, reference_indices: Tensor, reference_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices (uint8) `[B, K, layers, P, N, F]`, scores `[B, K]` -> motion_weights, motion_targets
        `[B, layers, P, N, F, F]`."""
        shares = torch.softmax(reference_scores / self.temperature, 1)[..., None]
        return fused(reference_values, reference_indices.long(), shares, reference_values.shape[-1])


class PlainStep(nn.Module):
    """A step of AnimateDiff with guidance g and DDIM's update: o = o_u + g (o_c - o_u), x0 = a x + b o, e = c x + d o,
    x' = p x0 + q e. The release writes o_c + w (o_c - o_u): its w = 7.5 is g = 8.5."""

    def __init__(self, unet: TappedUNet) -> None:
        super().__init__()
        self.net = unet

    def forward(
        self, latents: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor, text: Tensor, negative_text: Tensor,
        *residuals: Tensor,
    ) -> Tensor:  # fmt: skip
        """`latents [B, F, C, h, w]`, `coefficients [B, 7]` (a, b, c, d, p, q, r), `guidance`, `timestep` `[B]`, texts
        `[B, L, D]`, SparseCtrl's `residuals [B, 2, F, c, h, w]` (without the prompt, with it) -> the next latents."""
        both, twice = paired(negative_text, text), repeated(self.net.embedded(timestep), 2)
        added = [residual.flatten(0, 2) for residual in residuals]
        hidden, skips, _ = self.net.head(repeated(latents, 2), twice, both, added)
        output = self.net.tail(hidden, skips, twice, both, latents.shape[1])
        return updated(latents, output, coefficients, guidance)


class GuidedStep(nn.Module):
    """`PlainStep` and the energy's gradient g: x' = p x0 + q e - r g, r = sqrt((1 - alpha)(1 - alpha')) (spec, trap 3).

    It differentiates, so that a graph of it is made by `export/compiler/gradients.py`.
    """

    def __init__(self, unet: TappedUNet) -> None:
        super().__init__()
        self.net = unet

    def forward(
        self, latents: Tensor, coefficients: Tensor, guidance: Tensor, timestep: Tensor, text: Tensor, negative_text: Tensor,
        weight: Tensor, motion_scale: Tensor, motion_weights: Tensor, motion_targets: Tensor, *residuals: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `PlainStep`, with `weight` (lambda s), `motion_scale` `[B]` and the motion as `Extract` gives it -> the next
        latents and the energy `[B]`."""
        frames, embedding = latents.shape[1], self.net.embedded(timestep)
        without, conditioned = ([residual[:, branch].flatten(0, 1) for residual in residuals] for branch in (0, 1))
        with torch.enable_grad():
            tracked = latents.detach().requires_grad_()
            hidden, skips, seen = self.net.head(tracked, embedding, text, conditioned)
            off = distance(seen, motion_weights, motion_targets)
            # Of the distance times N, and not of the energy: the same in all steps, so that float16 loses no small weight.
            rows = seen[0].shape[1:4].numel()
            (gradient,) = torch.autograd.grad(off, tracked, torch.full_like(off, rows))
        with torch.no_grad():
            hidden_u, skips_u, _ = self.net.head(latents, embedding, negative_text, without)
            halves = zip((hidden_u, *skips_u), (hidden, *skips), strict=True)
            both = [paired(*(half.detach().unflatten(0, (-1, frames)) for half in two)).flatten(0, 1) for two in halves]
            output = self.net.tail(both[0], tuple(both[1:]), repeated(embedding, 2), paired(negative_text, text), frames)
            plain = updated(latents, output, coefficients, guidance)
            strength = weight * motion_scale
            move = like(coefficients[:, 6] * strength / rows, latents) * gradient
            return plain - move, strength * off.detach()


def distance(seen: Sequence[Tensor], weights: Tensor, targets: Tensor) -> Tensor:
    """Sum over layers of the mean squared distance of the probabilities `[B, P, N, F, F]` from the references', `[B]`."""
    total: Tensor | None = None
    for index, layer in enumerate(seen):
        off = weights[:, index] * (layer - targets[:, index]).square()
        part = off.sum(-1).mean((1, 2, 3))
        total = part if total is None else total + part
    assert total is not None
    return total


def updated(latents: Tensor, outputs: Tensor, coefficients: Tensor, guidance: Tensor) -> Tensor:
    """DDIM's update of `latents [B, ...]` from the network's `outputs [2 B, ...]`, without the prompt and with it in turn,
    and a row of `coefficients` for each request."""
    output = guided(outputs, like(guidance, latents))
    a, b, c, d, p, q, _ = (like(column, latents) for column in coefficients.unbind(1))
    return p * (a * latents + b * output) + q * (c * latents + d * output)
