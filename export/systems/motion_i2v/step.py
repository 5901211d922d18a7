"""A step of each of Motion-I2V's loops (arXiv 2401.15977): the fields' latents, then the video's.

What belongs to a request is declared so, and the compiler takes what it makes of it out of the steps: the image's half of the
first convolution, the hint's embedding, the tables that warp, frame 0 up to where it meets the others, keys and values of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from motionrt.export.systems.motion_i2v.augmented import tables_of
from motionrt.export.systems.motion_i2v.fields import coarse
from motionrt.export.systems.motion_i2v.networks import FlowUNet, Trajectories, VideoUNet
from motionrt.export.systems.motion_i2v.stencil import depth
from motionrt.export.systems.rows import guided, like, paired

# What an input changes with. `guidance` and `negative_text` come last: without a second branch they are left out. The noise
# that a video begins with and the tables of its fields are the same in all steps, but they change with the seed, and what else
# belongs to a request does not: so they are the step's, and other seeds of a request share the rest.
FLOW_CHANGES: Mapping[str, str] = MappingProxyType(
    {"latents": "step", "coefficients": "step", "times": "step", "image_latents": "request", "text": "request"}
)
DRAWN_CHANGES: Mapping[str, str] = MappingProxyType({**FLOW_CHANGES, "drawn_times": "step", "hint": "request"})
VIDEO_CHANGES: Mapping[str, str] = MappingProxyType(
    {
        "latents": "step",
        "coefficients": "step",
        "timestep": "schedule",
        "reference": "request",
        "brush": "request",
        "text": "request",
        "start": "step",
    }
)
GUIDED: Mapping[str, str] = MappingProxyType({"guidance": "step", "negative_text": "request"})


class FlowStep(nn.Module):
    """A step of stage 1, without what is drawn: o = o_u + g (o_c - o_u), x' = p x + q o.

    Without `negative_text`, here and below: o = o_c, as with guidance 1, for half of the work.
    """

    def __init__(self, net: FlowUNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, latents: Tensor, coefficients: Tensor, times: Tensor, image_latents: Tensor, text: Tensor,
        guidance: Tensor | None = None, negative_text: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`latents [B, n, 4, h, w]`, `coefficients [B, 2]` (p, q), `times [B, n, S]` (see `Times`), `image_latents
        [B, 4, h, w]`, texts `[B, L, D]`, `guidance [B]` -> the next latents."""
        output = self.net.predicted(image_latents, latents, times, branches(text, negative_text))
        return updated(latents, output, coefficients, guidance)


class DrawnStep(nn.Module):
    """A step of stage 1 with the ControlNet, in both branches of guidance."""

    def __init__(self, net: FlowUNet, drawn: Trajectories) -> None:
        super().__init__()
        self.net, self.drawn = net, drawn

    def forward(
        self, latents: Tensor, coefficients: Tensor, times: Tensor, image_latents: Tensor, text: Tensor, drawn_times: Tensor,
        hint: Tensor, guidance: Tensor | None = None, negative_text: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As of `FlowStep`; `drawn_times [B, n, S']`, `hint [B, n, 5, h, w]` (see `fields.py`)."""
        both = branches(text, negative_text)
        residuals = self.drawn.residuals(image_latents, latents, drawn_times, both, hint)
        output = self.net.predicted(image_latents, latents, times, both, residuals)
        return updated(latents, output, coefficients, guidance)


class VideoStep(nn.Module):
    """A step of stage 2; what the brush holds is the image again behind each step that says so. `fused`: its augmented
    attention is one op, which a GPU has a kernel for; it has no gradient."""

    def __init__(self, net: VideoUNet, fused: bool = False) -> None:
        super().__init__()
        self.net, self.fused = net, fused

    def forward(
        self, latents: Tensor, coefficients: Tensor, timestep: Tensor, reference: Tensor, brush: Tensor, text: Tensor,
        start: Tensor, *more: Tensor,
    ) -> Tensor:  # fmt: skip
        """`latents [B, n, 4, h, w]` of the pictures behind the first, `coefficients [B, 5]` (p, q, signal, spread, hold),
        `timestep [B]`, `reference [B, 4, h, w]`, `brush [B, 1, H, W]` (1: held), `text [B, L, D]`, `start`: the noise that
        the loop began with; then what `Tables` gives and, with guidance, `guidance [B]`, `negative_text` -> the next latents.
        """
        height, width = latents.shape[-2:]
        grids = self.net.grids(height, width)
        count = sum(2 + depth(h * w) for h, w in grids)
        fields, (guidance, negative_text) = tables_of(more[:count], grids), more[count:] or (None, None)
        output = self.net(reference, latents, timestep, branches(text, negative_text), fields, self.fused)
        return held(updated(latents, output, coefficients, guidance), coefficients, reference, brush, start)


class Times(nn.Module):
    """What times and strides add in every residual block of the networks of stage 1: tables over the steps of the loop."""

    def __init__(self, *nets: FlowUNet | Trajectories) -> None:
        super().__init__()
        self.nets: Any = nn.ModuleList(nets)

    def forward(self, timestep: Tensor, strides: Tensor) -> tuple[Tensor, ...]:
        """`timestep [T]`, `strides [1, n]` -> `[T, n, S]` of each network."""
        every = strides.expand(timestep.shape[0], -1)
        return tuple(net.times(timestep, every) for net in self.nets)


def branches(text: Tensor, negative_text: Tensor | None) -> Tensor:
    """Rows of text of every request, `[B g, L, D]`: without the prompt and with it, or with it alone."""
    return text if negative_text is None else paired(negative_text, text)


def held(following: Tensor, coefficients: Tensor, reference: Tensor, brush: Tensor, start: Tensor) -> Tensor:
    """Latents `following [B, n, 4, h, w]` with the image, as noisy as they are, where the brush holds it; see `VideoStep`."""
    _, _, signal, spread, hold = (like(column, following) for column in coefficients.unbind(1))
    share = coarse(brush, following.shape[-2])[:, None] * hold
    return share * (signal * reference[:, None] + spread * start) + (1 - share) * following


def updated(latents: Tensor, outputs: Tensor, coefficients: Tensor, guidance: Tensor | None) -> Tensor:
    """x' = p x + q o of the network's `outputs [2 B, ...]`, without the prompt and with it in turn, or `[B, ...]`; p and q are
    the first two of `coefficients`."""
    output = outputs if guidance is None else guided(outputs, like(guidance, latents))
    return like(coefficients[:, 0], latents) * latents + like(coefficients[:, 1], latents) * output
