"""Motion-I2V's three networks (Shi et al. 2024, arXiv 2401.15977), of diffusers' modules: see `passes.py` for how they run.

* `FlowUNet`, stage 1: noisy latents of the fields from frame 0 to each other one beside the latents of the image, and a stride
  for each field.
* `Trajectories`: a copy of its encoder that reads sparse fields and their mask too; what it gives is added to the skips.
* `VideoUNet`, stage 2: frame 0 is the image, clean and at timestep 1, and temporal attention also sees it as the fields move it
  (`augmented.py`).

Latents are `[B, F, C, h, w]`; texts `[B g, L, D]`: g rows a request, one for each branch of guidance.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motionrt.export.systems.motion_i2v.augmented import FORMS, Warp, rendered
from motionrt.export.systems.motion_i2v.passes import Pass, decode, encode, middle, output, resnet
from motionrt.export.systems.motion_i2v.stencil import Stencil
from motionrt.export.systems.motionclone.unet import prepared

FIRST = 1.0  # the timestep of the clean frame


def unet_config(released: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' UNetMotionModel, of the release's config (or of those arguments themselves).

    ValueError for what that class cannot be told.
    """
    from diffusers import UNetMotionModel

    config: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in released.items()}
    motion = config.get("motion_module_kwargs", {})
    fixed = {
        "act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "use_inflated_groupnorm": True, "use_motion_module": True,
        "motion_module_mid_block": True, "motion_module_decoder_only": False, "motion_module_type": "Vanilla",
        "unet_use_cross_frame_attention": False, "unet_use_temporal_attention": False,
    }  # fmt: skip
    fixed_inside = {
        "num_transformer_block": 1, "temporal_position_encoding": True, "temporal_attention_dim_div": 1,
        "attention_block_types": ["Temporal_Self", "Temporal_Self"],
    }  # fmt: skip
    for wanted, found in ((fixed, config), (fixed_inside, motion)):
        for name, value in wanted.items():
            if found.get(name, value) != value:
                raise ValueError(f"{name} is {found[name]!r}; allowed: {value!r}")
    if (heads := config.get("attention_head_dim")) is not None:  # the number of heads, in the configs of Stable Diffusion
        config["num_attention_heads"] = heads
    if motion:
        config["motion_num_attention_heads"] = motion.get("num_attention_heads", 8)
        config["motion_max_seq_length"] = motion.get("temporal_position_encoding_max_len", 32)
    for name in ("down_block_types", "up_block_types"):
        if name in config:
            config[name] = tuple(kind.replace("3D", "Motion").replace("2D", "Motion") for kind in config[name])
    allowed = inspect.signature(UNetMotionModel.__init__).parameters
    return {name: config[name] for name in allowed if name in config} | {"use_motion_mid_block": True}


def _network(released: Mapping[str, Any]) -> Any:
    """diffusers' UNetMotionModel of a config; the groups of its motion modules' norms are `motion_norm_num_groups`."""
    from diffusers import UNetMotionModel
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    config = unet_config(released)
    network = prepared(UNetMotionModel(**config))
    groups = released.get("motion_norm_num_groups", config.get("norm_num_groups", 32))
    for module in network.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            module.norm.num_groups = groups
    return network


def _embedding(net: Any) -> nn.Module:
    """A second embedding of numbers like that of timesteps."""
    from diffusers.models.embeddings import TimestepEmbedding

    return TimestepEmbedding(net.time_embedding.linear_1.in_features, net.time_embedding.linear_1.out_features)


class _OfFields(nn.Module):
    """What stage 1 and its ControlNet have in common: what reads the noisy fields, the image, times and strides."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.unet = _network(config)
        self.stride_embedding = _embedding(self.unet)

    def embedded(self, timestep: Tensor, strides: Tensor) -> Tensor:
        """`timestep [B]`, `strides [B, F]` -> `[B, F, E]`."""
        net, dtype = self.unet, self.unet.conv_in.weight.dtype
        time = net.time_embedding(net.time_proj(timestep).to(dtype))
        frames = self.stride_embedding(net.time_proj(strides.flatten()).to(dtype)).unflatten(0, strides.shape)
        return time[:, None] + frames

    def resnets(self) -> list[Any]:
        """The residual blocks, in the order of `times`."""
        return [module for module in self.unet.modules() if hasattr(module, "time_emb_proj")]

    def times(self, timestep: Tensor, strides: Tensor) -> Tensor:
        """All that a pass reads of times and strides: what they add in every residual block, side by side, `[B, F, S]`."""
        active = F.silu(self.embedded(timestep, strides))
        return torch.cat([block.time_emb_proj(active) for block in self.resnets()], -1)

    def given(self, times: Tensor, text: Tensor) -> Pass:
        """What a pass reads."""
        blocks, frames = self.resnets(), times.shape[1]
        parts = times.split([block.time_emb_proj.out_features for block in blocks], -1)
        added = dict(zip(blocks, parts, strict=True))
        return Pass(added.__getitem__, lambda motion, hidden: motion(hidden, num_frames=frames), text)

    def skips(self, image: Tensor, latents: Tensor, given: Pass, hint: Tensor | None = None) -> list[Tensor]:
        """The skips of the encoder, `[B g F, C, h, w]` each. `hint [B, F, C, h, w]`: added behind the first convolution."""
        conv, rows = self.unet.conv_in, latents.shape[0]
        still = F.conv2d(image, conv.weight[:, : image.shape[1]], padding=1)  # the same in all frames and steps
        moving = F.conv2d(latents.flatten(0, 1), conv.weight[:, image.shape[1] :], conv.bias, padding=1)
        hidden = moving.unflatten(0, (rows, -1)) + still[:, None]
        hidden = (hidden if hint is None else hidden + hint).flatten(0, 1)
        block = self.unet.down_blocks[0]
        first = given.branched(given.resnet(block.resnets[0], hidden), rows)
        first = given.mixed(block.motion_modules[0], given.seen(block.attentions[0], first))
        return encode(self.unet, given, [given.branched(hidden, rows), first], 1)


class FlowUNet(_OfFields):
    """Stage 1. `config`: the release's, or arguments of diffusers' UNetMotionModel; 8 input channels: image, then fields."""

    def forward(
        self, image: Tensor, latents: Tensor, timestep: Tensor, strides: Tensor, text: Tensor, residuals: Sequence[Tensor] = ()
    ) -> Tensor:
        """`image [B, 4, h, w]`, `latents [B, F, 4, h, w]`, `timestep [B]`, `strides [B, F]`, `text [B g, L, D]`, residuals as
        of `Trajectories` -> the prediction `[B g, F, 4, h, w]`."""
        return self.predicted(image, latents, self.times(timestep, strides), text, residuals)

    def predicted(
        self, image: Tensor, latents: Tensor, times: Tensor, text: Tensor, residuals: Sequence[Tensor] = ()
    ) -> Tensor:
        """The same, of `times`."""
        given = self.given(times, text)
        skips = self.skips(image, latents, given)
        hidden = middle(self.unet, given, skips[-1])
        if residuals:
            skips = [skip + extra for skip, extra in zip(skips, residuals[:-1], strict=True)]
            hidden = hidden + residuals[-1]
        found = output(self.unet, decode(self.unet, given, hidden, skips))
        return found.unflatten(0, (-1, latents.shape[1]))


class Hint(nn.Module):
    """Sparse fields and mask to what is added behind the first convolution, each frame on its own."""

    def __init__(self, channels: int, inner: int, width: int) -> None:
        super().__init__()
        convolution = lambda n, m: nn.Conv3d(n, m, (1, 3, 3), padding=(0, 1, 1))  # noqa: E731
        self.layers = nn.Sequential(convolution(channels, inner), nn.SiLU(), convolution(inner, width))
        for value in self.layers[2].parameters():
            nn.init.zeros_(value)

    def forward(self, hint: Tensor) -> Tensor:
        """`[B, F, c, h, w]` -> `[B, F, C, h, w]`."""
        found: Tensor = self.layers(hint.transpose(1, 2))
        return found.transpose(1, 2)


class Trajectories(_OfFields):
    """The ControlNet of drags: what is added to the skips of `FlowUNet`, and to its middle. New ones add nothing.

    `config`: the release's; `conditioning_channels` 5: latents of the sparse field, not scaled, and the mask.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        for name in ("up_blocks", "conv_norm_out", "conv_out"):
            delattr(self.unet, name)
        widths = self.unet.config["block_out_channels"]
        self.controlnet_cond_embedding = Hint(
            config.get("conditioning_channels", 5), config.get("conditioning_hidden_channels", 512), widths[0]
        )
        skips = [widths[0]]
        for block, width in zip(self.unet.down_blocks, widths, strict=True):
            skips += [width] * (len(block.resnets) + len(block.downsamplers or ()))
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(width, width, 1) for width in skips])
        self.controlnet_mid_block = nn.Conv2d(widths[-1], widths[-1], 1)
        for module in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            for value in module.parameters():
                nn.init.zeros_(value)

    def forward(
        self, image: Tensor, latents: Tensor, timestep: Tensor, strides: Tensor, text: Tensor, hint: Tensor, scale: float = 1.0
    ) -> list[Tensor]:
        """As of `FlowUNet`, `hint [B, F, 5, h, w]` -> one tensor for every skip and the middle's, `[B g F, C, h, w]`."""
        return [scale * value for value in self.residuals(image, latents, self.times(timestep, strides), text, hint)]

    def residuals(self, image: Tensor, latents: Tensor, times: Tensor, text: Tensor, hint: Tensor) -> list[Tensor]:
        """The same, of `times`."""
        given = self.given(times, text)
        skips = self.skips(image, latents, given, self.controlnet_cond_embedding(hint))
        hidden = middle(self.unet, given, skips[-1])
        heads = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        return [head(value) for head, value in zip(heads, (*skips, hidden), strict=True)]


class VideoUNet(nn.Module):
    """Stage 2. `form`: "own", in which each branch of guidance is given its own frame 0 moved, or "released": there the even
    frames are given that of the other branch."""

    def __init__(self, config: Mapping[str, Any], form: str = "own") -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; allowed: {', '.join(FORMS)}.")
        self.unet, self.form = _network(config), form

    def embedded(self, timestep: Tensor) -> Tensor:
        """`timestep [B]` -> `[B, E]`."""
        net = self.unet
        return net.time_embedding(net.time_proj(timestep).to(net.conv_in.weight.dtype))

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """The sizes of the levels, for latents of this size."""
        return [(height >> level, width >> level) for level in range(len(self.unet.down_blocks))]

    def hidden(
        self, reference: Tensor, latents: Tensor, timestep: Tensor, text: Tensor, fields: Sequence[Stencil], fused: bool = False
    ) -> Tensor:
        """Arguments as of `forward` -> what the decoder gives, `[B g, F, C, h, w]`, with frame 0."""
        net, rows, frames = self.unet, latents.shape[0], latents.shape[1] + 1
        first = F.silu(self.embedded(torch.full((1,), FIRST, device=latents.device)))
        others = F.silu(self.embedded(timestep))
        added = lambda block: (block.time_emb_proj(first), block.time_emb_proj(others))  # noqa: E731

        clean = torch.arange(frames, device=latents.device)[:, None] == 0

        def spread(block: Any) -> Tensor:
            one, rest = added(block)
            return torch.where(clean, one[:, None], rest[:, None])  # a table of many timesteps too, which a `cat` is not

        tables = {table.beyond.shape[0] // (frames - 1) // rows: table for table in fields}
        warp = Warp(tables, frames, rows, self.form, fused)
        given = Pass(spread, lambda motion, hidden: rendered(motion, hidden, warp), text)
        # Frame 0 alone, up to where it meets the others: it is the same in all steps.
        block = net.down_blocks[0]
        parts, begun = (net.conv_in(reference), net.conv_in(latents.flatten(0, 1))), []
        for part, time in zip(parts, added(block.resnets[0]), strict=True):
            hidden = resnet(block.resnets[0], part, time[:, None])
            begun.append(given.seen(block.attentions[0], given.branched(hidden, rows)))
        skip = given.branched(_joined(*parts), rows)
        mixed = rendered(block.motion_modules[0], _joined(*begun), warp, begun[0])
        skips = encode(net, given, [skip, mixed], 1)
        found = decode(net, given, middle(net, given, skips[-1]), skips)
        return found.unflatten(0, (-1, frames))

    def forward(
        self, reference: Tensor, latents: Tensor, timestep: Tensor, text: Tensor, fields: Sequence[Stencil], fused: bool = False
    ) -> Tensor:
        """`reference [B, 4, h, w]` (clean), `latents [B, F - 1, 4, h, w]`, `timestep [B]`, `text [B g, L, D]`, `fields` as
        `fields_of` gives them -> the prediction for the frames behind frame 0, `[B g, F - 1, 4, h, w]`. `fused`: the
        augmented attention is the op of kernels/motion_augmented_attention.py, which has no gradient, where it fits."""
        hidden = self.hidden(reference, latents, timestep, text, fields, fused)[:, 1:]
        return output(self.unet, hidden.flatten(0, 1)).unflatten(0, (-1, latents.shape[1]))


def _joined(first: Tensor, others: Tensor) -> Tensor:
    """Frame 0 `[n, C, h, w]` and the others `[n (F - 1), C, h, w]` -> `[n F, C, h, w]`."""
    return torch.cat([first[:, None], others.unflatten(0, (first.shape[0], -1))], 1).flatten(0, 1)
